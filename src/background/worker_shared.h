/*-------------------------------------------------------------------------
 *
 * worker_shared.h
 *	  What the launcher shares with its workers and with sessions.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_WORKER_SHARED_H
#define IDEMPOTENCY_WORKER_SHARED_H

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

extern WorkerState *worker_shared;

extern void WorkerSharedInit(void);
extern void WorkerSharedTellLauncher(void);

#endif							/* IDEMPOTENCY_WORKER_SHARED_H */
