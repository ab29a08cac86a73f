/*-------------------------------------------------------------------------
 *
 * begin.h
 *	  Who may run a request.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_BEGIN_H
#define IDEMPOTENCY_BEGIN_H

#include "postgres.h"

#include "call/request.h"
#include "call/result.h"
#include "claim/claim.h"

/* A call of begin; to be filled in but for its state */
typedef struct BeginCall
{
	Request		request;		/* its scope and fingerprint */
	int64		ttl;			/* microseconds */
	int64		lease;			/* microseconds, 0 for a transaction claim */
	const pg_uuid_t *claim;		/* id that the caller brings, or null */
	int			wait_ms;
	bool		keep_leases;	/* the claim of a lease is not taken over */

	/* state of begin.c */
	bool		locked;			/* we have the lock of the scope */
	bool		woken;			/* the end of a lease will wake us */
	bool		stalled;		/* we took over a lease that ran out */
	bool		regained;		/* the claim was the caller's own */
} BeginCall;

extern Claim *BeginRequest(BeginCall *call, bool raise, ResultRow *row);

#endif							/* IDEMPOTENCY_BEGIN_H */
