/*-------------------------------------------------------------------------
 *
 * metrics_key.h
 *	  What is counted, and for whom.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_METRICS_KEY_H
#define IDEMPOTENCY_METRICS_KEY_H

#include "postgres.h"

#include "observe/event_class.h"
#include "observe/histogram.h"

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

/* What the metrics of an action are found by */
typedef struct MetricsKey
{
	Oid			database;
	unsigned char action[SCOPE_PART_MAX + 1];	/* behind a byte with its
												 * length, then zeros; empty
												 * for all actions that found
												 * no room */
} MetricsKey;

#endif							/* IDEMPOTENCY_METRICS_KEY_H */
