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

#include "nodes/pg_list.h"
#include "sweep.h"
#include "watch.h"

extern void WorkerStatusInit(void);
extern void WorkerStatusSwept(const Sweep *sweep, bool behind);
extern void WorkerStatusFailed(const char *message);
extern void WorkerStatusSetWatch(const Watch *watch);
extern bool WorkerStatusGetWatch(Watch *watch);
extern List *WorkerStatusDatabases(void);
extern bool WorkerStatusKnown(void);
extern void WorkerStatusForget(Oid database);

#endif							/* IDEMPOTENCY_WORKER_STATUS_H */
