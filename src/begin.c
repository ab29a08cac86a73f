/*-------------------------------------------------------------------------
 *
 * begin.c
 *	  begin, try_begin and replay: what a request is told.
 *
 * How begin decides.  It looks for a live record, and if there is none it
 * tries to get the lock of the scope, without waiting:
 *
 *		live record						replayed, or mismatch
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
 * Waiting changes nothing of this: when the wait is over, with the lock or
 * without, begin looks again and decides by the same table.
 *
 *-------------------------------------------------------------------------
 */
#include "idempotency.h"

#include "call.h"
#include "claim.h"
#include "in_flight.h"
#include "result.h"
#include "store.h"
#include "utils/timestamp.h"

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

/* A call of begin, and what it finds */
typedef struct Request
{
	Scope		scope;
	Fingerprint fingerprint;
	int64		ttl;			/* microseconds */
	int64		error_ttl;		/* microseconds */
	int			wait_ms;
	Store		store;
	RecordLife	life;
	Record		record;			/* unless life is RECORD_ABSENT */
	bool		tracked;		/* somebody else's claim is known: */
	InFlightClaim holder;
} Request;

static Datum begin_request(FunctionCallInfo fcinfo, const char *function,
						   bool raise);
static Outcome decide(Request *request);
static bool look_up(Request *request);
static bool mismatches_record(const Request *request);
static void raise_outcome(const Request *request, Outcome outcome);
static void raise_in_flight(const Request *request);
static int64 get_retry_after(const Request *request);

PG_FUNCTION_INFO_V1(idempotency_begin);
PG_FUNCTION_INFO_V1(idempotency_try_begin);
PG_FUNCTION_INFO_V1(idempotency_replay);

/*
 * idempotency_begin(tenant text, action text, key text, request jsonb,
 *					 actor text, ttl interval, wait interval,
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
	Datum		result;

	ScopeFromArguments(&request.scope, fcinfo, REPLAY_ACTOR);
	FingerprintFromArguments(&request.fingerprint, fcinfo,
							 REPLAY_REQUEST, REPLAY_REQUEST_HASH);

	StoreOpen(&request.store, AccessShareLock);
	if (look_up(&request) && StoreGetState(&request.record) != RECORD_PENDING)
	{
		if (mismatches_record(&request))
			raise_outcome(&request, OUTCOME_MISMATCHED);
		result = ResultReplayed(&request.record);
	}
	else
		result = ResultNone();
	StoreClose(&request.store);

	return result;
}

/*
 * Workhorse of begin and try_begin.
 */
static Datum
begin_request(FunctionCallInfo fcinfo, const char *function, bool raise)
{
	Request		request;
	Outcome		outcome;
	Datum		result;

	CallNeedsReadWrite(function);
	ScopeFromArguments(&request.scope, fcinfo, BEGIN_ACTOR);
	FingerprintFromArguments(&request.fingerprint, fcinfo,
							 BEGIN_REQUEST, BEGIN_REQUEST_HASH);
	request.ttl = CallReadTtl(fcinfo, BEGIN_TTL);
	request.error_ttl = CallReadErrorTtl();
	request.wait_ms = CallReadWait(fcinfo, BEGIN_WAIT);

	if (ClaimFindHeld(&request.scope) != NULL)
		ereport(ERROR,
				(errcode(ERRCODE_IDEMPOTENCY_NO_CLAIM),
				 errmsg("request was already begun by this transaction"),
				 errhint("Call idempotency_finish or idempotency_release first.")));

	StoreOpen(&request.store, RowExclusiveLock);
	outcome = decide(&request);

	if (outcome == OUTCOME_STARTED)
	{
		Claim	   *claim = ClaimAdd(&request.scope, &request.fingerprint);

		claim->ttl = request.ttl;
		claim->error_ttl = request.error_ttl;
		claim->replaces = (request.life == RECORD_EXPIRED);
		result = ResultStarted(claim->started_at);
	}
	else if (outcome == OUTCOME_REPLAYED)
		result = ResultReplayed(&request.record);
	else
	{
		if (raise)
			raise_outcome(&request, outcome);
		result = outcome == OUTCOME_MISMATCHED ? ResultMismatched() :
			ResultInFlight(get_retry_after(&request));
	}
	StoreClose(&request.store);

	return result;
}

/*
 * Decide what becomes of a request.  The head of this file says how.
 *
 * With OUTCOME_STARTED the lock of the scope is held, otherwise it is not.
 */
static Outcome
decide(Request *request)
{
	int			wait_ms = request->wait_ms;
	bool		tried = false;
	bool		locked = false;
	Outcome		outcome;

	request->tracked = false;

	while (!look_up(request))
	{
		if (!tried)
		{
			tried = true;
			ScopeSetLocktag(&request->scope);
			locked = ClaimTryLock(&request->scope.locktag);
			if (!StoreIsCurrent(&request->store))
				continue;
		}
		if (locked)
			return OUTCOME_STARTED;

		request->tracked = InFlightFind(&request->scope, &request->holder);
		if (request->tracked &&
			FingerprintDiffers(&request->fingerprint,
							   &request->holder.fingerprint))
			return OUTCOME_MISMATCHED;
		if (wait_ms == 0)
			return OUTCOME_IN_FLIGHT;

		locked = ClaimWaitLock(&request->scope.locktag, wait_ms);
		wait_ms = 0;
	}

	if (mismatches_record(request))
		outcome = OUTCOME_MISMATCHED;
	else if (StoreGetState(&request->record) == RECORD_PENDING)
		outcome = OUTCOME_IN_FLIGHT;
	else
		outcome = OUTCOME_REPLAYED;

	request->tracked = false;
	if (locked)
		ClaimUnlock(&request->scope.locktag);
	return outcome;
}

/*
 * Look for a record; returns whether there is a live one.
 */
static bool
look_up(Request *request)
{
	request->life = StoreFind(&request->store, &request->scope,
							  GetCurrentTimestamp(), &request->record);
	return request->life == RECORD_LIVE;
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
		held = Max(GetCurrentTimestamp() - holder->started_at, 0) /
			(double) USECS_PER_SEC;

	ereport(ERROR,
			(errcode(ERRCODE_IDEMPOTENCY_IN_FLIGHT),
			 errmsg("request with this idempotency key is in flight"),
			 !request->tracked ? 0 :
			 holder->pid != 0 ?
			 errdetail("Process %d has held the claim for %.3f s.",
					   holder->pid, held) :
			 errdetail("A prepared transaction has held the claim for %.3f s.",
					   held),
			 errhint("Retry after %d s.",
					 (int) (get_retry_after(request) / USECS_PER_SEC))));
}

/*
 * When a repeat of a request in flight should come again, in microseconds.
 *
 * What has taken long will probably take longer, so the longer the claim was
 * held, the later; but never later than a client would want to wait.
 */
static int64
get_retry_after(const Request *request)
{
	int64		least = (int64) idempotency_retry_after;
	int64		held = 0;

	if (request->tracked)
		held = (GetCurrentTimestamp() - request->holder.started_at +
				USECS_PER_SEC - 1) / USECS_PER_SEC;

	return Max(least, Min(held, MAX_RETRY_AFTER_SECS)) * USECS_PER_SEC;
}
