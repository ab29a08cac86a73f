/*-------------------------------------------------------------------------
 *
 * checkpoint.c
 *	  checkpoint: how far the work under a leased claim got.
 *
 * Who takes over a leased claim has to know which of the effects outside the
 * database have happened.  A checkpoint saves that in the caller's
 * transaction, together with what else that transaction writes.
 *
 *-------------------------------------------------------------------------
 */
#include "idempotency.h"

#include "call.h"
#include "claim.h"
#include "lease.h"
#include "miscadmin.h"
#include "scope.h"
#include "utils/timestamp.h"

/* Arguments of checkpoint */
enum
{
	CHECKPOINT_TENANT,
	CHECKPOINT_ACTION,
	CHECKPOINT_KEY,
	CHECKPOINT_ATTEMPT,
	CHECKPOINT_RECOVERY_POINT,
	CHECKPOINT_RECOVERY_STATE,
	CHECKPOINT_LEASE,
	CHECKPOINT_ACTOR
};

static void check_arguments(FunctionCallInfo fcinfo);

PG_FUNCTION_INFO_V1(idempotency_checkpoint);

/*
 * idempotency_checkpoint(tenant text, action text, key text, attempt int,
 *						  recovery_point text, recovery_state jsonb,
 *						  lease interval, actor text) returns timestamptz
 *
 * Save how far the work got, and renew the lease; returns when it will have
 * run out.  Without a recovery point, what was saved before stays.
 *
 * Errors: ID001, ID002, ID005 for a claim of another attempt or one that has
 * ended, ID007 for too large a state, 25006, 40001 in a serializable
 * transaction, 42501.
 */
Datum
idempotency_checkpoint(PG_FUNCTION_ARGS)
{
	Scope		scope;
	Claim	   *claim;
	Store		store;
	Record		record;
	int64		lease;
	TimestampTz lease_expires_at;

	PreventCommandIfReadOnly("idempotency_checkpoint()");
	PreventCommandIfParallelMode("idempotency_checkpoint()");
	ScopeFromArguments(&scope, fcinfo, CHECKPOINT_ACTOR);
	check_arguments(fcinfo);
	lease = CallReadLease(fcinfo, CHECKPOINT_LEASE);

	claim = ClaimFindHeld(&scope);
	if (claim != NULL && !claim_is_leased(&claim->facts))
		ereport(ERROR,
				(errcode(ERRCODE_IDEMPOTENCY_NO_CLAIM),
				 errmsg("no such claim"),
				 errdetail("The claim of this transaction is not leased.")));

	StoreOpen(&store, RowExclusiveLock);
	LeaseFind(&store, &scope, PG_GETARG_INT32(CHECKPOINT_ATTEMPT), &record);
	if (RecordGetState(&record) != RECORD_PENDING || LeaseIsReleased(&record))
		ereport(ERROR,
				(errcode(ERRCODE_IDEMPOTENCY_NO_CLAIM),
				 errmsg("no such claim"),
				 errdetail("Attempt %d has already ended.",
						   PG_GETARG_INT32(CHECKPOINT_ATTEMPT))));

	if (!PG_ARGISNULL(CHECKPOINT_RECOVERY_POINT))
	{
		RecordSetNullable(&record, recovery_point,
						  fcinfo->args[CHECKPOINT_RECOVERY_POINT]);
		RecordSetNullable(&record, recovery_state,
						  fcinfo->args[CHECKPOINT_RECOVERY_STATE]);
	}
	lease_expires_at = GetCurrentTimestamp() + lease;
	LeaseRenew(&record, lease_expires_at);
	StoreUpdate(&store, &record);
	StoreClose(&store);

	PG_RETURN_TIMESTAMPTZ(lease_expires_at);
}

static void
check_arguments(FunctionCallInfo fcinfo)
{
	if (PG_ARGISNULL(CHECKPOINT_ATTEMPT))
		ereport(ERROR,
				(errcode(ERRCODE_IDEMPOTENCY_MALFORMED),
				 errmsg("attempt is missing"),
				 errhint("Give the attempt that idempotency_begin returned.")));

	if (!PG_ARGISNULL(CHECKPOINT_RECOVERY_POINT))
	{
		text	   *point = PG_GETARG_TEXT_PP(CHECKPOINT_RECOVERY_POINT);

		if (VARSIZE_ANY_EXHDR(point) == 0)
			ereport(ERROR,
					(errcode(ERRCODE_IDEMPOTENCY_MALFORMED),
					 errmsg("recovery_point is malformed"),
					 errdetail("It is empty.")));
		ScopeCheckName("recovery_point", point);
	}
	else if (!PG_ARGISNULL(CHECKPOINT_RECOVERY_STATE))
		ereport(ERROR,
				(errcode(ERRCODE_IDEMPOTENCY_MALFORMED),
				 errmsg("recovery_state was given without recovery_point")));

	CallCheckSize("recovery_state",
				  CallGetSize(&fcinfo->args[CHECKPOINT_RECOVERY_STATE]));
}
