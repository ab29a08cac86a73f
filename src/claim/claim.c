/*-------------------------------------------------------------------------
 *
 * claim.c
 *	  The claims of this transaction.
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
 * What the end of a savepoint costs.  Both levels are at most the current one,
 * and what is done now has that, so the levels in a list, latest first, never
 * grow towards its end.  The end of a savepoint therefore has to look only at
 * what happened in it: at the head of the list of all claims, in the order in
 * which they were begun, and at that of those ended, in the order in which they
 * were.
 *
 * Finding.  Nearly every transaction has one claim.  Where there are more than
 * MAX_UNINDEXED, they are found by an index in memory, so that a transaction
 * with a great many requests does not compare each with all.  A scope can have
 * several claims in a transaction, one begun after the other was ended; the
 * latest is what counts, and the others come back with a rollback.
 *
 * The guard.  A transaction that commits with a transaction claim that is still
 * held did work whose answer nobody will find, so that the next repeat would do
 * it again.  It is refused before it commits (guard.c says how that comes before
 * anything else).
 *
 * Claims elsewhere.  On a cluster, calls are sent to the node that has the records
 * of the tenant, and a claim is held by the transaction that this one has there
 * (call/forward.c).  Here it is in the list too, with all that goes for savepoints,
 * but without a lock, so that the guard refuses here before anything is committed
 * there.
 *
 * Leased claims.  One that this transaction began is in the list too, with its
 * lock: until the commit its record is not there for others.  The commit then
 * makes it the claim of whoever knows its id (see lease.c), and the guard has
 * nothing against that.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "access/xact.h"
#include "claim/claim.h"
#include "claim/guard.h"
#include "claim/in_flight.h"
#include "claim/lock.h"
#include "common/hashfn.h"
#include "observe/metrics.h"
#include "settings.h"
#include "transaction.h"
#include "utils/builtins.h"
#include "utils/memutils.h"

static Claim *add_claim(const Scope *scope, const ClaimFacts *facts, int place);
static void at_end_of_xact(XactEvent event);
static void at_end_of_savepoint(SubXactEvent event, int level);
static void commit_level(int level);
static void abort_level(int level);
static Claim *find_latest(const ScopeName *name);
static void index_claim(Claim *claim);
static void unindex_claim(Claim *claim);
static void remove_claim(Claim *claim);
static void untrack(const Claim *claim);
static void guard(const Claim *claim, int change);
static void refuse_unfinished(void);

/* An entry of the index: the latest claim on a scope */
typedef struct IndexedClaim
{
	const ScopeName *name;		/* of the claim */
	Claim	   *claim;
	uint32		hash;
	char		status;			/* for simplehash.h */
} IndexedClaim;

#define SH_PREFIX claimindex
#define SH_ELEMENT_TYPE IndexedClaim
#define SH_KEY_TYPE const ScopeName *
#define SH_KEY name
#define SH_HASH_KEY(tb, key) hash_bytes((key)->data, (key)->len)
#define SH_EQUAL(tb, a, b) ScopeNameEquals(a, b)
#define SH_STORE_HASH
#define SH_GET_HASH(tb, entry) (entry)->hash
#define SH_SCOPE static inline
#define SH_DECLARE
#define SH_DEFINE
#include "lib/simplehash.h"

static void insert_into_index(claimindex_hash *index, Claim *claim);

/* So many claims are found without an index */
#define MAX_UNINDEXED	16

/* the claims of this transaction, latest first, in TopTransactionContext */
static dlist_head claims = DLIST_STATIC_INIT(claims);
static int	claims_count = 0;

/* those that are ended, the one ended last first */
static dlist_head ended = DLIST_STATIC_INIT(ended);

/* the index, in the same context, or null */
static claimindex_hash *claims_index = NULL;

/*
 * Hook into the end of transactions.
 */
void
ClaimInit(void)
{
	GuardInit(refuse_unfinished);
	TransactionAtEnd(AT_END_CLAIMS, at_end_of_xact, at_end_of_savepoint);
}

/*
 * Note that this (sub)transaction has a claim, whose lock it just got.
 */
Claim *
ClaimAdd(const Scope *scope, const ClaimFacts *facts)
{
	Claim	   *claim = add_claim(scope, facts, CLAIM_HERE);

	claim->locktag = scope->locktag;
	claim->tracked = InFlightTrack(&claim->locktag, &claim->name,
								   &claim->facts);
	if (MetricsEnabled())
		claim->metrics = MetricsFind(ScopeNameAction(&claim->name));
	MetricsHold(claim->metrics, 1);
	return claim;
}

/*
 * Note that it has a transaction claim on another node of a cluster.
 */
void
ClaimAddElsewhere(const Scope *scope, int place)
{
	static const ClaimFacts facts = {.lease_expires_at = DT_NOEND};

	(void) add_claim(scope, &facts, place);
}

/*
 * Put a claim into the list.
 */
static Claim *
add_claim(const Scope *scope, const ClaimFacts *facts, int place)
{
	Claim	   *claim;

	claim = MemoryContextAlloc(TopTransactionContext,
							   offsetof(Claim, name) +
							   SizeOfScopeName(&scope->name));
	claim->place = place;
	claim->older = find_latest(&scope->name);
	claim->held_level = GetCurrentTransactionNestLevel();
	claim->ended_level = 0;
	claim->replaces = false;
	claim->takes_over = false;
	claim->created_at = facts->started_at;
	claim->ttl = 0;
	claim->facts = *facts;
	memcpy(&claim->name, &scope->name, SizeOfScopeName(&scope->name));
	claim->tracked = false;
	claim->metrics = NULL;

	dlist_push_head(&claims, &claim->node);
	claims_count++;
	guard(claim, 1);
	index_claim(claim);
	return claim;
}

/*
 * Find the claim that this transaction holds on a scope and has not ended.
 */
Claim *
ClaimFindHeld(const Scope *scope)
{
	Claim	   *claim = find_latest(&scope->name);

	/* only the latest can be held: it was begun when the others were ended */
	return claim != NULL && claim->ended_level == 0 ? claim : NULL;
}

/*
 * End a claim, and keep its lock to the end of the transaction.
 */
void
ClaimEnd(Claim *claim)
{
	Assert(claim->ended_level == 0);

	claim->ended_level = GetCurrentTransactionNestLevel();
	dlist_push_head(&ended, &claim->ended_node);
	guard(claim, -1);
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
	LOCKTAG		locktag = claim->locktag;

	if (claim->held_level != GetCurrentTransactionNestLevel())
	{
		ClaimEnd(claim);
		return;
	}

	remove_claim(claim);
	ClaimUnlock(&locktag);
}

/*
 * The end of a transaction: its memory and locks are about to go.
 */
static void
at_end_of_xact(XactEvent event)
{
	dlist_iter	iter;

	/* almost every transaction of almost every server */
	if (claims_count == 0)
		return;

	dlist_foreach(iter, &claims)
	{
		Claim	   *claim = dlist_container(Claim, node, iter.cur);

		MetricsHold(claim->metrics, -1);
		if (!claim->tracked)
			continue;
		if (event == XACT_EVENT_PREPARE)
			InFlightPrepare(&claim->locktag);
		else
			InFlightForget(&claim->locktag);
	}

	dlist_init(&claims);
	claims_count = 0;
	dlist_init(&ended);
	claims_index = NULL;
}

/*
 * The end of a savepoint
 */
static void
at_end_of_savepoint(SubXactEvent event, int level)
{
	if (claims_count == 0)
		return;

	if (event == SUBXACT_EVENT_COMMIT_SUB)
		commit_level(level);
	else
		abort_level(level);
}

/*
 * A savepoint was released: what it did is now its parent's.
 */
static void
commit_level(int level)
{
	dlist_iter	iter;

	dlist_foreach(iter, &claims)
	{
		Claim	   *claim = dlist_container(Claim, node, iter.cur);

		if (claim->held_level < level)
			break;
		claim->held_level--;
	}

	dlist_foreach(iter, &ended)
	{
		Claim	   *claim = dlist_container(Claim, ended_node, iter.cur);

		if (claim->ended_level < level)
			break;
		claim->ended_level--;
	}
}

/*
 * A savepoint was rolled back: undo what it did.
 */
static void
abort_level(int level)
{
	while (!dlist_is_empty(&claims))
	{
		Claim	   *claim = dlist_head_element(Claim, node, &claims);

		if (claim->held_level < level)
			break;
		remove_claim(claim);
	}

	while (!dlist_is_empty(&ended))
	{
		Claim	   *claim = dlist_head_element(Claim, ended_node, &ended);

		if (claim->ended_level < level)
			break;
		claim->ended_level = 0;
		dlist_delete(&claim->ended_node);
		guard(claim, 1);
	}
}

/*
 * Find the latest claim on a scope, ended or not.
 */
static Claim *
find_latest(const ScopeName *name)
{
	dlist_iter	iter;

	if (claims_index != NULL)
	{
		IndexedClaim *entry = claimindex_lookup(claims_index, name);

		return entry != NULL ? entry->claim : NULL;
	}

	dlist_foreach(iter, &claims)
	{
		Claim	   *claim = dlist_container(Claim, node, iter.cur);

		if (ScopeNameEquals(&claim->name, name))
			return claim;
	}
	return NULL;
}

/*
 * Put the latest claim on a scope into the index.  The index is made when there
 * are enough claims for it.
 *
 * There is none while it grows: if there is no memory for that, it is broken, and
 * the next claim has it made anew.
 */
static void
index_claim(Claim *claim)
{
	claimindex_hash *index = claims_index;
	dlist_iter	iter;

	claims_index = NULL;
	if (index != NULL)
		insert_into_index(index, claim);
	else if (claims_count > MAX_UNINDEXED)
	{
		index = claimindex_create(TopTransactionContext, claims_count, NULL);

		/* the oldest before the latest, which takes its place */
		dlist_reverse_foreach(iter, &claims)
			insert_into_index(index, dlist_container(Claim, node, iter.cur));
	}
	claims_index = index;
}

static void
insert_into_index(claimindex_hash *index, Claim *claim)
{
	bool		found;
	IndexedClaim *entry = claimindex_insert(index, &claim->name, &found);

	entry->name = &claim->name;
	entry->claim = claim;
}

/*
 * Take the latest claim on a scope from the index, so that the one before it is
 * the latest.  A rollback does this too, and must not fail, so it takes no memory.
 */
static void
unindex_claim(Claim *claim)
{
	IndexedClaim *entry;

	if (claims_index == NULL)
		return;

	if (claim->older == NULL)
	{
		claimindex_delete(claims_index, &claim->name);
		return;
	}

	entry = claimindex_lookup(claims_index, &claim->name);
	entry->name = &claim->older->name;
	entry->claim = claim->older;
}

/*
 * Remove the latest claim on a scope, whose lock is about to go.
 */
static void
remove_claim(Claim *claim)
{
	unindex_claim(claim);
	untrack(claim);
	MetricsHold(claim->metrics, -1);

	dlist_delete(&claim->node);
	claims_count--;
	if (claim->ended_level != 0)
		dlist_delete(&claim->ended_node);
	else
		guard(claim, -1);
	pfree(claim);
}

/*
 * Remove what shared memory says of a claim.
 *
 * The claims on one scope share one entry, which then goes back to the older
 * one: its end may have been rolled back too, and others are to tell a different
 * request from a repeat.
 */
static void
untrack(const Claim *claim)
{
	Claim	   *older = claim->older;

	if (claim->place != CLAIM_HERE)
		return;
	if (older != NULL)
		older->tracked = InFlightTrack(&older->locktag, &older->name,
									   &older->facts);
	else if (claim->tracked)
		InFlightForget(&claim->locktag);
}

/*
 * Have the guard know of a claim that is held (1), or is not any more (-1).  A
 * leased one may go on after the commit.
 */
static void
guard(const Claim *claim, int change)
{
	if (!claim_is_leased(&claim->facts))
		GuardCount(change);
}

/*
 * Refuse to commit with a claim that is held, or warn of it.
 *
 * The key may be named: it is the caller's own.  Errors: ID006.
 */
static void
refuse_unfinished(void)
{
	bool		dropped = !OidIsValid(get_extension_oid(EXTENSION_NAME, true));
	dlist_iter	iter;

	dlist_foreach(iter, &claims)
	{
		Claim	   *claim = dlist_container(Claim, node, iter.cur);

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
				 dropped ?
				 errhint("Drop extension \"%s\" in a transaction that has no claim.",
						 EXTENSION_NAME) :
				 errhint("Call idempotency_finish or idempotency_release in the transaction that called idempotency_begin.")));
	}
}
