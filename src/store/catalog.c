/*-------------------------------------------------------------------------
 *
 * catalog.c
 *	  What the catalogs must say of the table of records.
 *
 * The table is found by the schema of the extension, whatever the search_path.
 * That it has the columns and the indexes that this library knows, and that its
 * type of states has their labels, is seen once, and again when the relation
 * cache says that something about it has changed.  The extension can be dropped
 * and created anew at any time, also in the middle of a transaction.
 *
 * On a cluster the table may be an empty shell, with its records in shards that
 * have its shape (shards.c).  That is seen on the same occasion.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "access/htup_details.h"
#include "catalog/pg_am_d.h"
#include "catalog/pg_collation_d.h"
#include "catalog/pg_enum.h"
#include "catalog/pg_type_d.h"
#include "request/scope.h"
#include "storage/lmgr.h"
#include "store/catalog.h"
#include "store/shards.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/syscache.h"

#define TABLE_NAME		"idempotency_key"
#define STATE_TYPE		"idempotency_state"
#define RESULT_TYPE		"idempotency_result"
#define RESPONSE_TYPE	"idempotency_response"

/* A column that the table must have; no type stands for the state type */
typedef struct CatalogColumn
{
	const char *name;
	Oid			type;
} CatalogColumn;

/* What the catalogs say, good until the table's relcache entry is flushed */
typedef struct CatalogCache
{
	bool		valid;
	Oid			table;
	Oid			result_type;
	Oid			response_type;
	CatalogTableInfo info;
} CatalogCache;

static const CatalogCache *get_catalog(void);
static void forget_catalog(Datum arg, Oid relid);
static Relation look_up_catalog(LOCKMODE lockmode);
static Oid	find_table(Oid *schema);
static Relation open_found_table(LOCKMODE lockmode, Oid *schema);
static Oid	find_type(const char *name, Oid schema);
static void check_shape(Relation rel, Oid state_type);
static void refuse_shape(Relation rel);
static void check_primary_key(Relation rel);
static bool has_right_collation(AttrNumber column, Oid collation);
static void check_writable(Relation rel);

static const CatalogColumn columns[Natts_idempotency_key] = {
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

static CatalogCache catalog = {0};

/* counts what forget_catalog() has heard of */
static uint64 changes = 0;

/*
 * Hook into the invalidation of cached catalog entries.
 */
void
CatalogInit(void)
{
	CacheRegisterRelcacheCallback(forget_catalog, (Datum) 0);
}

/*
 * The schema of the extension.
 *
 * Errors: 42704 without the extension.
 */
Oid
CatalogSchema(void)
{
	return get_extension_schema(get_extension_oid(EXTENSION_NAME, false));
}

/*
 * The table of this database.
 *
 * Errors: 42704 without the extension, 42P01 without its table.
 */
Oid
CatalogTable(void)
{
	Oid			schema;

	return find_table(&schema);
}

/*
 * Open the table of this database, and say what there is to know of it.
 *
 * Errors: 55000 when the table is not the one that this library was made for, or
 * is distributed in a way that is not served; 0A000 when it has triggers or rules
 * or is a partition.
 */
Relation
CatalogOpenTable(LOCKMODE lockmode, CatalogTableInfo *info)
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

	/* where others write for us, they see to triggers */
	if (lockmode >= RowExclusiveLock && !catalog.info.distributed)
		check_writable(rel);

	*info = catalog.info;
	return rel;
}

/*
 * Open a shard of the table; null if it is gone.
 *
 * Errors: 55000 when it does not have the shape of the table.
 */
Relation
CatalogOpenShard(Oid shard, LOCKMODE lockmode)
{
	Relation	rel = try_table_open(shard, lockmode);

	if (rel != NULL)
	{
		check_shape(rel, TupleDescAttr(RelationGetDescr(rel),
									   Anum_idempotency_key_state - 1)->atttypid);
		check_primary_key(rel);
	}
	return rel;
}

/*
 * Whether the records are distributed over a cluster.
 *
 * Errors: those of CatalogOpenTable.
 */
bool
CatalogIsDistributed(void)
{
	return get_catalog()->info.distributed;
}

/*
 * Open the table, for who does not want to read or write it, and asks no more of
 * it than that it is there.
 *
 * Errors: 42704 without the extension, 42P01 without its table.
 */
Relation
CatalogLookAtTable(LOCKMODE lockmode)
{
	Oid			schema;

	return open_found_table(lockmode, &schema);
}

/*
 * The index that has records in the order of their expiry, and of their place
 * in the table when they expire at once; with a second column it would not.
 *
 * What the predicate of a partial index says does not matter.  To ask the
 * relation cache for it would evaluate its constant parts, which are functions
 * of the table's owner, with the rights of whoever sweeps.
 */
Oid
CatalogFindExpiryIndex(Relation rel)
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
 * Whether an index keeps a scope from having two rows: the primary key, or what
 * REINDEX CONCURRENTLY is making in its place, or has left there.
 */
bool
CatalogIsScopeIndex(Relation index)
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
			!has_right_collation(column, index->rd_indcollation[i]))
			return false;
		seen[column - 1] = true;
	}
	return true;
}

/*
 * The row type that calls return.
 */
Oid
CatalogResultType(void)
{
	return get_catalog()->result_type;
}

/*
 * The row type that a handler may return.
 */
Oid
CatalogResponseType(void)
{
	return get_catalog()->response_type;
}

/*
 * What the catalogs say of the extension that is there now, which need not be
 * the one that was there when the caller began.
 */
static const CatalogCache *
get_catalog(void)
{
	if (!catalog.valid)
		table_close(look_up_catalog(AccessShareLock), NoLock);
	return &catalog;
}

/*
 * Relation cache callback: the table changed, or anything may have.
 */
static void
forget_catalog(Datum arg, Oid relid)
{
	if (relid == InvalidOid || relid == catalog.table)
	{
		catalog.valid = false;
		changes++;
	}
}

/*
 * Open the table, and find our other objects.
 *
 * With the table locked, nothing about it can change any more, but for where its
 * shards are.
 */
static Relation
look_up_catalog(LOCKMODE lockmode)
{
	Oid			schema;
	Oid			state_type;
	uint64		changes_before;
	Relation	rel = open_found_table(lockmode, &schema);

	state_type = find_type(STATE_TYPE, schema);
	check_shape(rel, state_type);
	check_primary_key(rel);

	catalog.table = RelationGetRelid(rel);
	catalog.result_type = find_type(RESULT_TYPE, schema);
	catalog.response_type = find_type(RESPONSE_TYPE, schema);
	for (int i = 0; i < RECORD_STATES; i++)
	{
		catalog.info.states[i] = GetSysCacheOid2(ENUMTYPOIDNAME, Anum_pg_enum_oid,
												 ObjectIdGetDatum(state_type),
												 CStringGetDatum(state_labels[i]));
		if (!OidIsValid(catalog.info.states[i]))
			refuse_shape(rel);
	}
	if (!OidIsValid(catalog.result_type) || !OidIsValid(catalog.response_type))
		refuse_shape(rel);

	/* last, so that what we are told meanwhile is not missed */
	do
	{
		changes_before = changes;
		catalog.info.distributed = ShardsLoad(rel);
	} while (changes != changes_before);
	catalog.valid = true;

	return rel;
}

/*
 * Open the table of the extension.
 *
 * What has its name may be another table by the time that we have the lock.
 */
static Relation
open_found_table(LOCKMODE lockmode, Oid *schema)
{
	for (;;)
	{
		Oid			table = find_table(schema);
		Relation	rel = try_table_open(table, lockmode);

		if (rel != NULL && find_table(schema) == table)
			return rel;
		if (rel != NULL)
			table_close(rel, lockmode);
	}
}

/*
 * Find the table by the schema of the extension, whatever the search_path.
 */
static Oid
find_table(Oid *schema)
{
	Oid			table;

	*schema = CatalogSchema();
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

		if (i < SCOPE_PARTS && !has_right_collation(i + 1, attr->attcollation))
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

		matches = CatalogIsScopeIndex(index);
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
 * Whether a column of the primary key has the collation that it should have.
 *
 * That is "C", by which lookups compare bytes, as they should, and which is the
 * fastest.  But where a cluster keeps the records of a tenant together with its
 * rows in tables of the application, the tenant has their collation; it must be one
 * by which nothing is equal but the same bytes.
 */
static bool
has_right_collation(AttrNumber column, Oid collation)
{
	return collation == C_COLLATION_OID ||
		(column == Anum_idempotency_key_tenant && OidIsValid(collation) &&
		 get_collation_isdeterministic(collation));
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
