/*-------------------------------------------------------------------------
 *
 * sharded.c
 *	  Locking and writing records that are distributed over a cluster.
 *
 * Whoever comes here is on the node of the tenant (call/forward.c), and has
 * looked for the record in its shard.  To write there as direct.c does would be
 * wrong in two ways:
 *
 * - A shard moves to another node while it is written to.  Citus holds the writers
 *   off at the end, by locks of its own; a row that got in behind them would stay
 *   where nobody looks any more.
 * - Citus commits the transactions that it has opened on other nodes with two
 *   phases if it knows of a change here, and else with one, before ours.  A crash
 *   in between would leave the work there, and no record of it here.
 *
 * So records are written by statements on the whole table, which Citus sends to
 * where they belong.  That is nearly always this very process, and much of the
 * cost is saved by plans that are kept.  Each statement has a snapshot of its own
 * moment, at every isolation level, for the reason that find.c gives.
 *
 * If the shard has moved since we looked, the statement goes to the new place, and
 * meets what is there: an insertion the unique index, everything else the
 * condition that the row is in the very version that we have found.
 *
 * The statements run with the rights of the owner of the table.  The right to call
 * a function is the right to have it write its record.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "access/relation.h"
#include "access/tableam.h"
#include "executor/spi.h"
#include "request/scope.h"
#include "store/catalog.h"
#include "store/find.h"
#include "store/owner.h"
#include "store/sharded.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

/* The statements, whose plans are kept */
typedef enum Statement
{
	LOCK_ROW,
	LOCK_ROW_NOW,				/* or skip it, if it is locked */
	INSERT_ROW,
	INSERT_ROW_UNLESS_FOUND,
	UPDATE_ROW,
	DELETE_ROW,
	STATEMENTS
} Statement;

/*
 * Parameters: a record, of which a statement may use the scope only, and the
 * version of the row that it is about.
 */
static const AttrNumber version[] = {
	Anum_idempotency_key_attempt,
	Anum_idempotency_key_claim,
	Anum_idempotency_key_created_at,
	Anum_idempotency_key_expires_at
};

#define VERSION_PARAMETERS	((int) lengthof(version))
#define PARAMETERS			(Natts_idempotency_key + VERSION_PARAMETERS)

static RowLock lock_row(Store *store, bool wait, Record *record);
static void insert(Store *store, const Record *record);
static bool insert_unless_found(Store *store, const Record *record,
								Record *found);
static void update(Store *store, const Record *record);
static bool delete_row(Store *store, bool wait);
static uint64 execute(Store *store, Statement statement, const Record *record);
static void set_parameters(Store *store, const Record *record, Datum *values,
						   char *nulls);
static SPIPlanPtr get_plan(Store *store, Statement statement);
static char *make_statement(Relation table, Statement statement);
static const char *column_name(Relation table, AttrNumber column);
static void append_condition(StringInfo sql, Relation table, bool with_version);
static bool violates_scope(const ErrorData *edata, Relation shard);

const StoreMethods ShardedMethods = {
	.lock = lock_row,
	.insert = insert,
	.insert_unless_found = insert_unless_found,
	.update = update,
	.delete = delete_row
};

/* of the table with this OID */
static SPIPlanPtr plans[STATEMENTS];
static Oid	planned_table = InvalidOid;

/*
 * Refuse to go on where the records of a tenant are no more.
 *
 * Errors: 40001.
 */
void
ShardedRaiseMoved(void)
{
	ereport(ERROR,
			(errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
			 errmsg("could not serialize access because the tenant was moved to another node"),
			 errhint("Retry the transaction.")));
}

/*
 * See StoreLock().
 *
 * With the lock on what is the row now, it is still what was found if the version
 * that was found is still in the shard.  If not, the lock stays, which keeps others
 * waiting for a row that changed while we looked, to the end of the transaction.
 */
static RowLock
lock_row(Store *store, bool wait, Record *record)
{
	ItemPointerData tid = store->slot->tts_tid;
	bool		locked;
	bool		unchanged;
	Snapshot	snapshot;

	StoreReadSlot(store, record);
	locked = execute(store, wait ? LOCK_ROW : LOCK_ROW_NOW, record) > 0;

	snapshot = RegisterSnapshot(GetLatestSnapshot());
	unchanged = table_tuple_fetch_row_version(store->rel, &tid, snapshot,
											  store->slot);
	UnregisterSnapshot(snapshot);

	if (!unchanged)
		return ROW_CHANGED;
	if (locked)
	{
		StoreReadSlot(store, record);
		return ROW_LOCKED;
	}
	if (!wait)
		return ROW_BUSY;
	/* it is here, but not for Citus */
	ShardedRaiseMoved();
}

/*
 * See StoreInsert().
 */
static void
insert(Store *store, const Record *record)
{
	MemoryContext oldcontext = CurrentMemoryContext;

	PG_TRY();
	{
		(void) execute(store, INSERT_ROW, record);
	}
	PG_CATCH();
	{
		ErrorData  *edata;

		MemoryContextSwitchTo(oldcontext);
		edata = CopyErrorData();
		if (!violates_scope(edata, store->rel))
			PG_RE_THROW();

		FlushErrorState();
		RecordRaiseLost();
	}
	PG_END_TRY();
}

/*
 * See StoreInsertUnlessFound().
 *
 * What was in the way may be gone when we look for it.
 */
static bool
insert_unless_found(Store *store, const Record *record, Record *found)
{
	Scope		scope;

	memcpy(scope.parts, record->values, sizeof(scope.parts));

	for (int attempt = 0; attempt < 3; attempt++)
	{
		if (execute(store, INSERT_ROW_UNLESS_FOUND, record) > 0)
			return true;
		if (StoreFind(store, &scope, GetCurrentTimestamp(),
					  found) != RECORD_ABSENT)
			return false;
	}
	ShardedRaiseMoved();
}

/*
 * See StoreUpdate().
 */
static void
update(Store *store, const Record *record)
{
	if (execute(store, UPDATE_ROW, record) == 0)
		ShardedRaiseMoved();
}

/*
 * See StoreDelete().  Who may not wait does not delete here.
 */
static bool
delete_row(Store *store, bool wait)
{
	Record		record;

	Assert(wait);

	StoreReadSlot(store, &record);
	return execute(store, DELETE_ROW, &record) > 0;
}

/*
 * Execute a statement about a record.  Returns for how many rows it did something,
 * which is one at most.
 */
static uint64
execute(Store *store, Statement statement, const Record *record)
{
	Datum		values[PARAMETERS];
	char		nulls[PARAMETERS];
	Owner		owner;
	Snapshot	snapshot;
	uint64		rows;

	set_parameters(store, record, values, nulls);

	OwnerBecome(&owner, RelationGetRelid(store->shell));
	SPI_connect();
	snapshot = RegisterSnapshot(GetLatestSnapshot());
	if (SPI_execute_snapshot(get_plan(store, statement), values, nulls, snapshot,
							 InvalidSnapshot, false, true, 0) < 0)
		elog(ERROR, "could not execute a statement on the records: %s",
			 SPI_result_code_string(SPI_result));
	rows = SPI_processed;
	UnregisterSnapshot(snapshot);
	SPI_finish();
	OwnerLeave(&owner);

	store->changed = true;
	return rows;
}

/*
 * Give a statement its parameters: a record, and the version of the row that was
 * found last, if any was.
 */
static void
set_parameters(Store *store, const Record *record, Datum *values, char *nulls)
{
	bool		found = store->slot != NULL && !TTS_EMPTY(store->slot);

	for (int i = 0; i < Natts_idempotency_key; i++)
	{
		values[i] = record->values[i];
		nulls[i] = record->nulls[i] ? 'n' : ' ';
	}
	values[Anum_idempotency_key_state - 1] =
		ObjectIdGetDatum(store->info.states[RecordGetState(record)]);

	for (int i = 0; i < VERSION_PARAMETERS; i++)
	{
		int			parameter = Natts_idempotency_key + i;
		bool		isnull = true;

		values[parameter] = (Datum) 0;
		if (found)
			values[parameter] = slot_getattr(store->slot, version[i], &isnull);
		nulls[parameter] = isnull ? 'n' : ' ';
	}
}

/*
 * The plan of a statement on the table, which is kept.
 */
static SPIPlanPtr
get_plan(Store *store, Statement statement)
{
	TupleDesc	desc = RelationGetDescr(store->shell);
	Oid			types[PARAMETERS];
	SPIPlanPtr	plan;

	if (planned_table != RelationGetRelid(store->shell))
	{
		for (int i = 0; i < STATEMENTS; i++)
		{
			if (plans[i] != NULL)
				SPI_freeplan(plans[i]);
			plans[i] = NULL;
		}
		planned_table = RelationGetRelid(store->shell);
	}
	if (plans[statement] != NULL)
		return plans[statement];

	for (int i = 0; i < Natts_idempotency_key; i++)
		types[i] = TupleDescAttr(desc, i)->atttypid;
	for (int i = 0; i < VERSION_PARAMETERS; i++)
		types[Natts_idempotency_key + i] =
			TupleDescAttr(desc, version[i] - 1)->atttypid;

	plan = SPI_prepare(make_statement(store->shell, statement), PARAMETERS, types);
	if (plan == NULL)
		elog(ERROR, "SPI_prepare failed: %s", SPI_result_code_string(SPI_result));
	SPI_keepplan(plan);
	plans[statement] = plan;
	return plan;
}

/*
 * The text of a statement.
 */
static char *
make_statement(Relation table, Statement statement)
{
	char	   *name = quote_qualified_identifier(get_namespace_name(RelationGetNamespace(table)),
												  RelationGetRelationName(table));
	StringInfoData sql;

	initStringInfo(&sql);
	switch (statement)
	{
		case LOCK_ROW:
		case LOCK_ROW_NOW:
			appendStringInfo(&sql, "SELECT 1 FROM %s", name);
			append_condition(&sql, table, false);
			appendStringInfoString(&sql, " FOR NO KEY UPDATE");
			if (statement == LOCK_ROW_NOW)
				appendStringInfoString(&sql, " SKIP LOCKED");
			break;
		case INSERT_ROW:
		case INSERT_ROW_UNLESS_FOUND:
			appendStringInfo(&sql, "INSERT INTO %s (", name);
			for (int i = 1; i <= Natts_idempotency_key; i++)
				appendStringInfo(&sql, "%s%s", i == 1 ? "" : ", ",
								 column_name(table, i));
			appendStringInfoString(&sql, ") VALUES (");
			for (int i = 1; i <= Natts_idempotency_key; i++)
				appendStringInfo(&sql, "%s$%d", i == 1 ? "" : ", ", i);
			appendStringInfoChar(&sql, ')');
			if (statement == INSERT_ROW_UNLESS_FOUND)
				appendStringInfoString(&sql, " ON CONFLICT DO NOTHING");
			break;
		case UPDATE_ROW:
			appendStringInfo(&sql, "UPDATE %s SET ", name);
			for (int i = SCOPE_PARTS + 1; i <= Natts_idempotency_key; i++)
				appendStringInfo(&sql, "%s%s = $%d",
								 i == SCOPE_PARTS + 1 ? "" : ", ",
								 column_name(table, i), i);
			append_condition(&sql, table, true);
			break;
		case DELETE_ROW:
			appendStringInfo(&sql, "DELETE FROM %s", name);
			append_condition(&sql, table, true);
			break;
		case STATEMENTS:
			break;
	}
	return sql.data;
}

static const char *
column_name(Relation table, AttrNumber column)
{
	Form_pg_attribute attr = TupleDescAttr(RelationGetDescr(table), column - 1);

	return quote_identifier(NameStr(attr->attname));
}

/*
 * Have a statement be about the row of a scope, in one version only if so asked.
 */
static void
append_condition(StringInfo sql, Relation table, bool with_version)
{
	for (int i = 1; i <= SCOPE_PARTS; i++)
		appendStringInfo(sql, "%s %s = $%d", i == 1 ? " WHERE" : " AND",
						 column_name(table, i), i);

	for (int i = 0; with_version && i < VERSION_PARAMETERS; i++)
		appendStringInfo(sql, " AND %s IS NOT DISTINCT FROM $%d",
						 column_name(table, version[i]),
						 Natts_idempotency_key + i + 1);
}

/*
 * Whether an error says that there is a row for the scope already.
 *
 * From another node we get no more than the message, which names the index.  The
 * index of a shard has the name of that of the table, with a number.
 */
static bool
violates_scope(const ErrorData *edata, Relation shard)
{
	Relation	index;
	bool		matches;

	if (edata->sqlerrcode != ERRCODE_UNIQUE_VIOLATION)
		return false;
	if (edata->table_name != NULL && edata->constraint_name != NULL)
	{
		Oid			oid;

		if (strcmp(edata->table_name, RelationGetRelationName(shard)) != 0)
			return false;
		oid = get_relname_relid(edata->constraint_name,
								RelationGetNamespace(shard));
		index = OidIsValid(oid) ? try_relation_open(oid, AccessShareLock) : NULL;
		matches = index != NULL && index->rd_index != NULL &&
			CatalogIsScopeIndex(index);
	}
	else
	{
		char	   *name;

		index = index_open(RelationGetPrimaryKeyIndex(shard, false),
						   AccessShareLock);
		name = pstrdup(RelationGetRelationName(index));
		*strrchr(name, '_') = '\0';
		matches = edata->message != NULL && strstr(edata->message, name) != NULL;
	}
	if (index != NULL)
		relation_close(index, NoLock);
	return matches;
}
