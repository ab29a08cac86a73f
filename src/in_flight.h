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
#include "fingerprint.h"
#include "scope.h"

/* One claim in flight, as everybody may know it */
typedef struct InFlightClaim
{
	LOCKTAG		locktag;		/* hash key */
	int			pid;			/* holder, 0 for a prepared transaction */
	FullTransactionId prepared_xid; /* of that, else invalid */
	TimestampTz started_at;
	Fingerprint fingerprint;
	ScopeName	name;
} InFlightClaim;

extern void InFlightInit(void);
extern bool InFlightTrack(const LOCKTAG *locktag, const ScopeName *name,
						  const Fingerprint *fingerprint,
						  TimestampTz started_at);
extern void InFlightForget(const LOCKTAG *locktag);
extern void InFlightPrepare(const LOCKTAG *locktag);
extern bool InFlightFind(const Scope *scope, InFlightClaim *found);

#endif							/* IDEMPOTENCY_IN_FLIGHT_H */
