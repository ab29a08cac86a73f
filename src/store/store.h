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

#include "access/genam.h"
#include "datatype/timestamp.h"
#include "executor/tuptable.h"
#include "nodes/nodes.h"
#include "request/scope.h"
#include "store/catalog.h"
#include "utils/relcache.h"

/* What a lookup finds */
typedef enum RecordLife
{
	RECORD_ABSENT,
	RECORD_EXPIRED,				/* to be treated as absent */
	RECORD_LIVE
} RecordLife;

/*
 * A record as the columns of its row; a column is at [Anum - 1].
 *
 * The state is a RecordState, and becomes a value of the enum only in the row
 * that is written: who keeps a record while the table may be replaced (a handler
 * can do that) has nothing in it that belongs to the old one.
 */
typedef struct Record
{
	Datum		values[Natts_idempotency_key];
	bool		nulls[Natts_idempotency_key];
} Record;

#define RecordValue(record, column) \
	((record)->values[Anum_idempotency_key_##column - 1])
#define RecordIsNull(record, column) \
	((record)->nulls[Anum_idempotency_key_##column - 1])
#define RecordSet(record, column, value) \
	((record)->values[Anum_idempotency_key_##column - 1] = (value), \
	 (record)->nulls[Anum_idempotency_key_##column - 1] = false)
#define RecordSetNullable(record, column, datum) \
	((record)->values[Anum_idempotency_key_##column - 1] = (datum).value, \
	 (record)->nulls[Anum_idempotency_key_##column - 1] = (datum).isnull)
#define RecordSetNull(record, column) \
	((record)->nulls[Anum_idempotency_key_##column - 1] = true)

/* What became of an attempt to lock a row */
typedef enum RowLock
{
	ROW_LOCKED,
	ROW_BUSY,					/* somebody else has it locked */
	ROW_CHANGED					/* somebody updated or deleted it */
} RowLock;

/* How far the reading of expired records has got */
typedef struct StorePosition
{
	TimestampTz expires_at;
	ItemPointerData tid;		/* among those that expire at once */
} StorePosition;

/* The table, open for the length of one call */
typedef struct Store
{
	Relation	rel;
	LOCKMODE	lockmode;
	Oid			states[RECORD_STATES];	/* labels of its enum */
	Relation	index;			/* to look up by; null before the first lookup */
	TupleTableSlot *slot;		/* the row that was found last, if any */
	struct StoreWriter *writer; /* null before the first insert or update */
	bool		changed;		/* something was written */
	uint64		snapshot_count; /* of the last lookup, see StoreIsCurrent() */
	bool		too_new;		/* see StoreCheckSerializable() */
	IndexScanDesc expired;		/* while expired records are being read */
	StorePosition *position;	/* of the last of them */
	int			entries;		/* of the index, that may still be read */
} Store;

/* The state of a record */
static inline RecordState
RecordGetState(const Record *record)
{
	return (RecordState) DatumGetInt32(RecordValue(record, state));
}

static inline void
RecordSetState(Record *record, RecordState state)
{
	RecordSet(record, state, Int32GetDatum(state));
}

extern void StoreOpen(Store *store, LOCKMODE lockmode);
extern void StoreClose(Store *store);
extern RecordLife StoreFind(Store *store, const Scope *scope, TimestampTz now,
							Record *record);
extern void StoreFetch(Store *store, ItemPointer tid, Record *record);
extern void StoreForget(Store *store);
extern bool StoreIsCurrent(const Store *store);
extern void StoreCheckSerializable(Store *store);
extern void StoreCheckPublished(Store *store, CmdType command);
extern bool StoreIsSubscribed(Store *store);
extern RowLock StoreLock(Store *store, bool wait, Record *record);
extern void StoreInsert(Store *store, const Record *record);
extern bool StoreInsertUnlessFound(Store *store, const Record *record,
								   Record *found);
extern void StoreUpdate(Store *store, const Record *record);
extern bool StoreDelete(Store *store, bool wait);

extern void StoreBeginExpired(Store *store, StorePosition *position,
							  TimestampTz until, int entries);
extern bool StoreNextExpired(Store *store, Record *record);
extern void StoreEndExpired(Store *store);

extern void RecordInit(Record *record, const Scope *scope);

#endif							/* IDEMPOTENCY_STORE_H */
