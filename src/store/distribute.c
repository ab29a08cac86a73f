/*-------------------------------------------------------------------------
 *
 * distribute.c
 *	  distribute: have a cluster keep the records of a tenant on one of its nodes.
 *
 * Citus has functions for it, and what they would do wrong if they were called by
 * hand is in this file:
 *
 * - Two tables are kept together only if the columns by which they are distributed
 *   have the same type and collation.  So the tenant of the records gets that of
 *   the application's table.
 * - The function that carries calls to other nodes must be distributed in the same
 *   way, and sent wherever it is in a transaction.
 * - Nodes that were used before have records of their own, which would be hidden
 *   from then on.
 * - Rights on the functions of an extension do not get to other nodes.
 *
 * Nothing here needs to be done by anybody but the owner of the table, and all of it
 * is done with the rights of the caller.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "catalog/pg_type_d.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "store/catalog.h"
#include "store/shards.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"

/* The function that carries calls, with its arguments */
#define CARRIER	"idempotency_at_owner(text,text,text[],text[])"

static void check_cluster(void);
static void make_nodes_ready(const char *table, const char *alter);
static char *get_collation(Oid table);
static void distribute_table(const char *table, Oid colocate_with);
static void check_colocation(Oid table, Oid colocate_with);
static void distribute_two_phase(const char *schema);
static void distribute_carrier(const char *schema, const char *table);
static void hand_out_rights(const char *schema);
static void on_workers(const char *sql);
static char *query(const char *sql);

PG_FUNCTION_INFO_V1(idempotency_distribute);

/*
 * idempotency_distribute(colocate_with regclass) returns void
 *
 * Distribute the records by tenant, together with a table of the application if one
 * is given.  When they already are, see that calls and rights get to all nodes.
 *
 * Errors: 42704 without Citus, 55000 on a node that is not the coordinator, while
 * another one has records of its own, or when the records are distributed in another
 * way; 22023 for a table that they cannot be kept together with; 25006; and those of
 * Citus.
 */
Datum
idempotency_distribute(PG_FUNCTION_ARGS)
{
	Oid			colocate_with = PG_ARGISNULL(0) ? InvalidOid : PG_GETARG_OID(0);
	int			nest_level;
	Relation	rel;
	Oid			oid;
	ShardsStatus status;
	char	   *schema;
	char	   *table;

	PreventCommandIfReadOnly("idempotency_distribute()");
	check_cluster();

	rel = CatalogLookAtTable(AccessShareLock);
	oid = RelationGetRelid(rel);
	status = ShardsGetStatus(rel);
	table_close(rel, NoLock);
	schema = get_namespace_name(get_rel_namespace(oid));
	table = quote_qualified_identifier(schema, get_rel_name(oid));
	if (status.problem != NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("table \"%s\" is distributed in another way",
						get_rel_name(oid)),
				 errdetail("%s", status.problem),
				 errhint("Save the records, and create the extension anew.")));

	nest_level = NewGUCNestLevel();
	(void) set_config_option("search_path", "pg_catalog, pg_temp",
							 PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_SAVE, true, 0, false);
	SPI_connect();
	if (!status.distributed)
		distribute_table(table, colocate_with);
	else if (OidIsValid(colocate_with))
		check_colocation(oid, colocate_with);
	distribute_two_phase(schema);
	distribute_carrier(schema, table);
	hand_out_rights(schema);
	SPI_finish();
	AtEOXact_GUC(false, nest_level);

	PG_RETURN_VOID();
}

/*
 * Make sure that there is a cluster, and that this is where it is changed.
 */
static void
check_cluster(void)
{
	char	   *group;

	if (!OidIsValid(get_extension_oid("citus", true)))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("extension \"citus\" does not exist"),
				 errhint("On a single server there is nothing to distribute.")));

	SPI_connect();
	group = query("SELECT groupid FROM pg_catalog.pg_dist_local_group");
	if (group == NULL || strcmp(group, "0") != 0)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("this node is not the coordinator"),
				 errhint("Run idempotency_distribute() on the coordinator.")));
	SPI_finish();
}

/*
 * Distribute the table of records.
 *
 * The records that are there go to their shards; what is left of them in the table
 * could not be seen any more.
 */
static void
distribute_table(const char *table, Oid colocate_with)
{
	char	   *collation = "pg_catalog.\"C\"";
	char	   *together = "none";
	char	   *alter;

	if (OidIsValid(colocate_with))
	{
		collation = get_collation(colocate_with);
		together = quote_qualified_identifier(get_namespace_name(get_rel_namespace(colocate_with)),
											  get_rel_name(colocate_with));
	}
	alter = psprintf("ALTER TABLE %s ALTER COLUMN tenant TYPE text COLLATE %s",
					 table, collation);
	(void) query(alter);
	make_nodes_ready(table, alter);

	(void) set_config_option("citus.shard_replication_factor", "1",
							 PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_SAVE, true, 0, false);
	(void) query(psprintf("SELECT create_distributed_table(%s, 'tenant', colocate_with => %s)",
				 quote_literal_cstr(table), quote_literal_cstr(together)));
	(void) query(psprintf("SELECT truncate_local_data_after_distributing_table(%s)",
				 quote_literal_cstr(table)));
}

/*
 * The collation of the column by which a table is distributed.
 *
 * Errors: 22023 if the records cannot be kept together with it.
 */
static char *
get_collation(Oid table)
{
	char	   *collation = query(psprintf("SELECT quote_ident(n.nspname) || '.' || quote_ident(c.collname)"
								  " FROM pg_dist_partition AS p"
								  " JOIN pg_attribute AS a ON a.attrelid = p.logicalrelid"
								  "  AND a.attname = column_to_column_name(p.logicalrelid, p.partkey)"
								  " JOIN pg_collation AS c ON c.oid = a.attcollation"
								  " JOIN pg_namespace AS n ON n.oid = c.collnamespace"
								  " WHERE p.logicalrelid = %u AND p.partmethod = 'h'"
								  " AND a.atttypid = 'text'::regtype AND c.collisdeterministic",
								  table));

	if (collation == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("records cannot be kept together with table \"%s\"",
						get_rel_name(table)),
				 errdetail("It is not distributed by the hash of a column of type text with a deterministic collation."),
				 errhint("Call idempotency_distribute() without a table: requests are as safe then, but their transactions commit in two phases.")));
	return collation;
}

/*
 * Have an empty table on each of the other nodes, whose tenant has the collation.
 *
 * This is committed there before the rest is done, and does no harm without that.
 */
static void
make_nodes_ready(const char *table, const char *alter)
{
	const char *schema = quote_identifier(get_namespace_name(CatalogSchema()));

	on_workers(psprintf("DO $do$ BEGIN"
						" PERFORM set_config('citus.enable_ddl_propagation', 'off', true);"
						" IF NOT EXISTS (SELECT FROM pg_extension WHERE extname = '%s') THEN"
						" CREATE SCHEMA IF NOT EXISTS %s; CREATE EXTENSION %s SCHEMA %s; END IF;"
						" IF EXISTS (SELECT FROM %s) THEN"
						" RAISE 'it has records of its own' USING HINT ="
						" 'Wait until they are swept, or delete them if those requests will not be repeated.';"
						" END IF; %s; END $do$",
						EXTENSION_NAME, schema, EXTENSION_NAME, schema, table,
						alter));
}

/*
 * Refuse to leave the records where they are when they are wanted elsewhere.
 */
static void
check_colocation(Oid table, Oid colocate_with)
{
	if (query(psprintf("SELECT 1 FROM pg_dist_partition AS a JOIN pg_dist_partition AS b USING (colocationid)"
			  " WHERE a.logicalrelid = %u AND b.logicalrelid = %u AND colocationid > 0",
			  table, colocate_with)) == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("records are not kept together with table \"%s\"",
						get_rel_name(colocate_with)),
				 errhint("Save the records, create the extension anew, and distribute it together with the table.")));
}

/*
 * Distribute the table that is for two phases, in two shards.
 */
static void
distribute_two_phase(const char *schema)
{
	char	   *table = quote_literal_cstr(quote_qualified_identifier(schema,
																	  "idempotency_two_phase"));

	if (query(psprintf("SELECT 1 FROM pg_dist_partition WHERE logicalrelid = %s::regclass",
					   table)) == NULL)
		(void) query(psprintf("SELECT create_distributed_table(%s, 'part', shard_count => 2, colocate_with => 'none')",
							  table));
}

/*
 * Have calls sent to the node of their tenant.
 */
static void
distribute_carrier(const char *schema, const char *table)
{
	(void) query(psprintf("SELECT create_distributed_function(%s, 'tenant', colocate_with => %s, force_delegation => true)",
				 quote_literal_cstr(psprintf("%s.%s", quote_identifier(schema), CARRIER)),
				 quote_literal_cstr(table)));
}

/*
 * Have everybody who may make a call here make it on all nodes.  What pg_monitor may
 * call it may everywhere.
 *
 * The carrier is for whoever may make any call; what he may call is checked when it
 * has arrived.
 */
static void
hand_out_rights(const char *schema)
{
	char	   *granted = psprintf("SELECT p.oid::regprocedure AS routine, a.grantee::regrole AS role"
								   " FROM pg_proc AS p"
								   " JOIN pg_depend AS d ON d.classid = 'pg_proc'::regclass AND d.objid = p.oid"
								   "  AND d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e'"
								   " JOIN pg_extension AS e ON e.oid = d.refobjid AND e.extname = '%s',"
								   " aclexplode(p.proacl) AS a"
								   " WHERE a.privilege_type = 'EXECUTE'"
								   " AND a.grantee NOT IN (0, p.proowner, 'pg_monitor'::regrole)"
								   " AND p.oid <> '%s.%s'::regprocedure",
								   EXTENSION_NAME, quote_identifier(schema), CARRIER);
	char	   *rights = query(psprintf("SELECT string_agg(format('GRANT EXECUTE ON ROUTINE %%s TO %%s',"
										" routine, role), '; ') FROM (%s) AS granted",
										granted));

	if (rights == NULL)
		return;
	on_workers(rights);
	/* Citus sees to this one, which it has distributed */
	(void) query(query(psprintf("SELECT format('GRANT EXECUTE ON FUNCTION %s.%s TO %%s',"
								" string_agg(DISTINCT role::text, ', ')) FROM (%s) AS granted",
								quote_identifier(schema), CARRIER, granted)));
}

/*
 * Execute a statement on all nodes but this one.
 *
 * Errors: 55000 where that fails.
 */
static void
on_workers(const char *sql)
{
	char	   *failure = query(psprintf("SELECT nodename || ':' || nodeport || ': ' || result"
										 " FROM run_command_on_workers(%s) WHERE NOT success",
										 quote_literal_cstr(sql)));

	if (failure != NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("another node could not be made ready"),
				 errdetail("%s", failure)));
}

/*
 * Execute a statement.  Returns the first column of the first row as text, null if
 * there is none.
 */
static char *
query(const char *sql)
{
	int			result = SPI_execute(sql, false, 0);

	if (result < 0)
		elog(ERROR, "unexpected result of query: %s", SPI_result_code_string(result));
	if (result != SPI_OK_SELECT || SPI_processed == 0)
		return NULL;
	return SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1);
}
