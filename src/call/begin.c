/*-------------------------------------------------------------------------
 *
 * begin.c
 *	  begin and try_begin: who may run a request.
 *
 * How begin decides.  It looks for a live record, and if there is none, or
 * only that of a leased claim that nobody holds any more, it tries to get the
 * lock of the scope, without waiting:
 *
 *		an answer						replayed, or mismatch
 *		a lease that has not run out	in flight, or mismatch
 *		none, and the lock is ours		started
 *		none, and it is not				in flight, or mismatch
 *
 * A lookup is good for the last two only if it was made after the lock was
 * tried for: in between, another transaction may have committed its record
 * and let the lock go, to be held by a repeat that is just reading the
 * record.  So begin looks again, unless it can tell that the lookup would
 * have had the very same snapshot, which is nearly always so and saves the
 * second search.
 *
 * Only "started" keeps the lock.  A repeat that finds the record at once does
 * not touch it, and one that had to wait for it gives it back before it
 * returns, so that repeats do not wait for each other's transactions.
 *
 * Where there is a row to be taken over or replaced by that of a leased claim,
 * it is locked too (lease.c says why), unless somebody changed it meanwhile;
 * then begin looks again.
 *
 * A caller that brings the id of the very claim that the record is of asks
 * again, because it does not know what became of its first call.  For it, the
 * record is one that nobody holds, and it goes through the same locks; so it
 * cannot get its claim back while somebody else is just taking it over, or while
 * its own first call is still at work.
 *
 * Waiting changes nothing of this: when the wait is over, for whatever reason,
 * begin looks again and decides by the same table, until it has something
 * better to say than "in flight" or the time is up.  It waits for the lock of
 * the scope if that is what another transaction has, and otherwise for the
 * lease to end or run out, without the lock.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "call/begin.h"
#include "call/forward.h"
#include "claim/lease.h"
#include "claim/lock.h"
#include "claim/wake.h"
#include "clock.h"
#include "miscadmin.h"
#include "request/arguments.h"
#include "utils/fmgrprotos.h"
#include "utils/timestamp.h"

typedef enum Outcome
{
	OUTCOME_STARTED,
	OUTCOME_REPLAYED,
	OUTCOME_MISMATCHED,
	OUTCOME_IN_FLIGHT
} Outcome;

/* Arguments of begin and try_begin */
enum
{
	BEGIN_TENANT,
	BEGIN_ACTION,
	BEGIN_KEY,
	BEGIN_REQUEST,
	BEGIN_ACTOR,
	BEGIN_TTL,
	BEGIN_WAIT,
	BEGIN_LEASE,
	BEGIN_REQUEST_HASH,
	BEGIN_CLAIM
};

static Datum begin_request(FunctionCallInfo fcinfo, const char *function,
						   bool raise);
static void forward_begin(FunctionCallInfo fcinfo, const BeginCall *call,
						  bool raise, ResultRow *row);
static Claim *find_own_claim(const BeginCall *call);
static Outcome decide(BeginCall *call);
static Outcome decide_now(BeginCall *call);
static bool may_be_ours(const BeginCall *call);
static bool is_own(const BeginCall *call);
static Outcome decide_by_record(BeginCall *call);
static Outcome decide_by_lock(BeginCall *call);
static void wait_for_holder(BeginCall *call, int wait_ms);
static RowLock lock_row(BeginCall *call);
static void unlock(BeginCall *call);
static Claim *start(BeginCall *call, Claim *own);
static void describe_claim(BeginCall *call, ClaimFacts *facts);
static void write_row(BeginCall *call, const ClaimFacts *facts);
static void report_start(const BeginCall *call, const Claim *claim);
static void tell(const BeginCall *call, Outcome outcome, bool raise,
				 ResultRow *row);

PG_FUNCTION_INFO_V1(idempotency_begin);
PG_FUNCTION_INFO_V1(idempotency_try_begin);

/*
 * idempotency_begin(tenant text, action text, key text, request jsonb,
 *					 actor text, ttl interval, wait interval, lease interval,
 *					 request_hash bytea, claim uuid) returns idempotency_result
 *
 * Claim a request, or get the answer that was given before.
 *
 * Errors: ID001 to ID005 and ID008 as docs/reference.md lists them, 22023 and 22004 for
 * arguments or settings that are out of range or missing, 25006 in a read-only
 * transaction, 40001 in a serializable one, 42501 for another tenant than the
 * role is pinned to, 55000 and 42P10 for a table that is published in such a way
 * that an expired record cannot be deleted.
 */
Datum
idempotency_begin(PG_FUNCTION_ARGS)
{
	return begin_request(fcinfo, "idempotency_begin()", true);
}

/*
 * idempotency_try_begin(the same) returns idempotency_result
 *
 * The same, but a mismatch and a request in flight are outcomes, not errors.
 */
Datum
idempotency_try_begin(PG_FUNCTION_ARGS)
{
	return begin_request(fcinfo, "idempotency_try_begin()", false);
}

/*
 * Begin a request, for begin and for those calls that finish it as well.
 *
 * Returns the claim if it is ours, and *row is then what begin returns.
 * Otherwise returns null, and *row is the stored answer or, unless they are
 * to be raised as errors, that the request is in flight or mismatched.
 *
 * Errors: ID003 and ID004 if so asked, ID005, ID008, 40001.
 */
Claim *
BeginRequest(BeginCall *call, bool raise, ResultRow *row)
{
	Request    *request = &call->request;
	Claim	   *own = find_own_claim(call);
	Claim	   *claim = NULL;
	Outcome		outcome;

	request->called_at = GetCurrentTimestamp();
	StoreOpen(&request->store, &request->scope, RowExclusiveLock);
	outcome = decide(call);
	if (outcome == OUTCOME_STARTED)
	{
		claim = start(call, own);
		report_start(call, claim);
		ResultStarted(row, &claim->facts,
					  claim->takes_over ? &request->record : NULL);
	}
	else
		tell(call, outcome, raise, row);
	StoreClose(&request->store);

	return claim;
}

/*
 * Workhorse of begin and try_begin.
 */
static Datum
begin_request(FunctionCallInfo fcinfo, const char *function, bool raise)
{
	BeginCall	call;
	ResultRow	row;

	CallNeedsReadWrite(function);
	ScopeFromArguments(&call.request.scope, fcinfo, BEGIN_ACTOR);
	FingerprintFromArguments(&call.request.fingerprint, fcinfo,
							 BEGIN_REQUEST, BEGIN_REQUEST_HASH);
	call.ttl = CallReadTtl(&fcinfo->args[BEGIN_TTL]);
	call.wait_ms = CallReadWait(&fcinfo->args[BEGIN_WAIT]);
	call.lease = 0;
	if (!PG_ARGISNULL(BEGIN_LEASE))
		call.lease = CallReadLease(&fcinfo->args[BEGIN_LEASE]);
	call.claim = NULL;
	if (!PG_ARGISNULL(BEGIN_CLAIM))
		call.claim = PG_GETARG_UUID_P(BEGIN_CLAIM);
	if (call.claim != NULL && call.lease == 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("claim was given without lease"),
				 errdetail("A transaction claim has no id.")));
	call.keep_leases = false;

	if (ForwardNeeded(&call.request.scope))
		forward_begin(fcinfo, &call, raise, &row);
	else
		(void) BeginRequest(&call, raise, &row);
	return ResultReturn(fcinfo, &row);
}

/*
 * Have a request begun where its records are.
 */
static void
forward_begin(FunctionCallInfo fcinfo, const BeginCall *call, bool raise,
			  ResultRow *row)
{
	const Scope *scope = &call->request.scope;

	ForwardGetRow(ForwardCall(fcinfo, raise ? "idempotency_begin" :
							  "idempotency_try_begin", scope), row);
	if (call->lease == 0 && strcmp(ResultOutcome(row), "started") == 0)
		ForwardBegun(scope);
}

/*
 * The claim that this transaction holds on the scope, which must be the very one
 * that the caller asks for, or null.
 *
 * Errors: ID008.
 */
static Claim *
find_own_claim(const BeginCall *call)
{
	Claim	   *held = ClaimFindHeld(&call->request.scope);

	if (held == NULL ||
		(call->claim != NULL && claim_is_leased(&held->facts) &&
		 memcmp(&held->facts.claim, call->claim, UUID_LEN) == 0))
		return held;

	ereport(ERROR,
			(errcode(ERRCODE_IDEMPOTENCY_OUT_OF_ORDER),
			 errmsg("request was already begun by this transaction"),
			 errhint("Call idempotency_finish or idempotency_release first.")));
}

/*
 * Decide what becomes of a request, and wait if that can help.
 *
 * With OUTCOME_STARTED the lock of the scope is held, otherwise it is not.
 */
static Outcome
decide(BeginCall *call)
{
	int64		deadline = 0;
	Outcome		outcome;

	call->locked = false;
	call->woken = false;
	if (call->wait_ms > 0)
		deadline = ClockMicros() + (int64) call->wait_ms * 1000;

	while ((outcome = decide_now(call)) == OUTCOME_IN_FLIGHT &&
		   call->wait_ms > 0)
	{
		long		rest_ms = ClockRestMillis(deadline);

		if (rest_ms == 0)
			break;
		wait_for_holder(call, (int) rest_ms);
	}

	if (call->woken)
		WakeDone();
	return outcome;
}

/*
 * Decide what becomes of a request as things are.  The head of this file says
 * how.
 */
static Outcome
decide_now(BeginCall *call)
{
	Request    *request = &call->request;
	bool		tried = call->locked;

	request->locked_out = false;
	request->tracked = false;

	for (;;)
	{
		CHECK_FOR_INTERRUPTS();

		if (RequestLookUp(request) && !may_be_ours(call))
			return decide_by_record(call);

		if (!tried)
		{
			tried = true;
			ScopeSetLocktag(&request->scope);
			call->locked = ClaimTryLock(&request->scope.locktag);
			if (!StoreIsCurrent(&request->store))
				continue;
		}

		if (request->life == RECORD_LIVE && RequestMismatchesRecord(request))
			return decide_by_record(call);
		if (!call->locked)
			return decide_by_lock(call);

		switch (lock_row(call))
		{
			case ROW_LOCKED:
				return OUTCOME_STARTED;
			case ROW_BUSY:
				unlock(call);
				return OUTCOME_IN_FLIGHT;
			case ROW_CHANGED:
				break;
		}
	}
}

/*
 * Whether the live record is that of a claim that we may have if we get its
 * locks.
 */
static bool
may_be_ours(const BeginCall *call)
{
	return !call->keep_leases &&
		(LeaseIsOver(&call->request.record) || is_own(call));
}

/*
 * Whether it is that of the claim that the caller asks for by its id.
 */
static bool
is_own(const BeginCall *call)
{
	return call->claim != NULL && RequestIsPending(&call->request) &&
		LeaseIsOf(&call->request.record, call->claim);
}

/*
 * Decide by a record that is an answer, or that of a claim which is held.
 */
static Outcome
decide_by_record(BeginCall *call)
{
	unlock(call);

	if (RequestMismatchesRecord(&call->request))
		return OUTCOME_MISMATCHED;
	if (RequestIsPending(&call->request))
		return OUTCOME_IN_FLIGHT;
	return OUTCOME_REPLAYED;
}

/*
 * Decide by what is known of the transaction that has the lock.
 */
static Outcome
decide_by_lock(BeginCall *call)
{
	call->request.locked_out = true;
	(void) RequestLookForHolder(&call->request);
	return RequestMismatchesHolder(&call->request) ?
		OUTCOME_MISMATCHED : OUTCOME_IN_FLIGHT;
}

/*
 * Wait until there may be something else to say than "in flight", at most
 * wait_ms milliseconds.
 */
static void
wait_for_holder(BeginCall *call, int wait_ms)
{
	Request    *request = &call->request;

	/* the end of a lease is nothing to who would not take it over */
	if (RequestIsLeased(request) && !call->keep_leases)
		wait_ms = Min(wait_ms, (RequestRestOfLease(request) + 999) / 1000);
	StoreForget(&request->store);

	if (request->locked_out)
	{
		call->locked = ClaimWaitLock(&request->scope.locktag, wait_ms);
		return;
	}

	if (!call->woken)
	{
		/* what happened before we were ready to be woken needs another look */
		WakePrepare(&request->scope);
		call->woken = true;
		return;
	}

	WakeSleep(&request->scope, wait_ms);
}

/*
 * Lock the row that we are about to take over or to replace, if there is one.
 *
 * The result is ROW_BUSY when a transaction, which may take long to commit, has
 * it locked: one that is just ending the claim or, rarely, replacing or
 * sweeping an expired record.
 */
static RowLock
lock_row(BeginCall *call)
{
	Request    *request = &call->request;
	RowLock		lock;

	/* a transaction claim leaves an expired record to finish */
	if (request->life == RECORD_ABSENT ||
		(request->life == RECORD_EXPIRED && call->lease == 0))
		return ROW_LOCKED;

	lock = StoreLock(&request->store, false, &request->record);
	if (lock != ROW_LOCKED)
		request->life = RECORD_ABSENT;
	return lock;
}

/*
 * Give back the lock of the scope, if we have it.
 */
static void
unlock(BeginCall *call)
{
	if (call->locked)
		ClaimUnlock(&call->request.scope.locktag);
	call->locked = false;
}

/*
 * The claim is ours.  Note it, and write its row if it is one with a lease, or
 * was.
 *
 * own is the claim of this transaction that is asked for again, or null.
 */
static Claim *
start(BeginCall *call, Claim *own)
{
	Request    *request = &call->request;
	Claim	   *claim;
	ClaimFacts	facts;

	describe_claim(call, &facts);
	write_row(call, &facts);

	if (own != NULL)
		ClaimEnd(own);
	claim = ClaimAdd(&request->scope, &facts);
	claim->replaces = (request->life == RECORD_EXPIRED);
	claim->takes_over = (request->life == RECORD_LIVE);
	if (claim->takes_over)
		claim->created_at = DatumGetTimestampTz(RecordValue(&request->record,
															created_at));
	claim->ttl = call->ttl;
	return claim;
}

/*
 * What there is to say about the claim that we got.
 *
 * Errors: ID005 when the caller asks again for a claim that it has released.
 */
static void
describe_claim(BeginCall *call, ClaimFacts *facts)
{
	const Record *record = &call->request.record;
	bool		takes_over = (call->request.life == RECORD_LIVE);
	TimestampTz now = GetCurrentTimestamp();

	call->regained = takes_over && is_own(call);
	call->stalled = takes_over && !call->regained &&
		!RecordIsNull(record, lease_expires_at);
	if (call->regained && LeaseIsReleased(record))
		ereport(ERROR,
				(errcode(ERRCODE_IDEMPOTENCY_CLAIM_LOST),
				 errmsg("claim was lost"),
				 errdetail("It was released."),
				 errhint("Bring a new claim id for each try.")));

	facts->started_at = now;
	facts->lease_expires_at = DT_NOEND;
	facts->attempt = 1;
	if (takes_over)
		facts->attempt = DatumGetInt32(RecordValue(record, attempt)) +
			(call->regained ? 0 : 1);
	facts->fingerprint = call->request.fingerprint;
	if (facts->fingerprint.len == 0 && takes_over &&
		!RecordIsNull(record, request_hash))
		FingerprintFromBytea(&facts->fingerprint,
							 RecordValue(record, request_hash));

	memset(&facts->claim, 0, UUID_LEN);
	if (call->lease == 0)
		return;
	facts->lease_expires_at = now + call->lease;
	facts->claim = call->claim != NULL ? *call->claim :
		*DatumGetUUIDP(DirectFunctionCall1(gen_random_uuid, (Datum) 0));
}

/*
 * Write what is to be written at begin: the row of a lease, and who has taken
 * one over.  Where finish will have to delete a row, see that it can.
 */
static void
write_row(BeginCall *call, const ClaimFacts *facts)
{
	Request    *request = &call->request;
	Store	   *store = &request->store;

	if (request->life == RECORD_LIVE)
	{
		LeaseTakeOver(store, &request->record, facts, call->ttl);
		WakeAtEnd(&request->scope);
	}
	else if (call->lease > 0)
	{
		if (request->life == RECORD_EXPIRED)
			(void) StoreDelete(store, true);
		LeaseInsert(store, &request->scope, facts, call->ttl);
	}
	else if (request->life == RECORD_EXPIRED)
		StoreCheckPublished(store, CMD_DELETE);
}

/*
 * Have a start counted and logged, and what was in its place before.  Who gets
 * its own claim again has not started anything.
 */
static void
report_start(const BeginCall *call, const Claim *claim)
{
	Event		event = {
		.class = EVENT_STARTED,
		.name = &call->request.scope.name,
		.attempt = claim->facts.attempt,
		.since = call->request.called_at,
	};

	if (call->regained)
		return;
	EventHappened(&event);

	if (claim->replaces)
	{
		event.class = EVENT_EXPIRED;
		EventHappened(&event);
	}
	if (call->stalled)
	{
		event.class = EVENT_TAKEN_OVER;
		EventHappened(&event);
	}
}

/*
 * Tell who did not get the claim why, in a row or by an error.
 */
static void
tell(const BeginCall *call, Outcome outcome, bool raise, ResultRow *row)
{
	const Request *request = &call->request;

	if (outcome == OUTCOME_REPLAYED)
	{
		RequestReport(request, EVENT_REPLAYED);
		ResultAnswer(row, "replayed", &request->record);
	}
	else if (outcome == OUTCOME_MISMATCHED)
	{
		RequestReport(request, EVENT_MISMATCHED);
		if (raise)
			RequestRaiseMismatched();
		ResultMismatched(row);
	}
	else
	{
		RequestReport(request, EVENT_IN_FLIGHT);
		if (raise)
			RequestRaiseInFlight(request);
		ResultPending(row, "in_flight", RequestRetryAfter(request),
					  RequestIsLeased(request) ? RequestAttempt(request) : 0,
					  RequestCreatedAt(request), NULL);
	}
}
