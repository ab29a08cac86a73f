/*-------------------------------------------------------------------------
 *
 * event.c
 *	  What becomes of requests: to be counted, and to be logged.
 *
 * What a request is told is an event at once, because it was told, whatever
 * becomes of the transaction.  What a request comes to is one only when the
 * transaction commits.  Until then it waits in a list of this backend, where
 * it goes with the savepoint that it happened in.
 *
 * A transaction that is prepared has promised to commit, and no code of ours
 * runs when it does.  So its events count when it is prepared.
 *
 * What is written to the log for an event at commit is made up before, because
 * a transaction that has committed cannot fail any more.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "access/xact.h"
#include "lib/ilist.h"
#include "observe/event.h"
#include "observe/log.h"
#include "observe/metrics.h"
#include "transaction.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

/* So many events are looked at for one that another can be added to */
#define MAX_LOOKED	64

/* An event that waits for the commit */
typedef struct PendingEvent
{
	dlist_node	node;
	int			level;			/* (sub)transaction that it goes with */
	EventClass	class;
	ActionMetrics *metrics;		/* of its action, if anything is counted */
	uint64		count;			/* of events like this */
	int64		run_time;		/* microseconds, negative when not known */
	char	   *log;			/* detail of its line, null for no line */
} PendingEvent;

static ActionMetrics *find_metrics(Datum action);
static void add_pending(EventClass class, ActionMetrics *metrics, uint64 count,
						int64 run_time, char *log);
static void at_end_of_xact(XactEvent event);
static void at_end_of_savepoint(SubXactEvent event, int level);
static void commit_level(int level);
static void abort_level(int level);
static void commit_events(void);

/* events of this transaction, in TopTransactionContext */
static dlist_head pending = DLIST_STATIC_INIT(pending);

/*
 * Hook into the end of transactions.
 */
void
EventInit(void)
{
	TransactionAtEnd(AT_END_EVENTS, at_end_of_xact, at_end_of_savepoint);
}

/*
 * Something happened that no rollback undoes.
 */
void
EventHappened(const Event *event)
{
	if (MetricsEnabled())
		MetricsCount(MetricsFind(ScopeNameAction(event->name)), event->class, 1);
	if (LogWants(event->class))
		LogWrite(event->class, LogMakeDetail(event));
}

/*
 * Something happens if this transaction commits.
 */
void
EventAtCommit(const Event *event)
{
	ActionMetrics *metrics = NULL;
	char	   *log = NULL;

	if (MetricsEnabled())
		metrics = MetricsFind(ScopeNameAction(event->name));
	if (LogWants(event->class))
		log = MemoryContextStrdup(TopTransactionContext, LogMakeDetail(event));

	if (MetricsEnabled() || log != NULL)
		add_pending(event->class, metrics, 1,
					event->since == 0 ? -1 :
					Max(GetCurrentTimestamp() - event->since, 0), log);
}

/*
 * Count events of one class, which happened to requests of an action, a text.
 */
void
EventCount(EventClass class, Datum action, uint64 count)
{
	if (MetricsEnabled() && count > 0)
		MetricsCount(find_metrics(action), class, count);
}

/*
 * The same for events that happen if this transaction commits.
 */
void
EventCountAtCommit(EventClass class, Datum action, uint64 count)
{
	ActionMetrics *metrics;
	dlist_iter	iter;
	int			looked = 0;

	if (!MetricsEnabled() || count == 0)
		return;
	metrics = find_metrics(action);

	/* there are not many actions in the batch of a sweep */
	dlist_reverse_foreach(iter, &pending)
	{
		PendingEvent *event = dlist_container(PendingEvent, node, iter.cur);

		if (event->level < GetCurrentTransactionNestLevel() || looked++ == MAX_LOOKED)
			break;
		if (event->metrics == metrics && event->class == class &&
			event->run_time < 0 && event->log == NULL)
		{
			event->count += count;
			return;
		}
	}
	add_pending(class, metrics, count, -1, NULL);
}

/*
 * The metrics of an action that is given as a text.
 *
 * One that is too long is that of a row which did not come from these
 * functions, and counts among the others.
 */
static ActionMetrics *
find_metrics(Datum action)
{
	text	   *name = DatumGetTextPP(action);
	unsigned char packed[SCOPE_PART_MAX + 1] = {0};

	if (VARSIZE_ANY_EXHDR(name) <= SCOPE_PART_MAX)
	{
		packed[0] = (unsigned char) VARSIZE_ANY_EXHDR(name);
		memcpy(packed + 1, VARDATA_ANY(name), packed[0]);
	}
	return MetricsFind(packed);
}

static void
add_pending(EventClass class, ActionMetrics *metrics, uint64 count,
			int64 run_time, char *log)
{
	PendingEvent *event = MemoryContextAlloc(TopTransactionContext,
											 sizeof(PendingEvent));

	event->level = GetCurrentTransactionNestLevel();
	event->class = class;
	event->metrics = metrics;
	event->count = count;
	event->run_time = run_time;
	event->log = log;
	dlist_push_tail(&pending, &event->node);
}

/*
 * The end of a transaction
 */
static void
at_end_of_xact(XactEvent event)
{
	if (dlist_is_empty(&pending))
		return;

	if (event != XACT_EVENT_ABORT)
		commit_events();
	dlist_init(&pending);
}

/*
 * The end of a savepoint
 */
static void
at_end_of_savepoint(SubXactEvent event, int level)
{
	if (event == SUBXACT_EVENT_COMMIT_SUB)
		commit_level(level);
	else
		abort_level(level);
}

/*
 * A savepoint was released: what happened in it now goes with its parent.
 *
 * Its events are the last ones in the list.
 */
static void
commit_level(int level)
{
	dlist_iter	iter;

	dlist_reverse_foreach(iter, &pending)
	{
		PendingEvent *event = dlist_container(PendingEvent, node, iter.cur);

		if (event->level < level)
			break;
		event->level = level - 1;
	}
}

/*
 * A savepoint was rolled back, and what happened in it with it.
 */
static void
abort_level(int level)
{
	while (!dlist_is_empty(&pending))
	{
		PendingEvent *event = dlist_tail_element(PendingEvent, node, &pending);

		if (event->level < level)
			break;
		dlist_delete(&event->node);
		if (event->log != NULL)
			pfree(event->log);
		pfree(event);
	}
}

/*
 * The transaction has committed, and with it everything that waited for that.
 */
static void
commit_events(void)
{
	dlist_iter	iter;

	dlist_foreach(iter, &pending)
	{
		PendingEvent *event = dlist_container(PendingEvent, node, iter.cur);

		if (MetricsEnabled())
		{
			MetricsCount(event->metrics, event->class, event->count);
			if (event->run_time >= 0)
				MetricsTime(event->metrics, METRIC_RUN_TIME,
							METRIC_RUN_TIME_HISTOGRAM, event->run_time);
		}
		if (event->log != NULL)
			LogWriteAtCommit(event->class, event->log);
	}
}
