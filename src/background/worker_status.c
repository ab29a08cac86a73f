/*-------------------------------------------------------------------------
 *
 * worker_status.c
 *	  What became of the sweeps of each database, in shared memory.
 *
 * An administrator wants to know when a database was last swept, whether that
 * was enough, and why not.  Whoever ends a sweep notes it here: a worker, or a
 * session that calls idempotency_sweep().  Each looks only at the entry of its
 * own database, so that a message is read in the encoding it was written in.
 *
 * There is room for MAX_DATABASES that have the extension.  What finds none is
 * not noted; the launcher removes the entries of databases that were dropped,
 * and a worker that of its own when the extension was.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "access/htup_details.h"
#include "access/xlog.h"
#include "background/worker_shared.h"
#include "background/worker_status.h"
#include "funcapi.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "settings.h"
#include "shared_memory.h"
#include "storage/lwlock.h"
#include "storage/shmem.h"
#include "utils/builtins.h"
#include "utils/hsearch.h"
#include "utils/timestamp.h"

#define MAX_DATABASES		256
#define MAX_ERROR_LENGTH	200
#define TRANCHE_NAME		"idempotency worker"

/* Columns of idempotency_worker_status() */
enum
{
	STATUS_STATE,
	STATUS_LAST_SWEEP_AT,
	STATUS_SWEPT,
	STATUS_DURATION,
	STATUS_BEHIND,
	STATUS_LAST_ERROR,
	STATUS_LAST_ERROR_AT,
	STATUS_FAILURES,
	STATUS_COLUMNS
};

typedef struct WorkerStatus
{
	Oid			database;		/* hash key */
	TimestampTz last_sweep_at;	/* when it ended, 0 for never */
	int64		swept;			/* rows that it deleted */
	int64		duration;		/* of it, in microseconds */
	bool		behind;			/* it ended with more to do */
	TimestampTz last_error_at;	/* 0 for never */
	char		last_error[MAX_ERROR_LENGTH + 1];
	int			failures;		/* of workers, since a sweep ended well */
	Watch		watch;			/* over leases */
} WorkerStatus;

static Size get_size(void);
static void start_up(void);
static WorkerStatus *lock_own_status(void);
static bool copy_own_status(WorkerStatus *copy);
static const char *get_state(void);

PG_FUNCTION_INFO_V1(idempotency_worker_status);

/* pointers to shared memory, null unless the library is preloaded */
static HTAB *statuses = NULL;
static LWLock *lock = NULL;

/*
 * Ask for shared memory.
 */
void
WorkerStatusInit(void)
{
	static const SharedMemoryUser user = {
		.get_size = get_size,
		.tranche = TRANCHE_NAME,
		.locks = 1,
		.start_up = start_up
	};

	SharedMemoryRegister(&user);
}

/*
 * Note the end of a sweep of this database, which has deleted so many rows, in
 * so many microseconds, and whether it ended with more to do.
 */
void
WorkerStatusSwept(int64 swept, int64 duration, bool behind)
{
	WorkerStatus *status = lock_own_status();

	if (status == NULL)
		return;

	status->last_sweep_at = GetCurrentTimestamp();
	status->swept = swept;
	status->duration = duration;
	status->behind = behind;
	status->failures = 0;
	LWLockRelease(lock);
}

/*
 * Note that a worker failed.  An error need not have a message.
 */
void
WorkerStatusFailed(const char *message)
{
	WorkerStatus *status = lock_own_status();
	int			length;

	if (status == NULL)
		return;
	if (message == NULL)
		message = "missing error text";

	length = pg_mbcliplen(message, strlen(message), MAX_ERROR_LENGTH);
	memcpy(status->last_error, message, length);
	status->last_error[length] = '\0';
	status->last_error_at = GetCurrentTimestamp();
	status->failures++;
	LWLockRelease(lock);
}

/*
 * Note how far the watch over the leases of this database has got.
 */
void
WorkerStatusSetWatch(const Watch *watch)
{
	WorkerStatus *status = lock_own_status();

	if (status == NULL)
		return;

	status->watch = *watch;
	LWLockRelease(lock);
}

/*
 * Get how far it has got.  Returns false where there is no room to keep that.
 */
bool
WorkerStatusGetWatch(Watch *watch)
{
	WorkerStatus *status = lock_own_status();

	if (status == NULL)
		return false;

	*watch = status->watch;
	LWLockRelease(lock);
	return true;
}

/*
 * The databases that there are entries of.
 */
List *
WorkerStatusDatabases(void)
{
	HASH_SEQ_STATUS seq;
	WorkerStatus *status;
	List	   *result = NIL;

	LWLockAcquire(lock, LW_SHARED);
	hash_seq_init(&seq, statuses);
	while ((status = hash_seq_search(&seq)) != NULL)
		result = lappend_oid(result, status->database);
	LWLockRelease(lock);

	return result;
}

/*
 * Whether there is an entry of this database.
 */
bool
WorkerStatusKnown(void)
{
	WorkerStatus status;

	return copy_own_status(&status);
}

/*
 * Remove the entry of a database that has no extension, or is no more.
 */
void
WorkerStatusForget(Oid database)
{
	LWLockAcquire(lock, LW_EXCLUSIVE);
	(void) hash_search(statuses, &database, HASH_REMOVE, NULL);
	LWLockRelease(lock);
}

/*
 * idempotency_worker_status(OUT state text, OUT last_sweep_at timestamptz,
 *							 OUT swept bigint, OUT duration interval,
 *							 OUT behind boolean, OUT last_error text,
 *							 OUT last_error_at timestamptz, OUT failures int)
 *
 * What the background does for this database; nulls for what is not known.
 */
Datum
idempotency_worker_status(PG_FUNCTION_ARGS)
{
	TupleDesc	tupdesc;
	Datum		values[STATUS_COLUMNS] = {0};
	bool		nulls[STATUS_COLUMNS] = {false};
	Interval	duration = {0};
	WorkerStatus status = {0};
	bool		found = copy_own_status(&status);
	bool		never_swept = (status.last_sweep_at == 0);
	bool		never_failed = (status.last_error_at == 0);

	if (get_call_result_type(fcinfo, NULL, &tupdesc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");

	values[STATUS_STATE] = CStringGetTextDatum(get_state());

	values[STATUS_LAST_SWEEP_AT] = TimestampTzGetDatum(status.last_sweep_at);
	values[STATUS_SWEPT] = Int64GetDatum(status.swept);
	duration.time = status.duration;
	values[STATUS_DURATION] = IntervalPGetDatum(&duration);
	values[STATUS_BEHIND] = BoolGetDatum(status.behind);
	nulls[STATUS_LAST_SWEEP_AT] = nulls[STATUS_SWEPT] = never_swept;
	nulls[STATUS_DURATION] = nulls[STATUS_BEHIND] = never_swept;

	values[STATUS_LAST_ERROR] = CStringGetTextDatum(status.last_error);
	values[STATUS_LAST_ERROR_AT] = TimestampTzGetDatum(status.last_error_at);
	values[STATUS_FAILURES] = Int32GetDatum(status.failures);
	nulls[STATUS_LAST_ERROR] = nulls[STATUS_LAST_ERROR_AT] = never_failed;
	nulls[STATUS_FAILURES] = !found;

	return HeapTupleGetDatum(heap_form_tuple(tupdesc, values, nulls));
}

static Size
get_size(void)
{
	return hash_estimate_size(MAX_DATABASES, sizeof(WorkerStatus));
}

/*
 * Make the table, or attach to it in a new process.
 */
static void
start_up(void)
{
	HASHCTL		info = {0};

	info.keysize = sizeof(Oid);
	info.entrysize = sizeof(WorkerStatus);
	statuses = ShmemInitHash("idempotency worker status",
							 MAX_DATABASES, &info,
							 HASH_ELEM | HASH_BLOBS | HASH_FIXED_SIZE);
	lock = &GetNamedLWLockTranche(TRANCHE_NAME)->lock;
}

/*
 * The entry of this database, locked, and made if there was none.  Returns
 * null, with nothing locked, where there is no room for it.
 */
static WorkerStatus *
lock_own_status(void)
{
	WorkerStatus *status;
	bool		found;

	if (statuses == NULL)
		return NULL;

	LWLockAcquire(lock, LW_EXCLUSIVE);
	status = hash_search(statuses, &MyDatabaseId, HASH_ENTER_NULL, &found);
	if (status == NULL)
		LWLockRelease(lock);
	else if (!found)
		*status = (WorkerStatus) {.database = MyDatabaseId};

	return status;
}

/*
 * Get a copy of the entry of this database, if there is one.
 */
static bool
copy_own_status(WorkerStatus *copy)
{
	WorkerStatus *status;

	if (statuses == NULL)
		return false;

	LWLockAcquire(lock, LW_SHARED);
	status = hash_search(statuses, &MyDatabaseId, HASH_FIND, NULL);
	if (status != NULL)
		*copy = *status;
	LWLockRelease(lock);

	return status != NULL;
}

/*
 * What the launcher and its workers are doing, as far as this database can
 * notice.
 */
static const char *
get_state(void)
{
	if (worker_shared == NULL)
		return "not preloaded";
	if (RecoveryInProgress())
		return "standby";
	if (!idempotency_worker)
		return "off";
	if (worker_shared->launcher == NULL)
		return "not running";
	if (WorkerReportDatabase(pg_atomic_read_u64(&worker_shared->report)) ==
		MyDatabaseId)
		return "sweeping";
	if (worker_shared->out_of_slots)
		return "waiting for a slot";
	return "running";
}
