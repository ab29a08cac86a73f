/*-------------------------------------------------------------------------
 *
 * run.c
 *	  run and try_run: begin, the work and finish in one call.
 *
 * The work is a function of the application, the handler (handler.c).  What it is
 * allowed to be is checked before anything else, also when the stored answer is all
 * that is needed: a mistake in the call should not wait for the first request that
 * is new.
 *
 * Where the records of the tenant are on another node of a cluster, the handler
 * can be called here or there.  Here it may do what it likes, and begin and finish
 * are sent there one after the other.  There it saves a round trip, but Citus lets
 * it see nothing but the rows of its tenant, and it finds other settings; so
 * somebody has to say that it may (idempotency.forward_handlers).
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "call/begin.h"
#include "call/finish.h"
#include "call/forward.h"
#include "call/handler.h"
#include "call/result.h"
#include "call/run.h"
#include "catalog/pg_type_d.h"
#include "claim/claim.h"
#include "request/arguments.h"
#include "settings.h"

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

const Oid	RunTypes[RUN_ARGUMENTS] = {
	TEXTOID, TEXTOID, TEXTOID, JSONBOID, REGPROCEDUREOID, TEXTOID, INTERVALOID,
	INTERVALOID
};

/* What is sent to the node of the tenant when the handler was called here */
enum
{
	ANSWER_TENANT,
	ANSWER_ACTION,
	ANSWER_KEY,
	ANSWER_ACTOR,
	ANSWER_STATUS_CODE,
	ANSWER_RESPONSE,
	ANSWER_HEADERS,
	ANSWER_BODY,
	ANSWER_TTL
};

const Oid	RunAnswerTypes[RUN_ANSWER_ARGUMENTS] = {
	TEXTOID, TEXTOID, TEXTOID, TEXTOID, INT4OID, JSONOID, JSONBOID, BYTEAOID,
	INTERVALOID
};

static Datum run_request(FunctionCallInfo fcinfo, const char *function,
						 bool raise);
static void read_call(BeginCall *call, FunctionCallInfo fcinfo);
static void run_here(FunctionCallInfo fcinfo, BeginCall *call, bool raise,
					 Oid rettype, ResultRow *row);
static void run_elsewhere(FunctionCallInfo fcinfo, const Scope *scope,
						  bool raise, Oid rettype, ResultRow *row);
static void finish_run(const Scope *scope, const Answer *answer, ResultRow *row);
static void send_answer(const Scope *scope, const Answer *answer,
						ResultRow *row);

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
 * Errors: those of begin, finish and the handler; 22004 without one, 42883 when
 * there is none with that OID, 42809 for one of another shape, 42501 without the
 * right to call it, 39004 when it returns null, 39000 when it returns no valid
 * status or both a response and a body.
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
 * Begin a request for a handler that is called on another node; fcinfo has the
 * arguments of run.
 *
 * Errors: those of begin.
 */
void
RunBegin(FunctionCallInfo fcinfo, bool raise, ResultRow *row)
{
	BeginCall	call;

	ScopeFromArguments(&call.request.scope, fcinfo, RUN_ACTOR);
	read_call(&call, fcinfo);
	(void) BeginRequest(&call, raise, row);
}

/*
 * Finish it with its answer; fcinfo has what send_answer() has sent.
 *
 * Errors: those of finish.
 */
void
RunFinish(FunctionCallInfo fcinfo, ResultRow *row)
{
	Scope		scope;
	Answer		answer = {
		.status_code = fcinfo->args[ANSWER_STATUS_CODE],
		.response = fcinfo->args[ANSWER_RESPONSE],
		.headers = fcinfo->args[ANSWER_HEADERS],
		.body = fcinfo->args[ANSWER_BODY],
		.ttl = fcinfo->args[ANSWER_TTL],
	};

	ScopeFromArguments(&scope, fcinfo, ANSWER_ACTOR);
	FinishCheckAnswer(&answer, InvalidOid);
	finish_run(&scope, &answer, row);
}

/*
 * Workhorse of run and try_run.
 */
static Datum
run_request(FunctionCallInfo fcinfo, const char *function, bool raise)
{
	BeginCall	call;
	Oid			rettype;
	ResultRow	row;

	CallNeedsReadWrite(function);
	ScopeFromArguments(&call.request.scope, fcinfo, RUN_ACTOR);
	if (PG_ARGISNULL(RUN_HANDLER))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("handler is missing")));
	read_call(&call, fcinfo);
	rettype = HandlerCheck(PG_GETARG_OID(RUN_HANDLER));

	if (ForwardNeeded(&call.request.scope))
		run_elsewhere(fcinfo, &call.request.scope, raise, rettype, &row);
	else
		run_here(fcinfo, &call, raise, rettype, &row);
	return ResultReturn(fcinfo, &row);
}

/*
 * What begin needs to know, but for the scope.
 */
static void
read_call(BeginCall *call, FunctionCallInfo fcinfo)
{
	FingerprintFromRequest(&call->request.fingerprint, &fcinfo->args[RUN_REQUEST]);
	call->ttl = CallReadTtl(&fcinfo->args[RUN_TTL]);
	call->wait_ms = CallReadWait(&fcinfo->args[RUN_WAIT]);
	call->lease = 0;
	call->claim = NULL;
	call->keep_leases = false;
}

/*
 * Run a request whose records are on this node.
 */
static void
run_here(FunctionCallInfo fcinfo, BeginCall *call, bool raise, Oid rettype,
		 ResultRow *row)
{
	Answer		answer;

	if (BeginRequest(call, raise, row) == NULL)
		return;
	HandlerCall(PG_GETARG_OID(RUN_HANDLER), rettype, &fcinfo->args[RUN_REQUEST],
				&answer);
	finish_run(&call->request.scope, &answer, row);
}

/*
 * Run a request whose records are on another node.
 */
static void
run_elsewhere(FunctionCallInfo fcinfo, const Scope *scope, bool raise,
			  Oid rettype, ResultRow *row)
{
	NullableDatum args[RUN_ARGUMENTS];
	Answer		answer;

	if (idempotency_forward_handlers)
	{
		ForwardGetRow(ForwardCall(fcinfo, raise ? "idempotency_run" :
								  "idempotency_try_run", scope), row);
		return;
	}

	/* the handler need not be there */
	memcpy(args, fcinfo->args, sizeof(args));
	args[RUN_HANDLER].isnull = true;
	ForwardGetRow(ForwardArguments(raise ? RUN_BEGIN : RUN_TRY_BEGIN, scope,
								   RUN_ARGUMENTS, RunTypes, args), row);
	if (strcmp(ResultOutcome(row), "started") != 0)
		return;
	ForwardBegun(scope);
	HandlerCall(PG_GETARG_OID(RUN_HANDLER), rettype, &fcinfo->args[RUN_REQUEST],
				&answer);
	send_answer(scope, &answer, row);
}

/*
 * Finish the request that a handler has answered.
 */
static void
finish_run(const Scope *scope, const Answer *answer, ResultRow *row)
{
	Claim	   *claim = ClaimFindHeld(scope);
	Record		record;
	StatusClass class;

	/* the handler may have ended the claim itself */
	if (claim == NULL || claim_is_leased(&claim->facts))
		ereport(ERROR,
				(errcode(ERRCODE_IDEMPOTENCY_OUT_OF_ORDER),
				 errmsg("no such claim"),
				 errdetail("The handler has ended the claim that it was called for.")));
	class = FinishClaim(scope, claim, answer, &record);
	FinishedRow(row, class, &record);
}

/*
 * Send an answer to the node where the request was begun.
 */
static void
send_answer(const Scope *scope, const Answer *answer, ResultRow *row)
{
	NullableDatum args[RUN_ANSWER_ARGUMENTS] = {
		[ANSWER_TENANT] = {.value = scope->parts[SCOPE_TENANT]},
		[ANSWER_ACTION] = {.value = scope->parts[SCOPE_ACTION]},
		[ANSWER_KEY] = {.value = scope->parts[SCOPE_KEY]},
		[ANSWER_ACTOR] = {.value = scope->parts[SCOPE_ACTOR]},
		[ANSWER_STATUS_CODE] = answer->status_code,
		[ANSWER_RESPONSE] = answer->response,
		[ANSWER_HEADERS] = answer->headers,
		[ANSWER_BODY] = answer->body,
		[ANSWER_TTL] = answer->ttl,
	};

	ForwardGetRow(ForwardArguments(RUN_FINISH, scope, RUN_ANSWER_ARGUMENTS,
								   RunAnswerTypes, args), row);
	ForwardEnded(scope);
}
