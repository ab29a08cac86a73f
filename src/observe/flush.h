/*-------------------------------------------------------------------------
 *
 * flush.h
 *	  Keeping metrics when the server does not.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_FLUSH_H
#define IDEMPOTENCY_FLUSH_H

#include "postgres.h"

extern void FlushInit(void);
extern void FlushMetrics(void);

#endif							/* IDEMPOTENCY_FLUSH_H */
