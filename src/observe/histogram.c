/*-------------------------------------------------------------------------
 *
 * histogram.c
 *	  Histograms of times.
 *
 * A histogram counts times in buckets that are spaced by their logarithm: four
 * to each power of two of microseconds.  So a bucket is at most a quarter as
 * wide as the times in it, and 128 of them reach from a microsecond to more
 * than two hours.  Whatever takes longer is counted in the last one.
 *
 *		bucket		0	1	2	3	4	5	6	7	8	9	10	11	12	...
 *		from (us)	0	1	2	3	4	5	6	7	8	10	12	14	16	...
 *
 * Stored, a histogram is an array of counts whose subscripts are the numbers
 * of the buckets, without the empty ones at both ends.  Times of one action
 * are mostly alike, so that few elements are left.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include <math.h>

#include "catalog/pg_type_d.h"
#include "fmgr.h"
#include "observe/histogram.h"
#include "port/pg_bitutils.h"
#include "utils/array.h"

#define BUCKETS_PER_POWER	4

static double get_lower_bound(int bucket);
static uint64 get_total(const uint64 *counts);
static void read_histogram(ArrayType *array, uint64 *counts);
static void refuse_histogram(const char *detail);

PG_FUNCTION_INFO_V1(idempotency_histogram_add);
PG_FUNCTION_INFO_V1(idempotency_percentile);

/*
 * The bucket of a time.
 */
int
HistogramBucket(int64 usecs)
{
	int			power;
	int			bucket;

	/* a clock that was set back is no reason to lose a count */
	if (usecs < BUCKETS_PER_POWER)
		return (int) Max(usecs, 0);

	power = pg_leftmost_one_pos64((uint64) usecs);
	bucket = (power - 1) * BUCKETS_PER_POWER +
		(int) ((usecs >> (power - 2)) % BUCKETS_PER_POWER);
	return Min(bucket, HISTOGRAM_BUCKETS - 1);
}

/*
 * The time that a fraction of all counted ones do not exceed, in milliseconds;
 * within its bucket by linear interpolation.  Not a number when nothing was
 * counted.
 */
double
HistogramPercentile(const uint64 *counts, double fraction)
{
	double		rest = fraction * get_total(counts);
	double		result = NAN;

	for (int i = 0; i < HISTOGRAM_BUCKETS; i++)
	{
		double		from = get_lower_bound(i);
		double		to = get_lower_bound(i + 1);

		if (counts[i] == 0)
			continue;

		result = from + (to - from) * Min(rest / counts[i], 1);
		rest -= counts[i];
		if (rest <= 0)
			break;
	}

	return result / 1000;
}

/*
 * A histogram as it is stored.
 */
Datum
HistogramToArray(const uint64 *counts)
{
	Datum		elements[HISTOGRAM_BUCKETS];
	int			first = 0;
	int			end = HISTOGRAM_BUCKETS;
	int			size;

	while (first < end && counts[first] == 0)
		first++;
	while (end > first && counts[end - 1] == 0)
		end--;
	size = end - first;
	if (size == 0)
		return PointerGetDatum(construct_empty_array(INT8OID));

	for (int i = 0; i < size; i++)
		elements[i] = Int64GetDatum((int64) counts[first + i]);
	return PointerGetDatum(construct_md_array(elements, NULL, 1, &size, &first,
											  INT8OID, sizeof(int64),
											  FLOAT8PASSBYVAL, TYPALIGN_DOUBLE));
}

/*
 * idempotency_histogram_add(bigint[], bigint[]) returns bigint[]
 *
 * Add two histograms.
 *
 * Errors: 22023 for an array that is no histogram, 22003 for counts that are
 * too large.
 */
Datum
idempotency_histogram_add(PG_FUNCTION_ARGS)
{
	uint64		a[HISTOGRAM_BUCKETS];
	uint64		b[HISTOGRAM_BUCKETS];

	read_histogram(PG_GETARG_ARRAYTYPE_P(0), a);
	read_histogram(PG_GETARG_ARRAYTYPE_P(1), b);

	for (int i = 0; i < HISTOGRAM_BUCKETS; i++)
	{
		a[i] += b[i];
		if (a[i] > PG_INT64_MAX)
			ereport(ERROR,
					(errcode(ERRCODE_NUMERIC_VALUE_OUT_OF_RANGE),
					 errmsg("bigint out of range")));
	}

	return HistogramToArray(a);
}

/*
 * idempotency_percentile(histogram bigint[], fraction float8) returns float8
 *
 * The time that a fraction of the counted ones do not exceed, in milliseconds;
 * null when nothing was counted.
 *
 * Errors: 22023 for an array that is no histogram, or a fraction that is not
 * from 0 to 1.
 */
Datum
idempotency_percentile(PG_FUNCTION_ARGS)
{
	uint64		counts[HISTOGRAM_BUCKETS];
	double		fraction = PG_GETARG_FLOAT8(1);

	read_histogram(PG_GETARG_ARRAYTYPE_P(0), counts);
	if (!(fraction >= 0 && fraction <= 1))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("fraction is out of range"),
				 errdetail("It must be from 0 to 1.")));

	if (get_total(counts) == 0)
		PG_RETURN_NULL();
	PG_RETURN_FLOAT8(HistogramPercentile(counts, fraction));
}

/*
 * The least time that is counted in a bucket, in microseconds.
 */
static double
get_lower_bound(int bucket)
{
	if (bucket < BUCKETS_PER_POWER)
		return bucket;
	return ldexp(BUCKETS_PER_POWER + bucket % BUCKETS_PER_POWER,
				 bucket / BUCKETS_PER_POWER - 1);
}

static uint64
get_total(const uint64 *counts)
{
	uint64		total = 0;

	for (int i = 0; i < HISTOGRAM_BUCKETS; i++)
		total += counts[i];
	return total;
}

/*
 * Read a histogram that is stored as an array, and may be anybody's.
 */
static void
read_histogram(ArrayType *array, uint64 *counts)
{
	Datum	   *elements;
	int			first;
	int			size;

	memset(counts, 0, HISTOGRAM_BUCKETS * sizeof(uint64));
	if (ARR_NDIM(array) == 0)
		return;
	if (ARR_NDIM(array) != 1 || array_contains_nulls(array))
		refuse_histogram("It must have one dimension, and no nulls.");

	first = ARR_LBOUND(array)[0];
	deconstruct_array(array, INT8OID, sizeof(int64), FLOAT8PASSBYVAL,
					  TYPALIGN_DOUBLE, &elements, NULL, &size);
	if (first < 0 || size > HISTOGRAM_BUCKETS - first)
		refuse_histogram("Its subscripts must be numbers of buckets, from 0 to 127.");

	for (int i = 0; i < size; i++)
	{
		int64		count = DatumGetInt64(elements[i]);

		if (count < 0)
			refuse_histogram("Its elements must not be negative.");
		counts[first + i] = (uint64) count;
	}
}

static void
refuse_histogram(const char *detail)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("array is not a histogram"),
			 errdetail_internal("%s", detail)));
}
