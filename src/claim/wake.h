/*-------------------------------------------------------------------------
 *
 * wake.h
 *	  Waiting for a lease to end, and waking those who do.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_WAKE_H
#define IDEMPOTENCY_WAKE_H

#include "postgres.h"

#include "request/scope.h"

extern void WakeInit(void);
extern void WakeAtEnd(const Scope *scope);
extern void WakePrepare(const Scope *scope);
extern void WakeSleep(const Scope *scope, int timeout_ms);
extern void WakeDone(void);

#endif							/* IDEMPOTENCY_WAKE_H */
