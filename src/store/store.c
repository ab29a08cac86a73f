/*-------------------------------------------------------------------------
 *
 * store.c
 *	  Opening the table of records, and writing them.
 *
 * Everything that touches the rows of idempotency_key for a request is in this
 * folder.  (The watch over leases and the views read it by SQL.)  Records are found
 * by find.c.  They are locked and written by direct.c, or, where they are
 * distributed over a cluster, by sharded.c; which of them is settled when the table
 * is opened, and no caller has to know.
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

#include "access/xact.h"
#include "catalog/pg_subscription_rel.h"
#include "store/catalog.h"
#include "store/direct.h"
#include "store/sharded.h"
#include "store/shards.h"
#include "store/store.h"
#include "utils/rel.h"

static void init_store(Store *store);
static void open_shard(Store *store, const Scope *scope);

/*
 * Open the table of this database for one call that is about a tenant.
 *
 * The lock is kept to the end of the transaction, as a statement would keep
 * it.  Errors: those of CatalogOpenTable, and 40001 when the records of the tenant
 * are not on this node any more.
 */
void
StoreOpen(Store *store, const Scope *scope, LOCKMODE lockmode)
{
	store->rel = CatalogOpenTable(lockmode, &store->info);
	store->lockmode = lockmode;
	init_store(store);
	if (store->info.distributed)
		open_shard(store, scope);
}

/*
 * The tables that have the records of this node are the table itself, or those of
 * its shards that are here.  Returns the first of them whose OID is not below
 * another one, so that whoever goes through them can stop and go on later;
 * InvalidOid if there is none.
 *
 * Errors: those of CatalogOpenTable.
 */
Oid
StoreNextPart(Oid from)
{
	CatalogTableInfo info;
	Relation	rel = CatalogOpenTable(AccessShareLock, &info);
	Oid			table = RelationGetRelid(rel);

	table_close(rel, NoLock);
	if (info.distributed)
		return ShardsNextHere(from);
	return table >= from ? table : InvalidOid;
}

/*
 * Open one of them, for who does not ask for a tenant but for all there is.
 *
 * Writing to a shard passes Citus by: what is deleted there while the shard moves
 * away may still be in the place that it moves to.  So this is for the sweep, which
 * does no harm then.  Returns false if there is no such table any more.
 */
bool
StoreOpenPart(Store *store, Oid part, LOCKMODE lockmode)
{
	Relation	rel = CatalogOpenTable(lockmode, &store->info);

	if (store->info.distributed)
	{
		table_close(rel, NoLock);
		rel = CatalogOpenShard(part, lockmode);
	}
	else if (RelationGetRelid(rel) != part)
	{
		table_close(rel, NoLock);
		rel = NULL;
	}

	store->rel = rel;
	store->lockmode = lockmode;
	init_store(store);
	return rel != NULL;
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
		store->methods->close(store);
	if (store->changed)
		CommandCounterIncrement();
	if (store->slot != NULL)
		ExecDropSingleTupleTableSlot(store->slot);
	if (store->index != NULL)
		index_close(store->index, NoLock);
	table_close(store->rel, NoLock);
	if (store->shell != NULL)
		table_close(store->shell, NoLock);
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
	return store->methods->lock(store, wait, record);
}

/*
 * Insert a record.
 *
 * Errors: ID005 when another transaction committed a record for the scope.
 */
void
StoreInsert(Store *store, const Record *record)
{
	store->methods->insert(store, record);
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
	return store->methods->insert_unless_found(store, record, found);
}

/*
 * Change the row that was found last, and is locked, to a record.
 *
 * Errors: those of StoreCheckPublished.
 */
void
StoreUpdate(Store *store, const Record *record)
{
	StoreCheckPublished(store, CMD_UPDATE);
	store->methods->update(store, record);
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
	StoreCheckPublished(store, CMD_DELETE);
	return store->methods->delete(store, wait);
}

/*
 * Nothing was read or written yet.
 */
static void
init_store(Store *store)
{
	store->methods = &DirectMethods;
	store->shell = NULL;
	store->index = NULL;
	store->slot = NULL;
	store->writer = NULL;
	store->changed = false;
	store->too_new = false;
}

/*
 * Have the shard of a tenant for the table to read.
 *
 * Whether it is on this node was asked before, but it may just have moved.
 */
static void
open_shard(Store *store, const Scope *scope)
{
	Oid			shard = ShardsFind(scope->parts[SCOPE_TENANT]);
	Relation	rel = NULL;

	if (OidIsValid(shard))
		rel = CatalogOpenShard(shard, AccessShareLock);
	if (rel == NULL)
		ShardedRaiseMoved();

	store->methods = &ShardedMethods;
	store->shell = store->rel;
	store->rel = rel;
	store->lockmode = AccessShareLock;
}
