/*-------------------------------------------------------------------------
 *
 * lease.c
 *	  Leased claims, which are rows.
 *
 * Work with effects outside the database cannot be done in the transaction
 * that claims it: a card that was charged stays charged when the transaction
 * rolls back.  So a leased claim outlives its transaction.  It is a pending
 * record, and since nothing tells whether who began it is still alive, it is
 * held for a limited time, the lease.  When that has run out, the next repeat
 * takes the claim over.
 *
 * Fencing.  Who was taken over may not know it.  A process that was stopped
 * for longer than its lease comes back and goes on where it was.  Therefore
 * each takeover has the next attempt number, and finish, checkpoint and
 * release name the attempt that they belong to.  They find the row as it is
 * now, whatever the snapshot of their transaction shows, compare, and lock it;
 * if somebody changed it before they had the lock, they look again.  While no
 * one has taken over, a late finish is as good as one in time.
 *
 * A takeover holds two locks.  That of the scope, as any begin, so that others
 * are told that the request is in flight; and that of the row, which is what
 * an old attempt that finishes at the same moment meets.  A takeover does not
 * wait for the row: if somebody has it, the claim is just being ended.  With T
 * for the takeover and F for the finish of the old attempt:
 *
 *		F updates, T finds the row locked		T: in flight
 *		T finds the row, F updates and commits	T looks again, and replays
 *		T updates, F waits, T commits			F: its attempt is stale
 *		T updates, F waits, T rolls back		F succeeds
 *
 * Of two takeovers the second does not get the lock of the scope, or finds a
 * lease that has not run out.  An expired row is treated as absent by all of
 * them, so that the sweep, which deletes only those, takes nothing from
 * anybody.
 *
 * States of a pending row:
 *
 *		lease_expires_at in the future			in flight
 *		lease_expires_at in the past			stalled, may be taken over
 *		lease_expires_at is null				released, may be taken over
 *
 * A released row holds nothing but its attempt number, which must not be given
 * out again.  Numbers also go on when an expired row is claimed anew, by
 * whatever claim.  They start again only when the row has been swept, which is
 * no sooner than the ttl after the end of the lease.
 *
 * A transaction claim can take over a stalled lease.  The row then gets its
 * attempt at once, which fences the old one off, and nothing else; its lease
 * stays in the past.  So when the claim is released, the row is as free as it
 * was.
 *
 * HOT updates.  A row is written at begin and updated at each checkpoint and
 * at finish.  That needs no new index entries as long as no indexed column
 * changes, and expires_at is indexed.  So it has some room from the beginning
 * (see get_expiry_room()): renewing the lease does not move it as long as it leaves the
 * ttl after the end of the lease, and neither does an answer that would be
 * forgotten a little sooner otherwise.
 *
 *-------------------------------------------------------------------------
 */
#include "idempotency.h"

#include "call.h"
#include "lease.h"
#include "miscadmin.h"
#include "utils/timestamp.h"
#include "wake.h"

/* How much longer than its ttl an answer may be kept, as a part of that */
#define EXPIRY_ROOM_PART	8

static void check_attempt(int attempt, int latest);
static void set_lease(Record *record, const ClaimFacts *facts, int64 ttl);
static int64 get_ttl(const Record *record);
static int64 get_expiry_room(int64 ttl);

/*
 * Write the row of a new leased claim.
 *
 * Errors: ID005 when another transaction committed a record for the scope.
 */
void
LeaseInsert(Store *store, const Scope *scope, const ClaimFacts *facts,
			int64 ttl)
{
	Record		record;

	RecordInit(&record, scope);
	RecordSetState(&record, RECORD_PENDING);
	RecordSet(&record, attempt, Int32GetDatum(facts->attempt));
	RecordSet(&record, created_at, TimestampTzGetDatum(facts->started_at));
	set_lease(&record, facts, ttl);
	StoreInsert(store, &record);
}

/*
 * Make the row of a claim that nobody holds any more that of a new attempt.
 *
 * The row was found and locked, and *record is changed as it is.
 */
void
LeaseTakeOver(Store *store, Record *record, const ClaimFacts *facts, int64 ttl)
{
	RecordSet(record, attempt, Int32GetDatum(facts->attempt));
	if (claim_is_leased(facts))
		set_lease(record, facts, ttl);
	StoreUpdate(store, record);
}

/*
 * Find the row of a leased claim and lock it, if it is still that of this
 * attempt; whoever is just changing it is waited for.  Who finds it locked by
 * us, or waits for the lease, is woken when this transaction is over.
 *
 * The row may have been finished or released by the same attempt.  Errors:
 * ID005 when there is no such row, or it belongs to another attempt; 40001 when
 * it is too new for a serializable transaction.
 */
void
LeaseFind(Store *store, Scope *scope, int attempt, Record *record)
{
	ScopeSetLocktag(scope);
	WakeAtEnd(scope);

	do
	{
		CHECK_FOR_INTERRUPTS();

		/* the row of a transaction claim has no lease, and is not pending */
		if (StoreFind(store, scope, GetCurrentTimestamp(), record) != RECORD_LIVE ||
			(RecordIsNull(record, lease_expires_at) &&
			 RecordGetState(record) != RECORD_PENDING))
			ereport(ERROR,
					(errcode(ERRCODE_IDEMPOTENCY_NO_CLAIM),
					 errmsg("no such claim"),
					 errdetail("There is no leased claim on the request.")));

		check_attempt(attempt, DatumGetInt32(RecordValue(record, attempt)));
	} while (StoreLock(store, true, record) != ROW_LOCKED);

	StoreCheckSerializable(store);
}

/*
 * Refuse an attempt that is not the latest one.
 */
static void
check_attempt(int attempt, int latest)
{
	if (attempt == latest)
		return;

	ereport(ERROR,
			(errcode(ERRCODE_IDEMPOTENCY_NO_CLAIM),
			 errmsg("no such claim"),
			 errdetail("Attempt %d is not the latest one, which is %d.",
					   attempt, latest),
			 attempt < latest ?
			 errhint("Stop working on the request: another attempt took it over.") : 0));
}

/*
 * Give the record of a leased claim another end of its lease.
 */
void
LeaseRenew(Record *record, TimestampTz lease_expires_at)
{
	int64		ttl = get_ttl(record);
	TimestampTz expires_at = DatumGetTimestampTz(RecordValue(record, expires_at));

	RecordSet(record, lease_expires_at, TimestampTzGetDatum(lease_expires_at));
	if (expires_at < lease_expires_at + ttl)
		RecordSet(record, expires_at,
				  TimestampTzGetDatum(lease_expires_at + ttl +
									  get_expiry_room(ttl) / 2));
}

/*
 * Let the next repeat run, without anything that this attempt has saved.
 *
 * The row was found and locked, and *record is changed as it is.
 */
void
LeaseRelease(Store *store, Record *record)
{
	RecordSetNull(record, request_hash);
	RecordSetNull(record, recovery_point);
	RecordSetNull(record, recovery_state);
	RecordSetNull(record, lease_expires_at);
	StoreUpdate(store, record);
}

/*
 * When the answer to a leased claim that is completed now will be forgotten.
 */
TimestampTz
LeaseGetAnswerExpiry(const Record *record, TimestampTz now)
{
	int64		ttl = get_ttl(record);
	TimestampTz expires_at = DatumGetTimestampTz(RecordValue(record, expires_at));

	if (expires_at >= now + ttl && expires_at <= now + ttl + get_expiry_room(ttl))
		return expires_at;
	return now + ttl;
}

/*
 * Whether a record is that of a leased claim that nobody holds any more.
 */
bool
LeaseIsOver(const Record *record)
{
	return RecordGetState(record) == RECORD_PENDING &&
		(RecordIsNull(record, lease_expires_at) ||
		 DatumGetTimestampTz(RecordValue(record, lease_expires_at)) <=
		 GetCurrentTimestamp());
}

/*
 * Whether a record is that of a leased claim that was released.
 */
bool
LeaseIsReleased(const Record *record)
{
	return RecordGetState(record) == RECORD_PENDING &&
		RecordIsNull(record, lease_expires_at);
}

/*
 * Put the lease of a claim into its record, and what request it is for.
 */
static void
set_lease(Record *record, const ClaimFacts *facts, int64 ttl)
{
	Interval   *interval = palloc0_object(Interval);

	if (facts->fingerprint.len > 0)
		RecordSet(record, request_hash,
				  FingerprintGetBytea(&facts->fingerprint));
	interval->time = ttl;
	RecordSet(record, ttl, IntervalPGetDatum(interval));
	RecordSet(record, lease_expires_at,
			  TimestampTzGetDatum(facts->lease_expires_at));
	RecordSet(record, expires_at,
			  TimestampTzGetDatum(facts->lease_expires_at + ttl +
								  get_expiry_room(ttl) / 2));
}

/*
 * How long the answer to a leased claim is to be kept, in microseconds.
 */
static int64
get_ttl(const Record *record)
{
	if (RecordIsNull(record, ttl))
		elog(ERROR, "pending idempotency record without ttl");
	return CallIntervalToUsecs(DatumGetIntervalP(RecordValue(record, ttl)));
}

/*
 * How much longer than its ttl an answer may be kept, but never longer than
 * the administrator allows.
 */
static int64
get_expiry_room(int64 ttl)
{
	int64		max_ttl = (int64) idempotency_max_ttl * USECS_PER_SEC;

	return Min(ttl / EXPIRY_ROOM_PART, Max(max_ttl - ttl, 0));
}
