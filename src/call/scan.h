/*-------------------------------------------------------------------------
 *
 * scan.h
 *	  The plan of a call in FROM.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_SCAN_H
#define IDEMPOTENCY_SCAN_H

extern void ScanInit(void);

#endif							/* IDEMPOTENCY_SCAN_H */
