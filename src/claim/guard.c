/*-------------------------------------------------------------------------
 *
 * guard.c
 *	  Coming first when a transaction is about to commit.
 *
 * Whether a transaction may commit with the claims that it holds is decided by
 * claim.c; here is when that is asked.  Where the transaction has done work on
 * other servers, somebody else's callback commits it there, at the same event as
 * ours: postgres_fdw, for one.  If that came first, and ours then refused, the
 * work there would stay, and each repeat would do it again.
 *
 * The server calls such callbacks in the order in which they were registered, the
 * last one first, and others register theirs when they like: when they are
 * loaded, or, like postgres_fdw, at the first use of a connection.  So ours is
 * registered again when there is something to guard, which puts it before all
 * that was there, and then whenever anybody may have been added: at the end of
 * each statement, whether the executor runs it or it is a utility command, COMMIT
 * among them.  What is run by a trigger at the end of the transaction, or by
 * closing a portal, are statements too, and come before the callbacks.
 *
 * This is only for the question.  What is to be done when the outcome is known
 * has its turn in transaction.c.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "access/xact.h"
#include "claim/guard.h"
#include "executor/executor.h"
#include "tcop/utility.h"

static void at_end_of_xact(XactEvent event, void *arg);
static void end_executor(QueryDesc *query);
static void run_utility(PlannedStmt *statement, const char *query,
						bool read_only_tree, ProcessUtilityContext context,
						ParamListInfo params, QueryEnvironment *environment,
						DestReceiver *dest, QueryCompletion *completion);
static void come_first(void);

static ExecutorEnd_hook_type previous_executor_end_hook = NULL;
static ProcessUtility_hook_type previous_process_utility_hook = NULL;

/* what to ask before a commit, one after the other */
static GuardCheck check_commit;
static GuardCheck check_next;

/* claims of this transaction that have to be guarded */
static int	guarded = 0;

/* whether the callbacks of this transaction are being called */
static bool committing = false;

/* told apart by its argument, our callback can be registered before it goes */
static bool registrations[2];
static int	registered = 0;

/*
 * Hook into the end of transactions and statements.
 */
void
GuardInit(GuardCheck check)
{
	check_commit = check;
	RegisterXactCallback(at_end_of_xact, &registrations[registered]);

	previous_executor_end_hook = ExecutorEnd_hook;
	ExecutorEnd_hook = end_executor;
	previous_process_utility_hook = ProcessUtility_hook;
	ProcessUtility_hook = run_utility;
}

/*
 * Ask something else as well, when the first question is answered.
 */
void
GuardAlso(GuardCheck check)
{
	check_next = check;
}

/*
 * There are so many claims more, or less, to be guarded in this transaction.
 */
void
GuardCount(int change)
{
	guarded += change;
	if (change > 0)
		come_first();
}

/*
 * Transaction callback
 *
 * Errors: those of the check.
 */
static void
at_end_of_xact(XactEvent event, void *arg)
{
	if (event == XACT_EVENT_PRE_COMMIT || event == XACT_EVENT_PRE_PREPARE)
	{
		committing = true;
		if (guarded > 0)
		{
			check_commit();
			check_next();
		}
	}
	else
	{
		committing = false;
		guarded = 0;
	}
}

/*
 * ExecutorEnd hook
 */
static void
end_executor(QueryDesc *query)
{
	if (previous_executor_end_hook)
		previous_executor_end_hook(query);
	else
		standard_ExecutorEnd(query);

	if (guarded > 0)
		come_first();
}

/*
 * ProcessUtility hook
 */
static void
run_utility(PlannedStmt *statement, const char *query, bool read_only_tree,
			ProcessUtilityContext context, ParamListInfo params,
			QueryEnvironment *environment, DestReceiver *dest,
			QueryCompletion *completion)
{
	if (previous_process_utility_hook)
		previous_process_utility_hook(statement, query, read_only_tree, context,
									  params, environment, dest, completion);
	else
		standard_ProcessUtility(statement, query, read_only_tree, context,
								params, environment, dest, completion);

	if (guarded > 0)
		come_first();
}

/*
 * Be called before all that is registered now.
 *
 * While the callbacks are being called, it is too late to change their order.
 * If there is no memory for the new registration, the old one is still there.
 */
static void
come_first(void)
{
	int			next = 1 - registered;

	if (committing)
		return;

	RegisterXactCallback(at_end_of_xact, &registrations[next]);
	UnregisterXactCallback(at_end_of_xact, &registrations[registered]);
	registered = next;
}
