/*-------------------------------------------------------------------------
 *
 * find.h
 *	  Finding records.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_FIND_H
#define IDEMPOTENCY_FIND_H

#include "postgres.h"

#include "request/scope.h"
#include "store/record.h"

extern RecordLife StoreFind(Store *store, const Scope *scope, TimestampTz now,
							Record *record);
extern void StoreFetch(Store *store, ItemPointer tid, Record *record);
extern void StoreReadSlot(Store *store, Record *record);
extern void StoreForget(Store *store);
extern bool StoreIsCurrent(const Store *store);
extern void StoreCheckSerializable(Store *store);

extern void StoreBeginExpired(Store *store, StorePosition *position,
							  TimestampTz until, int entries);
extern bool StoreNextExpired(Store *store, Record *record);
extern void StoreEndExpired(Store *store);

#endif							/* IDEMPOTENCY_FIND_H */
