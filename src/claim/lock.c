/*-------------------------------------------------------------------------
 *
 * lock.c
 *	  The lock of a scope, which is what a transaction claim is to others.
 *
 * Owners.  The lock manager charges a lock to a resource owner, and during a
 * query that is the owner of its portal.  A later call in the same
 * transaction runs in another portal and could not release it, so locks are
 * always charged to the owner of the (sub)transaction; that is where they
 * would have ended up anyway.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "access/xact.h"
#include "claim/lock.h"
#include "miscadmin.h"
#include "storage/proc.h"
#include "utils/guc.h"
#include "utils/resowner.h"

static LockAcquireResult acquire_lock(const LOCKTAG *locktag, bool dont_wait);
static void wait_with_timeout(const LOCKTAG *locktag, int wait_ms);

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
