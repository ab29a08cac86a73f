/*-------------------------------------------------------------------------
 *
 * databases.h
 *	  What the launcher remembers of the databases.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_DATABASES_H
#define IDEMPOTENCY_DATABASES_H

#include "postgres.h"

#include "background/worker_shared.h"
#include "datatype/timestamp.h"

/* What the launcher remembers of a database */
typedef struct Database
{
	Oid			oid;
	bool		exists;			/* still in pg_database */
	bool		busy;			/* somebody had it locked when its time came */
	WorkerResult result;		/* of the last sweep */
	int			failures;		/* of sweeps, since one succeeded */
	TimestampTz last;			/* when we were through with it, 0 for never */
	TimestampTz measured;		/* when its metrics were last flushed */
} Database;

extern void DatabasesRead(void);
extern void DatabasesLookAgain(void);
extern Database *DatabasesFindDue(long *rest);
extern bool DatabaseNeedsSweep(const Database *database);
extern bool DatabaseNeedsMeasuring(const Database *database);

#endif							/* IDEMPOTENCY_DATABASES_H */
