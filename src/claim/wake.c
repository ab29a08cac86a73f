/*-------------------------------------------------------------------------
 *
 * wake.c
 *	  Waiting for a lease to end, and waking those who do.
 *
 * Nobody holds a lock for as long as a lease lasts, so a repeat that waits for
 * a leased claim has no lock to queue for.  It sleeps on a condition variable
 * in shared memory, and a transaction that has finished or released the claim
 * signals it when it is over, that is when its change can be seen.  So does one
 * that was aborted, or only made a checkpoint: who wanted to take the claim
 * over may have found the row locked by it.
 *
 * There are NUM_CHANNELS variables, chosen by the hash of the scope.  Being
 * woken means no more than that it is time to look again, so it does no harm
 * that several scopes share one.  Nobody signals when a claim ends in other
 * ways (COMMIT PREPARED runs no code of ours, an administrator may delete the
 * row), hence nobody sleeps longer than MAX_SLEEP_MS at a time.
 *
 * Without shared memory, that is when the library is not preloaded, a waiter
 * has nothing to be woken by, and looks again every POLL_MS.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "access/xact.h"
#include "claim/wake.h"
#include "common/hashfn.h"
#include "miscadmin.h"
#include "shared_memory.h"
#include "storage/condition_variable.h"
#include "storage/latch.h"
#include "storage/shmem.h"
#include "transaction.h"
#include "utils/wait_event.h"

#define NUM_CHANNELS	64
#define MAX_SLEEP_MS	1000
#define POLL_MS			50

static Size get_size(void);
static void start_up(void);
static int	get_channel(const Scope *scope);
static void at_end_of_xact(XactEvent event);

/* in shared memory, null unless the library is preloaded */
static ConditionVariable *channels = NULL;

/* channels to signal at the end of this transaction, a bit each */
static uint64 pending = 0;

/*
 * Ask for shared memory, and hook into the end of transactions.
 */
void
WakeInit(void)
{
	static const SharedMemoryUser user = {
		.get_size = get_size,
		.start_up = start_up
	};

	SharedMemoryRegister(&user);
	TransactionAtEnd(AT_END_WAKE, at_end_of_xact, NULL);
}

/*
 * Wake those who wait for the claim on a scope when this transaction is over.
 */
void
WakeAtEnd(const Scope *scope)
{
	pending |= UINT64CONST(1) << get_channel(scope);
}

/*
 * Get ready to sleep: what happens from now on wakes us.
 *
 * So the caller has to look once more before it goes to sleep.
 */
void
WakePrepare(const Scope *scope)
{
	if (channels != NULL)
		ConditionVariablePrepareToSleep(&channels[get_channel(scope)]);
}

/*
 * Sleep until it is time to look again, at most timeout_ms milliseconds.
 */
void
WakeSleep(const Scope *scope, int timeout_ms)
{
	if (channels != NULL)
	{
		ConditionVariableTimedSleep(&channels[get_channel(scope)],
									Min(timeout_ms, MAX_SLEEP_MS),
									PG_WAIT_EXTENSION);
		return;
	}

	(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
					 Min(timeout_ms, POLL_MS), PG_WAIT_EXTENSION);
	ResetLatch(MyLatch);
	CHECK_FOR_INTERRUPTS();
}

/*
 * The caller waits no longer.
 */
void
WakeDone(void)
{
	if (channels != NULL)
		ConditionVariableCancelSleep();
}

static Size
get_size(void)
{
	return MAXALIGN(NUM_CHANNELS * sizeof(ConditionVariable));
}

/*
 * Make the variables, or attach to them in a new process.
 */
static void
start_up(void)
{
	bool		found;

	channels = ShmemInitStruct("idempotency wake",
							   NUM_CHANNELS * sizeof(ConditionVariable),
							   &found);
	for (int i = 0; !found && i < NUM_CHANNELS; i++)
		ConditionVariableInit(&channels[i]);
}

/*
 * The channel of a scope.
 */
static int
get_channel(const Scope *scope)
{
	return hash_bytes(scope->name.data, scope->name.len) % NUM_CHANNELS;
}

/*
 * Transaction callback: what this transaction did can be seen now, or never
 * will be.
 */
static void
at_end_of_xact(XactEvent event)
{
	if (pending == 0)
		return;

	if (event == XACT_EVENT_COMMIT || event == XACT_EVENT_ABORT)
	{
		for (int i = 0; channels != NULL && i < NUM_CHANNELS; i++)
		{
			if (pending & (UINT64CONST(1) << i))
				ConditionVariableBroadcast(&channels[i]);
		}
	}
	pending = 0;
}
