/*-------------------------------------------------------------------------
 *
 * finish.c
 *	  finish and release: how a request ends.
 *
 * finish writes the record, the only row that a request with a transaction
 * claim costs.  It is inserted without looking for an old one first; begin
 * has looked, and since then the lock of the scope kept others away.  Only
 * where begin saw an expired record is there a row to be deleted before.
 * Whoever got past the lock all the same is met in the unique index (see
 * store.c).
 *
 *-------------------------------------------------------------------------
 */
#include "idempotency.h"

#include "access/detoast.h"
#include "call.h"
#include "claim.h"
#include "status.h"
#include "store.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

/* Arguments of finish */
enum
{
	FINISH_TENANT,
	FINISH_ACTION,
	FINISH_KEY,
	FINISH_STATUS_CODE,
	FINISH_RESPONSE,
	FINISH_HEADERS,
	FINISH_ACTOR,
	FINISH_BODY
};

/* Arguments of release */
enum
{
	RELEASE_TENANT,
	RELEASE_ACTION,
	RELEASE_KEY,
	RELEASE_ACTOR
};

static void check_answer(FunctionCallInfo fcinfo);
static void check_size(FunctionCallInfo fcinfo);
static void write_record(const Scope *scope, const Claim *claim,
						 StatusClass class, FunctionCallInfo fcinfo);
static void set_column(Record *record, int column, Datum value);
static void set_argument(Record *record, int column,
						 FunctionCallInfo fcinfo, int argument);

PG_FUNCTION_INFO_V1(idempotency_finish);
PG_FUNCTION_INFO_V1(idempotency_release);

/*
 * idempotency_finish(tenant text, action text, key text, status_code int,
 *					  response json, headers jsonb, actor text, body bytea)
 *					  returns text
 *
 * Store the answer and end the claim.  Returns what became of the request:
 * completed, errored or released.
 *
 * Errors: ID001, ID002, ID005 without a claim, ID007 for too large an answer,
 * 25006, 42501.
 */
Datum
idempotency_finish(PG_FUNCTION_ARGS)
{
	static const char *const names[] = {
		[STATUS_COMPLETED] = "completed",
		[STATUS_ERRORED] = "errored",
		[STATUS_RELEASED] = "released",
	};
	Scope		scope;
	Claim	   *claim;
	StatusClass class;

	CallNeedsReadWrite("idempotency_finish()");
	ScopeFromArguments(&scope, fcinfo, FINISH_ACTOR);
	check_answer(fcinfo);

	claim = ClaimFindHeld(&scope);
	if (claim == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_IDEMPOTENCY_NO_CLAIM),
				 errmsg("no such claim"),
				 errdetail("This transaction did not begin the request, or has already finished it."),
				 errhint("Do the work only when the outcome of idempotency_begin is \"started\".")));

	class = StatusClassify(PG_GETARG_INT32(FINISH_STATUS_CODE));
	if (class != STATUS_RELEASED)
	{
		check_size(fcinfo);
		write_record(&scope, claim, class, fcinfo);
	}
	ClaimEnd(claim);

	PG_RETURN_TEXT_P(cstring_to_text(names[class]));
}

/*
 * idempotency_release(tenant text, action text, key text, actor text)
 *					   returns boolean
 *
 * Give a claim back without an answer, so that the next repeat runs.  Returns
 * whether there was one.
 *
 * Errors: ID001, ID002, 25006, 42501.
 */
Datum
idempotency_release(PG_FUNCTION_ARGS)
{
	Scope		scope;
	Claim	   *claim;

	CallNeedsReadWrite("idempotency_release()");
	ScopeFromArguments(&scope, fcinfo, RELEASE_ACTOR);

	claim = ClaimFindHeld(&scope);
	if (claim == NULL)
		PG_RETURN_BOOL(false);

	ClaimForget(claim);
	PG_RETURN_BOOL(true);
}

/*
 * Refuse an answer that cannot be stored.
 */
static void
check_answer(FunctionCallInfo fcinfo)
{
	if (PG_ARGISNULL(FINISH_STATUS_CODE) ||
		PG_GETARG_INT32(FINISH_STATUS_CODE) < STATUS_MIN ||
		PG_GETARG_INT32(FINISH_STATUS_CODE) > STATUS_MAX)
		ereport(ERROR,
				(errcode(ERRCODE_IDEMPOTENCY_MALFORMED),
				 errmsg("status_code is out of range"),
				 errdetail("It must be an HTTP status, from %d to %d.",
						   STATUS_MIN, STATUS_MAX)));

	if (!PG_ARGISNULL(FINISH_RESPONSE) && !PG_ARGISNULL(FINISH_BODY))
		ereport(ERROR,
				(errcode(ERRCODE_IDEMPOTENCY_MALFORMED),
				 errmsg("both response and body were given"),
				 errhint("Use response for JSON and body for anything else.")));
}

/*
 * Refuse an answer that is too large to be kept.
 */
static void
check_size(FunctionCallInfo fcinfo)
{
	static const int parts[] = {FINISH_RESPONSE, FINISH_HEADERS, FINISH_BODY};
	Size		size = 0;

	for (size_t i = 0; i < lengthof(parts); i++)
	{
		if (!PG_ARGISNULL(parts[i]))
			size += toast_raw_datum_size(PG_GETARG_DATUM(parts[i])) - VARHDRSZ;
	}

	if (size > (Size) idempotency_max_response_size)
		ereport(ERROR,
				(errcode(ERRCODE_IDEMPOTENCY_TOO_LARGE),
				 errmsg("answer is too large to be stored"),
				 errdetail("Its size in bytes, headers included, is %zu, and \"idempotency.max_response_size\" is %d.",
						   size, idempotency_max_response_size),
				 errhint("Store a reference to the answer instead of the answer.")));
}

/*
 * Write the record of a claim that is finished.
 */
static void
write_record(const Scope *scope, const Claim *claim, StatusClass class,
			 FunctionCallInfo fcinfo)
{
	Store		store;
	Datum		values[Natts_idempotency_key] = {0};
	bool		nulls[Natts_idempotency_key];
	Record		record = {values, nulls};
	bool		completed = (class == STATUS_COMPLETED);
	TimestampTz now = GetCurrentTimestamp();

	StoreOpen(&store, RowExclusiveLock);

	if (claim->replaces)
	{
		Record		expired;

		/* a sweep may have been faster, and anything else fails below */
		if (StoreFind(&store, scope, now, &expired) == RECORD_EXPIRED)
			(void) StoreDelete(&store, true);
	}

	memset(nulls, true, sizeof(nulls));
	for (int i = 0; i < SCOPE_PARTS; i++)
		set_column(&record, i + 1, scope->parts[i]);
	set_column(&record, Anum_idempotency_key_state,
			   ObjectIdGetDatum(StoreStateOid(completed ? RECORD_COMPLETED :
											  RECORD_ERRORED)));
	if (claim->fingerprint.len > 0)
		set_column(&record, Anum_idempotency_key_request_hash,
				   FingerprintGetBytea(&claim->fingerprint));
	set_argument(&record, Anum_idempotency_key_status_code,
				 fcinfo, FINISH_STATUS_CODE);
	set_argument(&record, Anum_idempotency_key_headers,
				 fcinfo, FINISH_HEADERS);
	set_argument(&record, Anum_idempotency_key_response,
				 fcinfo, FINISH_RESPONSE);
	set_argument(&record, Anum_idempotency_key_body,
				 fcinfo, FINISH_BODY);
	set_column(&record, Anum_idempotency_key_attempt, Int32GetDatum(1));
	set_column(&record, Anum_idempotency_key_created_at,
			   TimestampTzGetDatum(claim->started_at));
	set_column(&record, Anum_idempotency_key_finished_at,
			   TimestampTzGetDatum(now));
	set_column(&record, Anum_idempotency_key_expires_at,
			   TimestampTzGetDatum(now + (completed ? claim->ttl :
										  claim->error_ttl)));

	StoreInsert(&store, &record);
	StoreClose(&store);
}

static void
set_column(Record *record, int column, Datum value)
{
	record->values[column - 1] = value;
	record->nulls[column - 1] = false;
}

static void
set_argument(Record *record, int column,
			 FunctionCallInfo fcinfo, int argument)
{
	if (!PG_ARGISNULL(argument))
		set_column(record, column, PG_GETARG_DATUM(argument));
}
