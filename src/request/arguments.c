/*-------------------------------------------------------------------------
 *
 * arguments.c
 *	  What the calls of an application have in common.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "access/detoast.h"
#include "access/xact.h"
#include "miscadmin.h"
#include "request/arguments.h"
#include "settings.h"
#include "utils/timestamp.h"

static bool is_lifetime(int64 usecs, int64 least);
static void refuse_argument(const char *what, const char *least);
static void refuse_setting(const char *name, int secs, const char *limit);

/*
 * Refuse to begin or finish what could not be written.
 */
void
CallNeedsReadWrite(const char *function)
{
	if (XactReadOnly)
		ereport(ERROR,
				(errcode(ERRCODE_READ_ONLY_SQL_TRANSACTION),
				 errmsg("cannot execute %s in a read-only transaction", function),
				 errhint("Use idempotency_replay to get an answer that is stored already.")));

	PreventCommandIfParallelMode(function);
}

/*
 * How long a completed answer is to be kept, in microseconds: by the argument,
 * an interval, or else by the setting.
 *
 * Errors: 22023 for one that is not from min_ttl to max_ttl.
 */
int64
CallReadTtl(const NullableDatum *argument)
{
	int64		min_ttl = (int64) idempotency_min_ttl * USECS_PER_SEC;
	int64		ttl = (int64) idempotency_ttl * USECS_PER_SEC;

	if (!argument->isnull)
	{
		ttl = CallIntervalToUsecs(DatumGetIntervalP(argument->value));
		if (!is_lifetime(ttl, min_ttl))
			refuse_argument("ttl",
							psprintf("%d s, which is \"idempotency.min_ttl\",",
									 idempotency_min_ttl));
	}
	else if (!is_lifetime(ttl, min_ttl))
		refuse_setting("idempotency.ttl", idempotency_ttl,
					   ttl < min_ttl ? "least" : "most");
	return ttl;
}

/*
 * The same for a final error, which may be kept for as little as a second.
 */
int64
CallReadErrorTtl(const NullableDatum *argument)
{
	int64		ttl = (int64) idempotency_error_ttl * USECS_PER_SEC;

	if (!argument->isnull)
	{
		ttl = CallIntervalToUsecs(DatumGetIntervalP(argument->value));
		if (!is_lifetime(ttl, USECS_PER_SEC))
			refuse_argument("ttl", "1 s");
	}
	else if (!is_lifetime(ttl, USECS_PER_SEC))
		refuse_setting("idempotency.error_ttl", idempotency_error_ttl, "most");
	return ttl;
}

/*
 * The length of a lease in microseconds: by the argument, or else by the
 * setting.
 *
 * Errors: 22023 for one that is not from 1 ms to max_ttl.
 */
int64
CallReadLease(const NullableDatum *argument)
{
	int64		lease = (int64) idempotency_lease * 1000;

	if (!argument->isnull)
	{
		lease = CallIntervalToUsecs(DatumGetIntervalP(argument->value));
		if (!is_lifetime(lease, 1000))
			refuse_argument("lease", "1 ms");
	}
	else if (!is_lifetime(lease, 1000))
		refuse_setting("idempotency.lease", idempotency_lease / 1000, "most");
	return lease;
}

/*
 * The wait of a call in milliseconds: by the argument, or else by the setting.
 *
 * Errors: 22023 for one that is not from 0 to an hour.
 */
int
CallReadWait(const NullableDatum *argument)
{
	int64		wait;

	if (argument->isnull)
		return idempotency_wait;

	wait = CallIntervalToUsecs(DatumGetIntervalP(argument->value));
	if (wait < 0 || wait > (int64) MAX_WAIT_MS * 1000)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("wait is out of range"),
				 errdetail("It must be from 0 s to %d s.", MAX_WAIT_MS / 1000)));

	/* less than a millisecond is still a wait */
	return (int) ((wait + 999) / 1000);
}

/*
 * The size of a value that is to be stored, in bytes.
 */
Size
CallGetSize(const NullableDatum *argument)
{
	if (argument->isnull)
		return 0;
	return toast_raw_datum_size(argument->value) - VARHDRSZ;
}

/*
 * Refuse what is too large to be kept.
 */
void
CallCheckSize(const char *what, Size size)
{
	if (size > (Size) idempotency_max_response_size)
		ereport(ERROR,
				(errcode(ERRCODE_IDEMPOTENCY_TOO_LARGE),
				 errmsg("%s is too large to be stored", what),
				 errdetail("Its size in bytes is %zu, and \"idempotency.max_response_size\" is %d.",
						   size, idempotency_max_response_size),
				 errhint("Store a reference to it instead.")));
}

/*
 * An interval in microseconds, with days of 24 hours and months of 30 days;
 * what does not fit is beyond any bound, and PG_INT64_MAX or PG_INT64_MIN.
 */
int64
CallIntervalToUsecs(const Interval *interval)
{
	double		usecs = (double) interval->time +
		(double) interval->day * USECS_PER_DAY +
		(double) interval->month * DAYS_PER_MONTH * USECS_PER_DAY;

	if (usecs >= 9.0e18)
		return PG_INT64_MAX;
	if (usecs <= -9.0e18)
		return PG_INT64_MIN;
	return interval->time + interval->day * USECS_PER_DAY +
		interval->month * (int64) DAYS_PER_MONTH * USECS_PER_DAY;
}

/*
 * Whether a lifetime, in microseconds, is from a least one to max_ttl.
 */
static bool
is_lifetime(int64 usecs, int64 least)
{
	return usecs >= least &&
		usecs <= (int64) idempotency_max_ttl * USECS_PER_SEC;
}

/*
 * Refuse a lifetime that a call asks for; "least" says how short it can be.
 */
static void
refuse_argument(const char *what, const char *least)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("%s is out of range", what),
			 errdetail("It must be from %s to %d s, which is \"idempotency.max_ttl\".",
					   least, idempotency_max_ttl)));
}

/*
 * Refuse a lifetime that a setting has, because it comes from the configuration
 * file, or a bound was changed after it was set.
 */
static void
refuse_setting(const char *name, int secs, const char *limit)
{
	bool		too_short = strcmp(limit, "least") == 0;

	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("invalid value for parameter \"%s\": %d s", name, secs),
			 errdetail("The value must be at %s \"%s\", %d s.", limit,
					   too_short ? "idempotency.min_ttl" : "idempotency.max_ttl",
					   too_short ? idempotency_min_ttl : idempotency_max_ttl)));
}
