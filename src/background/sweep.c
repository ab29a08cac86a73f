/*-------------------------------------------------------------------------
 *
 * sweep.c
 *	  Giving back the space of expired records.
 *
 * An expired record is treated as absent wherever one is looked for, so a
 * sweep changes no answer, and nothing has to wait for it.  (The record of a
 * leased claim expires its ttl after its lease has run out.)  A sweep walks the
 * index on expires_at from the oldest record to those that expire when it
 * starts, and deletes in batches with a transaction each.  A row that cannot
 * be had at once is passed over and left for the next sweep: one that
 * somebody has locked, or one whose scope is claimed, because finish is about
 * to replace it and would have to wait for the batch to commit.  Hence any
 * number of sweeps can run at once, beside any load.
 *
 * The next batch starts where the last one ended, so that rows that were
 * passed over do not keep a sweep from its end, and rows that were deleted but
 * not vacuumed are not looked at again for each batch.  Where many records
 * expire at once, only their index entries are read again.
 *
 * Where the table is written by a subscription, the publisher sweeps, and its
 * deletions arrive here.  One that finds nothing is a conflict, which newer
 * servers log; and by the clock of the publisher a record may have some time left
 * yet, and be changed.  So a sweep here leaves the records alone for
 * SUBSCRIBER_SECS after their time, and does only what has not been done by then.
 * Those of leases it leaves alone altogether: their time may have been prolonged
 * without our knowing yet, and an update that finds no row is lost.
 *
 * Losing the last batches in a crash costs nothing, so commits do not wait
 * for the disk, or for a standby.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "access/xact.h"
#include "background/sweep.h"
#include "background/worker_status.h"
#include "claim/in_flight.h"
#include "clock.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "observe/event.h"
#include "observe/flush.h"
#include "observe/metrics.h"
#include "request/arguments.h"
#include "request/scope.h"
#include "settings.h"
#include "store/store.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#define MAX_BATCH_SIZE	1000000

/* So many rows that cannot be deleted, or were already, may be in a batch */
#define MAX_PASSED_OVER	10000

/* So long a subscriber leaves expired records to the publisher */
#define SUBSCRIBER_SECS	300

/* Arguments of sweep */
enum
{
	SWEEP_BATCH_SIZE,
	SWEEP_MAX_DURATION
};

static void refuse_atomic(FunctionCallInfo fcinfo);
static void read_arguments(Sweep *sweep, FunctionCallInfo fcinfo);
static void commit_lazily(void);
static void enter_part(Sweep *sweep, Oid part);
static bool sweep_part(Sweep *sweep);
static bool is_claimed(const Record *record);

PG_FUNCTION_INFO_V1(idempotency_sweep);

/*
 * CALL idempotency_sweep(batch_size int, max_duration interval)
 *
 * Delete expired records.  Where there is a background worker to do that, it
 * flushes metrics too, and so does this.
 *
 * Errors: 2D000 where it cannot commit, 22023 for arguments out of range, 25006
 * in a read-only transaction, and those of StoreOpen and StoreDelete.
 */
Datum
idempotency_sweep(PG_FUNCTION_ARGS)
{
	Sweep		sweep;
	bool		more = true;

	refuse_atomic(fcinfo);
	PreventCommandIfReadOnly("idempotency_sweep()");
	read_arguments(&sweep, fcinfo);

	SPI_connect_ext(SPI_OPT_NONATOMIC);
	while (more && ClockMicros() < sweep.deadline)
	{
		commit_lazily();
		more = SweepBatch(&sweep);
		SPI_commit();
	}
	WorkerStatusSwept(sweep.swept, ClockMicros() - sweep.started, more);
	if (MetricsEnabled())
	{
		commit_lazily();
		FlushMetrics();
		SPI_commit();
	}
	SPI_finish();

	PG_RETURN_VOID();
}

/*
 * Refuse to run where a procedure cannot commit.
 *
 * A procedure that has a SET clause or is SECURITY DEFINER is such a place, and
 * whatever it calls, also outside of a transaction block.
 */
static void
refuse_atomic(FunctionCallInfo fcinfo)
{
	if (fcinfo->context != NULL && IsA(fcinfo->context, CallContext) &&
		!castNode(CallContext, fcinfo->context)->atomic)
		return;

	ereport(ERROR,
			(errcode(ERRCODE_INVALID_TRANSACTION_TERMINATION),
			 errmsg("%s cannot be called where it cannot commit",
					"idempotency_sweep()"),
			 errdetail("It commits after each batch."),
			 errhint("Call it outside of transaction blocks and functions, and of procedures with SET or SECURITY DEFINER.")));
}

static void
read_arguments(Sweep *sweep, FunctionCallInfo fcinfo)
{
	int			batch_size = idempotency_sweep_batch_size;
	int64		duration = PG_INT64_MAX;

	if (!PG_ARGISNULL(SWEEP_BATCH_SIZE))
		batch_size = PG_GETARG_INT32(SWEEP_BATCH_SIZE);
	if (batch_size < 1 || batch_size > MAX_BATCH_SIZE)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("batch_size is out of range"),
				 errdetail("It must be from 1 to %d.", MAX_BATCH_SIZE)));

	if (!PG_ARGISNULL(SWEEP_MAX_DURATION))
		duration = CallIntervalToUsecs(PG_GETARG_INTERVAL_P(SWEEP_MAX_DURATION));
	if (duration <= 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("max_duration is out of range"),
				 errdetail("It must be greater than zero.")));

	SweepStart(sweep, batch_size, duration);
}

/*
 * Do not wait for the disk when the current transaction commits.
 */
static void
commit_lazily(void)
{
	(void) set_config_option("synchronous_commit", "off",
							 PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_LOCAL, true, 0, false);
}

/*
 * Get ready to sweep what expires until now, for duration microseconds.
 */
void
SweepStart(Sweep *sweep, int batch_size, int64 duration)
{
	sweep->batch_size = batch_size;
	enter_part(sweep, InvalidOid);
	sweep->started_at = GetCurrentTimestamp();
	sweep->started = ClockMicros();
	sweep->deadline = duration < PG_INT64_MAX - sweep->started ?
		sweep->started + duration : PG_INT64_MAX;
	sweep->swept = 0;
}

/*
 * Sweep one batch in the current transaction.  Returns whether there may be
 * more to sweep.
 */
bool
SweepBatch(Sweep *sweep)
{
	Oid			part = StoreNextPart(sweep->part);

	if (!OidIsValid(part))
		return false;
	if (part != sweep->part)
		enter_part(sweep, part);
	if (sweep_part(sweep))
		return true;

	enter_part(sweep, part + 1);
	return OidIsValid(StoreNextPart(sweep->part));
}

/*
 * Begin with the records of another table.
 */
static void
enter_part(Sweep *sweep, Oid part)
{
	sweep->part = part;
	sweep->position.expires_at = DT_NOBEGIN;
	ItemPointerSet(&sweep->position.tid, 0, InvalidOffsetNumber);
}

/*
 * Sweep one batch of one of the tables that have records.  Returns whether it may
 * have more to sweep.
 */
static bool
sweep_part(Sweep *sweep)
{
	MemoryContext oldcontext = CurrentMemoryContext;
	MemoryContext row_context;
	Store		store;
	Record		record;
	TimestampTz until = sweep->started_at;
	bool		subscribed;
	int			deleted = 0;

	if (!StoreOpenPart(&store, sweep->part, RowExclusiveLock))
		return false;
	row_context = AllocSetContextCreate(CurrentMemoryContext,
										"idempotency sweep",
										ALLOCSET_SMALL_SIZES);
	subscribed = StoreIsSubscribed(&store);
	if (subscribed)
		until -= SUBSCRIBER_SECS * USECS_PER_SEC;
	StoreBeginExpired(&store, &sweep->position, until,
					  sweep->batch_size + MAX_PASSED_OVER);
	while (deleted < sweep->batch_size && StoreNextExpired(&store, &record))
	{
		CHECK_FOR_INTERRUPTS();

		if (subscribed && RecordGetState(&record) == RECORD_PENDING)
			continue;

		MemoryContextSwitchTo(row_context);
		if (!is_claimed(&record) && StoreDelete(&store, false))
		{
			deleted++;
			EventCountAtCommit(EVENT_SWEPT, RecordValue(&record, action), 1);
		}
		MemoryContextSwitchTo(oldcontext);
		MemoryContextReset(row_context);
	}
	StoreEndExpired(&store);
	StoreClose(&store);
	MemoryContextDelete(row_context);

	sweep->swept += deleted;
	return deleted == sweep->batch_size || store.entries == 0;
}

/*
 * Whether somebody holds the lock of the record's scope.
 *
 * Looking does not take the lock, not even for a moment, so that no request
 * is told that another one is in flight because of a sweep.  If no claim is held
 * on the action, and none by a prepared transaction, there is no need to work out
 * what lock it would be.
 */
static bool
is_claimed(const Record *record)
{
	Scope		scope;
	int			holders;

	if (!ScopeFromParts(&scope, record->values))
		return false;
	if (MetricsEnabled() && !InFlightAnyPrepared() &&
		!MetricsMayBeHeld(MetricsFind(ScopeNameAction(&scope.name))))
		return false;

	ScopeSetLocktag(&scope);
	(void) GetLockConflicts(&scope.locktag, ExclusiveLock, &holders);

	return holders > 0;
}
