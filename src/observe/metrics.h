/*-------------------------------------------------------------------------
 *
 * metrics.h
 *	  What became of requests, counted in shared memory.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_METRICS_H
#define IDEMPOTENCY_METRICS_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "event.h"
#include "histogram.h"
#include "nodes/pg_list.h"
#include "port/atomics.h"
#include "scope.h"

/* The values that are counted for an action, by their place in an array */
enum
{
	/* before these, a counter for each class of events */
	METRIC_RUN_TIME = EVENT_CLASSES,	/* sum, microseconds */
	METRIC_LOOKUP_TIME,			/* the same */
	METRIC_RUN_TIME_HISTOGRAM,
	METRIC_LOOKUP_TIME_HISTOGRAM = METRIC_RUN_TIME_HISTOGRAM + HISTOGRAM_BUCKETS,
	METRIC_VALUES = METRIC_LOOKUP_TIME_HISTOGRAM + HISTOGRAM_BUCKETS
};

/* The leases of an action; only a background worker counts them (watch.c) */
typedef struct LeaseCounts
{
	bool		valid;
	int			in_flight;
	int			stalled;
} LeaseCounts;

/* What the metrics of an action are found by */
typedef struct MetricsKey
{
	Oid			database;
	unsigned char action[SCOPE_PART_MAX + 1];	/* behind a byte with its
												 * length, then zeros; empty
												 * for all actions that found
												 * no room */
} MetricsKey;

/* The metrics of an action, in shared memory */
typedef struct ActionMetrics
{
	MetricsKey	key;			/* hash key */
	pg_atomic_uint32 held;		/* claims that transactions hold now */
	LeaseCounts leases;			/* as of the last look */
	LeaseCounts leases_so_far;	/* of a look that is under way */
	TimestampTz reported;		/* leases that ran out until then were */
	pg_atomic_uint64 values[METRIC_VALUES];
	uint64		flushed[METRIC_VALUES]; /* of these, what is in the table of
										 * metrics; belongs to who has that
										 * locked for a flush */
} ActionMetrics;

extern void MetricsInit(void);
extern bool MetricsEnabled(void);
extern ActionMetrics *MetricsFind(const unsigned char *action);
extern void MetricsCount(ActionMetrics *metrics, EventClass class, uint64 count);
extern void MetricsTime(ActionMetrics *metrics, int sum, int histogram,
						int64 usecs);
extern void MetricsHold(ActionMetrics *metrics, int change);
extern bool MetricsMayBeHeld(ActionMetrics *metrics);
extern void MetricsForgetLeases(void);
extern void MetricsCountLease(ActionMetrics *metrics, bool stalled);
extern void MetricsPublishLeases(TimestampTz until);
extern List *MetricsList(void);
extern void MetricsRead(ActionMetrics *metrics, uint64 *values);
extern List *MetricsDatabases(void);
extern void MetricsForget(Oid database);

#endif							/* IDEMPOTENCY_METRICS_H */
