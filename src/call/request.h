/*-------------------------------------------------------------------------
 *
 * request.h
 *	  A request, and what is known of it.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_REQUEST_H
#define IDEMPOTENCY_REQUEST_H

#include "postgres.h"

#include "claim/in_flight.h"
#include "observe/event.h"
#include "store/store.h"

/* A request that somebody asks about, and what was found when looking last */
typedef struct Request
{
	/* to be filled in by the caller */
	Scope		scope;
	Fingerprint fingerprint;

	Store		store;			/* to be opened by the caller */
	TimestampTz called_at;		/* also by the caller */
	RecordLife	life;
	Record		record;			/* unless life is RECORD_ABSENT */
	bool		locked_out;		/* another transaction has the lock of the scope */
	bool		tracked;		/* its claim is known: */
	InFlightClaim holder;
} Request;

extern bool RequestLookUp(Request *request);
extern bool RequestLookForHolder(Request *request);
extern bool RequestIsPending(const Request *request);
extern bool RequestIsLeased(const Request *request);
extern int64 RequestRestOfLease(const Request *request);
extern int	RequestRetryAfter(const Request *request);
extern TimestampTz RequestCreatedAt(const Request *request);
extern int	RequestAttempt(const Request *request);
extern bool RequestMismatchesRecord(const Request *request);
extern bool RequestMismatchesHolder(const Request *request);
extern void RequestReport(const Request *request, EventClass class);
extern void RequestRaiseMismatched(void);
extern void RequestRaiseInFlight(const Request *request);

#endif							/* IDEMPOTENCY_REQUEST_H */
