/*-------------------------------------------------------------------------
 *
 * claim.c
 *	  The claims of this transaction: their locks, and what it must know.
 *
 * A transaction claim is a lock on the scope and an entry in a list of this
 * backend.  Nothing is written for it, so a rollback leaves nothing behind,
 * and the lock manager does the rest: it wakes those who wait, finds
 * deadlocks, and hands the lock to a prepared transaction.
 *
 * Savepoints.  A claim belongs to the (sub)transaction that began it, its
 * held_level.  When a savepoint is released, what it began belongs to its
 * parent; when it is rolled back, the claim is gone, and the lock manager
 * lets the lock go at the same moment.  The end of a claim is undone in the
 * same way: a claim that was ended at ended_level is held again when that
 * subtransaction is rolled back, because then so is the record that was
 * written.
 *
 *		begin a			held 1
 *		SAVEPOINT s		held 1
 *		finish a		held 1, ended 2
 *		ROLLBACK TO s	held 1				(the record is gone)
 *
 * An ended claim keeps its lock until the transaction is over: until then its
 * record is not there for others, who would run the work a second time and
 * fail at the end.
 *
 * Owners.  The lock manager charges a lock to a resource owner, and during a
 * query that is the owner of its portal.  A later call in the same
 * transaction runs in another portal and could not release it, so locks are
 * always charged to the owner of the (sub)transaction; that is where they
 * would have ended up anyway.
 *
 * The guard.  A transaction that commits with a claim that is still held did
 * work whose answer nobody will find, so that the next repeat would do it
 * again.  It is refused before it commits.
 *
 * Leased claims.  One that this transaction began is in the list too, with its
 * lock: until the commit its record is not there for others.  The commit then
 * makes it the claim of whoever knows the attempt (see lease.c), and the guard
 * has nothing against that.
 *
 *-------------------------------------------------------------------------
 */
#include "idempotency.h"

#include "access/xact.h"
#include "claim.h"
#include "in_flight.h"
#include "metrics.h"
#include "miscadmin.h"
#include "storage/proc.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/resowner.h"

static void at_end_of_xact(XactEvent event, void *arg);
static void at_end_of_subxact(SubXactEvent event, SubTransactionId mySubid,
							  SubTransactionId parentSubid, void *arg);
static void guard_commit(void);
static void forget_all(XactEvent event);
static void commit_level(int level);
static void abort_level(int level);
static void untrack(const Claim *claim);
static LockAcquireResult acquire_lock(const LOCKTAG *locktag, bool dont_wait);
static void wait_with_timeout(const LOCKTAG *locktag, int wait_ms);

/* The claims of this transaction, latest first, in TopTransactionContext */
static Claim *claims = NULL;

/*
 * Hook into the end of transactions.
 */
void
ClaimInit(void)
{
	RegisterXactCallback(at_end_of_xact, NULL);
	RegisterSubXactCallback(at_end_of_subxact, NULL);
}

/*
 * Get the lock of a scope if nobody else has it.
 */
bool
ClaimTryLock(const LOCKTAG *locktag)
{
	return acquire_lock(locktag, true) != LOCKACQUIRE_NOT_AVAIL;
}

/*
 * Wait for the lock of a scope, at most wait_ms milliseconds.
 *
 * Returns false when the time is up.  The lock manager can be told to give up
 * only by an error, and after an error it needs the cleanup that the abort of
 * a subtransaction does.  Hence the subtransaction; a lock that was got in it
 * goes to its parent.
 *
 * A lock_timeout of the session that is shorter than wait_ms keeps its
 * meaning, and raises its error.
 */
bool
ClaimWaitLock(const LOCKTAG *locktag, int wait_ms)
{
	MemoryContext oldcontext = CurrentMemoryContext;
	ResourceOwner oldowner = CurrentResourceOwner;
	bool		use_timeout = (LockTimeout == 0 || wait_ms <= LockTimeout);
	ErrorData  *volatile edata = NULL;

	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(oldcontext);

	PG_TRY();
	{
		if (use_timeout)
			wait_with_timeout(locktag, wait_ms);
		else
			acquire_lock(locktag, false);
		ReleaseCurrentSubTransaction();
	}
	PG_CATCH();
	{
		MemoryContextSwitchTo(oldcontext);
		edata = CopyErrorData();
		FlushErrorState();
		RollbackAndReleaseCurrentSubTransaction();
	}
	PG_END_TRY();

	MemoryContextSwitchTo(oldcontext);
	CurrentResourceOwner = oldowner;

	if (edata == NULL)
		return true;
	if (!use_timeout || edata->sqlerrcode != ERRCODE_LOCK_NOT_AVAILABLE)
		ReThrowError(edata);
	FreeErrorData(edata);
	return false;
}

/*
 * Give back a lock that was got in the current (sub)transaction.
 */
void
ClaimUnlock(const LOCKTAG *locktag)
{
	ResourceOwner oldowner = CurrentResourceOwner;

	CurrentResourceOwner = CurTransactionResourceOwner;
	LockRelease(locktag, ExclusiveLock, false);
	CurrentResourceOwner = oldowner;
}

/*
 * Note that this (sub)transaction has a claim, whose lock it just got.
 */
Claim *
ClaimAdd(const Scope *scope, const ClaimFacts *facts)
{
	Claim	   *claim;

	claim = MemoryContextAlloc(TopTransactionContext,
							   offsetof(Claim, name) +
							   SizeOfScopeName(&scope->name));
	claim->locktag = scope->locktag;
	claim->held_level = GetCurrentTransactionNestLevel();
	claim->ended_level = 0;
	claim->replaces = false;
	claim->takes_over = false;
	claim->created_at = facts->started_at;
	claim->ttl = 0;
	claim->error_ttl = 0;
	claim->facts = *facts;
	memcpy(&claim->name, &scope->name, SizeOfScopeName(&scope->name));
	claim->tracked = InFlightTrack(&claim->locktag, &claim->name,
								   &claim->facts);

	claim->metrics = NULL;
	if (MetricsEnabled())
		claim->metrics = MetricsFind(ScopeNameAction(&claim->name));
	MetricsHold(claim->metrics, 1);

	claim->next = claims;
	claims = claim;
	return claim;
}

/*
 * Find the claim that this transaction holds on a scope and has not ended.
 */
Claim *
ClaimFindHeld(const Scope *scope)
{
	for (Claim *claim = claims; claim != NULL; claim = claim->next)
	{
		if (claim->ended_level == 0 &&
			ScopeNameEquals(&claim->name, &scope->name))
			return claim;
	}
	return NULL;
}

/*
 * End a claim, and keep its lock to the end of the transaction.
 */
void
ClaimEnd(Claim *claim)
{
	claim->ended_level = GetCurrentTransactionNestLevel();
}

/*
 * End a claim and let the next one on the scope run at once.
 *
 * Inside a savepoint that the claim is older than, the lock is kept: if the
 * savepoint is rolled back, the claim is held again.
 */
void
ClaimForget(Claim *claim)
{
	Claim	  **link;

	if (claim->held_level != GetCurrentTransactionNestLevel())
	{
		ClaimEnd(claim);
		return;
	}

	for (link = &claims; *link != claim; link = &(*link)->next)
		 /* find what points to it */ ;
	*link = claim->next;

	untrack(claim);
	MetricsHold(claim->metrics, -1);
	ClaimUnlock(&claim->locktag);
	pfree(claim);
}

/*
 * Transaction callback
 */
static void
at_end_of_xact(XactEvent event, void *arg)
{
	/* almost every transaction of almost every server */
	if (claims == NULL)
		return;

	switch (event)
	{
		case XACT_EVENT_PRE_COMMIT:
		case XACT_EVENT_PRE_PREPARE:
			guard_commit();
			break;
		case XACT_EVENT_COMMIT:
		case XACT_EVENT_ABORT:
		case XACT_EVENT_PREPARE:
			forget_all(event);
			break;
		case XACT_EVENT_PARALLEL_PRE_COMMIT:
		case XACT_EVENT_PARALLEL_COMMIT:
		case XACT_EVENT_PARALLEL_ABORT:
			break;
	}
}

/*
 * Subtransaction callback
 */
static void
at_end_of_subxact(SubXactEvent event, SubTransactionId mySubid,
				  SubTransactionId parentSubid, void *arg)
{
	if (claims == NULL)
		return;

	if (event == SUBXACT_EVENT_COMMIT_SUB)
		commit_level(GetCurrentTransactionNestLevel());
	else if (event == SUBXACT_EVENT_ABORT_SUB)
		abort_level(GetCurrentTransactionNestLevel());
}

/*
 * Refuse to commit while a claim is held.
 *
 * The key may be named: it is the caller's own.
 */
static void
guard_commit(void)
{
	for (Claim *claim = claims; claim != NULL; claim = claim->next)
	{
		if (claim->ended_level != 0 || claim_is_leased(&claim->facts))
			continue;

		ereport(idempotency_commit_guard ? ERROR : WARNING,
				(errcode(ERRCODE_IDEMPOTENCY_NOT_FINISHED),
				 errmsg("transaction has a claim that was not finished"),
				 errdetail("The claim is on action \"%s\" with key \"%s\".",
						   TextDatumGetCString(ScopeNamePart(&claim->name,
															 SCOPE_ACTION)),
						   TextDatumGetCString(ScopeNamePart(&claim->name,
															 SCOPE_KEY))),
				 errhint("Call idempotency_finish or idempotency_release in the transaction that called idempotency_begin.")));
	}
}

/*
 * The transaction is over, and its memory and locks are about to go.
 */
static void
forget_all(XactEvent event)
{
	for (Claim *claim = claims; claim != NULL; claim = claim->next)
	{
		MetricsHold(claim->metrics, -1);
		if (!claim->tracked)
			continue;
		if (event == XACT_EVENT_PREPARE)
			InFlightPrepare(&claim->locktag);
		else
			InFlightForget(&claim->locktag);
	}
	claims = NULL;
}

/*
 * A savepoint was released: what it did is now its parent's.
 */
static void
commit_level(int level)
{
	for (Claim *claim = claims; claim != NULL; claim = claim->next)
	{
		if (claim->held_level == level)
			claim->held_level--;
		if (claim->ended_level == level)
			claim->ended_level--;
	}
}

/*
 * A savepoint was rolled back: undo what it did.
 */
static void
abort_level(int level)
{
	Claim	  **link = &claims;

	while (*link != NULL)
	{
		Claim	   *claim = *link;

		if (claim->held_level >= level)
		{
			*link = claim->next;
			untrack(claim);
			MetricsHold(claim->metrics, -1);
			pfree(claim);
			continue;
		}

		if (claim->ended_level >= level)
			claim->ended_level = 0;
		link = &claim->next;
	}
}

/*
 * Remove what shared memory says of a claim.
 *
 * The scope may have been begun, ended and begun again.  The claims share one
 * entry, which then goes back to the older one.
 */
static void
untrack(const Claim *claim)
{
	if (!claim->tracked)
		return;

	for (Claim *older = claim->next; older != NULL; older = older->next)
	{
		if (memcmp(&older->locktag, &claim->locktag, sizeof(LOCKTAG)) == 0)
		{
			older->tracked = InFlightTrack(&older->locktag, &older->name,
										   &older->facts);
			return;
		}
	}

	InFlightForget(&claim->locktag);
}

/*
 * Acquire the lock of a scope for the current (sub)transaction.
 */
static LockAcquireResult
acquire_lock(const LOCKTAG *locktag, bool dont_wait)
{
	ResourceOwner oldowner = CurrentResourceOwner;
	LockAcquireResult result;

	CurrentResourceOwner = CurTransactionResourceOwner;
	result = LockAcquire(locktag, ExclusiveLock, false, dont_wait);
	CurrentResourceOwner = oldowner;

	return result;
}

/*
 * Acquire the lock of a scope, or raise lock_not_available after wait_ms.
 */
static void
wait_with_timeout(const LOCKTAG *locktag, int wait_ms)
{
	int			nest_level = NewGUCNestLevel();
	char		value[16];

	snprintf(value, sizeof(value), "%d", wait_ms);
	(void) set_config_option("lock_timeout", value,
							 PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_SAVE, true, 0, false);
	acquire_lock(locktag, false);

	/* the time may have run out in the moment in which the lock was granted */
	CHECK_FOR_INTERRUPTS();

	AtEOXact_GUC(true, nest_level);
}
