/*-------------------------------------------------------------------------
 *
 * metrics.c
 *	  What became of requests, counted in shared memory.
 *
 * Each action of each database that was seen since the server started has an
 * entry in a hash table: a counter for each class of events, and sums and
 * histograms of times.  The table has a fixed size.  Actions that find no room
 * are counted together, in an entry of their database with an empty name, for
 * which some room is set aside.
 *
 * Counting takes no lock.  The values are atomic, an entry is never moved, and
 * it is removed only when its database is dropped, when nobody can be connected
 * to that.  So a backend looks an action up once, under the lock of the table,
 * and remembers the entry by the hash of the name.
 *
 * The values only grow.  What of them has been written to the table of metrics
 * is kept beside them (see flush.c).  Both outlive a restart (metrics_file.c).
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include <math.h>

#include "common/hashfn.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "observe/metrics.h"
#include "observe/metrics_file.h"
#include "settings.h"
#include "shared_memory.h"
#include "storage/lwlock.h"
#include "storage/shmem.h"
#include "utils/builtins.h"
#include "utils/hsearch.h"
#include "utils/timestamp.h"
#include "utils/tuplestore.h"

#define TRANCHE_NAME		"idempotency metrics"

/* Entries that are set aside for the other actions of a database */
#define OVERFLOW_ENTRIES	64

/* Entries that a backend remembers; a power of two */
#define RECENT_ENTRIES		64

/* Columns of idempotency_stats() */
enum
{
	STATS_ACTION,
	STATS_EVENTS,				/* a column for each class */
	STATS_HELD = STATS_EVENTS + EVENT_CLASSES,
	STATS_LEASES,
	STATS_STALLED_LEASES,
	STATS_RUN_TIME,				/* sum, p50, p95, p99, histogram */
	STATS_LOOKUP_TIME = STATS_RUN_TIME + 5,
	STATS_SINCE = STATS_LOOKUP_TIME + 5,
	STATS_COLUMNS
};

typedef struct MetricsState
{
	TimestampTz since;			/* when counting began */
	int			named;			/* entries that are not for other actions */
	pg_atomic_uint64 lost;		/* events that there was no entry for */
} MetricsState;

static Size get_size(void);
static void start_up(void);
static SavedMetrics *get_saved(int *count, TimestampTz *since);
static void put_saved(SavedMetrics *saved, int count, TimestampTz since);
static void put_saved_entry(SavedMetrics *saved);
static ActionMetrics *find_entry(const unsigned char *action);
static ActionMetrics *enter(const MetricsKey *key);
static void init_entry(ActionMetrics *metrics);
static void put_row(ReturnSetInfo *rsinfo, ActionMetrics *metrics);
static void put_times(Datum *values, bool *nulls, uint64 sum,
					  const uint64 *histogram);

PG_FUNCTION_INFO_V1(idempotency_stats);
PG_FUNCTION_INFO_V1(idempotency_metrics_room);

/* pointers to shared memory, null unless the library is preloaded */
static MetricsState *state = NULL;
static HTAB *entries = NULL;
static LWLock *lock = NULL;

/* entries that this backend has looked up, at the hash of their action */
static struct
{
	uint64		hash;
	ActionMetrics *metrics;
}			recent[RECENT_ENTRIES];

/* the last of them, which most questions are about */
static struct
{
	ActionMetrics *metrics;
	unsigned char action[SCOPE_PART_MAX + 1];
}			latest;

/*
 * Ask for shared memory.
 */
void
MetricsInit(void)
{
	static const SharedMemoryUser user = {
		.get_size = get_size,
		.tranche = TRANCHE_NAME,
		.locks = 1,
		.start_up = start_up
	};

	SharedMemoryRegister(&user);
}

/*
 * Whether anything is counted.
 */
bool
MetricsEnabled(void)
{
	return entries != NULL;
}

/*
 * The metrics of an action of this database; null if there is no room, not
 * even for the other actions.
 *
 * action is a name behind a byte with its length.
 */
ActionMetrics *
MetricsFind(const unsigned char *action)
{
	uint64		hash;
	int			slot;

	if (latest.metrics != NULL &&
		memcmp(latest.action, action, 1 + action[0]) == 0)
		return latest.metrics;

	hash = hash_bytes_extended(action, 1 + action[0], 0);
	slot = hash % RECENT_ENTRIES;

	/* that another name has the same 64 bits need not worry us */
	if (recent[slot].metrics == NULL || recent[slot].hash != hash)
	{
		recent[slot].metrics = find_entry(action);
		recent[slot].hash = hash;
	}
	latest.metrics = recent[slot].metrics;
	memcpy(latest.action, action, 1 + action[0]);
	return latest.metrics;
}

/*
 * Count events.
 */
void
MetricsCount(ActionMetrics *metrics, EventClass class, uint64 count)
{
	if (metrics != NULL)
		pg_atomic_fetch_add_u64(&metrics->values[class], count);
	else
		pg_atomic_fetch_add_u64(&state->lost, count);
}

/*
 * Count a time, in its sum and in its histogram.
 */
void
MetricsTime(ActionMetrics *metrics, int sum, int histogram, int64 usecs)
{
	if (metrics == NULL)
		return;
	pg_atomic_fetch_add_u64(&metrics->values[sum], Max(usecs, 0));
	pg_atomic_fetch_add_u64(&metrics->values[histogram + HistogramBucket(usecs)], 1);
}

/*
 * Count a claim that a transaction has got (1) or has no more (-1).
 */
void
MetricsHold(ActionMetrics *metrics, int change)
{
	if (metrics != NULL)
		pg_atomic_fetch_add_u32(&metrics->held, change);
}

/*
 * Whether a transaction may hold a claim now; one that is prepared does not
 * count.
 */
bool
MetricsMayBeHeld(ActionMetrics *metrics)
{
	return metrics == NULL || pg_atomic_read_u32(&metrics->held) > 0;
}

/*
 * Start to count the leases of all actions.
 */
void
MetricsForgetLeases(void)
{
	ListCell   *lc;

	foreach(lc, MetricsList())
		memset(&((ActionMetrics *) lfirst(lc))->leases_so_far, 0,
			   sizeof(LeaseCounts));
}

/*
 * Count a lease.
 */
void
MetricsCountLease(ActionMetrics *metrics, bool stalled)
{
	if (stalled)
		metrics->leases_so_far.stalled++;
	else
		metrics->leases_so_far.in_flight++;
}

/*
 * All leases have been counted, and those reported that had run out until then.
 */
void
MetricsPublishLeases(TimestampTz until)
{
	ListCell   *lc;

	foreach(lc, MetricsList())
	{
		ActionMetrics *metrics = lfirst(lc);

		metrics->leases = metrics->leases_so_far;
		metrics->leases.valid = true;
		metrics->reported = until;
	}
}

/*
 * All entries of this database.
 */
List *
MetricsList(void)
{
	List	   *result = NIL;
	HASH_SEQ_STATUS seq;
	ActionMetrics *metrics;

	if (entries == NULL)
		return NIL;

	LWLockAcquire(lock, LW_SHARED);
	hash_seq_init(&seq, entries);
	while ((metrics = hash_seq_search(&seq)) != NULL)
	{
		if (metrics->key.database == MyDatabaseId)
			result = lappend(result, metrics);
	}
	LWLockRelease(lock);

	return result;
}

/*
 * Read the values of an action, METRIC_VALUES of them.
 */
void
MetricsRead(ActionMetrics *metrics, uint64 *values)
{
	for (int i = 0; i < METRIC_VALUES; i++)
		values[i] = pg_atomic_read_u64(&metrics->values[i]);
}

/*
 * The databases that have entries, as a list of OIDs.
 */
List *
MetricsDatabases(void)
{
	List	   *result = NIL;
	HASH_SEQ_STATUS seq;
	ActionMetrics *metrics;

	if (entries == NULL)
		return NIL;

	LWLockAcquire(lock, LW_SHARED);
	hash_seq_init(&seq, entries);
	while ((metrics = hash_seq_search(&seq)) != NULL)
		result = list_append_unique_oid(result, metrics->key.database);
	LWLockRelease(lock);

	return result;
}

/*
 * Remove the entries of a database that does not exist any more.
 */
void
MetricsForget(Oid database)
{
	HASH_SEQ_STATUS seq;
	ActionMetrics *metrics;

	if (entries == NULL)
		return;

	LWLockAcquire(lock, LW_EXCLUSIVE);
	hash_seq_init(&seq, entries);
	while ((metrics = hash_seq_search(&seq)) != NULL)
	{
		if (metrics->key.database != database)
			continue;
		if (metrics->key.action[0] != 0)
			state->named--;
		hash_search(entries, &metrics->key, HASH_REMOVE, NULL);
	}
	LWLockRelease(lock);
}

/*
 * idempotency_stats() returns setof record
 *
 * The metrics of this database since counting began, a row for each action;
 * none unless the library is preloaded.
 */
Datum
idempotency_stats(PG_FUNCTION_ARGS)
{
	ListCell   *lc;

	InitMaterializedSRF(fcinfo, 0);
	foreach(lc, MetricsList())
		put_row((ReturnSetInfo *) fcinfo->resultinfo, lfirst(lc));

	return (Datum) 0;
}

/*
 * idempotency_metrics_room(OUT capacity int, OUT used int, OUT lost bigint)
 *
 * How many actions can have metrics of their own on this server, how many
 * have, and how many events could not be counted at all; nulls unless the
 * library is preloaded.
 */
Datum
idempotency_metrics_room(PG_FUNCTION_ARGS)
{
	TupleDesc	tupdesc;
	Datum		values[3] = {0};
	bool		nulls[3] = {true, true, true};

	if (get_call_result_type(fcinfo, NULL, &tupdesc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");

	if (entries != NULL)
	{
		LWLockAcquire(lock, LW_SHARED);
		values[0] = Int32GetDatum(idempotency_max_actions);
		values[1] = Int32GetDatum(state->named);
		values[2] = Int64GetDatum((int64) pg_atomic_read_u64(&state->lost));
		LWLockRelease(lock);
		memset(nulls, false, sizeof(nulls));
	}

	return HeapTupleGetDatum(heap_form_tuple(tupdesc, values, nulls));
}

static Size
get_size(void)
{
	if (idempotency_max_actions == 0)
		return 0;
	return add_size(MAXALIGN(sizeof(MetricsState)),
					hash_estimate_size(idempotency_max_actions + OVERFLOW_ENTRIES,
									   sizeof(ActionMetrics)));
}

/*
 * Make the table, or attach to it in a new process.
 */
static void
start_up(void)
{
	bool		found;
	HASHCTL		info = {0};

	state = ShmemInitStruct("idempotency metrics state", sizeof(MetricsState),
							&found);
	info.keysize = sizeof(MetricsKey);
	info.entrysize = sizeof(ActionMetrics);
	entries = ShmemInitHash("idempotency metrics",
							idempotency_max_actions + OVERFLOW_ENTRIES, &info,
							HASH_ELEM | HASH_BLOBS | HASH_FIXED_SIZE);
	lock = &GetNamedLWLockTranche(TRANCHE_NAME)->lock;
	if (!found)
	{
		state->since = GetCurrentTimestamp();
		state->named = 0;
		pg_atomic_init_u64(&state->lost, 0);
	}

	MetricsFileInit(get_saved, put_saved);
	if (!found)
		MetricsFileLoad();
}

/*
 * Find the entry of an action under the lock of the table, or make it.
 */
static ActionMetrics *
find_entry(const unsigned char *action)
{
	MetricsKey	key = {.database = MyDatabaseId};
	ActionMetrics *metrics;

	memcpy(key.action, action, 1 + action[0]);

	LWLockAcquire(lock, LW_SHARED);
	metrics = hash_search(entries, &key, HASH_FIND, NULL);
	LWLockRelease(lock);

	if (metrics == NULL)
	{
		LWLockAcquire(lock, LW_EXCLUSIVE);
		metrics = enter(&key);
		if (metrics == NULL)
		{
			memset(key.action, 0, sizeof(key.action));
			metrics = enter(&key);
		}
		LWLockRelease(lock);
	}

	return metrics;
}

/*
 * Find an entry or make it, if there is room.  The lock is held.
 */
static ActionMetrics *
enter(const MetricsKey *key)
{
	bool		is_named = key->action[0] != 0;
	bool		found;
	ActionMetrics *metrics;

	if (is_named && state->named >= idempotency_max_actions)
		return hash_search(entries, key, HASH_FIND, NULL);

	metrics = hash_search(entries, key, HASH_ENTER_NULL, &found);
	if (metrics == NULL || found)
		return metrics;

	if (is_named)
		state->named++;
	init_entry(metrics);
	return metrics;
}

static void
init_entry(ActionMetrics *metrics)
{
	pg_atomic_init_u32(&metrics->held, 0);
	memset(&metrics->leases, 0, sizeof(LeaseCounts));
	memset(&metrics->leases_so_far, 0, sizeof(LeaseCounts));
	metrics->reported = 0;
	for (int i = 0; i < METRIC_VALUES; i++)
		pg_atomic_init_u64(&metrics->values[i], 0);
	memset(metrics->flushed, 0, sizeof(metrics->flushed));
}

/*
 * Add a row to the result of idempotency_stats().
 */
static void
put_row(ReturnSetInfo *rsinfo, ActionMetrics *metrics)
{
	Datum		values[STATS_COLUMNS];
	bool		nulls[STATS_COLUMNS] = {false};
	uint64		counts[METRIC_VALUES];

	MetricsRead(metrics, counts);

	values[STATS_ACTION] =
		PointerGetDatum(cstring_to_text_with_len((char *) metrics->key.action + 1,
												 metrics->key.action[0]));
	for (int i = 0; i < EVENT_CLASSES; i++)
		values[STATS_EVENTS + i] = Int64GetDatum((int64) counts[i]);
	values[STATS_HELD] = Int32GetDatum((int32) pg_atomic_read_u32(&metrics->held));
	values[STATS_LEASES] = Int32GetDatum(metrics->leases.in_flight);
	values[STATS_STALLED_LEASES] = Int32GetDatum(metrics->leases.stalled);

	/* where nobody looks any more, nobody knows */
	nulls[STATS_LEASES] = nulls[STATS_STALLED_LEASES] =
		!metrics->leases.valid || !idempotency_worker;
	put_times(&values[STATS_RUN_TIME], &nulls[STATS_RUN_TIME],
			  counts[METRIC_RUN_TIME], &counts[METRIC_RUN_TIME_HISTOGRAM]);
	put_times(&values[STATS_LOOKUP_TIME], &nulls[STATS_LOOKUP_TIME],
			  counts[METRIC_LOOKUP_TIME], &counts[METRIC_LOOKUP_TIME_HISTOGRAM]);
	values[STATS_SINCE] = TimestampTzGetDatum(state->since);

	tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
}

/*
 * Fill in the five columns about times, which are in milliseconds.
 */
static void
put_times(Datum *values, bool *nulls, uint64 sum, const uint64 *histogram)
{
	static const double fractions[] = {0.5, 0.95, 0.99};

	*values++ = Float8GetDatum(sum / 1000.0);
	nulls++;
	for (size_t i = 0; i < lengthof(fractions); i++)
	{
		double		percentile = HistogramPercentile(histogram, fractions[i]);

		*values++ = Float8GetDatum(percentile);
		*nulls++ = isnan(percentile);
	}
	*values = HistogramToArray(histogram);
}

/*
 * What is to be saved: all entries, of all databases.
 */
static SavedMetrics *
get_saved(int *count, TimestampTz *since)
{
	SavedMetrics *saved = palloc0_array(SavedMetrics,
										hash_get_num_entries(entries));
	HASH_SEQ_STATUS seq;
	ActionMetrics *metrics;

	*count = 0;
	*since = state->since;
	hash_seq_init(&seq, entries);
	while ((metrics = hash_seq_search(&seq)) != NULL)
	{
		SavedMetrics *entry = &saved[(*count)++];

		entry->key = metrics->key;
		MetricsRead(metrics, entry->values);
		memcpy(entry->flushed, metrics->flushed, sizeof(entry->flushed));
		entry->reported = metrics->reported;
	}
	return saved;
}

/*
 * Go on from what was saved.
 */
static void
put_saved(SavedMetrics *saved, int count, TimestampTz since)
{
	state->since = since;
	for (int i = 0; i < count; i++)
		put_saved_entry(&saved[i]);
}

/*
 * Add an entry that was saved to those that there are.  One that there is no room
 * for any more is added to the other actions of its database.
 */
static void
put_saved_entry(SavedMetrics *saved)
{
	ActionMetrics *metrics = enter(&saved->key);

	if (metrics == NULL)
	{
		memset(saved->key.action, 0, sizeof(saved->key.action));
		metrics = enter(&saved->key);
	}
	if (metrics == NULL)
		return;

	metrics->reported = Max(metrics->reported, saved->reported);
	for (int i = 0; i < METRIC_VALUES; i++)
	{
		pg_atomic_fetch_add_u64(&metrics->values[i], saved->values[i]);
		metrics->flushed[i] += saved->flushed[i];
	}
}
