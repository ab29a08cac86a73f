/*-------------------------------------------------------------------------
 *
 * replay.c
 *	  replay: what became of a request, for who only wants to know.
 *
 * This is for a page that polls until the answer is there, and for a standby.
 * It claims nothing, takes no lock on the scope, and fences nobody, so that a
 * slow worker is not harmed by who asks after it.
 *
 * A request in flight is seen in the table if it has a lease, and else in
 * shared memory, as far as this server knows of it.  When neither has anything,
 * the claim may have ended with an answer between the two looks.  Its entry goes
 * after its commit can be seen, so that a lookup with a newer snapshot finds the
 * answer; and where there is no newer snapshot, there is none.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "call/forward.h"
#include "call/request.h"
#include "call/result.h"
#include "claim/lease.h"
#include "miscadmin.h"
#include "settings.h"
#include "utils/timestamp.h"

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

static void look(Request *request);
static void look_at_lease(Request *request, ResultRow *row);
static void put_in_flight(Request *request, ResultRow *row);

PG_FUNCTION_INFO_V1(idempotency_replay);

/*
 * idempotency_replay(tenant text, action text, key text, request jsonb,
 *					  actor text, request_hash bytea)
 *					  returns idempotency_result
 *
 * Look what became of a request, also in a read-only transaction or on a
 * standby.  The outcome is replayed with the stored answer; in_flight, or stalled
 * when its lease has run out, with the attempt, the recovery point, when it was
 * begun, and the seconds after which to ask again; or null, as all columns, when
 * nothing is known of it.
 *
 * Errors: ID001, ID002, ID004 for a different request, 22023, 22004, 25000 in
 * parallel mode, 40001, 42501.
 */
Datum
idempotency_replay(PG_FUNCTION_ARGS)
{
	Request		request;
	ResultRow	row;

	PreventCommandIfParallelMode("idempotency_replay()");
	ScopeFromArguments(&request.scope, fcinfo, REPLAY_ACTOR);
	FingerprintFromArguments(&request.fingerprint, fcinfo,
							 REPLAY_REQUEST, REPLAY_REQUEST_HASH);
	if (ForwardNeeded(&request.scope))
		return ForwardRow(fcinfo, "idempotency_replay", &request.scope);

	request.called_at = GetCurrentTimestamp();
	StoreOpen(&request.store, &request.scope, AccessShareLock);
	look(&request);

	if ((request.life == RECORD_LIVE && RequestMismatchesRecord(&request)) ||
		RequestMismatchesHolder(&request))
	{
		RequestReport(&request, EVENT_MISMATCHED);
		RequestRaiseMismatched();
	}

	if (RequestIsPending(&request))
		look_at_lease(&request, &row);
	else if (request.life == RECORD_LIVE)
	{
		RequestReport(&request, EVENT_REPLAYED);
		ResultAnswer(&row, "replayed", &request.record);
	}
	else if (request.tracked)
		put_in_flight(&request, &row);
	else
		ResultNone(&row);
	StoreClose(&request.store);

	return ResultReturn(fcinfo, &row);
}

/*
 * Look for an answer or a lease, and where there is neither, or a lease that
 * somebody may be taking over, for the claim of a transaction.
 */
static void
look(Request *request)
{
	bool		tagged = false;

	request->tracked = false;
	request->locked_out = false;

	for (;;)
	{
		CHECK_FOR_INTERRUPTS();

		if (RequestLookUp(request) && !LeaseIsOver(&request->record))
			return;
		if (!tagged)
			ScopeSetLocktag(&request->scope);
		tagged = true;
		if (RequestLookForHolder(request) || StoreIsCurrent(&request->store))
			return;
	}
}

/*
 * What there is to tell of a request with the record of a leased claim.
 *
 * One that was released has nobody who works on it, and no answer; of that there
 * is as little to tell as of a transaction claim that was released.
 */
static void
look_at_lease(Request *request, ResultRow *row)
{
	if (request->tracked || !LeaseIsOver(&request->record))
		put_in_flight(request, row);
	else if (LeaseIsReleased(&request->record))
		ResultNone(row);
	else
		ResultPending(row, "stalled", idempotency_retry_after,
					  RequestAttempt(request), RequestCreatedAt(request),
					  &request->record);
}

static void
put_in_flight(Request *request, ResultRow *row)
{
	request->locked_out = request->tracked;
	ResultPending(row, "in_flight", RequestRetryAfter(request),
				  RequestAttempt(request), RequestCreatedAt(request),
				  RequestIsPending(request) ? &request->record : NULL);
}
