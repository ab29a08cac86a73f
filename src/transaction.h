/*-------------------------------------------------------------------------
 *
 * transaction.h
 *	  What is to be done at the end of transactions and savepoints.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_TRANSACTION_H
#define IDEMPOTENCY_TRANSACTION_H

#include "postgres.h"

#include "access/xact.h"

/* Whose turn it is, in this order */
typedef enum AtEnd
{
	AT_END_CLAIMS,				/* claims leave shared memory, or are prepared, */
	AT_END_EVENTS,				/* what the transaction came to is counted, */
	AT_END_FLUSH,				/* what it flushed is not flushed again, */
	AT_END_CREATED,				/* the launcher is told, */
	AT_END_FORWARD,				/* it is forgotten what was sent elsewhere, */
	AT_END_WAKE,				/* and last, who waits for all that is woken */
	AT_END_COUNT
} AtEnd;

/* Called with XACT_EVENT_COMMIT, XACT_EVENT_ABORT or XACT_EVENT_PREPARE */
typedef void (*AtEndOfTransaction) (XactEvent event);

/* Called with SUBXACT_EVENT_COMMIT_SUB or SUBXACT_EVENT_ABORT_SUB */
typedef void (*AtEndOfSavepoint) (SubXactEvent event, int level);

extern void TransactionInit(void);
extern void TransactionAtEnd(AtEnd turn, AtEndOfTransaction transaction,
							 AtEndOfSavepoint savepoint);

#endif							/* IDEMPOTENCY_TRANSACTION_H */
