/*-------------------------------------------------------------------------
 *
 * store.c
 *	  Finding and writing records.
 *
 * Everything that touches the table idempotency_key is here, so that another
 * kind of table could be served by another file with the same functions.
 *
 * The calls that every request makes do not go through SPI: planning aside,
 * starting and ending an executor costs more than the work.  They use the
 * table and index access methods directly, as the system catalogs do, and
 * therefore have to do what the executor would have done:
 *
 * - Callers refuse read-only transactions and parallel mode.
 * - All indexes of the table are maintained, also those that an administrator
 *   added, by the executor's own function; check constraints are checked.
 * - Triggers and rules would be passed over, so a table that has any is
 *   refused.  That includes the triggers of a foreign key that references the
 *   table, which a sweep would break.
 * - The command counter is incremented after a write, so that the next call of
 *   the same transaction sees it.
 *
 * No permissions are checked here.  The right to call a function is the right
 * to have it find and write its record, and nothing runs as another role.
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
 * The unique index decides.  Whatever became of the lock, of two transactions
 * that insert a record for one scope the second waits in the index for the
 * first, and fails when that one commits.  There may be more than one such
 * index: while REINDEX CONCURRENTLY makes the primary key anew, the other one
 * finds duplicates as well, and so does one that it left behind.
 *
 *-------------------------------------------------------------------------
 */
#include "idempotency.h"

#include "access/htup_details.h"
#include "access/relscan.h"
#include "access/skey.h"
#include "access/tableam.h"
#include "access/transam.h"
#include "access/xact.h"
#include "catalog/pg_am_d.h"
#include "catalog/pg_collation_d.h"
#include "catalog/pg_enum.h"
#include "catalog/pg_subscription_rel.h"
#include "catalog/pg_type_d.h"
#include "storage/lmgr.h"
#include "store.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"

#define TABLE_NAME		"idempotency_key"
#define STATE_TYPE		"idempotency_state"
#define RESULT_TYPE		"idempotency_result"
#define RESPONSE_TYPE	"idempotency_response"

/* A column that the table must have; no type stands for the state type */
typedef struct StoreColumn
{
	const char *name;
	Oid			type;
} StoreColumn;

/* What the catalogs say, good until the table's relcache entry is flushed */
typedef struct StoreCatalog
{
	bool		valid;
	Oid			table;
	Oid			result_type;
	Oid			response_type;
	Oid			states[RECORD_STATES];
} StoreCatalog;

/* What the executor needs to put rows into the table and its indexes */
typedef struct StoreWriter
{
	EState	   *estate;
	ResultRelInfo *target;
	TupleTableSlot *slot;		/* the row to write */
} StoreWriter;

static void forget_catalog(Datum arg, Oid relid);
static Relation look_up_catalog(LOCKMODE lockmode);
static Oid	find_table(Oid *schema);
static Oid	find_type(const char *name, Oid schema);
static void check_shape(Relation rel, Oid state_type);
static void refuse_shape(Relation rel);
static void check_primary_key(Relation rel);
static Oid	find_expiry_index(Relation rel);
static void check_writable(Relation rel);
static const StoreCatalog *get_catalog(void);
static Snapshot push_lookup_snapshot(Store *store);
static bool fetch_next(Store *store, IndexScanDesc scan);
static bool is_in_snapshot(Store *store, IndexScanDesc scan);
static bool is_too_new(Store *store);
static bool next_expired_entry(Store *store);
static void open_index(Store *store, Oid index);
static void open_slot(Store *store);
static bool fetch_row(Store *store, const Scope *scope);
static void init_scope_keys(ScanKey keys);
static void get_record(Store *store, Record *record);
static void open_writer(Store *store, bool speculative);
static void close_writer(Store *store);
static void fill_writer(Store *store, const Record *record);
static bool insert_speculatively(Store *store, List *arbiters);
static void insert_index_entries(StoreWriter *writer);
static bool violates_scope(const ErrorData *edata,
						   const ResultRelInfo *target);
static bool is_scope_index(Relation index);
static List *get_scope_indexes(const ResultRelInfo *target);

static const StoreColumn columns[Natts_idempotency_key] = {
	{"tenant", TEXTOID},
	{"action", TEXTOID},
	{"key", TEXTOID},
	{"actor", TEXTOID},
	{"state", InvalidOid},
	{"request_hash", BYTEAOID},
	{"status_code", INT4OID},
	{"headers", JSONBOID},
	{"response", JSONOID},
	{"body", BYTEAOID},
	{"claim", UUIDOID},
	{"attempt", INT4OID},
	{"recovery_point", TEXTOID},
	{"recovery_state", JSONBOID},
	{"lease_expires_at", TIMESTAMPTZOID},
	{"created_at", TIMESTAMPTZOID},
	{"finished_at", TIMESTAMPTZOID},
	{"expires_at", TIMESTAMPTZOID},
	{"ttl", INTERVALOID},
};

static const char *const state_labels[RECORD_STATES] = {
	[RECORD_PENDING] = "pending",
	[RECORD_COMPLETED] = "completed",
	[RECORD_ERRORED] = "errored",
};

static StoreCatalog catalog = {0};

/*
 * Hook into the invalidation of cached catalog entries.
 */
void
StoreInit(void)
{
	CacheRegisterRelcacheCallback(forget_catalog, (Datum) 0);
}

/*
 * The table of this database.
 *
 * Errors: 42704 without the extension, 42P01 without its table.
 */
Oid
StoreTable(void)
{
	Oid			schema;

	return find_table(&schema);
}

/*
 * Open the table of this database for one call.
 *
 * The lock is kept to the end of the transaction, as a statement would keep
 * it.  Errors: 55000 when the table is not the one that this library
 * was made for, 0A000 when it has triggers or rules or is a partition.
 */
void
StoreOpen(Store *store, LOCKMODE lockmode)
{
	Relation	rel;

	if (catalog.valid)
		LockRelationOid(catalog.table, lockmode);

	/*
	 * The table may have been altered or replaced while we waited for it.  If
	 * so, the lock on the old one goes with the transaction.
	 */
	if (catalog.valid)
		rel = table_open(catalog.table, NoLock);
	else
		rel = look_up_catalog(lockmode);

	if (lockmode >= RowExclusiveLock)
		check_writable(rel);

	store->rel = rel;
	store->lockmode = lockmode;
	memcpy(store->states, catalog.states, sizeof(store->states));
	store->index = NULL;
	store->slot = NULL;
	store->writer = NULL;
	store->changed = false;
	store->too_new = false;
}

/*
 * Close the table, and make what was written visible to the next call.
 *
 * Records that were found before must not be used any more.
 */
void
StoreClose(Store *store)
{
	if (store->writer != NULL)
		close_writer(store);
	if (store->changed)
		CommandCounterIncrement();
	if (store->slot != NULL)
		ExecDropSingleTupleTableSlot(store->slot);
	if (store->index != NULL)
		index_close(store->index, NoLock);
	table_close(store->rel, NoLock);
}

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

	get_record(store, record);
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
 * Fail if a row could not be updated, or deleted, because of how the table is
 * published, while there is still nothing to lose.
 *
 * Errors: 55000 without a replica identity, 42P10 when the filter of a
 * publication has columns that are not in it.
 */
void
StoreCheckPublished(Store *store, CmdType command)
{
	CheckCmdReplicaIdentity(store->rel, command);
}

/*
 * Whether a subscription of this database writes to the table, enabled or not.
 */
bool
StoreIsSubscribed(Store *store)
{
	Relation	rel = table_open(SubscriptionRelRelationId, AccessShareLock);
	ScanKeyData key;
	SysScanDesc scan;
	bool		found;

	ScanKeyInit(&key, Anum_pg_subscription_rel_srrelid, BTEqualStrategyNumber,
				F_OIDEQ, ObjectIdGetDatum(RelationGetRelid(store->rel)));
	scan = systable_beginscan(rel, SubscriptionRelSrrelidSrsubidIndexId, true,
							  NULL, 1, &key);
	found = HeapTupleIsValid(systable_getnext(scan));
	systable_endscan(scan);
	table_close(rel, AccessShareLock);

	return found;
}

/*
 * Lock the row that was found last, if it is still what was found.
 *
 * Otherwise nothing is locked, and the caller has to look again: a lock on
 * what has become of the row could not be given back before the end of the
 * transaction, whatever the caller thinks of it.  If we may not wait for
 * whoever has it locked, the result can be ROW_BUSY.  *record is filled in
 * anew with ROW_LOCKED, and not to be used any more with the others.
 */
RowLock
StoreLock(Store *store, bool wait, Record *record)
{
	ItemPointerData tid = store->slot->tts_tid;
	TM_FailureData failure;
	TM_Result	result;

	result = table_tuple_lock(store->rel, &tid, InvalidSnapshot, store->slot,
							  GetCurrentCommandId(false),
							  LockTupleNoKeyExclusive,
							  wait ? LockWaitBlock : LockWaitSkip,
							  0, &failure);
	switch (result)
	{
		case TM_Ok:
			get_record(store, record);
			return ROW_LOCKED;
		case TM_WouldBlock:
			return ROW_BUSY;
		case TM_Updated:
		case TM_Deleted:
			return ROW_CHANGED;
		default:
			elog(ERROR, "unexpected table_tuple_lock status: %u", result);
	}
}

/*
 * Insert a record.
 *
 * Errors: ID005 when another transaction committed a record for the scope.
 */
void
StoreInsert(Store *store, const Record *record)
{
	open_writer(store, false);
	fill_writer(store, record);
	simple_table_tuple_insert(store->rel, store->writer->slot);
	insert_index_entries(store->writer);
}

/*
 * Insert a record, unless there is a row for its scope.
 *
 * Whoever is just inserting one is waited for.  Returns whether the record was
 * inserted; if not, *found is filled in with the row that is there, which is
 * committed or our own.
 */
bool
StoreInsertUnlessFound(Store *store, const Record *record, Record *found)
{
	StoreWriter *writer;
	List	   *arbiters;
	ItemPointerData conflict;
	ItemPointerData none;
	bool		inserted = false;

	open_writer(store, true);
	fill_writer(store, record);
	writer = store->writer;
	arbiters = get_scope_indexes(writer->target);

	ItemPointerSetInvalid(&none);
	while (!inserted &&
		   ExecCheckIndexConstraints(writer->target, writer->slot,
									 writer->estate, &conflict, &none,
									 arbiters))
		inserted = insert_speculatively(store, arbiters);
	list_free(arbiters);
	if (inserted)
		return true;

	/* vacuum leaves it alone: it was live after our snapshot was made */
	open_slot(store);
	if (!table_tuple_fetch_row_version(store->rel, &conflict, SnapshotAny,
									   store->slot))
		elog(ERROR, "failed to fetch conflicting idempotency record");
	store->too_new = is_too_new(store);
	get_record(store, found);
	return false;
}

/*
 * Change the row that was found last, and is locked, to a record.
 *
 * Errors: those of StoreCheckPublished.
 */
void
StoreUpdate(Store *store, const Record *record)
{
	StoreWriter *writer;
	TU_UpdateIndexes update_indexes;

	StoreCheckPublished(store, CMD_UPDATE);
	open_writer(store, false);
	fill_writer(store, record);
	writer = store->writer;

	simple_table_tuple_update(store->rel, &store->slot->tts_tid, writer->slot,
							  InvalidSnapshot, &update_indexes);
	if (update_indexes != TU_None)
		ExecInsertIndexTuples(writer->target, writer->slot, writer->estate,
							  true, false, NULL, NIL,
							  updates_only_summarizing(update_indexes));
}

/*
 * Delete the row that was found last.
 *
 * Returns false when somebody else deleted it first or, unless we may wait,
 * has it locked.  Errors: those of StoreCheckPublished.
 */
bool
StoreDelete(Store *store, bool wait)
{
	TM_FailureData failure;
	TM_Result	result;

	StoreCheckPublished(store, CMD_DELETE);
	result = table_tuple_delete(store->rel, &store->slot->tts_tid,
								GetCurrentCommandId(true),
								InvalidSnapshot, InvalidSnapshot,
								wait, &failure, false);
	store->changed |= (result == TM_Ok);
	return result == TM_Ok;
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

	open_index(store, find_expiry_index(store->rel));
	store->position = position;
	store->entries = entries;
	store->expired = index_beginscan(store->rel, store->index,
									 push_lookup_snapshot(store), NULL, 2, 0);
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
			get_record(store, record);
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
 * Make a record of a scope; all other columns are null.
 */
void
RecordInit(Record *record, const Scope *scope)
{
	memset(record->values, 0, sizeof(record->values));
	memset(record->nulls, true, sizeof(record->nulls));

	for (int i = 0; i < SCOPE_PARTS; i++)
	{
		record->values[i] = scope->parts[i];
		record->nulls[i] = false;
	}
}

/*
 * The row type that calls return.
 */
Oid
StoreResultType(void)
{
	return get_catalog()->result_type;
}

/*
 * The row type that a handler may return.
 */
Oid
StoreResponseType(void)
{
	return get_catalog()->response_type;
}

/*
 * What the catalogs say of the extension that is there now, which need not be
 * the one that was there when the caller began.
 */
static const StoreCatalog *
get_catalog(void)
{
	if (!catalog.valid)
	{
		Store		store;

		StoreOpen(&store, AccessShareLock);
		StoreClose(&store);
	}
	return &catalog;
}

/*
 * Relation cache callback: the table changed, or anything may have.
 */
static void
forget_catalog(Datum arg, Oid relid)
{
	if (relid == InvalidOid || relid == catalog.table)
		catalog.valid = false;
}

/*
 * Open the table, and find our other objects.
 *
 * With the table locked, nothing about it can change any more; but what has
 * its name may be another table by the time that we have the lock.
 */
static Relation
look_up_catalog(LOCKMODE lockmode)
{
	Oid			schema;
	Oid			table;
	Oid			state_type;
	Relation	rel;

	for (;;)
	{
		table = find_table(&schema);
		rel = try_table_open(table, lockmode);
		if (rel != NULL && find_table(&schema) == table)
			break;
		if (rel != NULL)
			table_close(rel, lockmode);
	}

	state_type = find_type(STATE_TYPE, schema);
	check_shape(rel, state_type);
	check_primary_key(rel);

	catalog.table = table;
	catalog.result_type = find_type(RESULT_TYPE, schema);
	catalog.response_type = find_type(RESPONSE_TYPE, schema);
	for (int i = 0; i < RECORD_STATES; i++)
	{
		catalog.states[i] = GetSysCacheOid2(ENUMTYPOIDNAME, Anum_pg_enum_oid,
											ObjectIdGetDatum(state_type),
											CStringGetDatum(state_labels[i]));
		if (!OidIsValid(catalog.states[i]))
			refuse_shape(rel);
	}
	if (!OidIsValid(catalog.result_type) || !OidIsValid(catalog.response_type))
		refuse_shape(rel);
	catalog.valid = true;

	return rel;
}

/*
 * Find the table by the schema of the extension, whatever the search_path.
 */
static Oid
find_table(Oid *schema)
{
	Oid			table;

	*schema = get_extension_schema(get_extension_oid(EXTENSION_NAME, false));
	table = get_relname_relid(TABLE_NAME, *schema);
	if (!OidIsValid(table))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("table \"%s\" of extension \"%s\" does not exist",
						TABLE_NAME, EXTENSION_NAME)));
	return table;
}

static Oid
find_type(const char *name, Oid schema)
{
	return GetSysCacheOid2(TYPENAMENSP, Anum_pg_type_oid,
						   CStringGetDatum(name), ObjectIdGetDatum(schema));
}

/*
 * Refuse a table that this library does not know how to read: it belongs to
 * another version of the extension, or somebody altered it.
 */
static void
check_shape(Relation rel, Oid state_type)
{
	TupleDesc	desc = RelationGetDescr(rel);
	bool		matches = desc->natts >= Natts_idempotency_key &&
		rel->rd_rel->relkind == RELKIND_RELATION;

	for (int i = 0; matches && i < Natts_idempotency_key; i++)
	{
		Form_pg_attribute attr = TupleDescAttr(desc, i);
		Oid			type = columns[i].type;

		if (type == InvalidOid)
			type = state_type;
		matches = !attr->attisdropped && attr->atttypid == type &&
			strcmp(NameStr(attr->attname), columns[i].name) == 0;

		/* lookups compare the columns of the primary key by bytes */
		if (i < SCOPE_PARTS && attr->attcollation != C_COLLATION_OID)
			matches = false;
	}

	/* columns that somebody added and dropped again stay behind as nulls */
	for (int i = Natts_idempotency_key; matches && i < desc->natts; i++)
		matches = TupleDescAttr(desc, i)->attisdropped;

	if (!matches)
		refuse_shape(rel);
}

static void
refuse_shape(Relation rel)
{
	ereport(ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("table \"%s\" is not the one that the loaded library was made for",
					RelationGetRelationName(rel)),
			 errhint("Run ALTER EXTENSION idempotency UPDATE, and undo changes to the table and its types.")));
}

/*
 * Refuse to work without the index that everything rests on.
 */
static void
check_primary_key(Relation rel)
{
	Oid			oid = RelationGetPrimaryKeyIndex(rel, false);
	bool		matches = OidIsValid(oid);

	if (matches)
	{
		Relation	index = index_open(oid, AccessShareLock);

		matches = is_scope_index(index);
		index_close(index, AccessShareLock);
	}

	if (!matches)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("table \"%s\" has no valid primary key on tenant, action, key and actor",
						RelationGetRelationName(rel)),
				 errdetail("Without it nothing keeps a request from being run twice.")));
}

/*
 * The index that has records in the order of their expiry, and of their place
 * in the table when they expire at once; with a second column it would not.
 *
 * What the predicate of a partial index says does not matter.  To ask the
 * relation cache for it would evaluate its constant parts, which are functions
 * of the table's owner, with the rights of whoever sweeps.
 */
static Oid
find_expiry_index(Relation rel)
{
	List	   *indexes = RelationGetIndexList(rel);
	ListCell   *lc;

	foreach(lc, indexes)
	{
		Relation	index = index_open(lfirst_oid(lc), AccessShareLock);
		Form_pg_index form = index->rd_index;
		bool		matches = index->rd_rel->relam == BTREE_AM_OID &&
			form->indisvalid &&
			form->indnkeyatts == 1 &&
			form->indkey.values[0] == Anum_idempotency_key_expires_at &&
			index->rd_indoption[0] == 0 &&
			heap_attisnull(index->rd_indextuple, Anum_pg_index_indpred, NULL);

		index_close(index, AccessShareLock);
		if (matches)
			return lfirst_oid(lc);
	}

	ereport(ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("table \"%s\" has no valid index on expires_at",
					RelationGetRelationName(rel))));
}

/*
 * Refuse a table whose changes should have consequences that only the
 * executor would see to, or whose rows must be what it would check.
 */
static void
check_writable(Relation rel)
{
	if (rel->rd_rel->relispartition)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("table \"%s\" must not be a partition",
						RelationGetRelationName(rel)),
				 errdetail("Records are written to it directly, whatever its bounds are."),
				 errhint("Use ALTER TABLE ... DETACH PARTITION.")));

	if (rel->trigdesc == NULL && rel->rd_rules == NULL)
		return;

	ereport(ERROR,
			(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
			 errmsg("table \"%s\" must not have triggers, rules or foreign keys that reference it",
					RelationGetRelationName(rel)),
			 errdetail("They would not be run when a record is written or swept."),
			 errhint("Put them on the tables of the application instead.")));
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
	}

	store->too_new = false;
	scan = index_beginscan(store->rel, store->index,
						   push_lookup_snapshot(store), NULL, SCOPE_PARTS, 0);
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
	FmgrInfo	equal;

	fmgr_info_cxt(F_TEXTEQ, &equal, TopMemoryContext);
	for (int i = SCOPE_PARTS - 1; i >= 0; i--)
		ScanKeyEntryInitializeWithInfo(&keys[i], 0, i + 1,
									   BTEqualStrategyNumber, InvalidOid,
									   C_COLLATION_OID, &equal, (Datum) 0);
}

/*
 * The row in the slot as a record.
 */
static void
get_record(Store *store, Record *record)
{
	Oid			label;
	RecordState state = 0;

	slot_getallattrs(store->slot);
	memcpy(record->values, store->slot->tts_values, sizeof(record->values));
	memcpy(record->nulls, store->slot->tts_isnull, sizeof(record->nulls));

	label = DatumGetObjectId(RecordValue(record, state));
	while (store->states[state] != label)
	{
		if (++state == RECORD_STATES)
			elog(ERROR, "unrecognized state of idempotency record: %u", label);
	}
	RecordSetState(record, state);
}

/*
 * Get ready to write, for as long as the table is open.
 *
 * With speculative, also to insert only where nothing is in the way.
 */
static void
open_writer(Store *store, bool speculative)
{
	StoreWriter *writer;

	if (store->writer != NULL)
		return;

	writer = palloc_object(StoreWriter);
	writer->estate = CreateExecutorState();
	writer->target = makeNode(ResultRelInfo);
	InitResultRelInfo(writer->target, store->rel, 0, NULL, 0);
	ExecOpenIndices(writer->target, speculative);
	writer->slot = MakeSingleTupleTableSlot(RelationGetDescr(store->rel),
											&TTSOpsVirtual);
	store->writer = writer;
}

/*
 * Let go of what it takes to write, but for the locks: those of the indexes are
 * kept to the end of the transaction, like that of the table.
 */
static void
close_writer(Store *store)
{
	StoreWriter *writer = store->writer;
	ResultRelInfo *target = writer->target;

	ExecDropSingleTupleTableSlot(writer->slot);
	for (int i = 0; i < target->ri_NumIndices; i++)
	{
		Relation	index = target->ri_IndexRelationDescs[i];

		index_insert_cleanup(index, target->ri_IndexRelationInfo[i]);
		index_close(index, NoLock);
	}
	FreeExecutorState(writer->estate);
}

/*
 * Put a record into the row to write, and check it.
 */
static void
fill_writer(Store *store, const Record *record)
{
	StoreWriter *writer = store->writer;
	TupleTableSlot *slot = writer->slot;

	store->changed = true;
	ResetPerTupleExprContext(writer->estate);
	ExecClearTuple(slot);
	slot->tts_tableOid = RelationGetRelid(store->rel);
	memset(slot->tts_isnull, true,
		   slot->tts_tupleDescriptor->natts * sizeof(bool));
	memcpy(slot->tts_values, record->values, sizeof(record->values));
	memcpy(slot->tts_isnull, record->nulls, sizeof(record->nulls));
	slot->tts_values[Anum_idempotency_key_state - 1] =
		ObjectIdGetDatum(store->states[RecordGetState(record)]);
	ExecStoreVirtualTuple(slot);

	if (store->rel->rd_att->constr)
		ExecConstraints(writer->target, slot, writer->estate);
}

/*
 * Insert the row to write, or nothing if somebody else was faster.
 *
 * This is what INSERT ... ON CONFLICT does: others see the row only when its
 * index entries are there, and whoever meets them before waits for us to say
 * whether it stays (see "Speculative insertion" at the head of the server's
 * execIndexing.c).
 */
static bool
insert_speculatively(Store *store, List *arbiters)
{
	StoreWriter *writer = store->writer;
	TransactionId xid = GetCurrentTransactionId();
	uint32		token = SpeculativeInsertionLockAcquire(xid);
	bool		conflict = false;

	table_tuple_insert_speculative(store->rel, writer->slot,
								   GetCurrentCommandId(true), 0, NULL, token);
	ExecInsertIndexTuples(writer->target, writer->slot, writer->estate,
						  false, true, &conflict, arbiters, false);
	table_tuple_complete_speculative(store->rel, writer->slot, token, !conflict);
	SpeculativeInsertionLockRelease(xid);

	return !conflict;
}

/*
 * Put a row into the indexes, and say what it means when one of them has an
 * entry for its scope already.
 */
static void
insert_index_entries(StoreWriter *writer)
{
	MemoryContext oldcontext = CurrentMemoryContext;

	PG_TRY();
	{
		ExecInsertIndexTuples(writer->target, writer->slot, writer->estate,
							  false, false, NULL, NIL, false);
	}
	PG_CATCH();
	{
		ErrorData  *edata;

		MemoryContextSwitchTo(oldcontext);
		edata = CopyErrorData();
		if (!violates_scope(edata, writer->target))
			PG_RE_THROW();

		FlushErrorState();
		ereport(ERROR,
				(errcode(ERRCODE_IDEMPOTENCY_CLAIM_LOST),
				 errmsg("claim was lost to another transaction"),
				 errdetail("A record for the same request was committed meanwhile."),
				 errhint("Roll back and call idempotency_begin again: it replays the stored answer.")));
	}
	PG_END_TRY();
}

/*
 * Whether an error says that there is a row for the scope already.
 *
 * It may have been raised by anybody's function in an index or a constraint, so
 * that any part of it may be missing.
 */
static bool
violates_scope(const ErrorData *edata, const ResultRelInfo *target)
{
	Relation	rel = target->ri_RelationDesc;

	if (edata->sqlerrcode != ERRCODE_UNIQUE_VIOLATION ||
		edata->table_name == NULL || edata->constraint_name == NULL ||
		strcmp(edata->table_name, RelationGetRelationName(rel)) != 0)
		return false;

	for (int i = 0; i < target->ri_NumIndices; i++)
	{
		Relation	index = target->ri_IndexRelationDescs[i];

		if (is_scope_index(index) &&
			strcmp(RelationGetRelationName(index), edata->constraint_name) == 0)
			return true;
	}
	return false;
}

/*
 * Whether an index keeps a scope from having two rows: the primary key, or what
 * REINDEX CONCURRENTLY is making in its place, or has left there.
 */
static bool
is_scope_index(Relation index)
{
	Form_pg_index form = index->rd_index;
	bool		seen[SCOPE_PARTS] = {false};

	if (!form->indisunique || !form->indimmediate || !form->indisready ||
		form->indnkeyatts != SCOPE_PARTS ||
		!heap_attisnull(index->rd_indextuple, Anum_pg_index_indpred, NULL))
		return false;

	for (int i = 0; i < SCOPE_PARTS; i++)
	{
		AttrNumber	column = form->indkey.values[i];

		/* an expression has column 0 */
		if (column < 1 || column > SCOPE_PARTS || seen[column - 1] ||
			index->rd_indcollation[i] != C_COLLATION_OID)
			return false;
		seen[column - 1] = true;
	}
	return true;
}

/*
 * The OIDs of these indexes.
 */
static List *
get_scope_indexes(const ResultRelInfo *target)
{
	List	   *result = NIL;

	for (int i = 0; i < target->ri_NumIndices; i++)
	{
		Relation	index = target->ri_IndexRelationDescs[i];

		if (is_scope_index(index))
			result = lappend_oid(result, RelationGetRelid(index));
	}
	return result;
}
