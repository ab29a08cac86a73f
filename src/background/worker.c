/*-------------------------------------------------------------------------
 *
 * worker.c
 *	  The background worker that sees to one database: sweeps it, flushes its
 *	  metrics, and watches its leases.
 *
 * A process that is connected to a database is in the way of whoever wants to
 * drop, rename or copy it: the server waits some seconds for it to go, and
 * then gives up.  So a worker lives no longer than its work, and between two
 * batches it looks whether anybody has locked the database for such a thing,
 * and leaves if so.  Within the database it is in nobody's way for longer than
 * a batch either, because each batch is a transaction.
 *
 * The extension may be dropped or replaced at any time.  A batch locks it, as
 * an object, before it looks for its table, and then that.  Where either is
 * locked by somebody else the worker does not wait but leaves, and is soon
 * back, so that it can have no part in a deadlock.
 *
 * A worker has the rights of a superuser, and the table may belong to somebody
 * who has not.  So a batch runs as the owner of the table (owner.c).
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "access/xact.h"
#include "background/sweep.h"
#include "background/watch.h"
#include "background/worker.h"
#include "background/worker_shared.h"
#include "background/worker_status.h"
#include "catalog/pg_database.h"
#include "clock.h"
#include "miscadmin.h"
#include "observe/flush.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "settings.h"
#include "storage/ipc.h"
#include "storage/lmgr.h"
#include "storage/lock.h"
#include "store/owner.h"
#include "store/store.h"
#include "tcop/tcopprot.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

/* Shorter than the default of deadlock_timeout: it is us who give way */
#define LOCK_TIMEOUT	"500ms"

/* A look at the leases gives way to the next database after this long */
#define WATCH_SECS		2

/* A batch of some work; returns whether there is more */
typedef bool (*Batch) (void *state);

static void work(int tasks);
static void report(WorkerResult result);
static WorkerResult sweep_database(void);
static WorkerResult measure_database(void);
static WorkerResult work_until(int64 deadline, const char *activity,
							   Batch batch, void *state);
static bool may_go_on(int64 deadline);
static bool run_batch(const char *activity, Batch batch, void *state,
					  WorkerResult *result);
static bool lock_table(Oid extension, Oid *table);
static bool flush_batch(void *state);
static bool watch_batch(void *state);
static bool sweep_batch(void *state);
static char *get_name_of_database(void);
static void add_context(void *arg);

/*
 * Entry point of a worker; arg is the OID of its database.
 */
void
idempotency_worker_main(Datum arg)
{
	ErrorContextCallback context = {.callback = add_context};
	int			tasks;

	pqsignal(SIGTERM, die);
	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	BackgroundWorkerUnblockSignals();

	/* before we connect, which may have to wait for a lock on the database */
	WorkerSetSettings();
	SetConfigOption("lock_timeout", LOCK_TIMEOUT, PGC_SUSET, PGC_S_OVERRIDE);
	BackgroundWorkerInitializeConnectionByOid(DatumGetObjectId(arg), InvalidOid, 0);

	memcpy(&tasks, MyBgworkerEntry->bgw_extra, sizeof(tasks));
	context.arg = get_name_of_database();
	context.previous = error_context_stack;
	error_context_stack = &context;

	PG_TRY();
	{
		work(tasks);
	}
	PG_CATCH();
	{
		MemoryContextSwitchTo(TopMemoryContext);
		WorkerStatusFailed(CopyErrorData()->message);
		PG_RE_THROW();
	}
	PG_END_TRY();

	proc_exit(0);
}

/*
 * Make sure that no setting of the database or of the server changes what we
 * do.
 */
void
WorkerSetSettings(void)
{
	static const char *const settings[][2] = {
		{"search_path", "pg_catalog, pg_temp"},
		{"default_transaction_isolation", "read committed"},
		{"default_transaction_read_only", "off"},
		{"synchronous_commit", "off"},
		{"statement_timeout", "0"},
		{"transaction_timeout", "0"},
		{"lock_timeout", "0"},
		{"idempotency.tenant", ""},
	};

	for (size_t i = 0; i < lengthof(settings); i++)
	{
		/* older servers do not have all of them */
		if (GetConfigOption(settings[i][0], true, false) != NULL)
			SetConfigOption(settings[i][0], settings[i][1], PGC_SUSET,
							PGC_S_OVERRIDE);
	}
	SetConfigOption("application_name", MyBgworkerEntry->bgw_name, PGC_SUSET,
					PGC_S_OVERRIDE);
}

/*
 * Whether nobody has a database locked in order to drop, rename, move or copy
 * it.
 *
 * These take a lock on it that connecting to it would have to wait for.  To
 * be called outside of a transaction.
 */
bool
WorkerMayUse(Oid database)
{
	LOCKTAG		tag;
	bool		free;

	SET_LOCKTAG_OBJECT(tag, InvalidOid, DatabaseRelationId, database, 0);

	StartTransactionCommand();
	free = LockAcquire(&tag, RowExclusiveLock, false, true) !=
		LOCKACQUIRE_NOT_AVAIL;
	CommitTransactionCommand();

	return free;
}

/*
 * Do what is due.
 *
 * The sweep comes first, and is reported before the rest begins, so that no
 * error in that keeps it from coming, or from coming in time.
 */
static void
work(int tasks)
{
	WorkerResult result = WORKER_DONE;

	if (tasks & WORKER_SWEEP)
	{
		result = sweep_database();
		report(result);
	}
	if ((tasks & WORKER_MEASURE) && result != WORKER_NO_EXTENSION)
	{
		result = measure_database();
		report(result);
	}

	if (result == WORKER_NO_EXTENSION)
		WorkerStatusForget(MyDatabaseId);
}

/*
 * Tell the launcher how things stand, unless it has been told, or has given us
 * up and started another worker.
 */
static void
report(WorkerResult result)
{
	uint64		failed = WorkerReport(MyDatabaseId, WORKER_FAILED);

	(void) pg_atomic_compare_exchange_u64(&worker_shared->report, &failed,
										  WorkerReport(MyDatabaseId, result));
}

static WorkerResult
sweep_database(void)
{
	Sweep		sweep;
	WorkerResult result;

	SweepStart(&sweep, idempotency_sweep_batch_size,
			   WORKER_MAX_SECS * USECS_PER_SEC);
	result = work_until(sweep.deadline, "idempotency sweep", sweep_batch, &sweep);
	if (result != WORKER_NO_EXTENSION)
		WorkerStatusSwept(sweep.swept, ClockMicros() - sweep.started,
						  result == WORKER_INTERRUPTED);

	return result;
}

/*
 * Flush metrics, and watch leases if it is time to.
 */
static WorkerResult
measure_database(void)
{
	int64		deadline = ClockMicros() + WATCH_SECS * USECS_PER_SEC;
	WorkerResult result;
	Watch		watch;

	result = work_until(deadline, "idempotency flush", flush_batch, NULL);
	if (result == WORKER_DONE && WorkerStatusGetWatch(&watch) &&
		WatchStart(&watch))
		result = work_until(deadline, "idempotency watch", watch_batch, &watch);

	return result;
}

/*
 * Do some work in batches until it is done, or it is time to give way.
 */
static WorkerResult
work_until(int64 deadline, const char *activity, Batch batch, void *state)
{
	WorkerResult result = WORKER_INTERRUPTED;

	while (may_go_on(deadline) && run_batch(activity, batch, state, &result))
		;
	return result;
}

/*
 * Whether there may be another batch.
 *
 * Who wants us to end gets that here without an error in the log.
 */
static bool
may_go_on(int64 deadline)
{
	if (ProcDiePending || ConfigReloadPending)
		return false;
	CHECK_FOR_INTERRUPTS();

	return WorkerMayUse(MyDatabaseId) && ClockMicros() < deadline;
}

/*
 * Run one batch in a transaction of its own.  Returns whether there may be
 * more that can be had now; *result is how things stand.
 */
static bool
run_batch(const char *activity, Batch batch, void *state, WorkerResult *result)
{
	Oid			extension;
	Oid			table;
	bool		more = false;

	SetCurrentStatementStartTimestamp();
	StartTransactionCommand();
	PushActiveSnapshot(GetTransactionSnapshot());
	pgstat_report_activity(STATE_RUNNING, activity);

	extension = get_extension_oid(EXTENSION_NAME, true);
	if (!OidIsValid(extension))
		*result = WORKER_NO_EXTENSION;
	else if (!lock_table(extension, &table))
		*result = WORKER_INTERRUPTED;
	else
	{
		Owner		owner;

		OwnerBecome(&owner, table);
		more = batch(state);
		OwnerLeave(&owner);
		*result = more ? WORKER_INTERRUPTED : WORKER_DONE;
	}

	PopActiveSnapshot();
	CommitTransactionCommand();
	pgstat_report_stat(true);
	pgstat_report_activity(STATE_IDLE, NULL);

	return more;
}

/*
 * Lock the extension against being dropped, and its table, if nobody has them
 * locked, and they are what they were before.
 */
static bool
lock_table(Oid extension, Oid *table)
{
	if (!ConditionalLockDatabaseObject(ExtensionRelationId, extension, 0,
									   AccessShareLock) ||
		get_extension_oid(EXTENSION_NAME, true) != extension)
		return false;

	*table = CatalogTable();
	return ConditionalLockRelationOid(*table, RowExclusiveLock) &&
		CatalogTable() == *table;
}

static bool
flush_batch(void *state)
{
	FlushMetrics();
	return false;
}

static bool
watch_batch(void *state)
{
	Watch	   *watch = state;
	bool		more = WatchBatch(watch);

	WorkerStatusSetWatch(watch);
	return more;
}

static bool
sweep_batch(void *state)
{
	return SweepBatch((Sweep *) state);
}

static char *
get_name_of_database(void)
{
	char	   *name;

	StartTransactionCommand();
	name = MemoryContextStrdup(TopMemoryContext, get_database_name(MyDatabaseId));
	CommitTransactionCommand();

	return name;
}

/*
 * Error context callback: the log need not tell for which database we are.
 */
static void
add_context(void *arg)
{
	errcontext("idempotency worker in database \"%s\"", (char *) arg);
}
