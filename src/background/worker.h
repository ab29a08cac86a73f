/*-------------------------------------------------------------------------
 *
 * worker.h
 *	  The background worker that sees to one database.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_WORKER_H
#define IDEMPOTENCY_WORKER_H

#include "postgres.h"

/* What a worker is to do, in the extra data that it is registered with */
#define WORKER_SWEEP		0x01
#define WORKER_MEASURE		0x02	/* flush metrics, and watch leases */

/* A worker gives way to the next database after this long */
#define WORKER_MAX_SECS		10

extern void WorkerSetSettings(void);
extern bool WorkerMayUse(Oid database);
extern PGDLLEXPORT void idempotency_worker_main(Datum arg);

#endif							/* IDEMPOTENCY_WORKER_H */
