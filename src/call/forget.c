/*-------------------------------------------------------------------------
 *
 * forget.c
 *	  forget: delete the record of one request.
 *
 * This is for support and for erasure, not for applications: after it, a repeat
 * of the request runs the work again.
 *
 * It takes the lock of the scope and keeps it to the end of the transaction, as
 * who begins the request would, so that nobody is at work on it when the record
 * goes, and nobody begins before it is known whether it has gone.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "call/forward.h"
#include "call/request.h"
#include "catalog/pg_type_d.h"
#include "claim/claim.h"
#include "claim/lease.h"
#include "claim/lock.h"
#include "miscadmin.h"
#include "utils/timestamp.h"

/* Arguments of forget */
enum
{
	FORGET_TENANT,
	FORGET_ACTION,
	FORGET_KEY,
	FORGET_ACTOR
};

static bool delete_record(Request *request);

PG_FUNCTION_INFO_V1(idempotency_forget);

/*
 * idempotency_forget(tenant text, action text, key text, actor text)
 *					  returns boolean
 *
 * Delete the record of a request that was answered or released, or of a message
 * that was seen.  Returns whether there was one that had not expired.
 *
 * Errors: ID001, ID002, ID003 while work is in flight, a lease that ran out
 * included, ID008 when it is this transaction's, 22023, 22004, 25006, 40001,
 * 42501, 55000 and 42P10 when a deletion cannot be published.
 */
Datum
idempotency_forget(PG_FUNCTION_ARGS)
{
	Request		request;
	bool		forgotten;

	PreventCommandIfReadOnly("idempotency_forget()");
	PreventCommandIfParallelMode("idempotency_forget()");
	ScopeFromArguments(&request.scope, fcinfo, FORGET_ACTOR);
	if (ForwardNeeded(&request.scope))
		return ForwardGetValue(ForwardCall(fcinfo, "idempotency_forget",
										   &request.scope), BOOLOID);
	if (ClaimFindHeld(&request.scope) != NULL)
		ereport(ERROR,
				(errcode(ERRCODE_IDEMPOTENCY_OUT_OF_ORDER),
				 errmsg("request was begun by this transaction"),
				 errhint("Call idempotency_finish or idempotency_release first.")));

	request.fingerprint.len = 0;
	request.called_at = GetCurrentTimestamp();
	request.life = RECORD_ABSENT;
	request.tracked = false;
	StoreOpen(&request.store, &request.scope, RowExclusiveLock);

	ScopeSetLocktag(&request.scope);
	request.locked_out = !ClaimTryLock(&request.scope.locktag);
	if (request.locked_out)
	{
		(void) RequestLookForHolder(&request);
		RequestRaiseInFlight(&request);
	}
	forgotten = delete_record(&request);
	StoreClose(&request.store);

	PG_RETURN_BOOL(forgotten);
}

/*
 * Delete the record of a scope whose lock is held, unless it is that of a lease
 * that somebody may work under.
 *
 * Who sweeps the row or records a message has no lock on the scope, so that it
 * can change under us.
 */
static bool
delete_record(Request *request)
{
	for (;;)
	{
		CHECK_FOR_INTERRUPTS();

		if (RequestLookUp(request) && RequestIsPending(request) &&
			!LeaseIsReleased(&request->record))
			RequestRaiseInFlight(request);
		if (request->life == RECORD_ABSENT)
			return false;
		if (StoreLock(&request->store, true, &request->record) == ROW_LOCKED &&
			StoreDelete(&request->store, true))
			return request->life == RECORD_LIVE;
	}
}
