/*-------------------------------------------------------------------------
 *
 * histogram.h
 *	  Histograms of times.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_HISTOGRAM_H
#define IDEMPOTENCY_HISTOGRAM_H

#include "postgres.h"

#define HISTOGRAM_BUCKETS	128

extern int	HistogramBucket(int64 usecs);
extern double HistogramPercentile(const uint64 *counts, double fraction);
extern Datum HistogramToArray(const uint64 *counts);

#endif							/* IDEMPOTENCY_HISTOGRAM_H */
