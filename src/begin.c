/*-------------------------------------------------------------------------
 *
 * begin.c
 *	  begin, try_begin and replay: what a request is told.
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
 * Waiting changes nothing of this: when the wait is over, for whatever reason,
 * begin looks again and decides by the same table, until it has something
 * better to say than "in flight" or the time is up.  It waits for the lock of
 * the scope if that is what another transaction has, and otherwise for the
 * lease to end or run out, without the lock.
 *
 *-------------------------------------------------------------------------
 */
#include "idempotency.h"

#include "begin.h"
#include "call.h"
#include "event.h"
#include "lease.h"
#include "metrics.h"
#include "miscadmin.h"
#include "utils/timestamp.h"
#include "wake.h"

/* A claim is asked for again no later than this, however long it was held */
#define MAX_RETRY_AFTER_SECS	60

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
	BEGIN_REQUEST_HASH
};

/* Arguments of replay */
enum
{
	REPLAY_TENANT,
	REPLAY_ACTION,
	REPLAY_KEY,
	REPLAY_REQUEST,
	REPLAY_ACTOR,
	REPLAY_REQUEST_HASH
};

static Datum begin_request(FunctionCallInfo fcinfo, const char *function,
						   bool raise);
static Outcome decide(Request *request);
static Outcome decide_now(Request *request);
static Outcome decide_by_record(Request *request);
static Outcome decide_by_lock(Request *request);
static void wait_for_holder(Request *request, int wait_ms);
static bool look_up(Request *request);
static RowLock lock_row(Request *request);
static void unlock(Request *request);
static bool mismatches_record(const Request *request);
static Claim *start(Request *request);
static void report_outcome(const Request *request, Outcome outcome,
						   const Claim *claim);
static void report_start(Event *event, const Request *request,
						 const Claim *claim);
static void raise_outcome(const Request *request, Outcome outcome);
static void raise_in_flight(const Request *request);
static bool is_leased(const Request *request);
static int64 get_rest_of_lease(const Request *request);
static int64 get_retry_after(const Request *request);

PG_FUNCTION_INFO_V1(idempotency_begin);
PG_FUNCTION_INFO_V1(idempotency_try_begin);
PG_FUNCTION_INFO_V1(idempotency_replay);

/*
 * idempotency_begin(tenant text, action text, key text, request jsonb,
 *					 actor text, ttl interval, wait interval, lease interval,
 *					 request_hash bytea) returns idempotency_result
 *
 * Claim a request, or get the answer that was given before.
 *
 * Errors: ID001 to ID005 as README.md lists them, 22023 for a lifetime in the
 * settings above max_ttl, 25006 in a read-only transaction, 40001 in a
 * serializable one, 42501 for another tenant than the role is pinned to.
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
 * idempotency_replay(tenant text, action text, key text, request jsonb,
 *					  actor text, request_hash bytea)
 *					  returns idempotency_result
 *
 * Get a stored answer, also in a read-only transaction or on a standby.  All
 * columns are null when there is none.
 *
 * Errors: ID001, ID002, ID004 for a different request, 40001, 42501.
 */
Datum
idempotency_replay(PG_FUNCTION_ARGS)
{
	Request		request;
	ResultRow	row;

	ScopeFromArguments(&request.scope, fcinfo, REPLAY_ACTOR);
	FingerprintFromArguments(&request.fingerprint, fcinfo,
							 REPLAY_REQUEST, REPLAY_REQUEST_HASH);

	StoreOpen(&request.store, AccessShareLock);
	request.called_at = GetCurrentTimestamp();
	if (look_up(&request) && RecordGetState(&request.record) != RECORD_PENDING)
	{
		if (mismatches_record(&request))
		{
			report_outcome(&request, OUTCOME_MISMATCHED, NULL);
			raise_outcome(&request, OUTCOME_MISMATCHED);
		}
		report_outcome(&request, OUTCOME_REPLAYED, NULL);
		ResultAnswer(&row, "replayed", &request.record);
	}
	else
		ResultNone(&row);
	StoreClose(&request.store);

	return ResultReturn(fcinfo, &row);
}

/*
 * Begin a request, for begin and for run.
 *
 * Returns the claim if it is ours, and *row is then what begin returns.
 * Otherwise returns null, and *row is the stored answer or, unless they are
 * to be raised as errors, that the request is in flight or mismatched.
 *
 * Errors: ID003 and ID004 if so asked, ID005, 40001.
 */
Claim *
BeginRequest(Request *request, bool raise, ResultRow *row)
{
	Claim	   *claim = NULL;
	Outcome		outcome;

	if (ClaimFindHeld(&request->scope) != NULL)
		ereport(ERROR,
				(errcode(ERRCODE_IDEMPOTENCY_NO_CLAIM),
				 errmsg("request was already begun by this transaction"),
				 errhint("Call idempotency_finish or idempotency_release first.")));

	request->called_at = GetCurrentTimestamp();
	StoreOpen(&request->store, RowExclusiveLock);
	outcome = decide(request);
	if (outcome == OUTCOME_STARTED)
		claim = start(request);
	report_outcome(request, outcome, claim);

	if (outcome == OUTCOME_STARTED)
	{
		ResultStarted(row, &claim->facts,
					  claim->takes_over ? &request->record : NULL);
	}
	else if (outcome == OUTCOME_REPLAYED)
		ResultAnswer(row, "replayed", &request->record);
	else
	{
		if (raise)
			raise_outcome(request, outcome);
		if (outcome == OUTCOME_MISMATCHED)
			ResultMismatched(row);
		else
			ResultInFlight(row, get_retry_after(request));
	}
	StoreClose(&request->store);

	return claim;
}

/*
 * Workhorse of begin and try_begin.
 */
static Datum
begin_request(FunctionCallInfo fcinfo, const char *function, bool raise)
{
	Request		request;
	ResultRow	row;

	CallNeedsReadWrite(function);
	ScopeFromArguments(&request.scope, fcinfo, BEGIN_ACTOR);
	FingerprintFromArguments(&request.fingerprint, fcinfo,
							 BEGIN_REQUEST, BEGIN_REQUEST_HASH);
	request.ttl = CallReadTtl(fcinfo, BEGIN_TTL);
	request.error_ttl = CallReadErrorTtl();
	request.wait_ms = CallReadWait(fcinfo, BEGIN_WAIT);
	request.lease = 0;
	if (!PG_ARGISNULL(BEGIN_LEASE))
		request.lease = CallReadLease(fcinfo, BEGIN_LEASE);

	(void) BeginRequest(&request, raise, &row);
	return ResultReturn(fcinfo, &row);
}

/*
 * Decide what becomes of a request, and wait if that can help.
 *
 * With OUTCOME_STARTED the lock of the scope is held, otherwise it is not.
 */
static Outcome
decide(Request *request)
{
	TimestampTz deadline = 0;
	Outcome		outcome;

	request->locked = false;
	request->woken = false;
	if (request->wait_ms > 0)
		deadline = GetCurrentTimestamp() + (int64) request->wait_ms * 1000;

	while ((outcome = decide_now(request)) == OUTCOME_IN_FLIGHT &&
		   request->wait_ms > 0)
	{
		long		rest_ms = TimestampDifferenceMilliseconds(GetCurrentTimestamp(),
															  deadline);

		if (rest_ms <= 0)
			break;
		wait_for_holder(request, (int) rest_ms);
	}

	if (request->woken)
		WakeDone();
	return outcome;
}

/*
 * Decide what becomes of a request as things are.  The head of this file says
 * how.
 */
static Outcome
decide_now(Request *request)
{
	bool		tried = request->locked;

	request->locked_out = false;
	request->tracked = false;

	for (;;)
	{
		CHECK_FOR_INTERRUPTS();

		if (look_up(request) && !LeaseIsOver(&request->record))
			return decide_by_record(request);

		if (!tried)
		{
			tried = true;
			ScopeSetLocktag(&request->scope);
			request->locked = ClaimTryLock(&request->scope.locktag);
			if (!StoreIsCurrent(&request->store))
				continue;
		}

		if (request->life == RECORD_LIVE && mismatches_record(request))
			return decide_by_record(request);
		if (!request->locked)
			return decide_by_lock(request);

		switch (lock_row(request))
		{
			case ROW_LOCKED:
				return OUTCOME_STARTED;
			case ROW_BUSY:
				unlock(request);
				return OUTCOME_IN_FLIGHT;
			case ROW_CHANGED:
				break;
		}
	}
}

/*
 * Decide by a record that is an answer, or that of a claim which is held.
 */
static Outcome
decide_by_record(Request *request)
{
	unlock(request);

	if (mismatches_record(request))
		return OUTCOME_MISMATCHED;
	if (RecordGetState(&request->record) == RECORD_PENDING)
		return OUTCOME_IN_FLIGHT;
	return OUTCOME_REPLAYED;
}

/*
 * Decide by what is known of the transaction that has the lock.
 */
static Outcome
decide_by_lock(Request *request)
{
	request->locked_out = true;
	request->tracked = InFlightFind(&request->scope, &request->holder);
	if (request->tracked &&
		FingerprintDiffers(&request->fingerprint,
						   &request->holder.facts.fingerprint))
		return OUTCOME_MISMATCHED;
	return OUTCOME_IN_FLIGHT;
}

/*
 * Wait until there may be something else to say than "in flight", at most
 * wait_ms milliseconds.
 */
static void
wait_for_holder(Request *request, int wait_ms)
{
	if (is_leased(request))
		wait_ms = Min(wait_ms, (get_rest_of_lease(request) + 999) / 1000);
	StoreForget(&request->store);

	if (request->locked_out)
	{
		request->locked = ClaimWaitLock(&request->scope.locktag, wait_ms);
		return;
	}

	ScopeSetLocktag(&request->scope);
	if (!request->woken)
	{
		/* what happened before we were ready to be woken needs another look */
		WakePrepare(&request->scope);
		request->woken = true;
		return;
	}

	WakeSleep(&request->scope, wait_ms);
}

/*
 * Look for a record; returns whether there is a live one.
 */
static bool
look_up(Request *request)
{
	TimestampTz now = GetCurrentTimestamp();

	request->life = StoreFind(&request->store, &request->scope, now,
							  &request->record);
	if (MetricsEnabled())
		MetricsTime(MetricsFind(ScopeNameAction(&request->scope.name)),
					METRIC_LOOKUP_TIME, METRIC_LOOKUP_TIME_HISTOGRAM,
					GetCurrentTimestamp() - now);
	if (request->life != RECORD_LIVE)
		return false;

	StoreCheckSerializable(&request->store);
	return true;
}

/*
 * Lock the row that we are about to take over or to replace, if there is one.
 *
 * The result is ROW_BUSY when a transaction, which may take long to commit, has
 * it locked: one that is just ending the claim or, rarely, replacing or
 * sweeping an expired record.
 */
static RowLock
lock_row(Request *request)
{
	RowLock		lock;

	/* a transaction claim leaves an expired record to finish */
	if (request->life == RECORD_ABSENT ||
		(request->life == RECORD_EXPIRED && request->lease == 0))
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
unlock(Request *request)
{
	if (request->locked)
		ClaimUnlock(&request->scope.locktag);
	request->locked = false;
}

static bool
mismatches_record(const Request *request)
{
	Fingerprint stored;

	if (request->fingerprint.len == 0 ||
		RecordIsNull(&request->record, request_hash))
		return false;

	FingerprintFromBytea(&stored, RecordValue(&request->record, request_hash));
	return FingerprintDiffers(&request->fingerprint, &stored);
}

/*
 * The claim is ours.  Note it, and write its row if it is one with a lease, or
 * was.
 */
static Claim *
start(Request *request)
{
	Claim	   *claim;
	Record	   *record = &request->record;
	bool		takes_over = (request->life == RECORD_LIVE);
	TimestampTz now = GetCurrentTimestamp();
	ClaimFacts	facts = {
		.attempt = 1,
		.started_at = now,
		.lease_expires_at = request->lease > 0 ? now + request->lease : DT_NOEND,
		.fingerprint = request->fingerprint,
	};

	if (request->life != RECORD_ABSENT)
		facts.attempt = DatumGetInt32(RecordValue(record, attempt)) + 1;

	request->stalled = takes_over && !RecordIsNull(record, lease_expires_at);
	if (takes_over)
	{
		if (facts.fingerprint.len == 0 && !RecordIsNull(record, request_hash))
			FingerprintFromBytea(&facts.fingerprint,
								 RecordValue(record, request_hash));
		LeaseTakeOver(&request->store, record, &facts, request->ttl);
		WakeAtEnd(&request->scope);
	}
	else if (request->lease > 0)
	{
		if (request->life == RECORD_EXPIRED)
			(void) StoreDelete(&request->store, true);
		LeaseInsert(&request->store, &request->scope, &facts, request->ttl);
	}

	claim = ClaimAdd(&request->scope, &facts);
	claim->replaces = (request->life == RECORD_EXPIRED);
	claim->takes_over = takes_over;
	if (takes_over)
		claim->created_at = DatumGetTimestampTz(RecordValue(record, created_at));
	claim->ttl = request->ttl;
	claim->error_ttl = request->error_ttl;
	return claim;
}

/*
 * Have the outcome counted and logged.  claim is null unless it is ours.
 */
static void
report_outcome(const Request *request, Outcome outcome, const Claim *claim)
{
	const Record *record = &request->record;
	Event		event = {
		.name = &request->scope.name,
		.since = request->called_at,
	};

	switch (outcome)
	{
		case OUTCOME_STARTED:
			report_start(&event, request, claim);
			return;
		case OUTCOME_REPLAYED:
			event.class = EVENT_REPLAYED;
			event.attempt = DatumGetInt32(RecordValue(record, attempt));
			event.status = DatumGetInt32(RecordValue(record, status_code));
			break;
		case OUTCOME_MISMATCHED:
			event.class = EVENT_MISMATCHED;
			break;
		case OUTCOME_IN_FLIGHT:
			event.class = EVENT_IN_FLIGHT;
			if (is_leased(request))
				event.attempt = DatumGetInt32(RecordValue(record, attempt));
			else if (request->tracked)
				event.attempt = request->holder.facts.attempt;
			break;
	}
	EventHappened(&event);
}

/*
 * The same for a claim that is ours, and for what was in its place before.
 */
static void
report_start(Event *event, const Request *request, const Claim *claim)
{
	event->attempt = claim->facts.attempt;
	event->class = EVENT_STARTED;
	EventHappened(event);

	if (claim->replaces)
	{
		event->class = EVENT_EXPIRED;
		EventHappened(event);
	}
	if (request->stalled)
	{
		event->class = EVENT_TAKEN_OVER;
		EventHappened(event);
	}
}

/*
 * Raise the error for an outcome that is one.
 *
 * Who sent a different request may be anybody, and learns nothing of the
 * first one from the error.
 */
static void
raise_outcome(const Request *request, Outcome outcome)
{
	if (outcome == OUTCOME_IN_FLIGHT)
		raise_in_flight(request);

	ereport(ERROR,
			(errcode(ERRCODE_IDEMPOTENCY_MISMATCH),
			 errmsg("idempotency key was used with a different request"),
			 errhint("Send a new key with a new request, and repeat a request unchanged.")));
}

static void
raise_in_flight(const Request *request)
{
	const InFlightClaim *holder = &request->holder;
	double		held = 0;

	if (request->tracked)
		held = Max(GetCurrentTimestamp() - holder->facts.started_at, 0) /
			(double) USECS_PER_SEC;

	ereport(ERROR,
			(errcode(ERRCODE_IDEMPOTENCY_IN_FLIGHT),
			 errmsg("request with this idempotency key is in flight"),
			 is_leased(request) ?
			 errdetail("The lease of attempt %d runs out in %.3f s.",
					   DatumGetInt32(RecordValue(&request->record, attempt)),
					   get_rest_of_lease(request) / (double) USECS_PER_SEC) :
			 !request->tracked ? 0 :
			 holder->pid != 0 ?
			 errdetail("Process %d has held the claim for %.3f s.",
					   holder->pid, held) :
			 errdetail("A prepared transaction has held the claim for %.3f s.",
					   held),
			 errhint("Retry after %d s.",
					 (int) ((get_retry_after(request) + USECS_PER_SEC - 1) /
							USECS_PER_SEC))));
}

/*
 * Whether a request is in flight because of a lease, which had not run out when
 * it was looked up.
 */
static bool
is_leased(const Request *request)
{
	return !request->locked_out && request->life == RECORD_LIVE &&
		!RecordIsNull(&request->record, lease_expires_at);
}

/*
 * How long the lease of the record will last, in microseconds.
 */
static int64
get_rest_of_lease(const Request *request)
{
	TimestampTz end = DatumGetTimestampTz(RecordValue(&request->record,
													  lease_expires_at));

	return Max(end - GetCurrentTimestamp(), 0);
}

/*
 * When a repeat of a request in flight should come again, in microseconds.
 *
 * A lease says how long it lasts.  Of a transaction claim is only known since
 * when it is held: what has taken long will probably take longer, so the
 * longer, the later; but never later than a client would want to wait.
 */
static int64
get_retry_after(const Request *request)
{
	int64		least = (int64) idempotency_retry_after;
	int64		held = 0;

	if (is_leased(request))
		return get_rest_of_lease(request);

	if (request->tracked)
		held = (GetCurrentTimestamp() - request->holder.facts.started_at +
				USECS_PER_SEC - 1) / USECS_PER_SEC;

	return Max(least, Min(held, MAX_RETRY_AFTER_SECS)) * USECS_PER_SEC;
}
