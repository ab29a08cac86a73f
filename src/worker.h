/*-------------------------------------------------------------------------
 *
 * worker.h
 *	  Sweeping by background workers.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_WORKER_H
#define IDEMPOTENCY_WORKER_H

#include "postgres.h"

#include "port/atomics.h"
#include "storage/latch.h"

/* How a worker ended */
typedef enum WorkerResult
{
	WORKER_FAILED,				/* by an error, which is in the log */
	WORKER_NO_EXTENSION,
	WORKER_INTERRUPTED,			/* somebody needs the database, or time is up */
	WORKER_DONE
} WorkerResult;

/* What the launcher shares with others */
typedef struct WorkerState
{
	Latch	   *launcher;		/* to wake it; null while it does not run */
	pg_atomic_uint32 created;	/* extensions created since the server started */
	pg_atomic_uint32 result;	/* of the worker that ran last, a WorkerResult */
} WorkerState;

/* launcher.c */
extern WorkerState *worker_shared;

extern void LauncherInit(void);
extern PGDLLEXPORT void idempotency_launcher_main(Datum arg);

/* worker.c */
extern bool WorkerMayUse(Oid database);
extern PGDLLEXPORT void idempotency_worker_main(Datum arg);

#endif							/* IDEMPOTENCY_WORKER_H */
