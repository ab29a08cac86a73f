/*-------------------------------------------------------------------------
 *
 * store.c
 *	  Opening the table of records, and writing them.
 *
 * Everything that touches the rows of idempotency_key for a request is here and in
 * find.c, so that another kind of table could be served by other files with the
 * same functions.  (The watch over leases and the views read it by SQL.)  What
 * the catalogs must say of the table is in catalog.c.
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
 * The unique index decides.  Whatever became of the lock, of two transactions
 * that insert a record for one scope the second waits in the index for the
 * first, and fails when that one commits.  There may be more than one such
 * index: while REINDEX CONCURRENTLY makes the primary key anew, the other one
 * finds duplicates as well, and so does one that it left behind.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/pg_subscription_rel.h"
#include "storage/lmgr.h"
#include "store/catalog.h"
#include "store/store.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

/* What the executor needs to put rows into the table and its indexes */
typedef struct StoreWriter
{
	EState	   *estate;
	ResultRelInfo *target;
	TupleTableSlot *slot;		/* the row to write */
} StoreWriter;

static void open_writer(Store *store, bool speculative);
static void close_writer(Store *store);
static void fill_writer(Store *store, const Record *record);
static bool insert_speculatively(Store *store, List *arbiters);
static void insert_index_entries(StoreWriter *writer);
static bool violates_scope(const ErrorData *edata,
						   const ResultRelInfo *target);
static List *get_scope_indexes(const ResultRelInfo *target);

/*
 * Open the table of this database for one call.
 *
 * The lock is kept to the end of the transaction, as a statement would keep
 * it.  Errors: those of CatalogOpenTable.
 */
void
StoreOpen(Store *store, LOCKMODE lockmode)
{
	store->rel = CatalogOpenTable(lockmode, store->states);
	store->lockmode = lockmode;
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
	StoreFetch(store, &conflict, found);
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
		ExecInsertIndexTuples(writer->target, writer->estate,
							  update_indexes == TU_Summarizing ?
							  EIIT_IS_UPDATE | EIIT_ONLY_SUMMARIZING :
							  EIIT_IS_UPDATE,
							  writer->slot, NIL, NULL);
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
								GetCurrentCommandId(true), 0,
								InvalidSnapshot, InvalidSnapshot,
								wait, &failure);
	store->changed |= (result == TM_Ok);
	return result == TM_Ok;
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
insert_index_entries(StoreWriter *writer)
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
