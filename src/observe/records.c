/*-------------------------------------------------------------------------
 *
 * records.c
 *	  What the records are, for the views.
 *
 * On a cluster the table of records is an empty shell here, with the records in
 * shards, some of which are on this node (store/shards.c).  A view of the table would
 * ask all nodes, with rights that who watches does not have there.  So the views
 * have these functions to read from.  Each reads the tables that have the records of
 * this node, one after the other, by SQL, and as their owner, as if it were a view.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "access/htup_details.h"
#include "executor/spi.h"
#include "funcapi.h"
#include "store/catalog.h"
#include "store/owner.h"
#include "store/shards.h"
#include "store/store.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/timestamp.h"
#include "utils/tuplestore.h"

/* Takes what a query has found in one of the tables, which is in SPI_tuptable */
typedef void (*ReadRows) (Oid part, void *state);

/* Columns of idempotency_record_counts() */
#define COUNTS		5

/* Columns of idempotency_storage() */
enum
{
	STORAGE_DISTRIBUTED,
	STORAGE_NODES,
	STORAGE_PROBLEM,
	STORAGE_TABLE_SIZE,
	STORAGE_INDEX_SIZE,
	STORAGE_OLDEST_EXPIRED_AT,
	STORAGE_COLUMNS
};

static void query_parts(const char *query, ReadRows read, void *state);
static void put_leases(Oid part, void *state);
static void add_counts(Oid part, void *state);
static void add_storage(Oid part, void *state);
static ShardsStatus get_status(void);
static Datum make_row(FunctionCallInfo fcinfo, Datum *values, bool *nulls);

PG_FUNCTION_INFO_V1(idempotency_leases);
PG_FUNCTION_INFO_V1(idempotency_record_counts);
PG_FUNCTION_INFO_V1(idempotency_storage);

/*
 * idempotency_leases() returns setof record
 *
 * The leases on this node that are in flight or have run out.
 *
 * Errors: those of StoreNextPart.
 */
Datum
idempotency_leases(PG_FUNCTION_ARGS)
{
	InitMaterializedSRF(fcinfo, 0);
	query_parts("SELECT tenant, actor, action, key, attempt, recovery_point,"
				" created_at, lease_expires_at FROM ONLY %s"
				" WHERE state = 'pending' AND lease_expires_at IS NOT NULL"
				" AND expires_at > clock_timestamp()",
				put_leases, fcinfo->resultinfo);

	return (Datum) 0;
}

/*
 * idempotency_record_counts() returns record
 *
 * How many records this node has, by state, and how many of the pending ones have a
 * lease that lasts, or one that ran out; nulls while calls are refused.
 */
Datum
idempotency_record_counts(PG_FUNCTION_ARGS)
{
	Datum		counts[COUNTS] = {0};
	bool		nulls[COUNTS];
	bool		known = get_status().problem == NULL;

	if (known)
		query_parts("SELECT count(*) FILTER (WHERE state = 'pending'),"
					" count(*) FILTER (WHERE state = 'completed'),"
					" count(*) FILTER (WHERE state = 'errored'),"
					" count(*) FILTER (WHERE state = 'pending'"
					"  AND lease_expires_at > statement_timestamp()),"
					" count(*) FILTER (WHERE state = 'pending'"
					"  AND lease_expires_at <= statement_timestamp()"
					"  AND expires_at > statement_timestamp())"
					" FROM ONLY %s",
					add_counts, counts);
	memset(nulls, !known, sizeof(nulls));

	return make_row(fcinfo, counts, nulls);
}

/*
 * idempotency_storage() returns record
 *
 * Whether the records are distributed over a cluster, how many nodes that has, why
 * calls are refused if they are, the size of what is on this node, in bytes, and
 * when the oldest record expired that has not been swept.
 */
Datum
idempotency_storage(PG_FUNCTION_ARGS)
{
	ShardsStatus status = get_status();
	Datum		values[STORAGE_COLUMNS] = {0};
	bool		nulls[STORAGE_COLUMNS] = {0};

	values[STORAGE_DISTRIBUTED] = BoolGetDatum(status.distributed);
	values[STORAGE_NODES] = Int32GetDatum(status.nodes);
	nulls[STORAGE_PROBLEM] = (status.problem == NULL);
	values[STORAGE_OLDEST_EXPIRED_AT] = TimestampTzGetDatum(DT_NOEND);
	if (status.problem != NULL)
	{
		values[STORAGE_PROBLEM] = CStringGetTextDatum(status.problem);
		nulls[STORAGE_TABLE_SIZE] = nulls[STORAGE_INDEX_SIZE] = true;
	}
	else
		query_parts("SELECT min(expires_at) FROM ONLY %s"
					" WHERE expires_at <= statement_timestamp()",
					add_storage, values);
	nulls[STORAGE_OLDEST_EXPIRED_AT] =
		DatumGetTimestampTz(values[STORAGE_OLDEST_EXPIRED_AT]) == DT_NOEND;

	return make_row(fcinfo, values, nulls);
}

/*
 * Query each of the tables that have the records of this node; the name of the table
 * is put where the query has "%s".
 */
static void
query_parts(const char *query, ReadRows read, void *state)
{
	for (Oid part = StoreNextPart(InvalidOid); OidIsValid(part);
		 part = StoreNextPart(part + 1))
	{
		Relation	rel = try_table_open(part, AccessShareLock);
		Owner		owner;
		char	   *name;

		if (rel == NULL)
			continue;
		name = quote_qualified_identifier(get_namespace_name(RelationGetNamespace(rel)),
										  RelationGetRelationName(rel));

		OwnerBecome(&owner, part);
		SPI_connect();
		if (SPI_execute(psprintf(query, name), true, 0) != SPI_OK_SELECT)
			elog(ERROR, "could not read records");
		read(part, state);
		SPI_finish();
		OwnerLeave(&owner);
		table_close(rel, NoLock);
	}
}

/*
 * Return leases, whose columns are those of idempotency_leases().
 */
static void
put_leases(Oid part, void *state)
{
	ReturnSetInfo *rsinfo = state;

	for (uint64 i = 0; i < SPI_processed; i++)
		tuplestore_puttuple(rsinfo->setResult, SPI_tuptable->vals[i]);
}

/*
 * Add to counts, an array of bigint.
 */
static void
add_counts(Oid part, void *state)
{
	Datum	   *counts = state;

	for (int i = 0; i < COUNTS; i++)
	{
		bool		isnull;
		Datum		count = SPI_getbinval(SPI_tuptable->vals[0],
										  SPI_tuptable->tupdesc, i + 1, &isnull);

		counts[i] = Int64GetDatum(DatumGetInt64(counts[i]) + DatumGetInt64(count));
	}
}

/*
 * Add to the columns of idempotency_storage().
 */
static void
add_storage(Oid part, void *state)
{
	Datum	   *values = state;
	bool		isnull;
	TimestampTz oldest;
	Datum		table_size = DirectFunctionCall1(pg_table_size,
												 ObjectIdGetDatum(part));
	Datum		index_size = DirectFunctionCall1(pg_indexes_size,
												 ObjectIdGetDatum(part));

	values[STORAGE_TABLE_SIZE] =
		Int64GetDatum(DatumGetInt64(values[STORAGE_TABLE_SIZE]) +
					  DatumGetInt64(table_size));
	values[STORAGE_INDEX_SIZE] =
		Int64GetDatum(DatumGetInt64(values[STORAGE_INDEX_SIZE]) +
					  DatumGetInt64(index_size));

	oldest = DatumGetTimestampTz(SPI_getbinval(SPI_tuptable->vals[0],
											   SPI_tuptable->tupdesc, 1, &isnull));
	if (!isnull && oldest < DatumGetTimestampTz(values[STORAGE_OLDEST_EXPIRED_AT]))
		values[STORAGE_OLDEST_EXPIRED_AT] = TimestampTzGetDatum(oldest);
}

static ShardsStatus
get_status(void)
{
	Relation	rel = CatalogLookAtTable(AccessShareLock);
	ShardsStatus status = ShardsGetStatus(rel);

	table_close(rel, NoLock);
	return status;
}

static Datum
make_row(FunctionCallInfo fcinfo, Datum *values, bool *nulls)
{
	TupleDesc	desc;

	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	return HeapTupleGetDatum(heap_form_tuple(desc, values, nulls));
}
