/*-------------------------------------------------------------------------
 *
 * record.h
 *	  Records, and the table that they are in.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_RECORD_H
#define IDEMPOTENCY_RECORD_H

#include "postgres.h"

#include "access/genam.h"
#include "datatype/timestamp.h"
#include "executor/tuptable.h"
#include "request/scope.h"
#include "store/catalog.h"
#include "utils/relcache.h"

struct Store;

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

/*
 * How records are locked and written.  What each of them does is said in store.c,
 * where it is called.
 */
typedef struct StoreMethods
{
	RowLock		(*lock) (struct Store *store, bool wait, Record *record);
	void		(*insert) (struct Store *store, const Record *record);
	bool		(*insert_unless_found) (struct Store *store, const Record *record,
										Record *found);
	void		(*update) (struct Store *store, const Record *record);
	bool		(*delete) (struct Store *store, bool wait);
	void		(*close) (struct Store *store);
} StoreMethods;

/* The table, open for the length of one call */
typedef struct Store
{
	const StoreMethods *methods;
	Relation	rel;			/* to read */
	Relation	shell;			/* what it is a shard of, null if it is none */
	LOCKMODE	lockmode;		/* that rel is locked with */
	CatalogTableInfo info;
	Relation	index;			/* to look up by; null before the first lookup */
	TupleTableSlot *slot;		/* the row that was found last, if any */
	void	   *writer;			/* of the methods; null before they need it */
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

extern void RecordInit(Record *record, const Scope *scope);
pg_noreturn extern void RecordRaiseLost(void);

#endif							/* IDEMPOTENCY_RECORD_H */
