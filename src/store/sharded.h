/*-------------------------------------------------------------------------
 *
 * sharded.h
 *	  Locking and writing records that are distributed over a cluster.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_SHARDED_H
#define IDEMPOTENCY_SHARDED_H

#include "postgres.h"

#include "store/record.h"

extern const StoreMethods ShardedMethods;

pg_noreturn extern void ShardedRaiseMoved(void);

#endif							/* IDEMPOTENCY_SHARDED_H */
