/*-------------------------------------------------------------------------
 *
 * worker.c
 *	  The background worker that sweeps one database.
 *
 * A process that is connected to a database is in the way of whoever wants to
 * drop, rename or copy it: the server waits some seconds for it to go, and
 * then gives up.  So a worker lives no longer than its sweep, and between two
 * batches it looks whether anybody has locked the database for such a thing,
 * and leaves if so.  Within the database it is in nobody's way for longer than
 * a batch either, because each batch is a transaction.
 *
 * The extension may be dropped or replaced at any time.  A batch locks it, as
 * an object, before it looks for its table, in the order in which DROP
 * EXTENSION takes its locks, so that the two cannot deadlock.
 *
 *-------------------------------------------------------------------------
 */
#include "idempotency.h"

#include "access/xact.h"
#include "catalog/pg_database.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/ipc.h"
#include "storage/lmgr.h"
#include "storage/lock.h"
#include "sweep.h"
#include "tcop/tcopprot.h"
#include "utils/guc.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"
#include "worker.h"

/* A worker gives way to the next database after this long */
#define MAX_DURATION_SECS	10

static void set_settings(void);
static bool sweep_batch(Sweep *sweep, WorkerResult *result);
static bool lock_extension(void);

/*
 * Entry point of a worker; arg is the OID of its database.
 */
void
idempotency_worker_main(Datum arg)
{
	Sweep		sweep;
	WorkerResult result = WORKER_DONE;
	bool		more = true;

	pqsignal(SIGTERM, die);
	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	BackgroundWorkerUnblockSignals();

	/* before we connect, which may have to wait for a lock on the database */
	set_settings();
	BackgroundWorkerInitializeConnectionByOid(DatumGetObjectId(arg), InvalidOid, 0);

	SweepStart(&sweep, idempotency_sweep_batch_size,
			   MAX_DURATION_SECS * USECS_PER_SEC);
	while (more)
	{
		CHECK_FOR_INTERRUPTS();
		if (ConfigReloadPending || !WorkerMayUse(MyDatabaseId) ||
			GetCurrentTimestamp() >= sweep.deadline)
		{
			result = WORKER_INTERRUPTED;
			break;
		}
		more = sweep_batch(&sweep, &result);
	}

	pg_atomic_write_u32(&worker_shared->result, result);
	proc_exit(0);
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
 * Make sure that no setting of the database or of the server changes what a
 * sweep does.
 */
static void
set_settings(void)
{
	static const char *const settings[][2] = {
		{"application_name", "idempotency worker"},
		{"search_path", "pg_catalog, pg_temp"},
		{"default_transaction_isolation", "read committed"},
		{"default_transaction_read_only", "off"},
		{"synchronous_commit", "off"},
		{"statement_timeout", "0"},
		{"lock_timeout", "500ms"},	/* sooner than a deadlock is looked for */
		{"idempotency.tenant", ""},
	};

	for (size_t i = 0; i < lengthof(settings); i++)
		SetConfigOption(settings[i][0], settings[i][1], PGC_SUSET,
						PGC_S_OVERRIDE);
}

/*
 * Sweep one batch in a transaction of its own.  Returns whether there may be
 * more to sweep.
 */
static bool
sweep_batch(Sweep *sweep, WorkerResult *result)
{
	bool		more = false;

	SetCurrentStatementStartTimestamp();
	StartTransactionCommand();
	PushActiveSnapshot(GetTransactionSnapshot());
	pgstat_report_activity(STATE_RUNNING, "idempotency sweep");

	if (lock_extension())
		more = SweepBatch(sweep);
	else
		*result = WORKER_NO_EXTENSION;

	PopActiveSnapshot();
	CommitTransactionCommand();
	pgstat_report_stat(true);
	pgstat_report_activity(STATE_IDLE, NULL);

	return more;
}

/*
 * Lock the extension against being dropped, if there is one.
 */
static bool
lock_extension(void)
{
	for (;;)
	{
		Oid			extension = get_extension_oid("idempotency", true);

		if (!OidIsValid(extension))
			return false;

		LockDatabaseObject(ExtensionRelationId, extension, 0, AccessShareLock);
		if (get_extension_oid("idempotency", true) == extension)
			return true;
	}
}
