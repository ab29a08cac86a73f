/*-------------------------------------------------------------------------
 *
 * forward.c
 *	  Sending a call to the node of its tenant.
 *
 * On a cluster the records of a tenant are on one of its nodes (store/shards.c),
 * and there, in one process, must be all that there is to a claim: its lock, what
 * shared memory knows of it, the guard, and what becomes of it with savepoints.  So
 * a call that comes in elsewhere is made again there, in the transaction that Citus
 * has for this one on that node, and over the connection by which it changes the
 * rows of that tenant.  Who commits this transaction commits that one.
 *
 * Citus can send the call of a function to the node that belongs to one of its
 * arguments, but only where the call is all that a statement has, and it crashes if
 * that argument is null.  So that is not asked of the functions that an application
 * calls.  Whatever statement they are in, they run here first, and come to this
 * file when the records are elsewhere.  It makes a statement of the form that Citus
 * does send, of the function idempotency_at_owner() (at_owner.c), with the tenant,
 * the name of the call, and its arguments as texts.  The settings of the session
 * that are anybody's to change go with it.
 *
 * Changes that belong to this node only.  Citus commits what it has done on one
 * other node before this one commits.  If this node has changes of its own, in
 * tables that Citus knows nothing of, they could then be lost while the record of
 * the request stays.  So, before such a transaction commits, Citus is made to use
 * two phases.  There is no function for that; but a statement on two shards has it
 * done, even if it finds no row to change (add_second_phase()).
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "access/xact.h"
#include "call/forward.h"
#include "catalog/pg_type_d.h"
#include "claim/claim.h"
#include "claim/guard.h"
#include "executor/spi.h"
#include "request/scope.h"
#include "store/catalog.h"
#include "store/owner.h"
#include "store/sharded.h"
#include "store/shards.h"
#include "transaction.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"
#include "utils/snapmgr.h"

#define CARRIER			"idempotency_at_owner"
#define TWO_PHASE_TABLE	"idempotency_two_phase"

const char *const ForwardSettings[FORWARD_SETTINGS] = {
	"idempotency.ttl",
	"idempotency.error_ttl",
	"idempotency.lease",
	"idempotency.wait",
	"idempotency.retry_after",
	"idempotency.retryable_status"
};

/* How values are written as text, so that both sides read what the other writes */
static const struct
{
	const char *name;
	const char *value;
}			styles[] = {
	{"datestyle", "ISO, YMD"},
	{"intervalstyle", "postgres"},
	{"bytea_output", "hex"},
	{"standard_conforming_strings", "on"},

	/* nothing is found by it, so that a name has its schema */
	{"search_path", "pg_catalog, pg_temp"}
};

static char *send_call(const char *function, Datum tenant, Datum arguments);
static Datum make_array(const NullableDatum *texts, int count);
static Datum get_settings(void);
static void before_commit(void);
static void add_second_phase(void);
static void at_end(XactEvent event);

/* whether a call is on its way */
static bool under_way = false;

/* whether this transaction has sent one, and to which node the last time */
static bool has_sent = false;
static int	sent_to;

/*
 * Hook into the end of transactions.
 */
void
ForwardInit(void)
{
	GuardAlso(before_commit);
	TransactionAtEnd(AT_END_FORWARD, at_end, NULL);
}

/*
 * Whether a call has to be made on another node.
 *
 * Errors: those of CatalogOpenTable, and 40001 when this transaction has a claim on
 * the request where the records have been, and are no more.
 */
bool
ForwardNeeded(const Scope *scope)
{
	Datum		tenant = scope->parts[SCOPE_TENANT];
	const Claim *claim;
	bool		needed;

	if (!CatalogIsDistributed())
		return false;

	needed = !OidIsValid(ShardsFind(tenant));
	claim = ClaimFindHeld(scope);
	if (claim != NULL && !claim_is_leased(&claim->facts) &&
		claim->place != (needed ? ShardsFindNode(tenant) : CLAIM_HERE))
		ShardedRaiseMoved();
	return needed;
}

/*
 * Whether a call is on its way to another node.
 */
bool
ForwardIsUnderWay(void)
{
	return under_way;
}

/*
 * Note that a call which was sent has got a transaction claim, or ended one.
 */
void
ForwardBegun(const Scope *scope)
{
	/* the records may have moved on meanwhile; the claim has not */
	ClaimAddElsewhere(scope, sent_to);
}

void
ForwardEnded(const Scope *scope)
{
	Claim	   *claim = ClaimFindHeld(scope);

	if (claim != NULL)
		ClaimEnd(claim);
}

/*
 * Send the call of a function of ours, as it came.  Returns its result as text,
 * null for a null; a set of texts comes as the text of an array.
 */
char *
ForwardCall(FunctionCallInfo fcinfo, const char *function, const Scope *scope)
{
	Oid		   *types;
	int			nargs;
	NullableDatum args[FUNC_MAX_ARGS];

	(void) get_func_signature(fcinfo->flinfo->fn_oid, &types, &nargs);
	memcpy(args, fcinfo->args, nargs * sizeof(NullableDatum));

	return ForwardArguments(function, scope, nargs, types, args);
}

/*
 * Send the call of a function that returns an idempotency_result, as it came, and
 * return what comes back.
 */
Datum
ForwardRow(FunctionCallInfo fcinfo, const char *function, const Scope *scope)
{
	ResultRow	row;

	ForwardGetRow(ForwardCall(fcinfo, function, scope), &row);
	return ResultReturn(fcinfo, &row);
}

/*
 * Send a call with arguments of some types.
 */
char *
ForwardArguments(const char *function, const Scope *scope, int nargs,
				 const Oid *types, const NullableDatum *args)
{
	NullableDatum texts[FUNC_MAX_ARGS];
	int			nest_level = NewGUCNestLevel();
	char	   *result;

	ForwardUseStyles();
	for (int i = 0; i < nargs; i++)
	{
		Oid			output;
		bool		is_varlena;

		texts[i].isnull = args[i].isnull;
		if (args[i].isnull)
			continue;
		getTypeOutputInfo(types[i], &output, &is_varlena);
		texts[i].value = CStringGetTextDatum(OidOutputFunctionCall(output,
																   args[i].value));
	}

	under_way = true;
	PG_TRY();
	{
		result = send_call(function, scope->parts[SCOPE_TENANT],
						   make_array(texts, nargs));
	}
	PG_FINALLY();
	{
		under_way = false;
	}
	PG_END_TRY();
	AtEOXact_GUC(false, nest_level);

	return result;
}

/*
 * Read a row of type idempotency_result.
 */
void
ForwardGetRow(const char *text, ResultRow *row)
{
	Datum		tuple = ForwardGetValue(text, CatalogResultType());

	ResultFromTuple(row, DatumGetHeapTupleHeader(tuple));
}

/*
 * Read a value of a type.
 */
Datum
ForwardGetValue(const char *text, Oid type)
{
	int			nest_level = NewGUCNestLevel();
	Oid			input;
	Oid			param;
	Datum		result;

	ForwardUseStyles();
	getTypeInputInfo(type, &input, &param);
	result = OidInputFunctionCall(input, unconstify(char *, text), param, -1);
	AtEOXact_GUC(false, nest_level);

	return result;
}

/*
 * Write values as text in the same way everywhere, up to the end of a level of
 * settings.
 */
void
ForwardUseStyles(void)
{
	for (int i = 0; i < (int) lengthof(styles); i++)
		(void) set_config_option(styles[i].name, styles[i].value,
								 PGC_USERSET, PGC_S_SESSION,
								 GUC_ACTION_SAVE, true, 0, false);
}

/*
 * Have Citus make a call on the node of a tenant.
 *
 * The plan is made for this one execution, so that the planner of Citus sees the
 * values of its parameters, whatever plan_cache_mode says.
 */
static char *
send_call(const char *function, Datum tenant, Datum arguments)
{
	MemoryContext caller = CurrentMemoryContext;
	Oid			types[] = {TEXTOID, TEXTOID, TEXTARRAYOID, TEXTARRAYOID};
	Datum		values[] = {tenant, CStringGetTextDatum(function), arguments,
	get_settings()};
	char	   *query = psprintf("SELECT result FROM %s($1, $2, $3, $4) AS result",
								 quote_qualified_identifier(get_namespace_name(CatalogSchema()),
															CARRIER));
	char	   *result;

	/* to be asked before the commit */
	if (!has_sent)
		GuardCount(1);
	has_sent = true;
	sent_to = ShardsFindNode(tenant);

	SPI_connect();
	if (SPI_execute_with_args(query, lengthof(types), types, values, NULL,
							  false, 0) != SPI_OK_SELECT || SPI_processed != 1)
		elog(ERROR, "could not send a call to the node of its tenant");
	result = SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1);
	if (result != NULL)
		result = MemoryContextStrdup(caller, result);
	SPI_finish();

	return result;
}

static Datum
make_array(const NullableDatum *texts, int count)
{
	Datum		values[FUNC_MAX_ARGS];
	bool		nulls[FUNC_MAX_ARGS];
	int			dims[] = {count};
	int			lbs[] = {1};

	for (int i = 0; i < count; i++)
	{
		values[i] = texts[i].value;
		nulls[i] = texts[i].isnull;
	}
	return PointerGetDatum(construct_md_array(values, nulls, 1, dims, lbs, TEXTOID,
											  -1, false, TYPALIGN_INT));
}

/*
 * The values of the settings that travel with a call, in their order, and what
 * tells whether they arrived as they were.
 */
static Datum
get_settings(void)
{
	NullableDatum texts[FORWARD_SETTINGS + FORWARD_PROBES];

	for (int i = 0; i < FORWARD_SETTINGS; i++)
	{
		texts[i].value = CStringGetTextDatum(GetConfigOption(ForwardSettings[i],
															 false, false));
		texts[i].isnull = false;
	}
	texts[FORWARD_SETTINGS].value = CStringGetTextDatum(FORWARD_PROBE);
	texts[FORWARD_SETTINGS].isnull = false;
	texts[FORWARD_SETTINGS + 1].value = (Datum) 0;
	texts[FORWARD_SETTINGS + 1].isnull = true;
	return make_array(texts, FORWARD_SETTINGS + FORWARD_PROBES);
}

/*
 * What the guard calls before a commit.
 */
static void
before_commit(void)
{
	if (has_sent && TransactionIdIsValid(GetTopTransactionIdIfAny()))
		add_second_phase();
}

/*
 * Have Citus commit this transaction in two phases.
 *
 * It does so for a statement that changes more than one shard.  There is an empty
 * table for that, which nobody else touches: what we do, we do as its owner, over
 * connections of his own, and Citus does not let those of two users change one
 * shard.  With nothing to change, nobody has to wait for it.
 */
static void
add_second_phase(void)
{
	int			nest_level = NewGUCNestLevel();
	Oid			schema = CatalogSchema();
	Oid			table = get_relname_relid(TWO_PHASE_TABLE, schema);
	Owner		owner;

	PushActiveSnapshot(GetTransactionSnapshot());
	OwnerBecome(&owner, table);
	(void) set_config_option("citus.all_modifications_commutative", "on",
							 PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_SAVE, true, 0, false);
	SPI_connect();
	if (SPI_execute(psprintf("SELECT FROM pg_dist_shard WHERE logicalrelid = %u",
							 table), true, 0) != SPI_OK_SELECT ||
		SPI_processed < 2)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("changes on this node cannot be committed together with those on the node of the tenant"),
				 errdetail("Table \"%s\" is not distributed.", TWO_PHASE_TABLE),
				 errhint("Run idempotency_distribute() on the coordinator.")));
	if (SPI_execute(psprintf("DELETE FROM %s",
							 quote_qualified_identifier(get_namespace_name(schema),
														TWO_PHASE_TABLE)),
					false, 0) != SPI_OK_DELETE)
		elog(ERROR, "could not have the transaction committed in two phases");
	SPI_finish();
	OwnerLeave(&owner);
	AtEOXact_GUC(false, nest_level);
	PopActiveSnapshot();
}

static void
at_end(XactEvent event)
{
	has_sent = false;
	under_way = false;
}
