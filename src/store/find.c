/*-------------------------------------------------------------------------
 *
 * find.c
 *	  Finding records.
 *
 * Snapshots.  Who claims a request must have seen every record that was
 * committed before the lock of its scope was got, at every isolation level,
 * or the work would be done twice.  So a lookup uses a new snapshot, not that
 * of the transaction.  In a serializable transaction a scan with a snapshot
 * would also take predicate locks on whole index pages, and requests with
 * neighboring keys would fail each other.  That only one transaction at a
 * time works on a scope is known from its lock and from the unique index, so
 * the scan there reads all versions of a row (SnapshotAny) and picks the one
 * that is in the new snapshot. What is then left to check is that no version
 * was committed that is not in the snapshot which the transaction's other reads
 * had; if there is one, work was done that they do not show, and the transaction
 * cannot be serialized.  That holds also when the record has expired, or was
 * swept: as long as the transaction has its snapshot, vacuum leaves us the
 * version to see.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "access/htup_details.h"
#include "access/relscan.h"
#include "access/skey.h"
#include "access/tableam.h"
#include "access/transam.h"
#include "access/xact.h"
#include "catalog/pg_collation_d.h"
#include "store/find.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

static Snapshot push_lookup_snapshot(Store *store);
static bool fetch_next(Store *store, IndexScanDesc scan);
static bool is_in_snapshot(Store *store, IndexScanDesc scan);
static bool is_too_new(Store *store);
static bool next_expired_entry(Store *store);
static void open_index(Store *store, Oid index);
static void open_slot(Store *store);
static bool fetch_row(Store *store, const Scope *scope);
static void init_scope_keys(ScanKey keys);

/*
 * Find the record of a scope.
 *
 * *record is filled in unless the result is RECORD_ABSENT, and points into
 * the store.  A record whose time is over at now is reported as expired; it
 * is to be treated like none, but its row is in the way of a new one.
 */
RecordLife
StoreFind(Store *store, const Scope *scope, TimestampTz now, Record *record)
{
	if (store->index == NULL)
		open_index(store, RelationGetPrimaryKeyIndex(store->rel, false));

	if (!fetch_row(store, scope))
		return RECORD_ABSENT;

	StoreReadSlot(store, record);
	if (DatumGetTimestampTz(RecordValue(record, expires_at)) <= now)
		return RECORD_EXPIRED;
	return RECORD_LIVE;
}

/*
 * Let go of the row that was found last, before a long wait: as long as it is
 * in a slot its page is pinned, and nobody can vacuum that.
 */
void
StoreForget(Store *store)
{
	if (store->slot != NULL)
		ExecClearTuple(store->slot);
}

/*
 * Whether a lookup made now would find what the last one found.
 *
 * The server counts the transactions that ended with something to show, and a
 * snapshot has the count of the moment when it was made.  If a new snapshot
 * would have the same count as the old one, the two are the same.
 *
 * The count is read without its lock.  Who asks has just tried for the lock of a
 * scope, or looked for its claim in shared memory.  Where a transaction that has
 * ended had it before, the lock of that table lets us see all that it did before
 * it let go, the count among it.
 */
bool
StoreIsCurrent(const Store *store)
{
	return store->snapshot_count != 0 &&
		store->snapshot_count == TransamVariables->xactCompletionCount;
}

/*
 * Fail if the last lookup of a serializable transaction met a version of the
 * record that was committed, but not in the snapshot of the transaction; it does
 * not matter whether that is the row that was found, or whether any was.
 *
 * Errors: 40001.
 */
void
StoreCheckSerializable(Store *store)
{
	if (!store->too_new)
		return;

	ereport(ERROR,
			(errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
			 errmsg("could not serialize access due to concurrent work on the same request"),
			 errhint("Retry the transaction.")));
}

/*
 * Fetch a version of a row that is known to be there, as if it had been found.
 */
void
StoreFetch(Store *store, ItemPointer tid, Record *record)
{
	open_slot(store);
	if (!table_tuple_fetch_row_version(store->rel, tid, SnapshotAny,
									   store->slot))
		elog(ERROR, "failed to fetch idempotency record");
	store->too_new = is_too_new(store);
	StoreReadSlot(store, record);
}

/*
 * The row in the slot, which is the one that was found last, as a record.
 */
void
StoreReadSlot(Store *store, Record *record)
{
	Oid			label;
	RecordState state = 0;

	slot_getallattrs(store->slot);
	memcpy(record->values, store->slot->tts_values, sizeof(record->values));
	memcpy(record->nulls, store->slot->tts_isnull, sizeof(record->nulls));

	label = DatumGetObjectId(RecordValue(record, state));
	while (store->info.states[state] != label)
	{
		if (++state == RECORD_STATES)
			elog(ERROR, "unrecognized state of idempotency record: %u", label);
	}
	RecordSetState(record, state);
}

/*
 * Start to read the records that expire until some time, in the order of the
 * index, after a position.
 *
 * Reading moves the position, from which one may go on in another transaction:
 * the index has entries that expire at once in the order of their rows, so the
 * position need not be that of an entry that is still there.
 *
 * Only so many entries of the index are read, because there may be a lot of
 * them whose rows were deleted but cannot be vacuumed yet.
 */
void
StoreBeginExpired(Store *store, StorePosition *position, TimestampTz until,
				  int entries)
{
	ScanKeyData keys[2];

	ScanKeyInit(&keys[0], 1, BTGreaterEqualStrategyNumber, F_TIMESTAMPTZ_GE,
				TimestampTzGetDatum(position->expires_at));
	ScanKeyInit(&keys[1], 1, BTLessEqualStrategyNumber, F_TIMESTAMPTZ_LE,
				TimestampTzGetDatum(until));

	open_index(store, CatalogFindExpiryIndex(store->rel));
	store->position = position;
	store->entries = entries;
	store->expired = index_beginscan(store->rel, store->index,
									 push_lookup_snapshot(store), NULL, 2, 0,
									 SO_NONE);
	store->expired->xs_want_itup = true;
	index_rescan(store->expired, keys, 2, NULL, 0);
}

/*
 * Read the next of them.  Returns false when there is none, or store->entries
 * have come down to zero.
 */
bool
StoreNextExpired(Store *store, Record *record)
{
	IndexScanDesc scan = store->expired;

	while (scan->xs_heap_continue ||
		   (store->entries > 0 && next_expired_entry(store)))
	{
		if (index_fetch_heap(scan, store->slot) && is_in_snapshot(store, scan))
		{
			StoreReadSlot(store, record);
			return true;
		}
	}
	return false;
}

/*
 * Stop reading expired records.
 */
void
StoreEndExpired(Store *store)
{
	index_endscan(store->expired);
	PopActiveSnapshot();
}

/*
 * Start to read with a snapshot of this moment; PopActiveSnapshot() ends it.
 *
 * What is returned is what to scan with: see the head of this file.
 */
static Snapshot
push_lookup_snapshot(Store *store)
{
	Snapshot	latest = GetLatestSnapshot();

	/* the copy that is pushed does not have it */
	store->snapshot_count = latest->snapXactCompletionCount;
	PushActiveSnapshot(latest);

	return IsolationIsSerializable() ? SnapshotAny : GetActiveSnapshot();
}

/*
 * Fetch the next row of a scan that is in the active snapshot into the slot.
 */
static bool
fetch_next(Store *store, IndexScanDesc scan)
{
	while (index_getnext_slot(scan, ForwardScanDirection, store->slot))
	{
		store->too_new |= is_too_new(store);
		if (is_in_snapshot(store, scan))
			return true;
	}
	return false;
}

/*
 * Whether the row in the slot, in whatever version, was committed by another
 * transaction that the snapshot of this serializable one does not have.
 */
static bool
is_too_new(Store *store)
{
	Snapshot	snapshot;
	TransactionId xmin;

	if (!IsolationIsSerializable())
		return false;
	snapshot = GetTransactionSnapshot();
	if (table_tuple_satisfies_snapshot(store->rel, store->slot, snapshot))
		return false;

	/* it may also be too old, or have been rolled back */
	xmin = HeapTupleHeaderGetXmin(ExecFetchSlotHeapTuple(store->slot, false, NULL)->t_data);
	return TransactionIdIsNormal(xmin) &&
		!TransactionIdIsCurrentTransactionId(xmin) &&
		XidInMVCCSnapshot(xmin, snapshot) &&
		TransactionIdDidCommit(xmin);
}

/*
 * Whether the row that a scan has put into the slot is in the active snapshot.
 */
static bool
is_in_snapshot(Store *store, IndexScanDesc scan)
{
	return scan->xs_snapshot != SnapshotAny ||
		table_tuple_satisfies_snapshot(store->rel, store->slot,
									   GetActiveSnapshot());
}

/*
 * Go on to the next index entry of an expired record, and the position to it.
 *
 * Entries up to the position are passed over.  A look at the row of one that is
 * dead to everybody lets the index forget it; after the first that is not, for
 * an old snapshot has kept it, there is no looking at the others.
 */
static bool
next_expired_entry(Store *store)
{
	IndexScanDesc scan = store->expired;
	StorePosition *position = store->position;
	ItemPointer tid;
	bool		dead = true;

	while ((tid = index_getnext_tid(scan, ForwardScanDirection)) != NULL)
	{
		bool		isnull;
		TimestampTz expires_at =
			DatumGetTimestampTz(index_getattr(scan->xs_itup, 1,
											  scan->xs_itupdesc, &isnull));

		if (expires_at > position->expires_at ||
			ItemPointerCompare(tid, &position->tid) > 0)
		{
			position->expires_at = expires_at;
			position->tid = *tid;
			store->entries--;
			return true;
		}
		if (dead)
			dead = !index_fetch_heap(scan, store->slot) && scan->kill_prior_tuple;
	}
	return false;
}

/*
 * Open an index to read by.
 */
static void
open_index(Store *store, Oid index)
{
	Assert(store->index == NULL);

	store->index = index_open(index, store->lockmode);
	open_slot(store);
}

/*
 * Make a slot for the rows that are found.
 */
static void
open_slot(Store *store)
{
	if (store->slot == NULL)
		store->slot = table_slot_create(store->rel, NULL);
}

/*
 * Read the row of a scope, of which there is at most one, into the slot.
 */
static bool
fetch_row(Store *store, const Scope *scope)
{
	static ScanKeyData keys[SCOPE_PARTS];
	IndexScanDesc scan;
	bool		found;

	/* the same for all scopes, but for the values */
	if (keys[0].sk_attno == InvalidAttrNumber)
		init_scope_keys(keys);

	/* the columns of the index are those of the scope, in an order of its own */
	for (int i = 0; i < SCOPE_PARTS; i++)
	{
		AttrNumber	column = store->index->rd_index->indkey.values[i];

		keys[i].sk_argument = scope->parts[column - 1];
		keys[i].sk_collation = store->index->rd_indcollation[i];
	}

	store->too_new = false;
	scan = index_beginscan(store->rel, store->index,
						   push_lookup_snapshot(store), NULL, SCOPE_PARTS, 0,
						   SO_NONE);
	index_rescan(scan, keys, SCOPE_PARTS, NULL, 0);
	found = fetch_next(store, scan);
	index_endscan(scan);
	PopActiveSnapshot();

	return found;
}

/*
 * Keys to find a scope by, for as long as the process lives; the first is filled
 * in last.
 */
static void
init_scope_keys(ScanKey keys)
{
	MemoryContext oldcontext = MemoryContextSwitchTo(TopMemoryContext);
	FmgrInfo	equal;

	/* each key gets a copy, with the current context */
	fmgr_info(F_TEXTEQ, &equal);
	for (int i = SCOPE_PARTS - 1; i >= 0; i--)
		ScanKeyEntryInitializeWithInfo(&keys[i], 0, i + 1,
									   BTEqualStrategyNumber, InvalidOid,
									   C_COLLATION_OID, &equal, (Datum) 0);
	MemoryContextSwitchTo(oldcontext);
}
