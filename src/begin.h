/*-------------------------------------------------------------------------
 *
 * begin.h
 *	  What a request is told.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_BEGIN_H
#define IDEMPOTENCY_BEGIN_H

#include "postgres.h"

#include "claim.h"
#include "result.h"
#include "store.h"

/* A call of begin, and what it finds */
typedef struct Request
{
	/* to be filled in by the caller */
	Scope		scope;
	Fingerprint fingerprint;
	int64		ttl;			/* microseconds */
	int64		error_ttl;		/* microseconds */
	int64		lease;			/* microseconds, 0 for a transaction claim */
	int			wait_ms;

	/* state of begin.c */
	Store		store;
	bool		locked;			/* we have the lock of the scope, */
	bool		locked_out;		/* or another transaction has it */
	bool		woken;			/* the end of a lease will wake us */
	TimestampTz called_at;
	RecordLife	life;
	Record		record;			/* unless life is RECORD_ABSENT */
	bool		stalled;		/* it was of a lease that ran out */
	bool		tracked;		/* somebody else's claim is known: */
	InFlightClaim holder;
} Request;

extern Claim *BeginRequest(Request *request, bool raise, ResultRow *row);

#endif							/* IDEMPOTENCY_BEGIN_H */
