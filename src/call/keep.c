/*-------------------------------------------------------------------------
 *
 * keep.c
 *	  store: keep an answer that is already known.
 *
 * A transaction that did the work and failed is rolled back, and its claim with
 * it.  If the failure is to be kept, here is begin and finish in one call, in
 * the next transaction; so the way of success needs no savepoint.  It also takes
 * in answers that were given elsewhere.
 *
 * The answer that is there already stays.  So does the claim of a lease, even
 * one that ran out: who has no claim on the work knows nothing of what it did
 * outside the database.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "call/begin.h"
#include "call/finish.h"
#include "call/forward.h"
#include "call/result.h"
#include "request/arguments.h"

/* Arguments of store */
enum
{
	STORE_TENANT,
	STORE_ACTION,
	STORE_KEY,
	STORE_REQUEST,
	STORE_STATUS_CODE,
	STORE_RESPONSE,
	STORE_HEADERS,
	STORE_ACTOR,
	STORE_BODY,
	STORE_TTL,
	STORE_REQUEST_HASH
};

PG_FUNCTION_INFO_V1(idempotency_store);

/*
 * idempotency_store(tenant text, action text, key text, request jsonb,
 *					 status_code int, response json, headers jsonb, actor text,
 *					 body bytea, ttl interval, request_hash bytea)
 *					 returns idempotency_result
 *
 * Keep an answer.  The outcome is completed, errored or released, as from
 * finish; replayed with the answer that was there before; or in_flight or
 * mismatched, and nothing is kept.
 *
 * Errors: ID001, ID002, ID005, ID007, ID008 when this transaction has begun the
 * request, 22023, 22004, 25006, 40001, 42501.
 */
Datum
idempotency_store(PG_FUNCTION_ARGS)
{
	static const NullableDatum by_setting = {.isnull = true};
	BeginCall	call;
	Scope	   *scope = &call.request.scope;
	Claim	   *claim;
	Record		record;
	StatusClass class;
	ResultRow	row;
	Answer		answer = {
		.status_code = fcinfo->args[STORE_STATUS_CODE],
		.response = fcinfo->args[STORE_RESPONSE],
		.headers = fcinfo->args[STORE_HEADERS],
		.body = fcinfo->args[STORE_BODY],
		.ttl = fcinfo->args[STORE_TTL],
	};

	CallNeedsReadWrite("idempotency_store()");
	ScopeFromArguments(scope, fcinfo, STORE_ACTOR);
	FingerprintFromArguments(&call.request.fingerprint, fcinfo,
							 STORE_REQUEST, STORE_REQUEST_HASH);
	FinishCheckAnswer(&answer, InvalidOid);
	call.ttl = 0;
	class = StatusClassify(DatumGetInt32(answer.status_code.value));
	if (class == STATUS_COMPLETED)
		call.ttl = CallReadTtl(&answer.ttl);
	else
		(void) CallReadErrorTtl(&answer.ttl);	/* finish reads it again */
	call.wait_ms = CallReadWait(&by_setting);
	call.lease = 0;
	call.claim = NULL;
	call.keep_leases = true;

	if (ForwardNeeded(scope))
		return ForwardRow(fcinfo, "idempotency_store", scope);
	claim = BeginRequest(&call, false, &row);
	if (claim == NULL)
		return ResultReturn(fcinfo, &row);

	class = FinishClaim(scope, claim, &answer, &record);
	FinishedRow(&row, class, &record);
	return ResultReturn(fcinfo, &row);
}
