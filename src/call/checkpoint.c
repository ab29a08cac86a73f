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
#include "base.h"

#include "call/forward.h"
#include "catalog/pg_type_d.h"
#include "claim/lease.h"
#include "miscadmin.h"
#include "request/arguments.h"
#include "request/scope.h"
#include "utils/timestamp.h"

/* Arguments of checkpoint */
enum
{
	CHECKPOINT_TENANT,
	CHECKPOINT_ACTION,
	CHECKPOINT_KEY,
	CHECKPOINT_CLAIM,
	CHECKPOINT_RECOVERY_POINT,
	CHECKPOINT_RECOVERY_STATE,
	CHECKPOINT_LEASE,
	CHECKPOINT_ACTOR
};

static void set_recovery_point(Record *record, const NullableDatum *point,
							   const NullableDatum *recovery_state);
static void check_arguments(FunctionCallInfo fcinfo);

PG_FUNCTION_INFO_V1(idempotency_checkpoint);

/*
 * idempotency_checkpoint(tenant text, action text, key text, claim uuid,
 *						  recovery_point text, recovery_state jsonb,
 *						  lease interval, actor text) returns timestamptz
 *
 * Save how far the work got, and renew the lease; returns when it will have
 * run out.  Without a recovery point, what was saved before stays; with an empty
 * one it is forgotten, for everything was undone.
 *
 * Errors: ID001, ID002, ID005 for a claim that was lost or has ended, ID007 for
 * too large a state, ID008 without a claim id, 22023, 22004, 25006, 40001 in a
 * serializable transaction, 42501.
 */
Datum
idempotency_checkpoint(PG_FUNCTION_ARGS)
{
	Scope		scope;
	Store		store;
	Record		record;
	int64		lease;
	TimestampTz lease_expires_at;

	PreventCommandIfReadOnly("idempotency_checkpoint()");
	PreventCommandIfParallelMode("idempotency_checkpoint()");
	ScopeFromArguments(&scope, fcinfo, CHECKPOINT_ACTOR);
	check_arguments(fcinfo);
	lease = CallReadLease(&fcinfo->args[CHECKPOINT_LEASE]);
	if (ForwardNeeded(&scope))
		return ForwardGetValue(ForwardCall(fcinfo, "idempotency_checkpoint",
										   &scope), TIMESTAMPTZOID);

	StoreOpen(&store, &scope, RowExclusiveLock);
	LeaseFind(&store, &scope, PG_GETARG_UUID_P(CHECKPOINT_CLAIM), &record);
	if (RecordGetState(&record) != RECORD_PENDING || LeaseIsReleased(&record))
		ereport(ERROR,
				(errcode(ERRCODE_IDEMPOTENCY_CLAIM_LOST),
				 errmsg("claim was lost"),
				 errdetail("It has already ended.")));

	if (!PG_ARGISNULL(CHECKPOINT_RECOVERY_POINT))
		set_recovery_point(&record, &fcinfo->args[CHECKPOINT_RECOVERY_POINT],
						   &fcinfo->args[CHECKPOINT_RECOVERY_STATE]);
	lease_expires_at = GetCurrentTimestamp() + lease;
	LeaseRenew(&record, lease_expires_at);
	StoreUpdate(&store, &record);
	StoreClose(&store);

	PG_RETURN_TIMESTAMPTZ(lease_expires_at);
}

/*
 * Put a recovery point, a text, and its state into a record; an empty one stands
 * for none.
 */
static void
set_recovery_point(Record *record, const NullableDatum *point,
				   const NullableDatum *recovery_state)
{
	RecordSetNullable(record, recovery_point, *point);
	if (VARSIZE_ANY_EXHDR(DatumGetTextPP(point->value)) == 0)
		RecordSetNull(record, recovery_point);
	RecordSetNullable(record, recovery_state, *recovery_state);
}

static void
check_arguments(FunctionCallInfo fcinfo)
{
	bool		has_point = false;

	if (PG_ARGISNULL(CHECKPOINT_CLAIM))
		ereport(ERROR,
				(errcode(ERRCODE_IDEMPOTENCY_OUT_OF_ORDER),
				 errmsg("no such claim"),
				 errdetail("The call does not bring the id of a leased claim."),
				 errhint("Give the claim that idempotency_begin returned.")));

	if (!PG_ARGISNULL(CHECKPOINT_RECOVERY_POINT))
	{
		text	   *point = PG_GETARG_TEXT_PP(CHECKPOINT_RECOVERY_POINT);

		ScopeCheckName("recovery_point", point);
		has_point = VARSIZE_ANY_EXHDR(point) > 0;
	}
	if (!has_point && !PG_ARGISNULL(CHECKPOINT_RECOVERY_STATE))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("recovery_state was given without recovery_point")));

	CallCheckSize("recovery_state",
				  CallGetSize(&fcinfo->args[CHECKPOINT_RECOVERY_STATE]));
}
