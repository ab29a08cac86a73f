/*-------------------------------------------------------------------------
 *
 * created.h
 *	  Noticing that the extension is created.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_CREATED_H
#define IDEMPOTENCY_CREATED_H

#include "postgres.h"

extern void CreatedInit(void);

#endif							/* IDEMPOTENCY_CREATED_H */
