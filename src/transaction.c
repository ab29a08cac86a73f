/*-------------------------------------------------------------------------
 *
 * transaction.c
 *	  What is to be done at the end of transactions and savepoints.
 *
 * The outcome is known then, and cannot be changed any more: whoever is called at
 * a commit must not fail.  (What may still refuse it is in claim/guard.c.)
 *
 * A transaction that is prepared is over for its backend.  No code of ours is run
 * when it is committed or rolled back later.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "transaction.h"

static void at_end_of_xact(XactEvent event, void *arg);
static void at_end_of_subxact(SubXactEvent event, SubTransactionId mySubid,
							  SubTransactionId parentSubid, void *arg);

static AtEndOfTransaction transaction_callbacks[AT_END_COUNT];
static AtEndOfSavepoint savepoint_callbacks[AT_END_COUNT];

/*
 * Hook into the end of transactions and savepoints.
 */
void
TransactionInit(void)
{
	RegisterXactCallback(at_end_of_xact, NULL);
	RegisterSubXactCallback(at_end_of_subxact, NULL);
}

/*
 * Register what is to be called when it is somebody's turn; either may be null.
 */
void
TransactionAtEnd(AtEnd turn, AtEndOfTransaction transaction,
				 AtEndOfSavepoint savepoint)
{
	transaction_callbacks[turn] = transaction;
	savepoint_callbacks[turn] = savepoint;
}

/*
 * Transaction callback
 */
static void
at_end_of_xact(XactEvent event, void *arg)
{
	if (event != XACT_EVENT_COMMIT && event != XACT_EVENT_ABORT &&
		event != XACT_EVENT_PREPARE)
		return;

	for (int i = 0; i < AT_END_COUNT; i++)
	{
		if (transaction_callbacks[i] != NULL)
			transaction_callbacks[i] (event);
	}
}

/*
 * Subtransaction callback
 */
static void
at_end_of_subxact(SubXactEvent event, SubTransactionId mySubid,
				  SubTransactionId parentSubid, void *arg)
{
	int			level = GetCurrentTransactionNestLevel();

	if (event != SUBXACT_EVENT_COMMIT_SUB && event != SUBXACT_EVENT_ABORT_SUB)
		return;

	for (int i = 0; i < AT_END_COUNT; i++)
	{
		if (savepoint_callbacks[i] != NULL)
			savepoint_callbacks[i] (event, level);
	}
}
