/*-------------------------------------------------------------------------
 *
 * run.c
 *	  run and try_run: begin, the work and finish in one call.
 *
 * The work is a function of the application, the handler.  It is called with
 * the rights of the caller, who therefore must have the right to call it, and
 * in the caller's transaction, so that an error in it undoes the claim with
 * everything else.
 *
 * What the handler is allowed to be is checked before anything else, also when
 * the stored answer is all that is needed: a mistake in the call should not
 * wait for the first request that is new.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "access/htup_details.h"
#include "call/begin.h"
#include "call/finish.h"
#include "call/result.h"
#include "catalog/objectaccess.h"
#include "catalog/pg_namespace.h"
#include "catalog/pg_proc.h"
#include "catalog/pg_type_d.h"
#include "miscadmin.h"
#include "request/arguments.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/regproc.h"
#include "utils/syscache.h"
#include "utils/typcache.h"

/* Arguments of run and try_run */
enum
{
	RUN_TENANT,
	RUN_ACTION,
	RUN_KEY,
	RUN_REQUEST,
	RUN_HANDLER,
	RUN_ACTOR,
	RUN_TTL,
	RUN_WAIT
};

/* Columns of idempotency_response */
enum
{
	RESPONSE_STATUS_CODE,
	RESPONSE_HEADERS,
	RESPONSE_RESPONSE,
	RESPONSE_BODY,
	RESPONSE_TTL,
	RESPONSE_COLUMNS
};

static const Oid response_types[RESPONSE_COLUMNS] = {
	INT4OID, JSONBOID, JSONOID, BYTEAOID, INTERVALOID
};

#define DEFAULT_STATUS	200

static Datum run_request(FunctionCallInfo fcinfo, const char *function,
						 bool raise);
static Oid	check_handler(Oid handler);
static void check_rights(Oid function, Oid namespace);
static bool has_shape_of_handler(Form_pg_proc form);
static void call_handler(Oid handler, Oid rettype, const NullableDatum *request,
						 Answer *answer);
static void read_response(Datum row, Answer *answer);
static NullableDatum get_column(int column, const Datum *values,
								const bool *nulls);

PG_FUNCTION_INFO_V1(idempotency_run);
PG_FUNCTION_INFO_V1(idempotency_try_run);

/*
 * idempotency_run(tenant text, action text, key text, request jsonb,
 *				   handler regprocedure, actor text, ttl interval,
 *				   wait interval) returns idempotency_result
 *
 * Get the stored answer of a request, or have the handler make one and store
 * it.  The outcome is replayed, or what finish says: completed, errored or
 * released.
 *
 * Errors: those of begin and finish; 22004 without a handler, 42883 when there
 * is none with that OID, 42809 for one of another shape, 42501 without the
 * right to call it, 39004 when it returns null, 39000 when it returns no valid
 * status or both a response and a body, and its own.
 */
Datum
idempotency_run(PG_FUNCTION_ARGS)
{
	return run_request(fcinfo, "idempotency_run()", true);
}

/*
 * idempotency_try_run(the same) returns idempotency_result
 *
 * The same, but a mismatch and a request in flight are outcomes, not errors.
 */
Datum
idempotency_try_run(PG_FUNCTION_ARGS)
{
	return run_request(fcinfo, "idempotency_try_run()", false);
}

/*
 * Workhorse of run and try_run.
 */
static Datum
run_request(FunctionCallInfo fcinfo, const char *function, bool raise)
{
	BeginCall	call;
	Scope	   *scope = &call.request.scope;
	Claim	   *claim;
	Oid			rettype;
	Answer		answer;
	Record		record;
	StatusClass class;
	ResultRow	row;

	CallNeedsReadWrite(function);
	ScopeFromArguments(scope, fcinfo, RUN_ACTOR);
	if (PG_ARGISNULL(RUN_HANDLER))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("handler is missing")));
	FingerprintFromRequest(&call.request.fingerprint, &fcinfo->args[RUN_REQUEST]);
	call.ttl = CallReadTtl(&fcinfo->args[RUN_TTL]);
	call.wait_ms = CallReadWait(&fcinfo->args[RUN_WAIT]);
	call.lease = 0;
	call.claim = NULL;
	call.keep_leases = false;
	rettype = check_handler(PG_GETARG_OID(RUN_HANDLER));

	if (BeginRequest(&call, raise, &row) == NULL)
		return ResultReturn(fcinfo, &row);

	call_handler(PG_GETARG_OID(RUN_HANDLER), rettype,
				 &fcinfo->args[RUN_REQUEST], &answer);

	/* the handler may have ended the claim itself */
	claim = ClaimFindHeld(scope);
	if (claim == NULL || claim_is_leased(&claim->facts))
		ereport(ERROR,
				(errcode(ERRCODE_IDEMPOTENCY_OUT_OF_ORDER),
				 errmsg("no such claim"),
				 errdetail("The handler has ended the claim that it was called for.")));
	class = FinishClaim(scope, claim, &answer, &record);

	FinishedRow(&row, class, &record);
	return ResultReturn(fcinfo, &row);
}

/*
 * Check that a function can be a handler, and may be called; returns the type
 * of its result.
 */
static Oid
check_handler(Oid handler)
{
	HeapTuple	tuple = SearchSysCache1(PROCOID, ObjectIdGetDatum(handler));
	Form_pg_proc form;
	Oid			rettype;

	if (!HeapTupleIsValid(tuple))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_FUNCTION),
				 errmsg("function with OID %u does not exist", handler)));

	form = (Form_pg_proc) GETSTRUCT(tuple);
	rettype = form->prorettype;
	if (!has_shape_of_handler(form))
		ereport(ERROR,
				(errcode(ERRCODE_WRONG_OBJECT_TYPE),
				 errmsg("function %s cannot be a handler",
						format_procedure(handler)),
				 errdetail("A handler is a function that takes one jsonb and returns one json, jsonb or %s.",
						   format_type_be(CatalogResponseType()))));
	check_rights(handler, form->pronamespace);
	ReleaseSysCache(tuple);

	return rettype;
}

/*
 * Check that the caller could call a function by its name, as the server does
 * for one that is called by its OID (HandleFunctionRequest() in fastpath.c).
 */
static void
check_rights(Oid function, Oid namespace)
{
	AclResult	aclresult;

	aclresult = object_aclcheck(NamespaceRelationId, namespace, GetUserId(),
								ACL_USAGE);
	if (aclresult != ACLCHECK_OK)
		aclcheck_error(aclresult, OBJECT_SCHEMA,
					   get_namespace_name(namespace));
	InvokeNamespaceSearchHook(namespace, true);

	aclresult = object_aclcheck(ProcedureRelationId, function, GetUserId(),
								ACL_EXECUTE);
	if (aclresult != ACLCHECK_OK)
		aclcheck_error(aclresult, OBJECT_FUNCTION, get_func_name(function));
	InvokeFunctionExecuteHook(function);
}

static bool
has_shape_of_handler(Form_pg_proc form)
{
	return form->prokind == PROKIND_FUNCTION &&
		!form->proretset &&
		form->pronargs == 1 &&
		form->proargtypes.values[0] == JSONBOID &&
		(form->prorettype == JSONOID ||
		 form->prorettype == JSONBOID ||
		 form->prorettype == CatalogResponseType());
}

/*
 * Call the handler, and take its result for the answer.
 */
static void
call_handler(Oid handler, Oid rettype, const NullableDatum *request,
			 Answer *answer)
{
	LOCAL_FCINFO(fcinfo, 1);
	FmgrInfo	flinfo;
	Datum		result = (Datum) 0;

	fmgr_info(handler, &flinfo);
	InitFunctionCallInfoData(*fcinfo, &flinfo, 1, InvalidOid, NULL, NULL);
	fcinfo->args[0] = *request;
	fcinfo->isnull = flinfo.fn_strict && request->isnull;
	if (!fcinfo->isnull)
		result = FunctionCallInvoke(fcinfo);

	if (fcinfo->isnull)
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_NULL_VALUE_NOT_ALLOWED),
				 errmsg("handler %s returned null", format_procedure(handler)),
				 flinfo.fn_strict && request->isnull ?
				 errdetail("It is strict, and the request is null.") : 0));

	answer->status_code.value = Int32GetDatum(DEFAULT_STATUS);
	answer->status_code.isnull = false;
	answer->headers.isnull = true;
	answer->body.isnull = true;
	answer->ttl.isnull = true;
	answer->response.isnull = false;
	if (rettype == JSONOID)
		answer->response.value = result;
	else if (rettype == JSONBOID)
		answer->response.value =
			CStringGetTextDatum(DatumGetCString(DirectFunctionCall1(jsonb_out,
																	result)));
	else
		read_response(result, answer);

	FinishCheckAnswer(answer, handler);
}

/*
 * Take an idempotency_response for the answer.
 */
static void
read_response(Datum row, Answer *answer)
{
	HeapTupleHeader header = DatumGetHeapTupleHeader(row);
	TupleDesc	desc = lookup_rowtype_tupdesc(HeapTupleHeaderGetTypeId(header),
											  HeapTupleHeaderGetTypMod(header));
	HeapTupleData tuple;
	Datum		values[RESPONSE_COLUMNS];
	bool		nulls[RESPONSE_COLUMNS];

	ResultCheckShape(desc, response_types, RESPONSE_COLUMNS);
	tuple.t_len = HeapTupleHeaderGetDatumLength(header);
	tuple.t_data = header;
	heap_deform_tuple(&tuple, desc, values, nulls);
	ReleaseTupleDesc(desc);

	answer->status_code = get_column(RESPONSE_STATUS_CODE, values, nulls);
	answer->headers = get_column(RESPONSE_HEADERS, values, nulls);
	answer->response = get_column(RESPONSE_RESPONSE, values, nulls);
	answer->body = get_column(RESPONSE_BODY, values, nulls);
	answer->ttl = get_column(RESPONSE_TTL, values, nulls);
}

static NullableDatum
get_column(int column, const Datum *values, const bool *nulls)
{
	NullableDatum result = {.value = values[column], .isnull = nulls[column]};

	return result;
}
