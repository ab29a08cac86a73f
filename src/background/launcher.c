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
 * new one gets a worker, and where that finds none, the next one comes much
 * later; or at once when somebody creates it anywhere (created.c).
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
#include "base.h"

#include "background/created.h"
#include "background/databases.h"
#include "background/launcher.h"
#include "background/worker.h"
#include "background/worker_shared.h"
#include "clock.h"
#include "miscadmin.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "settings.h"
#include "storage/ipc.h"
#include "tcop/tcopprot.h"
#include "utils/guc.h"
#include "utils/timestamp.h"
#include "utils/wait_event.h"

#define LIBRARY_NAME		"idempotency"
#define RESTART_SECS		5
#define MAX_SLEEP_MS		(60 * 60 * 1000)
#define NO_SLOT_RETRY_MS	(10 * 1000)
#define STUCK_SECS			(WORKER_MAX_SECS + 20)
#define TERMINATION_SECS	5

static void register_launcher(void);
static void leave(int code, Datum arg);
static void handle_signals(void);
static long work_due(void);
static bool start_worker(Oid database, int tasks,
						 BackgroundWorkerHandle **handle);
static void wait_for_worker(Oid database, BackgroundWorkerHandle *handle);
static bool ends_within(BackgroundWorkerHandle *handle, int secs);
static bool work_on(Database *database);

/*
 * Register the launcher, and what it needs, while the server starts.
 */
void
LauncherInit(void)
{
	/* a server that is being upgraded must be left alone */
	if (!process_shared_preload_libraries_in_progress || IsBinaryUpgrade)
		return;

	WorkerSharedInit();
	CreatedInit();
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
		DatabasesLookAgain();
		DatabasesRead();
		if (idempotency_worker)
			sleep_ms = work_due();

		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 sleep_ms, PG_WAIT_EXTENSION);
		ResetLatch(MyLatch);
	}
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
	long		rest = Min((int64) idempotency_sweep_interval,
						   (int64) idempotency_metrics_interval * 1000);
	Database   *database = DatabasesFindDue(&rest);

	if (database == NULL)
		return rest;
	if (!work_on(database))
		return Min(rest, NO_SLOT_RETRY_MS);
	return 0;
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

	if (DatabaseNeedsSweep(database))
		tasks |= WORKER_SWEEP;
	if (DatabaseNeedsMeasuring(database))
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
