/*-------------------------------------------------------------------------
 *
 * guard.h
 *	  Coming first when a transaction is about to commit.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_GUARD_H
#define IDEMPOTENCY_GUARD_H

#include "postgres.h"

/* Raises an error if the transaction must not commit */
typedef void (*GuardCheck) (void);

extern void GuardInit(GuardCheck check);
extern void GuardAlso(GuardCheck check);
extern void GuardCount(int change);

#endif							/* IDEMPOTENCY_GUARD_H */
