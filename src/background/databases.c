/*-------------------------------------------------------------------------
 *
 * databases.c
 *	  What the launcher remembers of the databases, and which of them is due.
 *
 * A database that has no extension, or where a sweep failed, is left alone for
 * longer than others; see get_delay().
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "access/heapam.h"
#include "access/htup_details.h"
#include "access/xact.h"
#include "background/databases.h"
#include "background/worker_status.h"
#include "catalog/pg_database.h"
#include "nodes/pg_list.h"
#include "observe/metrics.h"
#include "settings.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#define NO_EXTENSION_MS		(60 * 60 * 1000)
#define MAX_BACKOFF_MS		(60 * 60 * 1000)
#define SOON_MS				1000

static void note_database(Oid oid);
static void forget_dropped(List *dropped);
static long get_rest(const Database *database);
static long get_rest_of_measuring(const Database *database);
static long get_rest_after(TimestampTz last, int64 delay);
static int64 get_delay(const Database *database);

/* all databases, in TopMemoryContext */
static List *databases = NIL;

/*
 * Bring what we remember up to date with pg_database, and what others keep by
 * database in shared memory.
 *
 * Databases that nobody can connect to, and templates, are left alone.
 */
void
DatabasesRead(void)
{
	ListCell   *lc;
	Relation	rel;
	TableScanDesc scan;
	HeapTuple	tuple;
	List	   *kept;
	List	   *existing = NIL;

	foreach(lc, databases)
		((Database *) lfirst(lc))->exists = false;

	StartTransactionCommand();
	(void) GetTransactionSnapshot();

	/* before we look which databases exist: meanwhile, one may be created */
	kept = list_concat_unique_oid(WorkerStatusDatabases(), MetricsDatabases());

	rel = table_open(DatabaseRelationId, AccessShareLock);
	scan = table_beginscan_catalog(rel, 0, NULL);
	while ((tuple = heap_getnext(scan, ForwardScanDirection)) != NULL)
	{
		Form_pg_database form = (Form_pg_database) GETSTRUCT(tuple);

		existing = lappend_oid(existing, form->oid);
		if (form->datallowconn && !form->datistemplate &&
			form->datconnlimit != DATCONNLIMIT_INVALID_DB)
			note_database(form->oid);
	}
	table_endscan(scan);
	table_close(rel, AccessShareLock);

	forget_dropped(list_difference_oid(kept, existing));
	CommitTransactionCommand();
}

/*
 * If our extension was created somewhere, look again where there was none, or
 * one that could not be swept.
 */
void
DatabasesLookAgain(void)
{
	static uint32 known = 0;
	uint32		created = pg_atomic_read_u32(&worker_shared->created);
	ListCell   *lc;

	if (created == known)
		return;
	known = created;

	foreach(lc, databases)
	{
		Database   *database = lfirst(lc);

		if (database->result == WORKER_NO_EXTENSION ||
			database->result == WORKER_FAILED)
			database->last = 0;
	}
}

/*
 * The database that is due and has waited longest, or null; *rest, in
 * milliseconds, is set to the time until one will be, if that is sooner.
 */
Database *
DatabasesFindDue(long *rest)
{
	Database   *result = NULL;
	ListCell   *lc;

	foreach(lc, databases)
	{
		Database   *database = lfirst(lc);
		long		own_rest = Min(get_rest(database),
								   get_rest_of_measuring(database));

		if (own_rest > 0)
			*rest = Min(*rest, own_rest);
		else if (result == NULL || database->last < result->last)
			result = database;
	}

	return result;
}

/*
 * Whether it is time to sweep a database.
 */
bool
DatabaseNeedsSweep(const Database *database)
{
	return get_rest(database) <= 0;
}

/*
 * Whether it is time to flush its metrics.
 */
bool
DatabaseNeedsMeasuring(const Database *database)
{
	return get_rest_after(database->measured,
						  (int64) idempotency_metrics_interval * 1000) <= 0;
}

/*
 * Note that a database exists.
 */
static void
note_database(Oid oid)
{
	MemoryContext oldcontext;
	Database   *database;
	ListCell   *lc;

	foreach(lc, databases)
	{
		database = lfirst(lc);
		if (database->oid == oid)
		{
			database->exists = true;
			return;
		}
	}

	oldcontext = MemoryContextSwitchTo(TopMemoryContext);
	database = palloc0_object(Database);
	database->oid = oid;
	database->exists = true;
	databases = lappend(databases, database);
	MemoryContextSwitchTo(oldcontext);
}

/*
 * Forget the databases that were not noted, and have others forget theirs.
 */
static void
forget_dropped(List *dropped)
{
	ListCell   *lc;

	foreach(lc, dropped)
	{
		WorkerStatusForget(lfirst_oid(lc));
		MetricsForget(lfirst_oid(lc));
	}

	foreach(lc, databases)
	{
		Database   *database = lfirst(lc);

		if (!database->exists)
		{
			databases = foreach_delete_current(databases, lc);
			pfree(database);
		}
	}
}

/*
 * Milliseconds until a database gets its next sweep.
 */
static long
get_rest(const Database *database)
{
	return get_rest_after(database->last, get_delay(database));
}

/*
 * Milliseconds until the metrics of a database are flushed again.  Where that
 * may not be possible, it waits for the next sweep.
 */
static long
get_rest_of_measuring(const Database *database)
{
	if (database->busy || database->result == WORKER_FAILED ||
		database->result == WORKER_NO_EXTENSION)
		return get_rest(database);
	return get_rest_after(database->measured, (int64) idempotency_metrics_interval * 1000);
}

/*
 * Milliseconds that are left of a delay after what came last.
 *
 * This is worked out anew each time, so that a changed interval has its effect
 * at once.  If the clock was set back, nobody waits for it to catch up.
 */
static long
get_rest_after(TimestampTz last, int64 delay)
{
	TimestampTz now = GetCurrentTimestamp();

	if (last > now)
		return 0;
	return TimestampDifferenceMilliseconds(now, last + delay * 1000);
}

/*
 * How long to leave a database alone, in milliseconds.
 */
static int64
get_delay(const Database *database)
{
	int64		interval = idempotency_sweep_interval;

	if (database->busy)
		return SOON_MS;

	switch (database->result)
	{
		case WORKER_DONE:
			return interval;
		case WORKER_INTERRUPTED:
			return Min(interval, SOON_MS);
		case WORKER_NO_EXTENSION:
			return NO_EXTENSION_MS;
		case WORKER_FAILED:
			return Min(interval << Min(database->failures, 20),
					   Max(interval, MAX_BACKOFF_MS));
	}
	return interval;			/* keep the compiler quiet */
}
