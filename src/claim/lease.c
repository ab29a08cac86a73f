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
 * each claim has an id that never comes again, a random UUID, and finish,
 * checkpoint and release bring the id of the claim that they belong to.  They
 * find the row as it is now, whatever the snapshot of their transaction shows,
 * compare, and lock it; if somebody changed it before they had the lock, they
 * look again.  While no one has taken over, a late finish is as good as one in
 * time.  A number would not do: it would have to be kept for ever, or be given
 * out again when the row has been swept.
 *
 * Asking again.  A caller whose connection broke during begin does not know
 * whether it has the claim.  If it brought the id, it brings it again, and gets
 * the claim that has that id as if it took it over, but for the attempt, which
 * is the same.  An id is not to be used for another try when its claim has ended.
 *
 * A takeover holds two locks.  That of the scope, as any begin, so that others
 * are told that the request is in flight; and that of the row, which is what
 * an old attempt that finishes at the same moment meets.  A takeover does not
 * wait for the row: if somebody has it, the claim is just being ended.  With T
 * for the takeover and F for the finish of the old attempt:
 *
 *		F updates, T finds the row locked		T: in flight
 *		T finds the row, F updates and commits	T looks again, and replays
 *		T updates, F waits, T commits			F: its claim is lost
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
 * However a claim is released, its row keeps what protects the next attempt:
 * the fingerprint, and the recovery point with its state, so that what was done
 * outside is not done again.
 *
 * A transaction claim can take over a stalled lease.  The row then gets its
 * attempt and loses its claim id at once, which fences the old claim off, and
 * nothing else; its lease stays in the past.  So when the transaction claim is
 * released, the row is as free as it was.
 *
 * HOT updates.  A row is written at begin and updated at each checkpoint and
 * at finish.  That needs no new index entries as long as no indexed column
 * changes, and expires_at is indexed.  So it has some room from the beginning
 * (see get_expiry_room()): renewing the lease does not move it as long as it
 * leaves the ttl after the end of the lease, and neither does an answer that
 * would be forgotten a little sooner otherwise.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "claim/lease.h"
#include "claim/wake.h"
#include "miscadmin.h"
#include "request/arguments.h"
#include "settings.h"
#include "utils/timestamp.h"

/* How much longer than its ttl an answer may be kept, as a part of that */
#define EXPIRY_ROOM_PART	8

static void refuse_claim(const Record *record);
static void set_claim(Record *record, const ClaimFacts *facts);
static void set_lease(Record *record, const ClaimFacts *facts, int64 ttl);
static int64 get_expiry_room(int64 ttl);

/*
 * Write the row of a new leased claim.
 *
 * It is no use without an update at the end, so see that there can be one.
 * Errors: ID005 when another transaction committed a record for the scope, and
 * those of StoreCheckPublished.
 */
void
LeaseInsert(Store *store, const Scope *scope, const ClaimFacts *facts,
			int64 ttl)
{
	Record		record;

	StoreCheckPublished(store, CMD_UPDATE);
	RecordInit(&record, scope);
	RecordSetState(&record, RECORD_PENDING);
	set_claim(&record, facts);
	RecordSet(&record, created_at, TimestampTzGetDatum(facts->started_at));
	set_lease(&record, facts, ttl);
	StoreInsert(store, &record);
}

/*
 * Make the row of a claim that nobody holds any more that of another one.
 *
 * The row was found and locked, and *record is changed as it is.
 */
void
LeaseTakeOver(Store *store, Record *record, const ClaimFacts *facts, int64 ttl)
{
	set_claim(record, facts);
	if (claim_is_leased(facts))
		set_lease(record, facts, ttl);
	StoreUpdate(store, record);
}

/*
 * Find the row of a leased claim and lock it, if it is still that of this
 * claim; whoever is just changing it is waited for.  Who finds it locked by
 * us, or waits for the lease, is woken when this transaction is over.
 *
 * The row may have been finished or released by the same claim.  Errors:
 * ID005 when there is no row of this claim any more; 40001 when it is too new
 * for a serializable transaction.
 */
void
LeaseFind(Store *store, const Scope *scope, const pg_uuid_t *claim,
		  Record *record)
{
	RecordLife	life;

	WakeAtEnd(scope);

	do
	{
		CHECK_FOR_INTERRUPTS();

		life = StoreFind(store, scope, GetCurrentTimestamp(), record);
		if (life != RECORD_LIVE || !LeaseIsOf(record, claim))
			refuse_claim(life == RECORD_LIVE ? record : NULL);
	} while (StoreLock(store, true, record) != ROW_LOCKED);

	StoreCheckSerializable(store);
}

/*
 * Refuse a claim id that the row, null if there is none, does not have.  Whose
 * claim it is now, or was, is nobody's business.
 */
static void
refuse_claim(const Record *record)
{
	ereport(ERROR,
			(errcode(ERRCODE_IDEMPOTENCY_CLAIM_LOST),
			 errmsg("claim was lost"),
			 record == NULL ?
			 errdetail("There is no record of the request any more.") :
			 RecordGetState(record) == RECORD_PENDING ?
			 errdetail("A later attempt took the request over.") :
			 errdetail("The request was finished by another attempt."),
			 record == NULL ?
			 errhint("Stop working on the request.") :
			 errhint("Stop working on the request, and undo nothing: what was done outside belongs to that attempt.")));
}

/*
 * Give the record of a leased claim another end of its lease.
 */
void
LeaseRenew(Record *record, TimestampTz lease_expires_at)
{
	int64		ttl = LeaseGetTtl(record);
	TimestampTz expires_at = DatumGetTimestampTz(RecordValue(record, expires_at));

	RecordSet(record, lease_expires_at, TimestampTzGetDatum(lease_expires_at));
	if (expires_at < lease_expires_at + ttl)
		RecordSet(record, expires_at,
				  TimestampTzGetDatum(lease_expires_at + ttl +
									  get_expiry_room(ttl) / 2));
}

/*
 * Let the next repeat run, with all that this attempt has saved.  The row keeps
 * the claim id, so that the caller can ask again.
 *
 * The row was found and locked, and *record is changed as it is.
 */
void
LeaseRelease(Store *store, Record *record)
{
	RecordSetNull(record, lease_expires_at);
	StoreUpdate(store, record);
}

/*
 * When the answer to a leased claim that is completed now will be forgotten.
 */
TimestampTz
LeaseGetAnswerExpiry(const Record *record, TimestampTz now, int64 ttl)
{
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
 * Whether a record is that of the leased claim with an id.
 */
bool
LeaseIsOf(const Record *record, const pg_uuid_t *claim)
{
	return !RecordIsNull(record, claim) &&
		memcmp(DatumGetUUIDP(RecordValue(record, claim)), claim, UUID_LEN) == 0;
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
 * Say in a record whose it is; the id must live as long as the record.  A
 * transaction claim has none.
 */
static void
set_claim(Record *record, const ClaimFacts *facts)
{
	RecordSet(record, attempt, Int32GetDatum(facts->attempt));
	if (claim_is_leased(facts))
		RecordSet(record, claim, UUIDPGetDatum(&facts->claim));
	else
		RecordSetNull(record, claim);
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
 * How long begin asked for the answer to a leased claim to be kept, in
 * microseconds.
 */
int64
LeaseGetTtl(const Record *record)
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
