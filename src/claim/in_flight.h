/*-------------------------------------------------------------------------
 *
 * in_flight.h
 *	  Claims in flight, described in shared memory.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_IN_FLIGHT_H
#define IDEMPOTENCY_IN_FLIGHT_H

#include "postgres.h"

#include "access/transam.h"
#include "datatype/timestamp.h"
#include "request/fingerprint.h"
#include "request/scope.h"
#include "utils/uuid.h"

/* What there is to know about a claim beside its scope */
typedef struct ClaimFacts
{
	pg_uuid_t	claim;			/* of a leased claim; the right to it, and shown
								 * to nobody but who began it */
	int			attempt;
	TimestampTz started_at;
	TimestampTz lease_expires_at;	/* DT_NOEND for a transaction claim */
	Fingerprint fingerprint;
} ClaimFacts;

/* One claim in flight, as everybody may know it */
typedef struct InFlightClaim
{
	LOCKTAG		locktag;		/* hash key */
	int			pid;			/* holder, 0 for a prepared transaction */
	FullTransactionId prepared_xid; /* of that, else invalid */
	ClaimFacts	facts;
	ScopeName	name;
} InFlightClaim;

static inline bool
claim_is_leased(const ClaimFacts *facts)
{
	return facts->lease_expires_at != DT_NOEND;
}

extern void InFlightInit(void);
extern bool InFlightTrack(const LOCKTAG *locktag, const ScopeName *name,
						  const ClaimFacts *facts);
extern void InFlightForget(const LOCKTAG *locktag);
extern void InFlightPrepare(const LOCKTAG *locktag);
extern bool InFlightAnyPrepared(void);
extern bool InFlightFind(const Scope *scope, InFlightClaim *found);

#endif							/* IDEMPOTENCY_IN_FLIGHT_H */
