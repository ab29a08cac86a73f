/*-------------------------------------------------------------------------
 *
 * result.c
 *	  Rows of type idempotency_result.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "access/htup_details.h"
#include "call/result.h"
#include "catalog/pg_type_d.h"
#include "funcapi.h"
#include "nodes/makefuncs.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"
#include "utils/typcache.h"

/* Columns of idempotency_result */
#define Anum_result_outcome			1
#define Anum_result_status_code		2
#define Anum_result_response		3
#define Anum_result_headers			4
#define Anum_result_body			5
#define Anum_result_claim			6
#define Anum_result_attempt			7
#define Anum_result_recovery_point	8
#define Anum_result_recovery_state	9
#define Anum_result_retry_after		10
#define Anum_result_created_at		11
#define Anum_result_finished_at		12
#define Anum_result_expires_at		13

static const Oid result_types[Natts_result] = {
	TEXTOID, INT4OID, JSONOID, JSONBOID, BYTEAOID, UUIDOID, INT4OID, TEXTOID,
	JSONBOID, INT4OID, TIMESTAMPTZOID, TIMESTAMPTZOID, TIMESTAMPTZOID
};

static void init_row(ResultRow *row, const char *outcome);
static void set_value(ResultRow *row, int column, Datum value);
static void copy_column(ResultRow *row, int column,
						const Record *record, int record_column);
static bool has_shape(TupleDesc desc, const Oid *types, int natts);

/*
 * The caller has the claim and is to do the work, or to go on with what the
 * record says when it was taken over; that is null when it was not.
 */
void
ResultStarted(ResultRow *row, const ClaimFacts *facts, const Record *taken_over)
{
	init_row(row, "started");
	set_value(row, Anum_result_attempt, Int32GetDatum(facts->attempt));
	set_value(row, Anum_result_created_at,
			  TimestampTzGetDatum(facts->started_at));

	if (claim_is_leased(facts))
	{
		pg_uuid_t  *claim = palloc_object(pg_uuid_t);

		*claim = facts->claim;
		set_value(row, Anum_result_claim, UUIDPGetDatum(claim));
	}

	if (taken_over != NULL)
	{
		copy_column(row, Anum_result_created_at,
					taken_over, Anum_idempotency_key_created_at);
		copy_column(row, Anum_result_recovery_point,
					taken_over, Anum_idempotency_key_recovery_point);
		copy_column(row, Anum_result_recovery_state,
					taken_over, Anum_idempotency_key_recovery_state);
	}
}

/*
 * An answer, whether it was just given or is replayed.
 */
void
ResultAnswer(ResultRow *row, const char *outcome, const Record *record)
{
	init_row(row, outcome);
	copy_column(row, Anum_result_status_code,
				record, Anum_idempotency_key_status_code);
	copy_column(row, Anum_result_response,
				record, Anum_idempotency_key_response);
	copy_column(row, Anum_result_headers,
				record, Anum_idempotency_key_headers);
	copy_column(row, Anum_result_body,
				record, Anum_idempotency_key_body);
	copy_column(row, Anum_result_attempt,
				record, Anum_idempotency_key_attempt);
	copy_column(row, Anum_result_created_at,
				record, Anum_idempotency_key_created_at);
	copy_column(row, Anum_result_finished_at,
				record, Anum_idempotency_key_finished_at);
	copy_column(row, Anum_result_expires_at,
				record, Anum_idempotency_key_expires_at);
}

/*
 * The key was used with a different request, of which nothing is told.
 */
void
ResultMismatched(ResultRow *row)
{
	init_row(row, "mismatched");
}

/*
 * There is a claim on the request, and retry_after seconds are to pass before it
 * is asked for again.  attempt and created_at are 0 where they are not known or
 * not to be told, and so is record where there is no recovery point to tell.
 */
void
ResultPending(ResultRow *row, const char *outcome, int retry_after, int attempt,
			  TimestampTz created_at, const Record *record)
{
	init_row(row, outcome);
	set_value(row, Anum_result_retry_after, Int32GetDatum(retry_after));
	if (attempt != 0)
		set_value(row, Anum_result_attempt, Int32GetDatum(attempt));
	if (created_at != 0)
		set_value(row, Anum_result_created_at, TimestampTzGetDatum(created_at));
	if (record != NULL)
		copy_column(row, Anum_result_recovery_point,
					record, Anum_idempotency_key_recovery_point);
}

/*
 * A row of nulls: there is no answer.
 */
void
ResultNone(ResultRow *row)
{
	init_row(row, NULL);
}

/*
 * A row that was made elsewhere, by the same version of the extension.
 */
void
ResultFromTuple(ResultRow *row, HeapTupleHeader header)
{
	TupleDesc	desc = lookup_rowtype_tupdesc(HeapTupleHeaderGetTypeId(header),
											  HeapTupleHeaderGetTypMod(header));
	HeapTupleData tuple;

	ResultCheckShape(desc, result_types, Natts_result);
	tuple.t_len = HeapTupleHeaderGetDatumLength(header);
	tuple.t_data = header;
	heap_deform_tuple(&tuple, desc, row->values, row->nulls);
	ReleaseTupleDesc(desc);
}

/*
 * The outcome that a row has, which is not null.
 */
const char *
ResultOutcome(const ResultRow *row)
{
	return TextDatumGetCString(row->values[Anum_result_outcome - 1]);
}

/*
 * Whether calls of a function can be made into a row; only then may
 * ResultCallInto() be asked for one.
 */
bool
ResultIsOf(const FuncExpr *call)
{
	TupleDesc	desc;

	return get_expr_result_type((Node *) call, NULL, &desc) == TYPEFUNC_COMPOSITE &&
		has_shape(desc, result_types, Natts_result);
}

/*
 * The same call, with an argument more than the function has: where
 * ResultReturn() is to put the row.  So no tuple is formed, only to be taken apart
 * again.  SQL cannot give it, because a function is found by the number of
 * arguments that it has.
 */
Expr *
ResultCallInto(const FuncExpr *call, ResultRow *row)
{
	FuncExpr   *result = makeNode(FuncExpr);
	Const	   *target = makeConst(INTERNALOID, -1, InvalidOid, sizeof(Datum),
								   PointerGetDatum(row), false, true);

	*result = *call;
	result->args = lappend(list_copy(call->args), target);
	return (Expr *) result;
}

/*
 * Return a row from a function: to where its caller wants it, with a null for
 * the datum, or as a datum.
 */
Datum
ResultReturn(FunctionCallInfo fcinfo, ResultRow *row)
{
	int			nargs = fcinfo->flinfo->fn_nargs;

	if (PG_NARGS() > nargs)
	{
		*(ResultRow *) PG_GETARG_POINTER(nargs) = *row;
		PG_RETURN_NULL();
	}

	return ResultGetDatum(row);
}

/*
 * Make all columns null but the outcome, which may be null too.
 */
static void
init_row(ResultRow *row, const char *outcome)
{
	memset(row->values, 0, sizeof(row->values));
	memset(row->nulls, true, sizeof(row->nulls));

	if (outcome != NULL)
		set_value(row, Anum_result_outcome, CStringGetTextDatum(outcome));
}

static void
set_value(ResultRow *row, int column, Datum value)
{
	row->values[column - 1] = value;
	row->nulls[column - 1] = false;
}

/*
 * Take a column of a record.  What it refers to is copied, and fetched if it
 * is stored out of line, because the record's row will not be held.
 */
static void
copy_column(ResultRow *row, int column, const Record *record, int record_column)
{
	Datum		value = record->values[record_column - 1];

	if (record->nulls[record_column - 1])
		return;

	switch (result_types[column - 1])
	{
		case INT4OID:
			break;
		case UUIDOID:
			/* the right to a claim is for who began it, not for who reads */
			elog(ERROR, "claim id of a record is not to be shown");
			break;
		case TIMESTAMPTZOID:
			value = TimestampTzGetDatum(DatumGetTimestampTz(value));
			break;
		default:
			value = PointerGetDatum(PG_DETOAST_DATUM_COPY(value));
			break;
	}
	set_value(row, column, value);
}

/*
 * A row as a datum.
 */
Datum
ResultGetDatum(ResultRow *row)
{
	TupleDesc	desc = lookup_rowtype_tupdesc(CatalogResultType(), -1);
	HeapTuple	tuple;

	ResultCheckShape(desc, result_types, Natts_result);
	tuple = heap_form_tuple(desc, row->values, row->nulls);
	ReleaseTupleDesc(desc);

	return HeapTupleGetDatum(tuple);
}

/*
 * Refuse a row type that belongs to another version of the extension.
 */
void
ResultCheckShape(TupleDesc desc, const Oid *types, int natts)
{
	if (!has_shape(desc, types, natts))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("type \"%s\" is not the one that the loaded library was made for",
						format_type_be(desc->tdtypeid)),
				 errhint("Run ALTER EXTENSION idempotency UPDATE, and start a new session.")));
}

static bool
has_shape(TupleDesc desc, const Oid *types, int natts)
{
	bool		matches = desc->natts == natts;

	for (int i = 0; matches && i < natts; i++)
		matches = TupleDescAttr(desc, i)->atttypid == types[i];
	return matches;
}
