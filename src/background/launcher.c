/*-------------------------------------------------------------------------
 *
 * launcher.c
 *	  The background worker that sees to it that every database is swept, and
 *	  its metrics are kept.
 *
 * The launcher is connected to no database, only to the shared catalogs, so
 * that it is in nobody's way.  It starts a short-lived worker (worker.c) for
 * one database after the other, and waits for it.
 *
 * Whether a database has the extension can only be seen from within.  So each
 * new one gets a worker, and where that finds none, the next one comes after
 * NO_EXTENSION_MS; or at once when somebody creates it anywhere, which a hook
 * tells us.  If that is done in a transaction that is prepared, no hook can tell
 * what becomes of it, so each COMMIT PREPARED looks whether its database has the
 * extension and has never been seen to.
 *
 * A sweep that fails has said why in the log.  The next one of that database
 * comes later and later, and meanwhile the others have their turns.  A worker
 * that does not end does not keep them from it for long either.
 *
 * The postmaster starts the launcher when recovery is over, so that a standby
 * has none before it is promoted, and again after a crash.
 *
 *-------------------------------------------------------------------------
 */
#include "idempotency.h"

#include "access/genam.h"
#include "access/heapam.h"
#include "access/htup_details.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/objectaccess.h"
#include "catalog/pg_database.h"
#include "clock.h"
#include "metrics.h"
#include "miscadmin.h"
#include "nodes/pg_list.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/ipc.h"
#include "storage/lwlock.h"
#include "storage/shmem.h"
#include "store.h"
#include "tcop/tcopprot.h"
#include "tcop/utility.h"
#include "utils/fmgroids.h"
#include "utils/guc.h"
#include "utils/inval.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"
#include "utils/wait_event.h"
#include "worker.h"
#include "worker_status.h"

#define LIBRARY_NAME		"idempotency"
#define RESTART_SECS		5
#define NO_EXTENSION_MS		(60 * 60 * 1000)
#define MAX_BACKOFF_MS		(60 * 60 * 1000)
#define MAX_SLEEP_MS		(60 * 60 * 1000)
#define NO_SLOT_RETRY_MS	(10 * 1000)
#define SOON_MS				1000
#define STUCK_SECS			(WORKER_MAX_SECS + 20)
#define TERMINATION_SECS	5

/* What the launcher remembers of a database */
typedef struct Database
{
	Oid			oid;
	bool		exists;			/* still in pg_database */
	bool		busy;			/* somebody had it locked when its time came */
	WorkerResult result;		/* of the last sweep */
	int			failures;		/* of sweeps, since one succeeded */
	TimestampTz last;			/* when we were through with it, 0 for never */
	TimestampTz measured;		/* when its metrics were last flushed */
} Database;

static void request_shmem(void);
static void startup_shmem(void);
static void register_launcher(void);
static void note_object(ObjectAccessType access, Oid classId, Oid objectId,
						int subId, void *arg);
static bool is_ours(Oid extension);
static void run_utility(PlannedStmt *statement, const char *query,
						bool read_only_tree, ProcessUtilityContext context,
						ParamListInfo params, QueryEnvironment *environment,
						DestReceiver *dest, QueryCompletion *completion);
static void tell_launcher(void);
static void at_end_of_xact(XactEvent event, void *arg);
static void leave(int code, Datum arg);
static void handle_signals(void);
static void read_databases(void);
static void note_database(Oid oid);
static void forget_dropped(List *dropped);
static void look_again(void);
static long work_due(void);
static bool start_worker(Oid database, int tasks,
						 BackgroundWorkerHandle **handle);
static void wait_for_worker(Oid database, BackgroundWorkerHandle *handle);
static bool ends_within(BackgroundWorkerHandle *handle, int secs);
static Database *find_due(long *rest);
static bool work_on(Database *database);
static long get_rest(const Database *database);
static long get_rest_of_measuring(const Database *database);
static long get_rest_after(TimestampTz last, int64 delay);
static int64 get_metrics_interval(void);
static int64 get_delay(const Database *database);

static shmem_request_hook_type prev_shmem_request_hook = NULL;
static shmem_startup_hook_type prev_shmem_startup_hook = NULL;
static object_access_hook_type prev_object_access_hook = NULL;
static ProcessUtility_hook_type prev_process_utility_hook = NULL;

/* in shared memory, null unless the library is preloaded */
WorkerState *worker_shared = NULL;

/* whether this transaction creates our extension */
static bool creates_extension = false;

/* in the launcher: all databases, in TopMemoryContext */
static List *databases = NIL;

/*
 * Register the launcher, and what it needs, while the server starts.
 */
void
LauncherInit(void)
{
	/* a server that is being upgraded must be left alone */
	if (!process_shared_preload_libraries_in_progress || IsBinaryUpgrade)
		return;

	prev_shmem_request_hook = shmem_request_hook;
	shmem_request_hook = request_shmem;
	prev_shmem_startup_hook = shmem_startup_hook;
	shmem_startup_hook = startup_shmem;
	prev_object_access_hook = object_access_hook;
	object_access_hook = note_object;
	prev_process_utility_hook = ProcessUtility_hook;
	ProcessUtility_hook = run_utility;
	RegisterXactCallback(at_end_of_xact, NULL);

	register_launcher();
}

/*
 * Entry point of the launcher.
 */
void
idempotency_launcher_main(Datum arg)
{
	pqsignal(SIGTERM, die);
	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	BackgroundWorkerUnblockSignals();
	WorkerSetSettings();
	BackgroundWorkerInitializeConnection(NULL, NULL, 0);

	worker_shared->launcher = MyLatch;
	worker_shared->out_of_slots = false;
	before_shmem_exit(leave, (Datum) 0);

	for (;;)
	{
		long		sleep_ms = MAX_SLEEP_MS;

		handle_signals();
		look_again();
		read_databases();
		if (idempotency_worker)
			sleep_ms = work_due();

		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 sleep_ms, PG_WAIT_EXTENSION);
		ResetLatch(MyLatch);
	}
}

/*
 * shmem_request hook
 */
static void
request_shmem(void)
{
	if (prev_shmem_request_hook)
		prev_shmem_request_hook();

	RequestAddinShmemSpace(MAXALIGN(sizeof(WorkerState)));
}

/*
 * shmem_startup hook
 */
static void
startup_shmem(void)
{
	bool		found;

	if (prev_shmem_startup_hook)
		prev_shmem_startup_hook();

	LWLockAcquire(AddinShmemInitLock, LW_EXCLUSIVE);
	worker_shared = ShmemInitStruct("idempotency worker", sizeof(WorkerState),
									&found);
	if (!found)
	{
		worker_shared->launcher = NULL;
		worker_shared->out_of_slots = false;
		pg_atomic_init_u32(&worker_shared->created, 0);
		pg_atomic_init_u64(&worker_shared->report, 0);
	}
	LWLockRelease(AddinShmemInitLock);
}

static void
register_launcher(void)
{
	BackgroundWorker worker = {
		.bgw_name = "idempotency launcher",
		.bgw_type = "idempotency launcher",
		.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION,
		.bgw_start_time = BgWorkerStart_RecoveryFinished,
		.bgw_restart_time = RESTART_SECS,
		.bgw_library_name = LIBRARY_NAME,
		.bgw_function_name = "idempotency_launcher_main",
	};

	RegisterBackgroundWorker(&worker);
}

/*
 * object_access hook: note that our extension is being created.
 */
static void
note_object(ObjectAccessType access, Oid classId, Oid objectId, int subId,
			void *arg)
{
	if (prev_object_access_hook)
		prev_object_access_hook(access, classId, objectId, subId, arg);

	if (access == OAT_POST_CREATE && classId == ExtensionRelationId &&
		is_ours(objectId))
		creates_extension = true;
}

/*
 * Whether an extension that is just being created is ours.
 *
 * The command counter has not been incremented yet, so that no catalog
 * snapshot shows its row.
 */
static bool
is_ours(Oid extension)
{
	Relation	rel = table_open(ExtensionRelationId, AccessShareLock);
	ScanKeyData key;
	SysScanDesc scan;
	HeapTuple	tuple;
	bool		result;

	ScanKeyInit(&key, Anum_pg_extension_oid, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(extension));
	scan = systable_beginscan(rel, ExtensionOidIndexId, true, SnapshotSelf,
							  1, &key);
	tuple = systable_getnext(scan);
	result = HeapTupleIsValid(tuple) &&
		strcmp(NameStr(((Form_pg_extension) GETSTRUCT(tuple))->extname),
			   EXTENSION_NAME) == 0;
	systable_endscan(scan);
	table_close(rel, AccessShareLock);

	return result;
}

/*
 * Transaction callback: tell the launcher of an extension that is there now.
 */
static void
at_end_of_xact(XactEvent event, void *arg)
{
	if (!creates_extension)
		return;

	if (event == XACT_EVENT_COMMIT)
		tell_launcher();
	if (event == XACT_EVENT_COMMIT || event == XACT_EVENT_ABORT ||
		event == XACT_EVENT_PREPARE)
		creates_extension = false;
}

/*
 * ProcessUtility hook: tell the launcher of an extension that is there now
 * because a prepared transaction was committed.
 */
static void
run_utility(PlannedStmt *statement, const char *query, bool read_only_tree,
			ProcessUtilityContext context, ParamListInfo params,
			QueryEnvironment *environment, DestReceiver *dest,
			QueryCompletion *completion)
{
	/* the statement may be freed by what it does */
	bool		commits_prepared = IsA(statement->utilityStmt, TransactionStmt) &&
		castNode(TransactionStmt, statement->utilityStmt)->kind ==
		TRANS_STMT_COMMIT_PREPARED;

	if (prev_process_utility_hook)
		prev_process_utility_hook(statement, query, read_only_tree, context,
								  params, environment, dest, completion);
	else
		standard_ProcessUtility(statement, query, read_only_tree, context,
								params, environment, dest, completion);

	if (commits_prepared && !WorkerStatusKnown())
	{
		/* we may have looked before, and remember that there was none */
		AcceptInvalidationMessages();
		if (OidIsValid(get_extension_oid(EXTENSION_NAME, true)))
			tell_launcher();
	}
}

/*
 * Have the launcher look again where there was no extension.
 */
static void
tell_launcher(void)
{
	Latch	   *launcher = worker_shared->launcher;

	pg_atomic_fetch_add_u32(&worker_shared->created, 1);

	/* should it be another process's by now, that will not mind */
	if (launcher != NULL)
		SetLatch(launcher);
}

/*
 * Exit callback of the launcher.
 */
static void
leave(int code, Datum arg)
{
	worker_shared->launcher = NULL;
	pg_atomic_write_u64(&worker_shared->report, 0);
}

/*
 * Do what signals ask for.
 *
 * The end of the server is no reason for a FATAL error in its log.  The exit
 * code has us started again if it was somebody else who wanted us to end.
 */
static void
handle_signals(void)
{
	if (ProcDiePending)
		proc_exit(1);
	CHECK_FOR_INTERRUPTS();

	if (ConfigReloadPending)
	{
		ConfigReloadPending = false;
		ProcessConfigFile(PGC_SIGHUP);
	}
}

/*
 * Bring what we remember up to date with pg_database, and what others keep by
 * database in shared memory.
 *
 * Databases that nobody can connect to, and templates, are left alone.
 */
static void
read_databases(void)
{
	ListCell   *lc;
	Relation	rel;
	TableScanDesc scan;
	HeapTuple	tuple;
	List	   *kept;
	List	   *existing = NIL;

	foreach(lc, databases)
		((Database *) lfirst(lc))->exists = false;

	StartTransactionCommand();
	(void) GetTransactionSnapshot();

	/* before we look which databases exist: meanwhile, one may be created */
	kept = list_concat_unique_oid(WorkerStatusDatabases(), MetricsDatabases());

	rel = table_open(DatabaseRelationId, AccessShareLock);
	scan = table_beginscan_catalog(rel, 0, NULL);
	while ((tuple = heap_getnext(scan, ForwardScanDirection)) != NULL)
	{
		Form_pg_database form = (Form_pg_database) GETSTRUCT(tuple);

		existing = lappend_oid(existing, form->oid);
		if (form->datallowconn && !form->datistemplate &&
			form->datconnlimit != DATCONNLIMIT_INVALID_DB)
			note_database(form->oid);
	}
	table_endscan(scan);
	table_close(rel, AccessShareLock);

	forget_dropped(list_difference_oid(kept, existing));
	CommitTransactionCommand();
}

/*
 * Note that a database exists.
 */
static void
note_database(Oid oid)
{
	MemoryContext oldcontext;
	Database   *database;
	ListCell   *lc;

	foreach(lc, databases)
	{
		database = lfirst(lc);
		if (database->oid == oid)
		{
			database->exists = true;
			return;
		}
	}

	oldcontext = MemoryContextSwitchTo(TopMemoryContext);
	database = palloc0_object(Database);
	database->oid = oid;
	database->exists = true;
	databases = lappend(databases, database);
	MemoryContextSwitchTo(oldcontext);
}

/*
 * Forget the databases that were not noted, and have others forget theirs.
 */
static void
forget_dropped(List *dropped)
{
	ListCell   *lc;

	foreach(lc, dropped)
	{
		WorkerStatusForget(lfirst_oid(lc));
		MetricsForget(lfirst_oid(lc));
	}

	foreach(lc, databases)
	{
		Database   *database = lfirst(lc);

		if (!database->exists)
		{
			databases = foreach_delete_current(databases, lc);
			pfree(database);
		}
	}
}

/*
 * If our extension was created somewhere, look again where there was none, or
 * one that could not be swept.
 */
static void
look_again(void)
{
	static uint32 known = 0;
	uint32		created = pg_atomic_read_u32(&worker_shared->created);
	ListCell   *lc;

	if (created == known)
		return;
	known = created;

	foreach(lc, databases)
	{
		Database   *database = lfirst(lc);

		if (database->result == WORKER_NO_EXTENSION ||
			database->result == WORKER_FAILED)
			database->last = 0;
	}
}

/*
 * Have a worker see to the database that is due and has waited longest.
 * Returns after how many milliseconds there may be more to do.
 *
 * It is one at a time, because while a worker runs databases come and go, and
 * waiting for it swallows what else would wake us: the main loop looks at all
 * that again before the next one.
 */
static long
work_due(void)
{
	long		rest = Min(idempotency_sweep_interval, get_metrics_interval());
	Database   *database = find_due(&rest);

	if (database == NULL)
		return rest;
	if (!work_on(database))
		return Min(rest, NO_SLOT_RETRY_MS);
	return 0;
}

/*
 * The database that is due and has waited longest, or null; *rest is set to
 * the time until one will be, if that is sooner.
 */
static Database *
find_due(long *rest)
{
	Database   *result = NULL;
	ListCell   *lc;

	foreach(lc, databases)
	{
		Database   *database = lfirst(lc);
		long		own_rest = Min(get_rest(database),
								   get_rest_of_measuring(database));

		if (own_rest > 0)
			*rest = Min(*rest, own_rest);
		else if (result == NULL || database->last < result->last)
			result = database;
	}

	return result;
}

/*
 * Have a worker do what is due in a database, unless somebody has it locked.
 * Returns false when there is no slot for a worker.
 */
static bool
work_on(Database *database)
{
	BackgroundWorkerHandle *handle;
	WorkerResult result;
	int			tasks = 0;

	if (get_rest(database) <= 0)
		tasks |= WORKER_SWEEP;
	if (get_rest_after(database->measured, get_metrics_interval()) <= 0)
		tasks |= WORKER_MEASURE;

	database->busy = !WorkerMayUse(database->oid);
	if (database->busy)
	{
		database->last = GetCurrentTimestamp();
		return true;
	}

	if (!start_worker(database->oid, tasks, &handle))
		return false;
	wait_for_worker(database->oid, handle);
	pfree(handle);

	result = WorkerReportResult(pg_atomic_exchange_u64(&worker_shared->report, 0));
	if (tasks & WORKER_MEASURE)
		database->measured = GetCurrentTimestamp();

	/* measuring alone has the next sweep come neither sooner nor later */
	if ((tasks & WORKER_SWEEP) || result == WORKER_NO_EXTENSION)
	{
		database->failures = (result == WORKER_FAILED) ? database->failures + 1 : 0;
		database->result = result;
		database->last = GetCurrentTimestamp();
	}

	return true;
}

/*
 * Start a worker, if there is a slot for one.
 */
static bool
start_worker(Oid database, int tasks, BackgroundWorkerHandle **handle)
{
	BackgroundWorker worker = {
		.bgw_name = "idempotency worker",
		.bgw_type = "idempotency worker",
		.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION,
		.bgw_start_time = BgWorkerStart_RecoveryFinished,
		.bgw_restart_time = BGW_NEVER_RESTART,
		.bgw_library_name = LIBRARY_NAME,
		.bgw_function_name = "idempotency_worker_main",
		.bgw_main_arg = ObjectIdGetDatum(database),
		.bgw_notify_pid = MyProcPid,
	};

	memcpy(worker.bgw_extra, &tasks, sizeof(tasks));

	/* unless the worker says otherwise */
	pg_atomic_write_u64(&worker_shared->report,
						WorkerReport(database, WORKER_FAILED));

	if (RegisterDynamicBackgroundWorker(&worker, handle))
	{
		worker_shared->out_of_slots = false;
		return true;
	}

	pg_atomic_write_u64(&worker_shared->report, 0);
	if (!worker_shared->out_of_slots)
		ereport(WARNING,
				(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
				 errmsg("out of background worker slots"),
				 errdetail("Expired idempotency records are not swept until there is one."),
				 errhint("You might need to increase \"max_worker_processes\".")));
	worker_shared->out_of_slots = true;
	return false;
}

/*
 * Wait for a worker to end.  One that takes much too long is told to end, and
 * if that does not help, left to itself: nobody else has to wait for it.
 */
static void
wait_for_worker(Oid database, BackgroundWorkerHandle *handle)
{
	if (ends_within(handle, STUCK_SECS))
		return;

	ereport(LOG,
			(errmsg("terminating idempotency worker for database with OID %u",
					database),
			 errdetail("It did not end within %d seconds.", STUCK_SECS)));
	TerminateBackgroundWorker(handle);
	(void) ends_within(handle, TERMINATION_SECS);
}

/*
 * Wait for a worker to end, but not for ever.
 */
static bool
ends_within(BackgroundWorkerHandle *handle, int secs)
{
	int64		deadline = ClockMicros() + secs * USECS_PER_SEC;
	pid_t		pid;

	while (GetBackgroundWorkerPid(handle, &pid) != BGWH_STOPPED)
	{
		long		rest = ClockRestMillis(deadline);

		if (rest == 0)
			return false;
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 rest, WAIT_EVENT_BGWORKER_SHUTDOWN);
		ResetLatch(MyLatch);
		handle_signals();
	}

	return true;
}

/*
 * Milliseconds until a database gets its next sweep.
 */
static long
get_rest(const Database *database)
{
	return get_rest_after(database->last, get_delay(database));
}

/*
 * Milliseconds until the metrics of a database are flushed again.  Where that
 * may not be possible, it waits for the next sweep.
 */
static long
get_rest_of_measuring(const Database *database)
{
	if (database->busy || database->result == WORKER_FAILED ||
		database->result == WORKER_NO_EXTENSION)
		return get_rest(database);
	return get_rest_after(database->measured, get_metrics_interval());
}

/*
 * Milliseconds that are left of a delay after what came last.
 *
 * This is worked out anew each time, so that a changed interval has its effect
 * at once.  If the clock was set back, nobody waits for it to catch up.
 */
static long
get_rest_after(TimestampTz last, int64 delay)
{
	TimestampTz now = GetCurrentTimestamp();

	if (last > now)
		return 0;
	return TimestampDifferenceMilliseconds(now, last + delay * 1000);
}

static int64
get_metrics_interval(void)
{
	return (int64) idempotency_metrics_interval * 1000;
}

/*
 * How long to leave a database alone, in milliseconds.
 */
static int64
get_delay(const Database *database)
{
	int64		interval = idempotency_sweep_interval;

	if (database->busy)
		return SOON_MS;

	switch (database->result)
	{
		case WORKER_DONE:
			return interval;
		case WORKER_INTERRUPTED:
			return Min(interval, SOON_MS);
		case WORKER_NO_EXTENSION:
			return NO_EXTENSION_MS;
		case WORKER_FAILED:
			return Min(interval << Min(database->failures, 20),
					   Max(interval, MAX_BACKOFF_MS));
	}
	return interval;			/* keep the compiler quiet */
}
