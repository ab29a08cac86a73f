/*-------------------------------------------------------------------------
 *
 * store.h
 *	  Finding and writing records.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_STORE_H
#define IDEMPOTENCY_STORE_H

#include "postgres.h"

#include "nodes/nodes.h"
#include "request/scope.h"
#include "store/find.h"
#include "store/record.h"

extern void StoreOpen(Store *store, const Scope *scope, LOCKMODE lockmode);
extern Oid	StoreNextPart(Oid from);
extern bool StoreOpenPart(Store *store, Oid part, LOCKMODE lockmode);
extern void StoreClose(Store *store);
extern void StoreCheckPublished(Store *store, CmdType command);
extern bool StoreIsSubscribed(Store *store);
extern RowLock StoreLock(Store *store, bool wait, Record *record);
extern void StoreInsert(Store *store, const Record *record);
extern bool StoreInsertUnlessFound(Store *store, const Record *record,
								   Record *found);
extern void StoreUpdate(Store *store, const Record *record);
extern bool StoreDelete(Store *store, bool wait);

#endif							/* IDEMPOTENCY_STORE_H */
