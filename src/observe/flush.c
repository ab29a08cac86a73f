/*-------------------------------------------------------------------------
 *
 * flush.c
 *	  Keeping metrics when the server does not.
 *
 * A flush adds what was counted since the last one to the rows of the current
 * minute in the table idempotency_metric, and deletes rows that are older than
 * idempotency.metrics_retention.
 *
 * Nothing is flushed twice or not at all.  What has been flushed is noted in
 * shared memory, beside the counters, and that is done by a callback when the
 * flush commits: between the commit and the callback no error or signal can
 * come, and if the process is killed there, the server starts anew and the
 * counters with it.  The table is locked against other flushes until then.
 *
 * Rows are by node as well: which server and database has counted.  Where the
 * table is replicated, by a subscription to all tables for one, the rows of both
 * sides are in it, and one never adds to a row of the other, nor has the same
 * key.  What stands for a node is the identifier of its cluster; when its server
 * was started, because a copy of a cluster has the same identifier; and its
 * database, because databases of a cluster can subscribe to each other.
 *
 * A flush waits for the disk when it commits, so that a crash cannot undo it,
 * but not for a standby, which may not be there.
 *
 * The statements run as the owner of the table, so that who may sweep needs no
 * right on it.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/pg_type_d.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "observe/flush.h"
#include "observe/metrics.h"
#include "settings.h"
#include "storage/lmgr.h"
#include "store/owner.h"
#include "transaction.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"

#define TABLE_NAME	"idempotency_metric"

/* So many old rows are deleted at most, that a flush does not take long */
#define MAX_DELETED	"100000"

/* A column of idempotency_metric */
typedef struct MetricColumn
{
	const char *name;
	Oid			type;
} MetricColumn;

#define KEY_COLUMNS	3			/* bucket, action and node */

/* What this transaction flushes of the metrics of an action */
typedef struct Flushed
{
	ActionMetrics *metrics;
	uint64		values[METRIC_VALUES];
} Flushed;

static void at_end_of_xact(XactEvent event);
static void flush_into(const char *schema);
static bool read_delta(ActionMetrics *metrics, uint64 *delta);
static SPIPlanPtr prepare_insert(const char *schema, const char *table);
static void insert_row(SPIPlanPtr plan, const Flushed *flushed);
static Datum get_node(void);
static void delete_old(const char *table);

static const MetricColumn columns[] = {
	{"bucket", TIMESTAMPTZOID},
	{"action", TEXTOID},
	{"node", TEXTOID},
	{"started", INT8OID},
	{"replayed", INT8OID},
	{"in_flight", INT8OID},
	{"mismatched", INT8OID},
	{"expired", INT8OID},
	{"stalled", INT8OID},
	{"taken_over", INT8OID},
	{"completed", INT8OID},
	{"errored", INT8OID},
	{"released", INT8OID},
	{"swept", INT8OID},
	{"run_time", FLOAT8OID},
	{"lookup_time", FLOAT8OID},
	{"run_time_histogram", INT8ARRAYOID},
	{"lookup_time_histogram", INT8ARRAYOID},
};

StaticAssertDecl(lengthof(columns) == KEY_COLUMNS + EVENT_CLASSES + 4,
				 "a column for each class of events");

/* what this transaction flushes, in TopTransactionContext */
static List *flushed_metrics = NIL;

/*
 * Hook into the end of transactions.
 */
void
FlushInit(void)
{
	TransactionAtEnd(AT_END_FLUSH, at_end_of_xact, NULL);
}

/*
 * Flush the metrics of this database in the current transaction, unless
 * somebody else is just doing that or has the table locked, or a row of it.
 * So nobody is waited for.
 */
void
FlushMetrics(void)
{
	Oid			extension = get_extension_oid(EXTENSION_NAME, true);
	Oid			schema;
	Oid			table;
	Owner		owner;

	if (!MetricsEnabled() || !OidIsValid(extension))
		return;

	schema = get_extension_schema(extension);
	table = get_relname_relid(TABLE_NAME, schema);
	if (!OidIsValid(table) ||
		!ConditionalLockRelationOid(table, ExclusiveLock))
		return;
	/* it may have been dropped before we had the lock */
	if (!SearchSysCacheExists1(RELOID, ObjectIdGetDatum(table)))
		return;

	OwnerBecome(&owner, table);
	flush_into(get_namespace_name(schema));
	OwnerLeave(&owner);
}

/*
 * The end of a transaction: what was flushed is in the table now, or is not.
 */
static void
at_end_of_xact(XactEvent event)
{
	ListCell   *lc;

	if (flushed_metrics == NIL)
		return;

	if (event == XACT_EVENT_COMMIT)
	{
		foreach(lc, flushed_metrics)
		{
			Flushed    *flushed = lfirst(lc);

			for (int i = 0; i < METRIC_VALUES; i++)
				flushed->metrics->flushed[i] += flushed->values[i];
		}
	}
	flushed_metrics = NIL;
}

/*
 * Write what was counted since the last flush, and delete what is old.
 */
static void
flush_into(const char *schema)
{
	char	   *table = quote_qualified_identifier(schema, TABLE_NAME);
	SPIPlanPtr	plan;
	ListCell   *lc;

	SPI_connect();
	plan = prepare_insert(schema, table);
	foreach(lc, MetricsList())
	{
		Flushed    *flushed = MemoryContextAlloc(TopTransactionContext,
												 sizeof(Flushed));

		flushed->metrics = lfirst(lc);
		if (read_delta(flushed->metrics, flushed->values))
		{
			MemoryContext oldcontext;

			insert_row(plan, flushed);
			oldcontext = MemoryContextSwitchTo(TopTransactionContext);
			flushed_metrics = lappend(flushed_metrics, flushed);
			MemoryContextSwitchTo(oldcontext);
		}
		else
			pfree(flushed);
	}
	delete_old(table);
	SPI_finish();

	/* our callers have synchronous_commit off */
	ForceSyncCommit();
}

/*
 * What was counted since the last flush.  Returns whether there is anything.
 */
static bool
read_delta(ActionMetrics *metrics, uint64 *delta)
{
	bool		any = false;

	MetricsRead(metrics, delta);
	for (int i = 0; i < METRIC_VALUES; i++)
	{
		delta[i] -= metrics->flushed[i];
		any |= delta[i] != 0;
	}

	return any;
}

/*
 * Plan the statement that adds to the row of an action.
 */
static SPIPlanPtr
prepare_insert(const char *schema, const char *table)
{
	Oid			types[lengthof(columns)];
	StringInfoData query;
	SPIPlanPtr	plan;

	initStringInfo(&query);
	appendStringInfo(&query, "INSERT INTO %s AS m (", table);
	for (size_t i = 0; i < lengthof(columns); i++)
		appendStringInfo(&query, "%s%s", i > 0 ? ", " : "", columns[i].name);
	appendStringInfoString(&query, ") VALUES (");
	for (size_t i = 0; i < lengthof(columns); i++)
	{
		types[i] = columns[i].type;
		appendStringInfo(&query, "%s$%zu", i > 0 ? ", " : "", i + 1);
	}
	appendStringInfoString(&query, ") ON CONFLICT (bucket, action, node) DO UPDATE SET ");
	for (size_t i = KEY_COLUMNS; i < lengthof(columns); i++)
	{
		const char *name = columns[i].name;

		appendStringInfo(&query, "%s%s = ", i > KEY_COLUMNS ? ", " : "", name);
		if (columns[i].type == INT8ARRAYOID)
			appendStringInfo(&query, "%s.idempotency_histogram_add(m.%s, excluded.%s)",
							 quote_identifier(schema), name, name);
		else
			appendStringInfo(&query, "m.%s + excluded.%s", name, name);
	}

	plan = SPI_prepare(query.data, lengthof(columns), types);
	if (plan == NULL)
		elog(ERROR, "SPI_prepare failed: %s", SPI_result_code_string(SPI_result));
	return plan;
}

/*
 * Add what was counted to the row of an action and this minute.
 */
static void
insert_row(SPIPlanPtr plan, const Flushed *flushed)
{
	const unsigned char *action = flushed->metrics->key.action;
	const uint64 *counts = flushed->values;
	TimestampTz now = GetCurrentTimestamp();
	Datum		values[lengthof(columns)];
	Datum	   *value = values;

	*value++ = TimestampTzGetDatum(now - now % USECS_PER_MINUTE);
	*value++ = PointerGetDatum(cstring_to_text_with_len((const char *) action + 1,
														action[0]));
	*value++ = get_node();
	for (int i = 0; i < EVENT_CLASSES; i++)
		*value++ = Int64GetDatum((int64) counts[i]);
	*value++ = Float8GetDatum(counts[METRIC_RUN_TIME] / 1000.0);
	*value++ = Float8GetDatum(counts[METRIC_LOOKUP_TIME] / 1000.0);
	*value++ = HistogramToArray(&counts[METRIC_RUN_TIME_HISTOGRAM]);
	*value++ = HistogramToArray(&counts[METRIC_LOOKUP_TIME_HISTOGRAM]);

	if (SPI_execute_plan(plan, values, NULL, false, 0) != SPI_OK_INSERT)
		elog(ERROR, "could not insert metrics");
}

/*
 * The name of this node, a text: the head of this file says what is in it.
 */
static Datum
get_node(void)
{
	return CStringGetTextDatum(psprintf(UINT64_FORMAT "/" INT64_FORMAT "/%u",
										GetSystemIdentifier(), PgStartTime,
										MyDatabaseId));
}

/*
 * Delete rows that have been kept for long enough.  Those of another node are
 * kept a little longer, because where they are replicated from they are deleted
 * as well.
 */
static void
delete_old(const char *table)
{
	Oid			types[] = {TIMESTAMPTZOID, TEXTOID};
	Datum		values[lengthof(types)];
	char	   *query;

	query = psprintf("DELETE FROM %s WHERE ctid = ANY (ARRAY("
					 "SELECT ctid FROM %s WHERE bucket < $1"
					 " AND (node = $2 OR bucket < $1 - INTERVAL '1 hour')"
					 " LIMIT " MAX_DELETED "))",
					 table, table);

	values[0] = TimestampTzGetDatum(GetCurrentTimestamp() -
									(int64) idempotency_metrics_retention * USECS_PER_SEC);
	values[1] = get_node();
	if (SPI_execute_with_args(query, lengthof(types), types, values, NULL,
							  false, 0) != SPI_OK_DELETE)
		elog(ERROR, "could not delete metrics");
}
