/*-------------------------------------------------------------------------
 *
 * finish.c
 *	  finish and release: how a request ends.
 *
 * finish writes the record, the only row that a request with a transaction
 * claim costs.  It is inserted without looking for an old one first; begin
 * has looked, and since then the lock of the scope kept others away.  Only
 * where begin saw an expired record is there a row to be deleted before, and
 * where it took over a stalled lease, one to be updated.  Whoever got past the
 * lock all the same is met in the unique index (see store.c).
 *
 * A leased claim has its row already.  It may have been begun in another
 * transaction, and is named by its id (see lease.c).
 *
 * What depends on the status, which is known only now, is decided only now: what
 * class it is of, and how long the answer is kept.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "call/finish.h"
#include "call/forward.h"
#include "catalog/pg_type_d.h"
#include "claim/lease.h"
#include "observe/event.h"
#include "request/arguments.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/regproc.h"
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
	FINISH_CLAIM,
	FINISH_BODY,
	FINISH_TTL
};

/* Arguments of release */
enum
{
	RELEASE_TENANT,
	RELEASE_ACTION,
	RELEASE_KEY,
	RELEASE_ACTOR,
	RELEASE_CLAIM
};

static Datum forward_end(FunctionCallInfo fcinfo, const char *function,
						 const Scope *scope, Oid type);
static void report_end(const Scope *scope, StatusClass class, int attempt,
					   int status, TimestampTz since);
static int64 read_ttl(StatusClass class, const Answer *answer, int64 begun);
static void check_size(const Answer *answer);
static Claim *find_transaction_claim(const Scope *scope,
									 const NullableDatum *claim_id);
static void end_own_lease(const Scope *scope);
static void refuse_without_claim(const Scope *scope);
static StatusClass finish_lease(const Scope *scope, const pg_uuid_t *claim_id,
								const Answer *answer);
static bool is_finished(const Record *record, const Answer *answer,
						StatusClass *class);
static bool same_value(Datum stored, bool stored_isnull,
					   const NullableDatum *given, int typlen);
static bool release_lease(const Scope *scope, const pg_uuid_t *claim_id);
static void refuse_ended(void);
static void write_record(const Scope *scope, const Claim *claim,
						 Record *record);
static void set_answer(Record *record, StatusClass class, const Answer *answer,
					   TimestampTz now);

PG_FUNCTION_INFO_V1(idempotency_finish);
PG_FUNCTION_INFO_V1(idempotency_release);

/*
 * idempotency_finish(tenant text, action text, key text, status_code int,
 *					  response json, headers jsonb, actor text, claim uuid,
 *					  body bytea, ttl interval) returns text
 *
 * Store the answer and end the claim.  Returns what became of the request:
 * completed, errored or released.
 *
 * Errors: ID001, ID002, ID005 for a claim that was lost, ID007 for too large an
 * answer, ID008 without a claim, or without its id if it is leased, 22023 and
 * 22004 for an impossible status, answer or ttl, 25006, 40001 in a serializable
 * transaction, 42501.
 */
Datum
idempotency_finish(PG_FUNCTION_ARGS)
{
	Scope		scope;
	Claim	   *claim;
	Record		record;
	StatusClass class;
	Answer		answer = {
		.status_code = fcinfo->args[FINISH_STATUS_CODE],
		.response = fcinfo->args[FINISH_RESPONSE],
		.headers = fcinfo->args[FINISH_HEADERS],
		.body = fcinfo->args[FINISH_BODY],
		.ttl = fcinfo->args[FINISH_TTL],
	};

	CallNeedsReadWrite("idempotency_finish()");
	ScopeFromArguments(&scope, fcinfo, FINISH_ACTOR);
	FinishCheckAnswer(&answer, InvalidOid);
	if (ForwardNeeded(&scope))
		return forward_end(fcinfo, "idempotency_finish", &scope, TEXTOID);

	claim = find_transaction_claim(&scope, &fcinfo->args[FINISH_CLAIM]);
	if (claim != NULL)
		class = FinishClaim(&scope, claim, &answer, &record);
	else
	{
		if (PG_ARGISNULL(FINISH_CLAIM))
			refuse_without_claim(&scope);
		class = finish_lease(&scope, PG_GETARG_UUID_P(FINISH_CLAIM), &answer);
		end_own_lease(&scope);
	}

	PG_RETURN_TEXT_P(cstring_to_text(StatusClassName(class)));
}

/*
 * idempotency_release(tenant text, action text, key text, actor text,
 *					   claim uuid) returns boolean
 *
 * Give a claim back without an answer, so that the next repeat runs.  Returns
 * true, or false if this leased claim was released before.
 *
 * Errors: ID001, ID002, ID005 for a claim that was lost, ID008 without a claim,
 * or without its id if it is leased, 22023, 22004, 25006, 40001 in a serializable
 * transaction, 42501.
 */
Datum
idempotency_release(PG_FUNCTION_ARGS)
{
	Scope		scope;
	Claim	   *claim;
	bool		released;

	CallNeedsReadWrite("idempotency_release()");
	ScopeFromArguments(&scope, fcinfo, RELEASE_ACTOR);
	if (ForwardNeeded(&scope))
		return forward_end(fcinfo, "idempotency_release", &scope, BOOLOID);

	claim = find_transaction_claim(&scope, &fcinfo->args[RELEASE_CLAIM]);
	if (claim != NULL)
	{
		report_end(&scope, STATUS_RELEASED, claim->facts.attempt, 0,
				   claim->facts.started_at);
		ClaimForget(claim);
		PG_RETURN_BOOL(true);
	}

	if (PG_ARGISNULL(RELEASE_CLAIM))
		refuse_without_claim(&scope);
	released = release_lease(&scope, PG_GETARG_UUID_P(RELEASE_CLAIM));
	end_own_lease(&scope);
	PG_RETURN_BOOL(released);
}

/*
 * Refuse an answer that cannot be stored: that of a handler, by its OID, or that
 * of the caller, for which the handler is InvalidOid.
 *
 * Errors: 39000 for a handler's; 22004 for a null status and 22023 for the rest
 * of the caller's.
 */
void
FinishCheckAnswer(const Answer *answer, Oid handler)
{
	if (!StatusIsValid(&answer->status_code))
		ereport(ERROR,
				(errcode(OidIsValid(handler) ?
						 ERRCODE_EXTERNAL_ROUTINE_INVOCATION_EXCEPTION :
						 answer->status_code.isnull ?
						 ERRCODE_NULL_VALUE_NOT_ALLOWED :
						 ERRCODE_INVALID_PARAMETER_VALUE),
				 OidIsValid(handler) ?
				 errmsg("handler %s returned a status_code out of range",
						format_procedure(handler)) :
				 answer->status_code.isnull ?
				 errmsg("status_code is missing") :
				 errmsg("status_code is out of range"),
				 errdetail("It must be an HTTP status, from %d to %d.",
						   STATUS_MIN, STATUS_MAX)));

	if (!answer->response.isnull && !answer->body.isnull)
		ereport(ERROR,
				(errcode(OidIsValid(handler) ?
						 ERRCODE_EXTERNAL_ROUTINE_INVOCATION_EXCEPTION :
						 ERRCODE_INVALID_PARAMETER_VALUE),
				 OidIsValid(handler) ?
				 errmsg("handler %s returned both a response and a body",
						format_procedure(handler)) :
				 errmsg("both response and body were given"),
				 errhint("Use response for JSON and body for anything else.")));
}

/*
 * Finish a transaction claim of this transaction.
 *
 * *record is filled in with what was stored, or would have been if the status
 * were not one after which the request may be run again.  Returns what became
 * of the request.  Errors: ID005, ID007, 22023 for a ttl that is out of range.
 */
StatusClass
FinishClaim(const Scope *scope, Claim *claim, const Answer *answer,
			Record *record)
{
	StatusClass class = StatusClassify(DatumGetInt32(answer->status_code.value));
	TimestampTz now = GetCurrentTimestamp();
	int64		ttl = read_ttl(class, answer, claim->ttl);

	RecordInit(record, scope);
	if (claim->facts.fingerprint.len > 0)
		RecordSet(record, request_hash,
				  FingerprintGetBytea(&claim->facts.fingerprint));
	RecordSet(record, attempt, Int32GetDatum(claim->facts.attempt));
	RecordSet(record, created_at, TimestampTzGetDatum(claim->created_at));
	RecordSet(record, expires_at, TimestampTzGetDatum(now + ttl));
	set_answer(record, class, answer, now);

	if (class != STATUS_RELEASED)
	{
		check_size(answer);
		write_record(scope, claim, record);
	}
	ClaimEnd(claim);
	report_end(scope, class, claim->facts.attempt,
			   DatumGetInt32(answer->status_code.value),
			   claim->facts.started_at);

	return class;
}

/*
 * What a call returns that has finished a claim.  Of an answer that is not kept
 * there is no time to tell.
 */
void
FinishedRow(ResultRow *row, StatusClass class, Record *record)
{
	if (class == STATUS_RELEASED)
	{
		RecordSetNull(record, finished_at);
		RecordSetNull(record, expires_at);
	}
	ResultAnswer(row, StatusClassName(class), record);
}

/*
 * Have a claim ended where it is held.
 */
static Datum
forward_end(FunctionCallInfo fcinfo, const char *function, const Scope *scope,
			Oid type)
{
	Datum		result = ForwardGetValue(ForwardCall(fcinfo, function, scope), type);

	ForwardEnded(scope);
	return result;
}

/*
 * Have the end of a claim counted and logged, if it is committed.
 */
static void
report_end(const Scope *scope, StatusClass class, int attempt, int status,
		   TimestampTz since)
{
	static const EventClass events[] = {
		[STATUS_COMPLETED] = EVENT_COMPLETED,
		[STATUS_ERRORED] = EVENT_ERRORED,
		[STATUS_RELEASED] = EVENT_RELEASED,
	};
	Event		event = {
		.class = events[class],
		.name = &scope->name,
		.attempt = attempt,
		.status = status,
		.since = since,
	};

	EventAtCommit(&event);
}

/*
 * How long an answer is to be kept, in microseconds; begun is what was asked for
 * at begin.
 *
 * Errors: 22023.
 */
static int64
read_ttl(StatusClass class, const Answer *answer, int64 begun)
{
	if (class != STATUS_COMPLETED)
		return CallReadErrorTtl(&answer->ttl);
	return answer->ttl.isnull ? begun : CallReadTtl(&answer->ttl);
}

/*
 * Refuse an answer that is too large to be kept.
 */
static void
check_size(const Answer *answer)
{
	CallCheckSize("answer with its headers",
				  CallGetSize(&answer->response) +
				  CallGetSize(&answer->headers) +
				  CallGetSize(&answer->body));
}

/*
 * Find the transaction claim that this transaction holds on a scope, null if it
 * has none.
 *
 * Who brings the id of a claim means a leased one, which this transaction has
 * then taken over.  Errors: ID005.
 */
static Claim *
find_transaction_claim(const Scope *scope, const NullableDatum *claim_id)
{
	Claim	   *claim = ClaimFindHeld(scope);

	if (claim == NULL || claim_is_leased(&claim->facts))
		return NULL;

	if (!claim_id->isnull)
		ereport(ERROR,
				(errcode(ERRCODE_IDEMPOTENCY_CLAIM_LOST),
				 errmsg("claim was lost"),
				 errdetail("This transaction has begun the request itself, and its claim is not leased.")));
	return claim;
}

/*
 * If the leased claim that was just ended was begun by this transaction, note
 * that.
 */
static void
end_own_lease(const Scope *scope)
{
	Claim	   *claim = ClaimFindHeld(scope);

	if (claim != NULL)
		ClaimEnd(claim);
}

/*
 * Refuse to end a claim that there is not, or that is leased and not named.
 *
 * Errors: ID008.
 */
static void
refuse_without_claim(const Scope *scope)
{
	Store		store;
	Record		record;
	bool		leased;

	StoreOpen(&store, scope, RowExclusiveLock);
	leased = StoreFind(&store, scope, GetCurrentTimestamp(),
					   &record) == RECORD_LIVE &&
		RecordGetState(&record) == RECORD_PENDING;
	StoreClose(&store);

	ereport(ERROR,
			(errcode(ERRCODE_IDEMPOTENCY_OUT_OF_ORDER),
			 errmsg("no such claim"),
			 leased ?
			 errdetail("The claim on the request is leased, and the call does not bring its id.") :
			 errdetail("This transaction did not begin the request, or has already ended the claim."),
			 leased ?
			 errhint("Give the claim that idempotency_begin returned.") :
			 errhint("Do the work only when the outcome of idempotency_begin is \"started\".")));
}

/*
 * Finish a leased claim.
 */
static StatusClass
finish_lease(const Scope *scope, const pg_uuid_t *claim_id,
			 const Answer *answer)
{
	StatusClass class = StatusClassify(DatumGetInt32(answer->status_code.value));
	int64		ttl = read_ttl(class, answer, 0);
	TimestampTz now;
	Store		store;
	Record		record;

	if (class != STATUS_RELEASED)
		check_size(answer);

	StoreOpen(&store, scope, RowExclusiveLock);
	LeaseFind(&store, scope, claim_id, &record);
	now = GetCurrentTimestamp();

	if (is_finished(&record, answer, &class))
	{
		/* the caller did not get to know, and asks again */
		StoreClose(&store);
		return class;
	}

	if (RecordGetState(&record) != RECORD_PENDING || LeaseIsReleased(&record))
		refuse_ended();
	report_end(scope, class, DatumGetInt32(RecordValue(&record, attempt)),
			   DatumGetInt32(answer->status_code.value),
			   DatumGetTimestampTz(RecordValue(&record, created_at)));
	if (class == STATUS_RELEASED)
		LeaseRelease(&store, &record);
	else
	{
		TimestampTz expires_at = now + ttl;

		if (class == STATUS_COMPLETED)
			expires_at = LeaseGetAnswerExpiry(&record, now, ttl > 0 ? ttl :
											  LeaseGetTtl(&record));
		RecordSet(&record, expires_at, TimestampTzGetDatum(expires_at));
		set_answer(&record, class, answer, now);
		StoreUpdate(&store, &record);
	}
	StoreClose(&store);

	return class;
}

/*
 * Whether a leased claim was ended before in the same way.
 *
 * *class is what the status means by today's settings, and is set to what it
 * meant when the answer was stored.
 */
static bool
is_finished(const Record *record, const Answer *answer, StatusClass *class)
{
	RecordState state = RecordGetState(record);

	if (state == RECORD_PENDING)
		return *class == STATUS_RELEASED && LeaseIsReleased(record);

	*class = (state == RECORD_COMPLETED) ? STATUS_COMPLETED : STATUS_ERRORED;
	return same_value(RecordValue(record, status_code),
					  RecordIsNull(record, status_code),
					  &answer->status_code, sizeof(int32)) &&
		same_value(RecordValue(record, response),
				   RecordIsNull(record, response), &answer->response, -1) &&
		same_value(RecordValue(record, headers),
				   RecordIsNull(record, headers), &answer->headers, -1) &&
		same_value(RecordValue(record, body),
				   RecordIsNull(record, body), &answer->body, -1);
}

/*
 * Whether two values are the same, byte for byte.
 */
static bool
same_value(Datum stored, bool stored_isnull, const NullableDatum *given,
		   int typlen)
{
	if (stored_isnull || given->isnull)
		return stored_isnull == given->isnull;
	return datum_image_eq(stored, given->value, typlen > 0, typlen);
}

/*
 * Release a leased claim.  Returns false if that was done before.
 */
static bool
release_lease(const Scope *scope, const pg_uuid_t *claim_id)
{
	Store		store;
	Record		record;
	bool		released = false;

	StoreOpen(&store, scope, RowExclusiveLock);
	LeaseFind(&store, scope, claim_id, &record);
	if (RecordGetState(&record) != RECORD_PENDING)
		refuse_ended();
	if (!LeaseIsReleased(&record))
	{
		report_end(scope, STATUS_RELEASED,
				   DatumGetInt32(RecordValue(&record, attempt)), 0,
				   DatumGetTimestampTz(RecordValue(&record, created_at)));
		LeaseRelease(&store, &record);
		released = true;
	}
	StoreClose(&store);

	return released;
}

/*
 * Refuse to end a claim that has ended in another way.
 */
static void
refuse_ended(void)
{
	ereport(ERROR,
			(errcode(ERRCODE_IDEMPOTENCY_CLAIM_LOST),
			 errmsg("claim was lost"),
			 errdetail("It has already ended, in another way.")));
}

/*
 * Write the record of a transaction claim that is finished.
 */
static void
write_record(const Scope *scope, const Claim *claim, Record *record)
{
	Store		store;
	Record		found;
	RecordLife	life = RECORD_ABSENT;

	StoreOpen(&store, scope, RowExclusiveLock);
	if (claim->replaces || claim->takes_over)
		life = StoreFind(&store, scope, GetCurrentTimestamp(), &found);

	if (claim->takes_over && life != RECORD_ABSENT &&
		RecordGetState(&found) == RECORD_PENDING &&
		RecordIsNull(&found, claim) &&
		DatumGetInt32(RecordValue(&found, attempt)) == claim->facts.attempt)
		StoreUpdate(&store, record);
	else
	{
		/* a sweep may have been faster, and anything else fails below */
		if (life == RECORD_EXPIRED)
			(void) StoreDelete(&store, true);
		StoreInsert(&store, record);
	}
	StoreClose(&store);
}

/*
 * Put the answer into a record.  What only a claim needs goes.
 */
static void
set_answer(Record *record, StatusClass class, const Answer *answer,
		   TimestampTz now)
{
	RecordSetState(record, class == STATUS_COMPLETED ? RECORD_COMPLETED :
				   RECORD_ERRORED);
	RecordSetNullable(record, status_code, answer->status_code);
	RecordSetNullable(record, response, answer->response);
	RecordSetNullable(record, headers, answer->headers);
	RecordSetNullable(record, body, answer->body);
	RecordSet(record, finished_at, TimestampTzGetDatum(now));
	RecordSetNull(record, recovery_point);
	RecordSetNull(record, recovery_state);
	RecordSetNull(record, ttl);
}
