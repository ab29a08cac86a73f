/*-------------------------------------------------------------------------
 *
 * lease.h
 *	  Leased claims, which are rows.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_LEASE_H
#define IDEMPOTENCY_LEASE_H

#include "postgres.h"

#include "claim/in_flight.h"
#include "request/scope.h"
#include "store/store.h"

extern void LeaseInsert(Store *store, const Scope *scope,
						const ClaimFacts *facts, int64 ttl);
extern void LeaseTakeOver(Store *store, Record *record,
						  const ClaimFacts *facts, int64 ttl);
extern void LeaseFind(Store *store, const Scope *scope,
					  const pg_uuid_t *claim, Record *record);
extern void LeaseRenew(Record *record, TimestampTz lease_expires_at);
extern void LeaseRelease(Store *store, Record *record);
extern int64 LeaseGetTtl(const Record *record);
extern TimestampTz LeaseGetAnswerExpiry(const Record *record, TimestampTz now,
										int64 ttl);
extern bool LeaseIsOver(const Record *record);
extern bool LeaseIsOf(const Record *record, const pg_uuid_t *claim);
extern bool LeaseIsReleased(const Record *record);

#endif							/* IDEMPOTENCY_LEASE_H */
