/*-------------------------------------------------------------------------
 *
 * at_owner.c
 *	  Making a call that was sent from another node.
 *
 * This is the other side of forward.c, on the node that has the records of the
 * tenant.  The call is made by a statement, as any other, by whoever made it on the
 * other node: so his rights are checked here as well, and what he can reach by it
 * is no more than if he had come here himself.
 *
 * A run whose handler is called on the other node is begun and finished in two
 * calls, for which there are no functions.  They are for who may call run.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "access/htup_details.h"
#include "access/xact.h"
#include "call/forward.h"
#include "call/run.h"
#include "catalog/dependency.h"
#include "catalog/pg_namespace.h"
#include "catalog/pg_proc.h"
#include "catalog/pg_type_d.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "store/catalog.h"
#include "store/sharded.h"
#include "utils/acl.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/catcache.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"
#include "utils/syscache.h"

/* Arguments of at_owner */
enum
{
	AT_OWNER_TENANT,
	AT_OWNER_CALL,
	AT_OWNER_ARGUMENTS,
	AT_OWNER_SETTINGS
};

/* The plan of the statement that makes a call, which is kept */
typedef struct Call
{
	const char *name;
	Oid			function;		/* that it was planned with */
	SPIPlanPtr	plan;
} Call;

static Call calls[] = {
	{.name = "idempotency_begin"},
	{.name = "idempotency_try_begin"},
	{.name = "idempotency_finish"},
	{.name = "idempotency_replay"},
	{.name = "idempotency_release"},
	{.name = "idempotency_store"},
	{.name = "idempotency_forget"},
	{.name = "idempotency_checkpoint"},
	{.name = "idempotency_first_seen"},
	{.name = "idempotency_run"},
	{.name = "idempotency_try_run"}
};

static void check_place(const Scope *scope);
static void check_transaction(const char *name);
static void use_settings(ArrayType *settings);
static char *begin_run(const char *function, bool raise, ArrayType *arguments);
static char *finish_run(ArrayType *arguments);
static bool may_call(const char *function);
static char *make_call(const char *name, ArrayType *arguments);
static Oid	find_function(const char *name);
static void prepare_call(Call *call, Oid function, Oid *types, int nargs);
static void read_arguments(ArrayType *arguments, int nargs, const Oid *types,
						   NullableDatum *values);
static char *write_result(Datum value, Oid type);

PG_FUNCTION_INFO_V1(idempotency_at_owner);

/*
 * idempotency_at_owner(tenant text, call text, arguments text[],
 *						settings text[]) returns text
 *
 * Make the call of a function of ours, by its name, with arguments that are written
 * as text, and return its result as text.
 *
 * Errors: those of the function; 40001 when the records of the tenant are not on
 * this node, 55000 when Citus has not sent the call to another one, or the records
 * are not distributed, 22023 for a call that there is not.
 */
Datum
idempotency_at_owner(PG_FUNCTION_ARGS)
{
	Scope		scope;
	char	   *name = text_to_cstring(PG_GETARG_TEXT_PP(AT_OWNER_CALL));
	ArrayType  *arguments = PG_GETARG_ARRAYTYPE_P(AT_OWNER_ARGUMENTS);
	int			nest_level = NewGUCNestLevel();
	char	   *result;

	scope.parts[SCOPE_TENANT] = PG_GETARG_DATUM(AT_OWNER_TENANT);
	scope.name.len = 0;
	check_place(&scope);
	check_transaction(name);
	use_settings(PG_GETARG_ARRAYTYPE_P(AT_OWNER_SETTINGS));

	if (strcmp(name, RUN_BEGIN) == 0)
		result = begin_run("idempotency_run", true, arguments);
	else if (strcmp(name, RUN_TRY_BEGIN) == 0)
		result = begin_run("idempotency_try_run", false, arguments);
	else if (strcmp(name, RUN_FINISH) == 0)
		result = finish_run(arguments);
	else
		result = make_call(name, arguments);
	AtEOXact_GUC(false, nest_level);

	if (result == NULL)
		PG_RETURN_NULL();
	PG_RETURN_TEXT_P(cstring_to_text(result));
}

/*
 * Refuse to make a call where the records of the tenant are not.
 */
static void
check_place(const Scope *scope)
{
	bool		distributed = CatalogIsDistributed();

	if (distributed && !ForwardNeeded(scope))
		return;
	if (distributed && !ForwardIsUnderWay())
		ShardedRaiseMoved();

	ereport(ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("call was not sent to the node of its tenant"),
			 errdetail("Function idempotency_at_owner() is not distributed together with the records, or the node of the tenant is not active."),
			 errhint("Run idempotency_distribute() on the coordinator.")));
}

/*
 * Refuse a call that would be committed here by itself, whatever becomes of the
 * transaction that it came from.
 *
 * Citus sends it so where it takes the statement for the only one of its transaction:
 * while it plans one, or a trigger is called at the end, outside of a transaction
 * block.
 */
static void
check_transaction(const char *name)
{
	if (ForwardIsUnderWay() || IsTransactionBlock() ||
		strcmp(name, "idempotency_replay") == 0)
		return;

	ereport(ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("call was sent without the transaction that it belongs to"),
			 errhint("Make the call in a transaction block, and leave citus.function_opens_transaction_block on.")));
}

/*
 * Have the settings of the session that the call came from.
 *
 * Errors: 55000 when they have not arrived as they were sent.
 */
static void
use_settings(ArrayType *settings)
{
	Datum	   *values;
	bool	   *nulls;
	int			count;

	deconstruct_array(settings, TEXTOID, -1, false, TYPALIGN_INT,
					  &values, &nulls, &count);
	if (count != FORWARD_SETTINGS + FORWARD_PROBES ||
		nulls[FORWARD_SETTINGS] || !nulls[FORWARD_SETTINGS + 1] ||
		strcmp(TextDatumGetCString(values[FORWARD_SETTINGS]), FORWARD_PROBE) != 0)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("call did not arrive as it was sent"),
				 errhint("Settings \"standard_conforming_strings\" and \"array_nulls\" must be on for the role on all nodes.")));

	for (int i = 0; i < FORWARD_SETTINGS; i++)
		(void) set_config_option(ForwardSettings[i],
								 TextDatumGetCString(values[i]),
								 PGC_USERSET, PGC_S_SESSION,
								 GUC_ACTION_SAVE, true, 0, false);
}

/*
 * Begin a request for a handler on the node that the call came from.
 */
static char *
begin_run(const char *function, bool raise, ArrayType *arguments)
{
	LOCAL_FCINFO(fcinfo, RUN_ARGUMENTS);
	ResultRow	row;

	if (!may_call(function))
		aclcheck_error(ACLCHECK_NO_PRIV, OBJECT_FUNCTION, function);

	InitFunctionCallInfoData(*fcinfo, NULL, RUN_ARGUMENTS, InvalidOid, NULL, NULL);
	read_arguments(arguments, RUN_ARGUMENTS, RunTypes, fcinfo->args);
	RunBegin(fcinfo, raise, &row);
	return write_result(ResultGetDatum(&row), CatalogResultType());
}

/*
 * Finish it.
 */
static char *
finish_run(ArrayType *arguments)
{
	LOCAL_FCINFO(fcinfo, RUN_ANSWER_ARGUMENTS);
	ResultRow	row;

	if (!may_call("idempotency_run") && !may_call("idempotency_try_run"))
		aclcheck_error(ACLCHECK_NO_PRIV, OBJECT_FUNCTION, "idempotency_run");

	InitFunctionCallInfoData(*fcinfo, NULL, RUN_ANSWER_ARGUMENTS, InvalidOid,
							 NULL, NULL);
	read_arguments(arguments, RUN_ANSWER_ARGUMENTS, RunAnswerTypes, fcinfo->args);
	RunFinish(fcinfo, &row);
	return write_result(ResultGetDatum(&row), CatalogResultType());
}

/*
 * Whether the caller has the right to call a function of the extension.
 */
static bool
may_call(const char *function)
{
	return object_aclcheck(ProcedureRelationId, find_function(function),
						   GetUserId(), ACL_EXECUTE) == ACLCHECK_OK;
}

/*
 * Make the call of a function.
 */
static char *
make_call(const char *name, ArrayType *arguments)
{
	MemoryContext caller = CurrentMemoryContext;
	Call	   *call = NULL;
	Oid			function;
	Oid		   *types;
	int			nargs;
	NullableDatum args[FUNC_MAX_ARGS];
	Datum		values[FUNC_MAX_ARGS];
	char		nulls[FUNC_MAX_ARGS];
	char	   *result = NULL;
	Datum		value;
	bool		isnull;

	for (int i = 0; i < (int) lengthof(calls); i++)
	{
		if (strcmp(calls[i].name, name) == 0)
			call = &calls[i];
	}
	if (call == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("there is no call \"%s\"", name)));

	function = find_function(name);
	(void) get_func_signature(function, &types, &nargs);
	read_arguments(arguments, nargs, types, args);
	for (int i = 0; i < nargs; i++)
	{
		values[i] = args[i].value;
		nulls[i] = args[i].isnull ? 'n' : ' ';
	}

	SPI_connect();
	prepare_call(call, function, types, nargs);
	if (SPI_execute_plan(call->plan, values, nulls, false, 0) != SPI_OK_SELECT ||
		SPI_processed != 1)
		elog(ERROR, "could not make the call \"%s\"", name);
	value = SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull);
	if (!isnull)
		result = MemoryContextStrdup(caller,
									 write_result(value,
												  SPI_gettypeid(SPI_tuptable->tupdesc, 1)));
	SPI_finish();

	return result;
}

/*
 * Find a function of the extension, of which there is one by each name; others may
 * have the same.
 */
static Oid
find_function(const char *name)
{
	Oid			extension = get_extension_oid(EXTENSION_NAME, false);
	CatCList   *list = SearchSysCacheList1(PROCNAMEARGSNSP, CStringGetDatum(name));
	Oid			function = InvalidOid;

	for (int i = 0; i < list->n_members; i++)
	{
		Form_pg_proc form = (Form_pg_proc) GETSTRUCT(&list->members[i]->tuple);

		if (getExtensionOfObject(ProcedureRelationId, form->oid) == extension)
			function = form->oid;
	}
	ReleaseSysCacheList(list);

	if (!OidIsValid(function))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_FUNCTION),
				 errmsg("function %s() of extension \"%s\" does not exist",
						name, EXTENSION_NAME)));
	return function;
}

/*
 * Prepare the statement that makes a call, if that was not done yet.
 *
 * A set comes as an array.
 */
static void
prepare_call(Call *call, Oid function, Oid *types, int nargs)
{
	StringInfoData sql;

	if (call->plan != NULL && call->function == function)
		return;
	if (call->plan != NULL)
		SPI_freeplan(call->plan);
	call->plan = NULL;

	initStringInfo(&sql);
	appendStringInfo(&sql, "SELECT %s FROM %s(",
					 get_func_retset(function) ?
					 "pg_catalog.array_agg(result)" : "result",
					 quote_qualified_identifier(get_namespace_name(get_func_namespace(function)),
												call->name));
	for (int i = 1; i <= nargs; i++)
		appendStringInfo(&sql, "%s$%d", i == 1 ? "" : ", ", i);
	appendStringInfoString(&sql, ") AS result");

	call->plan = SPI_prepare(sql.data, nargs, types);
	if (call->plan == NULL)
		elog(ERROR, "SPI_prepare failed: %s", SPI_result_code_string(SPI_result));
	SPI_keepplan(call->plan);
	call->function = function;
}

/*
 * Read arguments of some types.
 */
static void
read_arguments(ArrayType *arguments, int nargs, const Oid *types,
			   NullableDatum *values)
{
	int			nest_level = NewGUCNestLevel();
	Datum	   *texts;
	bool	   *nulls;
	int			count;

	deconstruct_array(arguments, TEXTOID, -1, false, TYPALIGN_INT,
					  &texts, &nulls, &count);
	if (count != nargs)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("number of arguments is wrong"),
				 errdetail("There are %d, and there should be %d.", count, nargs)));

	ForwardUseStyles();
	for (int i = 0; i < nargs; i++)
	{
		Oid			input;
		Oid			param;

		values[i].value = (Datum) 0;
		values[i].isnull = nulls[i];
		if (nulls[i])
			continue;
		getTypeInputInfo(types[i], &input, &param);
		values[i].value = OidInputFunctionCall(input, TextDatumGetCString(texts[i]),
											   param, -1);
	}
	AtEOXact_GUC(false, nest_level);
}

/*
 * Write a value as text.
 */
static char *
write_result(Datum value, Oid type)
{
	int			nest_level = NewGUCNestLevel();
	Oid			output;
	bool		is_varlena;
	char	   *text;

	ForwardUseStyles();
	getTypeOutputInfo(type, &output, &is_varlena);
	text = OidOutputFunctionCall(output, value);
	AtEOXact_GUC(false, nest_level);

	return text;
}
