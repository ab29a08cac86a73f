/*-------------------------------------------------------------------------
 *
 * watch.c
 *	  Watching leases: which are in flight, and which have run out.
 *
 * No process is there to tell when a lease runs out.  So a background worker
 * looks for those that have, to have them counted and logged, and counts all
 * leases by their action on this occasion.
 *
 * It has to read the whole table for that, because an index that finds leases
 * would forbid checkpoint and finish to update them in place.  So it looks only
 * so often that this takes a hundredth of the time, and reads a part of the
 * table in each transaction, so that it is in nobody's way for long.  How far
 * it got is kept in shared memory, for the next worker to go on.
 *
 * What ran out is reported once, because a look is at what ran out since the
 * one before.  After a crash it may be reported again.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "background/watch.h"
#include "catalog/pg_type_d.h"
#include "executor/spi.h"
#include "observe/event.h"
#include "observe/metrics.h"
#include "request/scope.h"
#include "storage/bufmgr.h"
#include "storage/itemptr.h"
#include "store/store.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/timestamp.h"

#define BATCH_BLOCKS	1024
#define PART_OF_TIME	100		/* a look takes one part in so many */

/* Columns of the query, after those of the scope */
enum
{
	WATCH_ATTEMPT = SCOPE_PARTS,
	WATCH_CREATED_AT,
	WATCH_LEASE_EXPIRES_AT,
	WATCH_COLUMNS
};

static bool watch_part(Watch *watch);
static void watch_blocks(const Watch *watch, Relation rel, BlockNumber end);
static void watch_row(const Watch *watch, HeapTuple row, TupleDesc desc);

/*
 * Start to look, or get ready to go on.  Returns false if it is too early to
 * look again.
 */
bool
WatchStart(Watch *watch)
{
	TimestampTz now = GetCurrentTimestamp();

	if (watch->until != 0)
		return true;
	/* if the clock was set back, do not wait for it to catch up */
	if (now >= watch->since && now < watch->due)
		return false;

	watch->until = now;
	watch->part = InvalidOid;
	watch->next = 0;
	watch->spent = 0;
	MetricsForgetLeases();
	return true;
}

/*
 * Look at the next part of the table of records.  Returns whether there is
 * more.
 *
 * Errors: those of StoreOpen.
 */
bool
WatchBatch(Watch *watch)
{
	TimestampTz start = GetCurrentTimestamp();
	Oid			part = StoreNextPart(watch->part);

	if (part != watch->part)
		watch->next = 0;
	watch->part = part;
	if (OidIsValid(part) && !watch_part(watch))
	{
		watch->part = part + 1;
		watch->next = 0;
	}

	watch->spent += Max(GetCurrentTimestamp() - start, 0);
	if (OidIsValid(StoreNextPart(watch->part)))
		return true;

	MetricsPublishLeases(watch->until);
	watch->since = watch->until;
	watch->until = 0;
	watch->due = watch->since + watch->spent * PART_OF_TIME;
	return false;
}

/*
 * Look at the next blocks of one of the tables that have records.  Returns
 * whether it has more.
 */
static bool
watch_part(Watch *watch)
{
	Store		store;
	BlockNumber blocks;

	/* which sees to it that the columns are what we take them for */
	if (!StoreOpenPart(&store, watch->part, AccessShareLock))
		return false;

	blocks = RelationGetNumberOfBlocks(store.rel);
	if (watch->next < blocks)
	{
		BlockNumber end = watch->next + Min(BATCH_BLOCKS, blocks - watch->next);

		watch_blocks(watch, store.rel, end);
		watch->next = end;
	}
	StoreClose(&store);

	return watch->next < blocks;
}

/*
 * Look at the leases in the blocks from the next one up to an end.
 */
static void
watch_blocks(const Watch *watch, Relation rel, BlockNumber end)
{
	Oid			types[] = {TIDOID, TIDOID};
	ItemPointerData tids[2];
	Datum		values[] = {PointerGetDatum(&tids[0]), PointerGetDatum(&tids[1])};
	char	   *query;

	ItemPointerSet(&tids[0], watch->next, 0);
	ItemPointerSet(&tids[1], end, 0);
	query = psprintf("SELECT tenant, action, key, actor, attempt, created_at, lease_expires_at"
					 " FROM ONLY %s WHERE ctid >= $1 AND ctid < $2 AND state = 'pending'"
					 " AND lease_expires_at IS NOT NULL AND expires_at > clock_timestamp()",
					 quote_qualified_identifier(get_namespace_name(RelationGetNamespace(rel)),
												RelationGetRelationName(rel)));

	SPI_connect();
	if (SPI_execute_with_args(query, 2, types, values, NULL, true, 0) != SPI_OK_SELECT)
		elog(ERROR, "could not read leases");
	for (uint64 i = 0; i < SPI_processed; i++)
		watch_row(watch, SPI_tuptable->vals[i], SPI_tuptable->tupdesc);
	SPI_finish();
}

/*
 * Count a lease, and report it if it has run out since the last look.
 *
 * The metrics know of the last look before the server was restarted, too.
 */
static void
watch_row(const Watch *watch, HeapTuple row, TupleDesc desc)
{
	Datum		values[WATCH_COLUMNS];
	bool		nulls[WATCH_COLUMNS];
	TimestampTz lease_expires_at;
	TimestampTz since = watch->since;
	ActionMetrics *metrics = NULL;
	Scope		scope;

	heap_deform_tuple(row, desc, values, nulls);
	if (!ScopeFromParts(&scope, values))
		return;

	lease_expires_at = DatumGetTimestampTz(values[WATCH_LEASE_EXPIRES_AT]);
	if (MetricsEnabled())
		metrics = MetricsFind(ScopeNameAction(&scope.name));
	if (metrics != NULL)
	{
		since = Max(since, metrics->reported);
		MetricsCountLease(metrics, lease_expires_at <= watch->until);
	}

	if (lease_expires_at > since && lease_expires_at <= watch->until)
	{
		Event		event = {
			.class = EVENT_STALLED,
			.name = &scope.name,
			.attempt = DatumGetInt32(values[WATCH_ATTEMPT]),
			.since = DatumGetTimestampTz(values[WATCH_CREATED_AT]),
		};

		EventHappened(&event);
	}
}
