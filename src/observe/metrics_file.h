/*-------------------------------------------------------------------------
 *
 * metrics_file.h
 *	  Keeping counters over a restart of the server.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_METRICS_FILE_H
#define IDEMPOTENCY_METRICS_FILE_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "observe/metrics_key.h"

/* The metrics of an action as they are saved */
typedef struct SavedMetrics
{
	MetricsKey	key;
	uint64		values[METRIC_VALUES];
	uint64		flushed[METRIC_VALUES];
	TimestampTz reported;
} SavedMetrics;

/* Gets what is to be saved, allocated here, and since when it was counted */
typedef SavedMetrics *(*GetSavedMetrics) (int *count, TimestampTz *since);

/* Takes over what was saved */
typedef void (*PutSavedMetrics) (SavedMetrics *saved, int count,
								 TimestampTz since);

extern void MetricsFileInit(GetSavedMetrics get, PutSavedMetrics put);
extern void MetricsFileLoad(void);

#endif							/* IDEMPOTENCY_METRICS_FILE_H */
