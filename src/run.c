/*-------------------------------------------------------------------------
 *
 * run.c
 *	  run: begin, the work and finish in one call.
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
#include "idempotency.h"

#include "access/htup_details.h"
#include "begin.h"
#include "call.h"
#include "catalog/objectaccess.h"
#include "catalog/pg_namespace.h"
#include "catalog/pg_proc.h"
#include "catalog/pg_type_d.h"
#include "finish.h"
#include "miscadmin.h"
#include "result.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/regproc.h"
#include "utils/syscache.h"
#include "utils/typcache.h"

/* Arguments of run */
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
	RESPONSE_COLUMNS
};

static const Oid response_types[RESPONSE_COLUMNS] = {
	INT4OID, JSONBOID, JSONOID
};

#define DEFAULT_STATUS	200

static Oid	check_handler(Oid handler);
static void check_rights(Oid function, Oid namespace);
static bool has_shape_of_handler(Form_pg_proc form);
static void call_handler(Oid handler, Oid rettype, const NullableDatum *request,
						 Answer *answer);
static void read_response(Datum row, Answer *answer);

PG_FUNCTION_INFO_V1(idempotency_run);

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
 * status, and its own.
 */
Datum
idempotency_run(PG_FUNCTION_ARGS)
{
	Request		request;
	Claim	   *claim;
	Oid			rettype;
	Answer		answer;
	Record		record;
	StatusClass class;
	ResultRow	row;

	CallNeedsReadWrite("idempotency_run()");
	ScopeFromArguments(&request.scope, fcinfo, RUN_ACTOR);
	if (PG_ARGISNULL(RUN_HANDLER))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("handler is missing")));
	FingerprintFromRequest(&request.fingerprint, &fcinfo->args[RUN_REQUEST]);
	request.ttl = CallReadTtl(fcinfo, RUN_TTL);
	request.error_ttl = CallReadErrorTtl();
	request.wait_ms = CallReadWait(fcinfo, RUN_WAIT);
	request.lease = 0;
	rettype = check_handler(PG_GETARG_OID(RUN_HANDLER));

	if (BeginRequest(&request, true, &row) == NULL)
		return ResultReturn(fcinfo, &row);

	call_handler(PG_GETARG_OID(RUN_HANDLER), rettype,
				 &fcinfo->args[RUN_REQUEST], &answer);

	/* the handler may have ended the claim itself */
	claim = ClaimFindHeld(&request.scope);
	if (claim == NULL || claim_is_leased(&claim->facts))
		ereport(ERROR,
				(errcode(ERRCODE_IDEMPOTENCY_NO_CLAIM),
				 errmsg("no such claim"),
				 errdetail("The handler has ended the claim that it was called for.")));
	class = FinishClaim(&request.scope, claim, &answer, &record);
	if (class == STATUS_RELEASED)
	{
		RecordSetNull(&record, finished_at);
		RecordSetNull(&record, expires_at);
	}

	ResultAnswer(&row, StatusClassName(class), &record);
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
						   format_type_be(StoreResponseType()))));
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
		 form->prorettype == StoreResponseType());
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
	answer->response.isnull = false;
	if (rettype == JSONOID)
		answer->response.value = result;
	else if (rettype == JSONBOID)
		answer->response.value =
			CStringGetTextDatum(DatumGetCString(DirectFunctionCall1(jsonb_out,
																	result)));
	else
		read_response(result, answer);

	if (!StatusIsValid(&answer->status_code))
		ereport(ERROR,
				(errcode(ERRCODE_EXTERNAL_ROUTINE_INVOCATION_EXCEPTION),
				 errmsg("handler %s returned a status_code out of range",
						format_procedure(handler)),
				 errdetail("It must be an HTTP status, from %d to %d.",
						   STATUS_MIN, STATUS_MAX)));
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

	answer->status_code.value = values[RESPONSE_STATUS_CODE];
	answer->status_code.isnull = nulls[RESPONSE_STATUS_CODE];
	answer->headers.value = values[RESPONSE_HEADERS];
	answer->headers.isnull = nulls[RESPONSE_HEADERS];
	answer->response.value = values[RESPONSE_RESPONSE];
	answer->response.isnull = nulls[RESPONSE_RESPONSE];
}
