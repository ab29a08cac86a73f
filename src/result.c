/*-------------------------------------------------------------------------
 *
 * result.c
 *	  Rows of type idempotency_result.
 *
 *-------------------------------------------------------------------------
 */
#include "idempotency.h"

#include "access/htup_details.h"
#include "catalog/pg_type_d.h"
#include "funcapi.h"
#include "result.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"
#include "utils/typcache.h"

/* Columns of idempotency_result */
#define Anum_result_outcome			1
#define Anum_result_status_code		2
#define Anum_result_response		3
#define Anum_result_headers			4
#define Anum_result_body			5
#define Anum_result_attempt			6
#define Anum_result_recovery_point	7
#define Anum_result_recovery_state	8
#define Anum_result_retry_after		9
#define Anum_result_created_at		10
#define Anum_result_finished_at		11
#define Anum_result_expires_at		12
#define Natts_result				12

static const Oid result_types[Natts_result] = {
	TEXTOID, INT4OID, JSONOID, JSONBOID, BYTEAOID, INT4OID, TEXTOID, JSONBOID,
	INTERVALOID, TIMESTAMPTZOID, TIMESTAMPTZOID, TIMESTAMPTZOID
};

/* A row in the making; all columns are null at first */
typedef struct ResultRow
{
	Datum		values[Natts_result];
	bool		nulls[Natts_result];
} ResultRow;

static void init_result(ResultRow *result, const char *outcome);
static void set_value(ResultRow *result, int column, Datum value);
static void copy_column(ResultRow *result, int column,
						const Record *record, int record_column);
static Datum make_datum(ResultRow *result);

/*
 * The caller has the claim and is to do the work, or to go on with what the
 * record says when it was taken over; that is null when it was not.
 */
Datum
ResultStarted(const ClaimFacts *facts, const Record *taken_over)
{
	ResultRow	result;

	init_result(&result, "started");
	set_value(&result, Anum_result_attempt, Int32GetDatum(facts->attempt));
	set_value(&result, Anum_result_created_at,
			  TimestampTzGetDatum(facts->started_at));

	if (taken_over != NULL)
	{
		copy_column(&result, Anum_result_created_at,
					taken_over, Anum_idempotency_key_created_at);
		copy_column(&result, Anum_result_recovery_point,
					taken_over, Anum_idempotency_key_recovery_point);
		copy_column(&result, Anum_result_recovery_state,
					taken_over, Anum_idempotency_key_recovery_state);
	}

	return make_datum(&result);
}

/*
 * An answer, whether it was just given or is replayed.
 */
Datum
ResultAnswer(const char *outcome, const Record *record)
{
	ResultRow	result;

	init_result(&result, outcome);
	copy_column(&result, Anum_result_status_code,
				record, Anum_idempotency_key_status_code);
	copy_column(&result, Anum_result_response,
				record, Anum_idempotency_key_response);
	copy_column(&result, Anum_result_headers,
				record, Anum_idempotency_key_headers);
	copy_column(&result, Anum_result_body,
				record, Anum_idempotency_key_body);
	copy_column(&result, Anum_result_attempt,
				record, Anum_idempotency_key_attempt);
	copy_column(&result, Anum_result_created_at,
				record, Anum_idempotency_key_created_at);
	copy_column(&result, Anum_result_finished_at,
				record, Anum_idempotency_key_finished_at);
	copy_column(&result, Anum_result_expires_at,
				record, Anum_idempotency_key_expires_at);

	return make_datum(&result);
}

/*
 * The key was used with a different request, of which nothing is told.
 */
Datum
ResultMismatched(void)
{
	ResultRow	result;

	init_result(&result, "mismatched");
	return make_datum(&result);
}

/*
 * Come again after retry_after microseconds.
 */
Datum
ResultInFlight(int64 retry_after)
{
	ResultRow	result;
	Interval   *interval = palloc0_object(Interval);

	interval->time = retry_after;

	init_result(&result, "in_flight");
	set_value(&result, Anum_result_retry_after, IntervalPGetDatum(interval));

	return make_datum(&result);
}

/*
 * A row of nulls: there is no answer.
 */
Datum
ResultNone(void)
{
	ResultRow	result;

	init_result(&result, NULL);
	return make_datum(&result);
}

static void
init_result(ResultRow *result, const char *outcome)
{
	memset(result->values, 0, sizeof(result->values));
	memset(result->nulls, true, sizeof(result->nulls));

	if (outcome != NULL)
		set_value(result, Anum_result_outcome, CStringGetTextDatum(outcome));
}

static void
set_value(ResultRow *result, int column, Datum value)
{
	result->values[column - 1] = value;
	result->nulls[column - 1] = false;
}

static void
copy_column(ResultRow *result, int column,
			const Record *record, int record_column)
{
	result->values[column - 1] = record->values[record_column - 1];
	result->nulls[column - 1] = record->nulls[record_column - 1];
}

/*
 * The row as a datum, with everything that is stored out of line fetched.
 */
static Datum
make_datum(ResultRow *result)
{
	TupleDesc	desc = lookup_rowtype_tupdesc(StoreResultType(), -1);
	HeapTuple	tuple;

	ResultCheckShape(desc, result_types, Natts_result);
	tuple = heap_form_tuple(desc, result->values, result->nulls);
	ReleaseTupleDesc(desc);

	return HeapTupleGetDatum(tuple);
}

/*
 * Refuse a row type that belongs to another version of the extension.
 */
void
ResultCheckShape(TupleDesc desc, const Oid *types, int natts)
{
	bool		matches = desc->natts == natts;

	for (int i = 0; matches && i < natts; i++)
		matches = TupleDescAttr(desc, i)->atttypid == types[i];

	if (!matches)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("type \"%s\" is not the one that the loaded library was made for",
						format_type_be(desc->tdtypeid)),
				 errhint("Run ALTER EXTENSION idempotency UPDATE, and start a new session.")));
}
