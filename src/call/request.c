/*-------------------------------------------------------------------------
 *
 * request.c
 *	  A request, and what is known of it.
 *
 * There are two places to look.  The table has the record, if the request was
 * answered or has a leased claim.  Shared memory knows of the claims of
 * transactions, as far as it goes (in_flight.c).  What begin, replay and forget
 * make of that is their affair; how to look, and how to tell of what was found,
 * is here.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "call/request.h"
#include "observe/metrics.h"
#include "settings.h"
#include "utils/timestamp.h"

/* A claim is asked for again no later than this, however long it was held */
#define MAX_RETRY_AFTER_SECS	60

/*
 * Look for a record; returns whether there is a live one.
 *
 * Errors: 40001 when work was committed on the scope that the snapshot of a
 * serializable transaction does not show.
 */
bool
RequestLookUp(Request *request)
{
	TimestampTz now = GetCurrentTimestamp();

	request->life = StoreFind(&request->store, &request->scope, now,
							  &request->record);
	if (MetricsEnabled())
		MetricsTime(MetricsFind(ScopeNameAction(&request->scope.name)),
					METRIC_LOOKUP_TIME, METRIC_LOOKUP_TIME_HISTOGRAM,
					GetCurrentTimestamp() - now);
	StoreCheckSerializable(&request->store);

	return request->life == RECORD_LIVE;
}

/*
 * Look for the claim of a transaction, by the lock tag of the scope; returns
 * whether one is known.
 */
bool
RequestLookForHolder(Request *request)
{
	request->tracked = InFlightFind(&request->scope, &request->holder);
	return request->tracked;
}

/*
 * Whether the record is that of a leased claim, whatever became of that.
 */
bool
RequestIsPending(const Request *request)
{
	return request->life == RECORD_LIVE &&
		RecordGetState(&request->record) == RECORD_PENDING;
}

/*
 * Whether a request is in flight because of a lease, which had not run out when
 * it was looked up.
 */
bool
RequestIsLeased(const Request *request)
{
	return !request->locked_out && RequestIsPending(request) &&
		!RecordIsNull(&request->record, lease_expires_at);
}

/*
 * How long the lease of the record will last, in microseconds.
 */
int64
RequestRestOfLease(const Request *request)
{
	TimestampTz end = DatumGetTimestampTz(RecordValue(&request->record,
													  lease_expires_at));

	return Max(end - GetCurrentTimestamp(), 0);
}

/*
 * When a repeat of a request in flight should come again, in whole seconds, as
 * the HTTP header Retry-After has it (RFC 9110, section 10.2.3), and at least 1.
 *
 * A lease says how long it lasts.  Of a transaction claim is only known since
 * when it is held: what has taken long will probably take longer, so the
 * longer, the later; but never later than a client would want to wait.
 */
int
RequestRetryAfter(const Request *request)
{
	int64		held = 0;

	if (RequestIsLeased(request))
		return (int) Max((RequestRestOfLease(request) + USECS_PER_SEC - 1) /
						 USECS_PER_SEC, 1);

	if (request->tracked)
		held = (GetCurrentTimestamp() - request->holder.facts.started_at +
				USECS_PER_SEC - 1) / USECS_PER_SEC;

	return (int) Max(idempotency_retry_after, Min(held, MAX_RETRY_AFTER_SECS));
}

/*
 * When a request in flight was begun first, 0 if that is not known.
 */
TimestampTz
RequestCreatedAt(const Request *request)
{
	if (RequestIsPending(request))
		return DatumGetTimestampTz(RecordValue(&request->record, created_at));
	return request->tracked ? request->holder.facts.started_at : 0;
}

/*
 * Which attempt works on a request in flight, 0 if that is not known.
 */
int
RequestAttempt(const Request *request)
{
	if (request->tracked)
		return request->holder.facts.attempt;
	return RequestIsPending(request) ?
		DatumGetInt32(RecordValue(&request->record, attempt)) : 0;
}

/*
 * Whether the record, which is live, is of a different request.
 */
bool
RequestMismatchesRecord(const Request *request)
{
	Fingerprint stored;

	if (request->fingerprint.len == 0 ||
		RecordIsNull(&request->record, request_hash))
		return false;

	FingerprintFromBytea(&stored, RecordValue(&request->record, request_hash));
	return FingerprintDiffers(&request->fingerprint, &stored);
}

/*
 * Whether the claim of a transaction is on a different request, as far as that
 * is known.
 */
bool
RequestMismatchesHolder(const Request *request)
{
	return request->tracked &&
		FingerprintDiffers(&request->fingerprint,
						   &request->holder.facts.fingerprint);
}

/*
 * Have it counted and logged what somebody is told who did not get the claim.
 */
void
RequestReport(const Request *request, EventClass class)
{
	Event		event = {
		.class = class,
		.name = &request->scope.name,
		.since = request->called_at,
	};

	if (class == EVENT_REPLAYED)
	{
		event.attempt = DatumGetInt32(RecordValue(&request->record, attempt));
		event.status = DatumGetInt32(RecordValue(&request->record, status_code));
	}
	else if (class == EVENT_IN_FLIGHT)
		event.attempt = RequestAttempt(request);

	EventHappened(&event);
}

/*
 * Raise the error for a different request.
 *
 * Who sent it may be anybody, and learns nothing of the first one from it.
 */
void
RequestRaiseMismatched(void)
{
	ereport(ERROR,
			(errcode(ERRCODE_IDEMPOTENCY_MISMATCH),
			 errmsg("idempotency key was used with a different request"),
			 errhint("Send a new key with a new request, and repeat a request unchanged.")));
}

/*
 * Raise the error for a request in flight.
 */
void
RequestRaiseInFlight(const Request *request)
{
	const InFlightClaim *holder = &request->holder;
	double		held = 0;

	if (request->tracked)
		held = Max(GetCurrentTimestamp() - holder->facts.started_at, 0) /
			(double) USECS_PER_SEC;

	ereport(ERROR,
			(errcode(ERRCODE_IDEMPOTENCY_IN_FLIGHT),
			 errmsg("request with this idempotency key is in flight"),
			 RequestIsLeased(request) && RequestRestOfLease(request) == 0 ?
			 errdetail("The lease of attempt %d has run out, and nobody has taken it over.",
					   RequestAttempt(request)) :
			 RequestIsLeased(request) ?
			 errdetail("The lease of attempt %d runs out in %.3f s.",
					   RequestAttempt(request),
					   RequestRestOfLease(request) / (double) USECS_PER_SEC) :
			 !request->tracked ? 0 :
			 holder->pid != 0 ?
			 errdetail("Process %d has held the claim for %.3f s.",
					   holder->pid, held) :
			 errdetail("A prepared transaction has held the claim for %.3f s.",
					   held),
			 errhint("Retry after %d s.", RequestRetryAfter(request))));
}
