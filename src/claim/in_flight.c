/*-------------------------------------------------------------------------
 *
 * in_flight.c
 *	  Claims in flight, described in shared memory.
 *
 * A transaction claim writes no row before it is finished, and the row of a
 * leased claim is not seen by others before begin's transaction commits, so
 * that nobody else could see what is known about it.  When the library is
 * preloaded, this table tells: who holds the claim, since when, and for which
 * request.  From here come the view idempotency_in_flight (beside the leases,
 * which it finds in the table of records), the details of an answer "in
 * flight", and the mismatch that is found while the first request still runs.
 *
 * Nothing here decides who may run.  An entry is made after the lock of the
 * claim was got and removed before the lock goes, so an entry that is found
 * is at worst a moment old.  Where there is no entry (the library is not
 * preloaded, the table is full, the server restarted after a transaction was
 * prepared), repeats just learn less.
 *
 * A prepared transaction has no process, and no code of ours runs when it is
 * resolved.  Its entries stay behind, with its transaction ID, and are stale
 * once that is not in progress any more.  The next claim on the scope takes
 * over a stale entry, and all of them are thrown out when somebody looks at
 * the whole table, or finds it full.
 *
 * The table is a partitioned hash table like that of the lock manager: a
 * backend takes one of NUM_PARTITIONS locks for an entry, and all of them, in
 * order, to look at the whole.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "access/xact.h"
#include "claim/in_flight.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "port/atomics.h"
#include "settings.h"
#include "shared_memory.h"
#include "storage/lwlock.h"
#include "storage/procarray.h"
#include "storage/shmem.h"
#include "utils/hsearch.h"
#include "utils/timestamp.h"
#include "utils/tuplestore.h"

#define NUM_PARTITIONS		16
#define TRANCHE_NAME		"idempotency"

/* Columns of idempotency_in_flight() */
enum
{
	IN_FLIGHT_PID,
	IN_FLIGHT_TENANT,
	IN_FLIGHT_ACTOR,
	IN_FLIGHT_ACTION,
	IN_FLIGHT_KEY,
	IN_FLIGHT_ATTEMPT,
	IN_FLIGHT_STARTED_AT,
	IN_FLIGHT_LEASE_EXPIRES_AT,
	IN_FLIGHT_COLUMNS
};

typedef struct InFlightState
{
	pg_atomic_uint64 untracked; /* claims that found the table full */
	pg_atomic_uint32 prepared;	/* entries of prepared transactions */
} InFlightState;

static Size get_size(void);
static void start_up(void);
static uint32 hash_locktag(const void *key, Size keysize);
static LWLock *partition_lock(uint32 hash);
static void lock_all_partitions(LWLockMode mode);
static void unlock_all_partitions(void);
static bool is_stale(const InFlightClaim *claim);
static void remove_stale_claims(void);
static void forget_prepared(const InFlightClaim *entry);
static void put_claim(ReturnSetInfo *rsinfo, const InFlightClaim *claim);

PG_FUNCTION_INFO_V1(idempotency_in_flight);
PG_FUNCTION_INFO_V1(idempotency_tracking);

/* pointers to shared memory, null unless the library is preloaded */
static InFlightState *state = NULL;
static HTAB *claims = NULL;
static LWLockPadded *partitions = NULL;

/*
 * Ask for shared memory.
 */
void
InFlightInit(void)
{
	static const SharedMemoryUser user = {
		.get_size = get_size,
		.tranche = TRANCHE_NAME,
		.locks = NUM_PARTITIONS,
		.start_up = start_up
	};

	SharedMemoryRegister(&user);
}

/*
 * Describe a claim whose lock this backend holds.
 *
 * An entry that is there already is stale or this backend's own, and is
 * overwritten.  Returns false when there is no room for a new one.
 */
bool
InFlightTrack(const LOCKTAG *locktag, const ScopeName *name,
			  const ClaimFacts *facts)
{
	uint32		hash;
	InFlightClaim *entry = NULL;
	bool		found;

	if (claims == NULL)
		return false;

	hash = get_hash_value(claims, locktag);
	for (int attempt = 0; attempt < 2; attempt++)
	{
		LWLockAcquire(partition_lock(hash), LW_EXCLUSIVE);
		entry = hash_search_with_hash_value(claims, locktag, hash,
											HASH_ENTER_NULL, &found);
		if (entry != NULL)
			break;
		LWLockRelease(partition_lock(hash));
		if (attempt == 0)
			remove_stale_claims();
	}

	if (entry == NULL)
	{
		pg_atomic_fetch_add_u64(&state->untracked, 1);
		return false;
	}

	if (found)
		forget_prepared(entry);
	entry->pid = MyProcPid;
	entry->prepared_xid = InvalidFullTransactionId;
	entry->facts = *facts;
	memcpy(&entry->name, name, SizeOfScopeName(name));
	LWLockRelease(partition_lock(hash));

	return true;
}

/*
 * Remove the entry of a claim whose lock this backend is about to lose.
 */
void
InFlightForget(const LOCKTAG *locktag)
{
	uint32		hash = get_hash_value(claims, locktag);

	LWLockAcquire(partition_lock(hash), LW_EXCLUSIVE);
	hash_search_with_hash_value(claims, locktag, hash, HASH_REMOVE, NULL);
	LWLockRelease(partition_lock(hash));
}

/*
 * Note that a claim now belongs to a prepared transaction.
 */
void
InFlightPrepare(const LOCKTAG *locktag)
{
	uint32		hash = get_hash_value(claims, locktag);
	InFlightClaim *entry;

	LWLockAcquire(partition_lock(hash), LW_EXCLUSIVE);
	entry = hash_search_with_hash_value(claims, locktag, hash, HASH_FIND, NULL);
	if (entry != NULL && entry->pid != 0)
	{
		entry->pid = 0;
		entry->prepared_xid = GetTopFullTransactionId();
		pg_atomic_fetch_add_u32(&state->prepared, 1);
	}
	LWLockRelease(partition_lock(hash));
}

/*
 * Whether a prepared transaction may hold a claim; true where that is not known.
 */
bool
InFlightAnyPrepared(void)
{
	return state == NULL || pg_atomic_read_u32(&state->prepared) > 0;
}

/*
 * Get a copy of what is known about the claim on a scope.
 */
bool
InFlightFind(const Scope *scope, InFlightClaim *found)
{
	uint32		hash;
	InFlightClaim *entry;
	bool		result = false;

	if (claims == NULL)
		return false;

	hash = get_hash_value(claims, &scope->locktag);
	LWLockAcquire(partition_lock(hash), LW_SHARED);
	entry = hash_search_with_hash_value(claims, &scope->locktag, hash,
										HASH_FIND, NULL);

	/* the name differs when another scope has the same lock */
	if (entry != NULL && ScopeNameEquals(&entry->name, &scope->name))
	{
		*found = *entry;
		result = true;
	}
	LWLockRelease(partition_lock(hash));

	return result && !is_stale(found);
}

/*
 * idempotency_in_flight() returns setof record
 *
 * The claims of transactions in this database; none unless the library is
 * preloaded.
 */
Datum
idempotency_in_flight(PG_FUNCTION_ARGS)
{
	HASH_SEQ_STATUS seq;
	InFlightClaim *entry;
	InFlightClaim *copies;
	int			count = 0;

	InitMaterializedSRF(fcinfo, 0);
	if (claims == NULL)
		return (Datum) 0;

	remove_stale_claims();

	/* Copy under the locks; what is slower comes after */
	lock_all_partitions(LW_SHARED);
	copies = MemoryContextAllocHuge(CurrentMemoryContext,
									sizeof(InFlightClaim) *
									(Size) hash_get_num_entries(claims));
	hash_seq_init(&seq, claims);
	while ((entry = hash_seq_search(&seq)) != NULL)
	{
		if (entry->locktag.locktag_field1 == MyDatabaseId)
			copies[count++] = *entry;
	}
	unlock_all_partitions();

	for (int i = 0; i < count; i++)
		put_claim((ReturnSetInfo *) fcinfo->resultinfo, &copies[i]);

	return (Datum) 0;
}

/*
 * idempotency_tracking(OUT capacity int, OUT used int, OUT untracked bigint)
 *
 * How full the table is, and how many claims found no room in it since the
 * server started; nulls unless the library is preloaded.
 */
Datum
idempotency_tracking(PG_FUNCTION_ARGS)
{
	TupleDesc	tupdesc;
	Datum		values[3] = {0};
	bool		nulls[3] = {true, true, true};

	if (get_call_result_type(fcinfo, NULL, &tupdesc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");

	if (claims != NULL)
	{
		remove_stale_claims();
		values[0] = Int32GetDatum(idempotency_max_tracked_claims);
		values[1] = Int32GetDatum((int32) hash_get_num_entries(claims));
		values[2] = Int64GetDatum((int64) pg_atomic_read_u64(&state->untracked));
		memset(nulls, false, sizeof(nulls));
	}

	return HeapTupleGetDatum(heap_form_tuple(tupdesc, values, nulls));
}

static Size
get_size(void)
{
	return add_size(MAXALIGN(sizeof(InFlightState)),
					hash_estimate_size(idempotency_max_tracked_claims,
									   sizeof(InFlightClaim)));
}

/*
 * Make the table, or attach to it in a new process.
 */
static void
start_up(void)
{
	bool		found;
	HASHCTL		info = {0};

	state = ShmemInitStruct("idempotency state", sizeof(InFlightState), &found);
	if (!found)
	{
		pg_atomic_init_u64(&state->untracked, 0);
		pg_atomic_init_u32(&state->prepared, 0);
	}

	info.keysize = sizeof(LOCKTAG);
	info.entrysize = sizeof(InFlightClaim);
	info.hash = hash_locktag;
	info.match = memcmp;
	info.num_partitions = NUM_PARTITIONS;
	claims = ShmemInitHash("idempotency claims in flight",
						   idempotency_max_tracked_claims, &info,
						   HASH_ELEM | HASH_FUNCTION | HASH_COMPARE |
						   HASH_PARTITION | HASH_FIXED_SIZE);
	partitions = GetNamedLWLockTranche(TRANCHE_NAME);
}

/*
 * A part of the tag that is a hash already.
 */
static uint32
hash_locktag(const void *key, Size keysize)
{
	return ((const LOCKTAG *) key)->locktag_field2;
}

static LWLock *
partition_lock(uint32 hash)
{
	return &partitions[hash % NUM_PARTITIONS].lock;
}

static void
lock_all_partitions(LWLockMode mode)
{
	for (int i = 0; i < NUM_PARTITIONS; i++)
		LWLockAcquire(&partitions[i].lock, mode);
}

static void
unlock_all_partitions(void)
{
	for (int i = NUM_PARTITIONS - 1; i >= 0; i--)
		LWLockRelease(&partitions[i].lock);
}

/*
 * Whether this is left over from a prepared transaction that was resolved.
 */
static bool
is_stale(const InFlightClaim *claim)
{
	uint64		age;

	if (!FullTransactionIdIsValid(claim->prepared_xid))
		return false;

	/* so old that its number may have been given out again */
	age = U64FromFullTransactionId(ReadNextFullTransactionId()) -
		U64FromFullTransactionId(claim->prepared_xid);
	if (age > PG_INT32_MAX)
		return true;

	return !TransactionIdIsInProgress(XidFromFullTransactionId(claim->prepared_xid));
}

/*
 * Throw out what is left over from prepared transactions, if there can be
 * any.
 */
static void
remove_stale_claims(void)
{
	HASH_SEQ_STATUS seq;
	InFlightClaim *entry;

	if (pg_atomic_read_u32(&state->prepared) == 0)
		return;

	lock_all_partitions(LW_EXCLUSIVE);
	hash_seq_init(&seq, claims);
	while ((entry = hash_seq_search(&seq)) != NULL)
	{
		if (is_stale(entry))
		{
			forget_prepared(entry);
			hash_search(claims, &entry->locktag, HASH_REMOVE, NULL);
		}
	}
	unlock_all_partitions();
}

/*
 * An entry is about to be removed or overwritten, so do not count it any more
 * if it is one of a prepared transaction.
 */
static void
forget_prepared(const InFlightClaim *entry)
{
	if (FullTransactionIdIsValid(entry->prepared_xid))
		pg_atomic_fetch_sub_u32(&state->prepared, 1);
}

/*
 * Add a row to the result of idempotency_in_flight().
 */
static void
put_claim(ReturnSetInfo *rsinfo, const InFlightClaim *claim)
{
	Datum		values[IN_FLIGHT_COLUMNS];
	bool		nulls[IN_FLIGHT_COLUMNS] = {false};

	values[IN_FLIGHT_PID] = Int32GetDatum(claim->pid);
	nulls[IN_FLIGHT_PID] = (claim->pid == 0);
	values[IN_FLIGHT_TENANT] = ScopeNamePart(&claim->name, SCOPE_TENANT);
	values[IN_FLIGHT_ACTOR] = ScopeNamePart(&claim->name, SCOPE_ACTOR);
	values[IN_FLIGHT_ACTION] = ScopeNamePart(&claim->name, SCOPE_ACTION);
	values[IN_FLIGHT_KEY] = ScopeNamePart(&claim->name, SCOPE_KEY);
	values[IN_FLIGHT_ATTEMPT] = Int32GetDatum(claim->facts.attempt);
	values[IN_FLIGHT_STARTED_AT] = TimestampTzGetDatum(claim->facts.started_at);
	values[IN_FLIGHT_LEASE_EXPIRES_AT] =
		TimestampTzGetDatum(claim->facts.lease_expires_at);
	nulls[IN_FLIGHT_LEASE_EXPIRES_AT] = !claim_is_leased(&claim->facts);

	tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
}
