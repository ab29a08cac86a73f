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
#include "nodes/pg_list.h"
#include "observe/metrics_key.h"
#include "port/atomics.h"

/* The leases of an action; only a background worker counts them (watch.c) */
typedef struct LeaseCounts
{
	bool		valid;
	int			in_flight;
	int			stalled;
} LeaseCounts;

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
