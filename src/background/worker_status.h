/*-------------------------------------------------------------------------
 *
 * worker_status.h
 *	  What became of the sweeps of each database.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_WORKER_STATUS_H
#define IDEMPOTENCY_WORKER_STATUS_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "nodes/pg_list.h"
#include "storage/block.h"

/* How far the watch over a database has got; all zero before the first look */
typedef struct Watch
{
	TimestampTz since;			/* what ran out before was reported */
	TimestampTz until;			/* what runs out later is left to the next
								 * look; 0 when none is under way */
	Oid			part;			/* where to go on: in this table, */
	BlockNumber next;			/* at this block */
	int64		spent;			/* on this look, in microseconds */
	TimestampTz due;			/* no other look before */
} Watch;

extern void WorkerStatusInit(void);
extern void WorkerStatusSwept(int64 swept, int64 duration, bool behind);
extern void WorkerStatusFailed(const char *message);
extern void WorkerStatusSetWatch(const Watch *watch);
extern bool WorkerStatusGetWatch(Watch *watch);
extern List *WorkerStatusDatabases(void);
extern bool WorkerStatusKnown(void);
extern void WorkerStatusForget(Oid database);

#endif							/* IDEMPOTENCY_WORKER_STATUS_H */
