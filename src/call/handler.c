/*-------------------------------------------------------------------------
 *
 * handler.c
 *	  Handlers: work that is a function of the application.
 *
 * A handler is called with the rights of the caller, who therefore must have the
 * right to call it, and in the caller's transaction, so that an error in it undoes
 * the claim with everything else.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "access/htup_details.h"
#include "call/handler.h"
#include "call/result.h"
#include "catalog/objectaccess.h"
#include "catalog/pg_namespace.h"
#include "catalog/pg_proc.h"
#include "catalog/pg_type_d.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/lsyscache.h"
#include "utils/regproc.h"
#include "utils/syscache.h"
#include "utils/typcache.h"

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

static void check_rights(Oid function, Oid namespace);
static bool has_shape_of_handler(Form_pg_proc form);
static void read_response(Datum row, Answer *answer);
static NullableDatum get_column(int column, const Datum *values,
								const bool *nulls);

/*
 * Check that a function can be a handler, and may be called; returns the type
 * of its result.
 *
 * Errors: 42883 when there is none with that OID, 42809 for one of another shape,
 * 42501 without the right to call it.
 */
Oid
HandlerCheck(Oid handler)
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
 * Call a handler, and take its result, which is of type rettype, for the answer.
 *
 * Errors: 39004 when it returns null, 39000 when it returns no valid status or
 * both a response and a body, and its own.
 */
void
HandlerCall(Oid handler, Oid rettype, const NullableDatum *request,
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
