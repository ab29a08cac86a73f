/*-------------------------------------------------------------------------
 *
 * claim.h
 *	  The claims of this transaction.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_CLAIM_H
#define IDEMPOTENCY_CLAIM_H

#include "postgres.h"

#include "claim/in_flight.h"
#include "datatype/timestamp.h"
#include "lib/ilist.h"
#include "request/scope.h"

/* The number of the node that holds a claim, unless it is this one */
#define CLAIM_HERE	(-1)

/* A claim that this transaction began */
typedef struct Claim
{
	dlist_node	node;			/* among all of them */
	dlist_node	ended_node;		/* among the ended ones, if it is one */
	int			place;			/* node of a cluster that it is held on */
	struct Claim *older;		/* begun before it, and ended, on the same scope */
	LOCKTAG		locktag;
	int			held_level;		/* (sub)transaction that it goes with */
	int			ended_level;	/* the one that ended it, 0 while it is held */
	bool		tracked;		/* has an entry in shared memory */
	struct ActionMetrics *metrics;	/* where it is counted, null for nowhere */
	bool		replaces;		/* there was an expired record */
	bool		takes_over;		/* there is the record of a lease, now ours */
	TimestampTz created_at;		/* begin of the first attempt */
	int64		ttl;			/* to keep a completed answer, microseconds */
	ClaimFacts	facts;
	ScopeName	name;			/* allocated as long as needed */
} Claim;

extern void ClaimInit(void);
extern Claim *ClaimAdd(const Scope *scope, const ClaimFacts *facts);
extern void ClaimAddElsewhere(const Scope *scope, int place);
extern Claim *ClaimFindHeld(const Scope *scope);
extern void ClaimEnd(Claim *claim);
extern void ClaimForget(Claim *claim);

#endif							/* IDEMPOTENCY_CLAIM_H */
