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

/* What became of a sweep or, where none was due, of the rest */
typedef enum WorkerResult
{
	WORKER_FAILED,				/* an error, which is in the log */
	WORKER_NO_EXTENSION,
	WORKER_INTERRUPTED,			/* somebody needs what it uses, or time is up */
	WORKER_DONE
} WorkerResult;

/* What a worker is to do, in the extra data that it is registered with */
#define WORKER_SWEEP		0x01
#define WORKER_MEASURE		0x02	/* flush metrics, and watch leases */

/* What the launcher shares with others */
typedef struct WorkerState
{
	Latch	   *launcher;		/* to wake it; null while it does not run */
	pg_atomic_uint32 created;	/* extensions that came since the server started */
	bool		out_of_slots;	/* the last worker could not be started */
	pg_atomic_uint64 report;	/* of the worker under way, see WorkerReport() */
} WorkerState;

/*
 * The report of a worker: for which database it was started, and its result.
 * Before it has one that is WORKER_FAILED; while there is none, all is zero.
 */
#define WorkerReport(database, result) \
	((uint64) (database) << 32 | (uint64) (result))
#define WorkerReportDatabase(report)	((Oid) ((report) >> 32))
#define WorkerReportResult(report)		((WorkerResult) (uint32) (report))

/* A worker gives way to the next database after this long */
#define WORKER_MAX_SECS		10

/* launcher.c */
extern WorkerState *worker_shared;

extern void LauncherInit(void);
extern PGDLLEXPORT void idempotency_launcher_main(Datum arg);

/* worker.c */
extern void WorkerSetSettings(void);
extern bool WorkerMayUse(Oid database);
extern PGDLLEXPORT void idempotency_worker_main(Datum arg);

#endif							/* IDEMPOTENCY_WORKER_H */
