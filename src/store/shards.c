/*-------------------------------------------------------------------------
 *
 * shards.c
 *	  Where the records of a tenant are, on a cluster.
 *
 * Citus makes a cluster of servers, the nodes, and spreads the rows of a table
 * over them by the hash of one of its columns: each range of hashes is a table of
 * its own, a shard, on one node.  What is left under the name of the table is an
 * empty shell, which the planner of Citus replaces in every query.  We read and
 * write without a planner.  So who opens the table has to know whether it is a
 * shell, and which shard to open instead; a record that was read from the shell,
 * or written to it, would be a request that runs twice.
 *
 * Citus keeps this in catalogs of its own, the same on every node, in pg_catalog
 * and readable by everybody.  We use what its documentation says of them, and
 * nothing of its library: it need not be there when we are built.  All that is
 * wanted to know is kept in memory until the relation cache entry of the table is
 * flushed, which Citus sees to, on each node, whenever it changes something about
 * the table or its shards.
 *
 * There is always a moment in which a shard has moved away and we have not been
 * told.  Who then looks for a record does so in a shard that nobody writes to any
 * more, and may be told that there is none.  But it can only write through Citus,
 * which knows better, and at the new place the unique index decides (sharded.c).
 *
 * Served is a table that is distributed by the hash of the tenant, with one copy
 * of each shard.  Any other way to have the table in a cluster is refused.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "catalog/pg_type_d.h"
#include "executor/spi.h"
#include "store/owner.h"
#include "store/shards.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

#define CLUSTER_EXTENSION	"citus"
#define DISTRIBUTED_BY_HASH	'h'

/* A range of hashes of tenants */
typedef struct Shard
{
	int32		min;
	int32		max;
	int32		node;			/* where they are */
	Oid			table;			/* in which table, if on this node */
} Shard;

/* How Citus has distributed a table */
typedef struct Distribution
{
	bool		exists;
	char		method;
	char	   *column;			/* by which, null for none */
	int			copies;			/* of each shard, the most that one has */
} Distribution;

static const Shard *find_shard(Datum tenant);
static Distribution read_distribution(Relation table);
static const char *find_problem(const Distribution *distribution);
static void read_shards(Relation table);
static uint64 query(Relation table, const char *sql);
static Datum get_value(uint64 row, int column, bool *isnull);

/* of the table that was loaded last, in the order of their ranges */
static MemoryContext context = NULL;
static Shard *shards = NULL;
static int	count = 0;
static Oid	collation = InvalidOid;

/*
 * See whether a table is distributed, and if so, where its shards are.
 *
 * Errors: 55000 when it is distributed in a way that is not served.
 */
bool
ShardsLoad(Relation table)
{
	Distribution distribution = read_distribution(table);
	const char *problem = find_problem(&distribution);

	if (problem != NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("table \"%s\" is distributed in a way that is not served",
						RelationGetRelationName(table)),
				 errdetail("%s", problem),
				 errhint("Save the records, create the extension anew, and run idempotency_distribute() on the coordinator.")));

	if (distribution.exists)
		read_shards(table);
	return distribution.exists;
}

/*
 * The shard of a tenant on this node, InvalidOid if it is on another one.
 */
Oid
ShardsFind(Datum tenant)
{
	const Shard *shard = find_shard(tenant);

	return shard != NULL ? shard->table : InvalidOid;
}

/*
 * The number of the node that has the records of a tenant, -1 if none has.
 */
int
ShardsFindNode(Datum tenant)
{
	const Shard *shard = find_shard(tenant);

	return shard != NULL ? shard->node : -1;
}

/*
 * The range of hashes that a tenant falls into, null if there is none.
 */
static const Shard *
find_shard(Datum tenant)
{
	int32		hash = DatumGetInt32(DirectFunctionCall1Coll(hashtext, collation,
															 tenant));
	int			low = 0;
	int			high = count - 1;

	while (low <= high)
	{
		int			middle = low + (high - low) / 2;

		if (hash < shards[middle].min)
			high = middle - 1;
		else if (hash > shards[middle].max)
			low = middle + 1;
		else
			return &shards[middle];
	}
	return NULL;
}

/*
 * Of the shards on this node, the first whose OID is not below another one;
 * InvalidOid if there is none.
 */
Oid
ShardsNextHere(Oid from)
{
	Oid			next = InvalidOid;

	for (int i = 0; i < count; i++)
	{
		Oid			table = shards[i].table;

		if (OidIsValid(table) && table >= from &&
			(!OidIsValid(next) || table < next))
			next = table;
	}
	return next;
}

/*
 * What a cluster has made of a table, for who only wants to know.
 *
 * A node that has not been told of the cluster's tables has at least a number in
 * it.
 */
ShardsStatus
ShardsGetStatus(Relation table)
{
	ShardsStatus status = {0};
	Distribution distribution = read_distribution(table);
	bool		isnull;

	if (!OidIsValid(get_extension_oid(CLUSTER_EXTENSION, true)))
		return status;

	status.problem = find_problem(&distribution);
	status.distributed = distribution.exists && status.problem == NULL;

	SPI_connect();
	if (query(table,
			  "SELECT greatest((SELECT count(*) FROM pg_dist_node"
			  " WHERE isactive AND noderole = 'primary'),"
			  " (SELECT 2 FROM pg_dist_local_group WHERE groupid > 0))::int4") == 1)
		status.nodes = DatumGetInt32(get_value(0, 1, &isnull));
	SPI_finish();

	return status;
}

/*
 * Read how a table is distributed, if at all.
 */
static Distribution
read_distribution(Relation table)
{
	MemoryContext caller = CurrentMemoryContext;
	Distribution distribution = {0};
	bool		isnull;

	if (!OidIsValid(get_extension_oid(CLUSTER_EXTENSION, true)))
		return distribution;

	SPI_connect();
	if (query(table,
			  "SELECT partmethod, column_to_column_name(logicalrelid, partkey),"
			  " coalesce((SELECT max(copies) FROM"
			  "  (SELECT count(*) FROM pg_dist_shard AS s"
			  "   JOIN pg_dist_placement AS p USING (shardid)"
			  "   WHERE s.logicalrelid = $1 AND p.shardstate = 1"
			  "   GROUP BY shardid) AS placed (copies)), 0)::int4"
			  " FROM pg_dist_partition WHERE logicalrelid = $1") == 1)
	{
		Datum		column;

		distribution.exists = true;
		distribution.method = DatumGetChar(get_value(0, 1, &isnull));
		column = get_value(0, 2, &isnull);
		if (!isnull)
			distribution.column = MemoryContextStrdup(caller,
													  TextDatumGetCString(column));
		distribution.copies = DatumGetInt32(get_value(0, 3, &isnull));
	}
	SPI_finish();

	return distribution;
}

/*
 * Why a table that is so distributed cannot be served, null if it can.
 */
static const char *
find_problem(const Distribution *distribution)
{
	if (!distribution->exists)
		return NULL;
	if (distribution->column == NULL)
		return "It is a reference table, a local table or one of a distributed schema, and not distributed by tenant.";
	if (distribution->method != DISTRIBUTED_BY_HASH ||
		strcmp(distribution->column, "tenant") != 0)
		return psprintf("It is distributed by column \"%s\", and not by the hash of the tenant.",
						distribution->column);
	if (distribution->copies > 1)
		return psprintf("There are %d copies of each shard, and a claim has only one place.",
						distribution->copies);
	return NULL;
}

/*
 * Read the ranges of the shards, and which of them are here.
 *
 * A shard whose table is not there is one that is just coming or going.
 */
static void
read_shards(Relation table)
{
	uint64		rows;
	bool		isnull;

	if (context == NULL)
		context = AllocSetContextCreate(TopMemoryContext,
										"idempotency shards",
										ALLOCSET_SMALL_SIZES);
	count = 0;
	MemoryContextReset(context);
	collation = TupleDescAttr(RelationGetDescr(table), 0)->attcollation;

	SPI_connect();
	rows = query(table,
				 "SELECT s.shardminvalue::int4, s.shardmaxvalue::int4,"
				 " s.shardid, p.groupid, p.groupid = (SELECT groupid FROM pg_dist_local_group)"
				 " FROM pg_dist_shard AS s JOIN pg_dist_placement AS p USING (shardid)"
				 " WHERE s.logicalrelid = $1 AND p.shardstate = 1 ORDER BY 1");
	shards = MemoryContextAlloc(context, sizeof(Shard) * Max(rows, 1));
	for (uint64 i = 0; i < rows; i++)
	{
		Shard	   *shard = &shards[i];

		shard->min = DatumGetInt32(get_value(i, 1, &isnull));
		shard->max = DatumGetInt32(get_value(i, 2, &isnull));
		shard->node = DatumGetInt32(get_value(i, 4, &isnull));
		shard->table = InvalidOid;
		if (DatumGetBool(get_value(i, 5, &isnull)))
			shard->table = get_relname_relid(psprintf("%s_" INT64_FORMAT,
													  RelationGetRelationName(table),
													  DatumGetInt64(get_value(i, 3, &isnull))),
											 RelationGetNamespace(table));
	}
	count = (int) rows;
	SPI_finish();
}

/*
 * Query the catalogs of Citus about a table, $1; the rows stay until SPI_finish.
 *
 * They are read as of now, whatever the isolation level, with nobody's operators
 * but the server's.
 */
static uint64
query(Relation table, const char *sql)
{
	Oid			types[] = {REGCLASSOID};
	Datum		values[] = {ObjectIdGetDatum(RelationGetRelid(table))};
	Snapshot	snapshot = RegisterSnapshot(GetLatestSnapshot());
	SPIPlanPtr	plan;
	Owner		owner;

	OwnerBecome(&owner, RelationGetRelid(table));
	plan = SPI_prepare(sql, lengthof(types), types);
	if (plan == NULL ||
		SPI_execute_snapshot(plan, values, NULL, snapshot, InvalidSnapshot,
							 true, false, 0) != SPI_OK_SELECT)
		elog(ERROR, "could not read the catalogs of %s", CLUSTER_EXTENSION);
	OwnerLeave(&owner);
	UnregisterSnapshot(snapshot);

	return SPI_processed;
}

/*
 * A column, counted from 1, of a row that a query has found.
 */
static Datum
get_value(uint64 row, int column, bool *isnull)
{
	return SPI_getbinval(SPI_tuptable->vals[row], SPI_tuptable->tupdesc, column,
						 isnull);
}
