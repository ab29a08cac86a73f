/*-------------------------------------------------------------------------
 *
 * direct.c
 *	  Locking and writing records by the access methods.
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
 * to have it find and write its record, and it does so as the caller.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "access/tableam.h"
#include "access/xact.h"
#include "storage/lmgr.h"
#include "store/catalog.h"
#include "store/direct.h"
#include "store/find.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

/* What the executor needs to put rows into the table and its indexes */
typedef struct Writer
{
	EState	   *estate;
	ResultRelInfo *target;
	TupleTableSlot *slot;		/* the row to write */
} Writer;

static RowLock lock_row(Store *store, bool wait, Record *record);
static void insert(Store *store, const Record *record);
static bool insert_unless_found(Store *store, const Record *record,
								Record *found);
static void update(Store *store, const Record *record);
static bool delete_row(Store *store, bool wait);
static void close_writer(Store *store);
static Writer *open_writer(Store *store, bool speculative);
static void fill_writer(Store *store, const Record *record);
static bool insert_speculatively(Store *store, List *arbiters);
static void insert_index_entries(Writer *writer);
static bool violates_scope(const ErrorData *edata,
						   const ResultRelInfo *target);
static List *get_scope_indexes(const ResultRelInfo *target);

const StoreMethods DirectMethods = {
	.lock = lock_row,
	.insert = insert,
	.insert_unless_found = insert_unless_found,
	.update = update,
	.delete = delete_row,
	.close = close_writer
};

/*
 * See StoreLock().
 */
static RowLock
lock_row(Store *store, bool wait, Record *record)
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
			StoreReadSlot(store, record);
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
 * See StoreInsert().
 */
static void
insert(Store *store, const Record *record)
{
	Writer	   *writer = open_writer(store, false);

	fill_writer(store, record);
	simple_table_tuple_insert(store->rel, writer->slot);
	insert_index_entries(writer);
}

/*
 * See StoreInsertUnlessFound().
 */
static bool
insert_unless_found(Store *store, const Record *record, Record *found)
{
	Writer	   *writer = open_writer(store, true);
	List	   *arbiters = get_scope_indexes(writer->target);
	ItemPointerData conflict;
	ItemPointerData none;
	bool		inserted = false;

	fill_writer(store, record);
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
	StoreFetch(store, &conflict, found);
	return false;
}

/*
 * See StoreUpdate().
 */
static void
update(Store *store, const Record *record)
{
	Writer	   *writer = open_writer(store, false);
	TU_UpdateIndexes update_indexes;

	fill_writer(store, record);
	simple_table_tuple_update(store->rel, &store->slot->tts_tid, writer->slot,
							  InvalidSnapshot, &update_indexes);
	if (update_indexes != TU_None)
		ExecInsertIndexTuples(writer->target, writer->estate,
							  update_indexes == TU_Summarizing ?
							  EIIT_IS_UPDATE | EIIT_ONLY_SUMMARIZING :
							  EIIT_IS_UPDATE,
							  writer->slot, NIL, NULL);
}

/*
 * See StoreDelete().
 */
static bool
delete_row(Store *store, bool wait)
{
	TM_FailureData failure;
	TM_Result	result = table_tuple_delete(store->rel, &store->slot->tts_tid,
											GetCurrentCommandId(true), 0,
											InvalidSnapshot, InvalidSnapshot,
											wait, &failure);

	store->changed |= (result == TM_Ok);
	return result == TM_Ok;
}

/*
 * Let go of what it takes to write, but for the locks: those of the indexes are
 * kept to the end of the transaction, like that of the table.
 */
static void
close_writer(Store *store)
{
	Writer	   *writer = store->writer;
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
 * Get ready to write, for as long as the table is open.
 *
 * With speculative, also to insert only where nothing is in the way.
 */
static Writer *
open_writer(Store *store, bool speculative)
{
	Writer	   *writer = store->writer;

	if (writer != NULL)
		return writer;

	writer = palloc_object(Writer);
	writer->estate = CreateExecutorState();

	/*
	 * In a serializable transaction the server reads the row that is in the way
	 * of a speculative insertion by the snapshot of the statement, for a
	 * predicate lock.  By this one it takes none, as our own lookups do not.
	 */
	writer->estate->es_snapshot = SnapshotAny;
	writer->target = makeNode(ResultRelInfo);
	InitResultRelInfo(writer->target, store->rel, 0, NULL, 0);
	ExecOpenIndices(writer->target, speculative);
	writer->slot = MakeSingleTupleTableSlot(RelationGetDescr(store->rel),
											&TTSOpsVirtual);
	store->writer = writer;
	return writer;
}

/*
 * Put a record into the row to write, and check it.
 */
static void
fill_writer(Store *store, const Record *record)
{
	Writer	   *writer = store->writer;
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
		ObjectIdGetDatum(store->info.states[RecordGetState(record)]);
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
	Writer	   *writer = store->writer;
	TransactionId xid = GetCurrentTransactionId();
	uint32		token = SpeculativeInsertionLockAcquire(xid);
	bool		conflict = false;

	table_tuple_insert_speculative(store->rel, writer->slot,
								   GetCurrentCommandId(true), 0, NULL, token);
	ExecInsertIndexTuples(writer->target, writer->estate, EIIT_NO_DUPE_ERROR,
						  writer->slot, arbiters, &conflict);
	table_tuple_complete_speculative(store->rel, writer->slot, token, !conflict);
	SpeculativeInsertionLockRelease(xid);

	return !conflict;
}

/*
 * Put a row into the indexes, and say what it means when one of them has an
 * entry for its scope already.
 */
static void
insert_index_entries(Writer *writer)
{
	MemoryContext oldcontext = CurrentMemoryContext;

	PG_TRY();
	{
		ExecInsertIndexTuples(writer->target, writer->estate, 0, writer->slot,
							  NIL, NULL);
	}
	PG_CATCH();
	{
		ErrorData  *edata;

		MemoryContextSwitchTo(oldcontext);
		edata = CopyErrorData();
		if (!violates_scope(edata, writer->target))
			PG_RE_THROW();

		FlushErrorState();
		RecordRaiseLost();
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

		if (CatalogIsScopeIndex(index) &&
			strcmp(RelationGetRelationName(index), edata->constraint_name) == 0)
			return true;
	}
	return false;
}

/*
 * The OIDs of the indexes that keep a scope from having two rows.
 */
static List *
get_scope_indexes(const ResultRelInfo *target)
{
	List	   *result = NIL;

	for (int i = 0; i < target->ri_NumIndices; i++)
	{
		Relation	index = target->ri_IndexRelationDescs[i];

		if (CatalogIsScopeIndex(index))
			result = lappend_oid(result, RelationGetRelid(index));
	}
	return result;
}
