/*-------------------------------------------------------------------------
 *
 * lock.h
 *	  The lock of a scope.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_LOCK_H
#define IDEMPOTENCY_LOCK_H

#include "postgres.h"

#include "storage/lock.h"

extern bool ClaimTryLock(const LOCKTAG *locktag);
extern bool ClaimWaitLock(const LOCKTAG *locktag, int wait_ms);
extern void ClaimUnlock(const LOCKTAG *locktag);

#endif							/* IDEMPOTENCY_LOCK_H */
