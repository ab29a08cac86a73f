/*-------------------------------------------------------------------------
 *
 * call.c
 *	  What the calls of an application have in common.
 *
 *-------------------------------------------------------------------------
 */
#include "idempotency.h"

#include "access/detoast.h"
#include "access/xact.h"
#include "call.h"
#include "miscadmin.h"
#include "utils/timestamp.h"

static int64 check_setting(const char *name, int64 usecs);
static bool fits_max_ttl(int64 usecs);

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
 * How long a completed answer is to be kept, in microseconds: by the
 * argument, or else by the setting.
 */
int64
CallReadTtl(FunctionCallInfo fcinfo, int argument)
{
	int64		ttl;

	if (PG_ARGISNULL(argument))
		return check_setting("idempotency.ttl",
							 (int64) idempotency_ttl * USECS_PER_SEC);

	ttl = CallIntervalToUsecs(PG_GETARG_INTERVAL_P(argument));
	if (ttl < (int64) MIN_TTL_SECS * USECS_PER_SEC ||
		!fits_max_ttl(ttl))
		ereport(ERROR,
				(errcode(ERRCODE_IDEMPOTENCY_MALFORMED),
				 errmsg("ttl is out of range"),
				 errdetail("It must be from %d s to %d s, which is \"idempotency.max_ttl\".",
						   MIN_TTL_SECS, idempotency_max_ttl)));
	return ttl;
}

/*
 * How long a final error is to be kept, in microseconds.
 */
int64
CallReadErrorTtl(void)
{
	return check_setting("idempotency.error_ttl",
						 (int64) idempotency_error_ttl * USECS_PER_SEC);
}

/*
 * The length of a lease in microseconds: by the argument, or else by the
 * setting.
 */
int64
CallReadLease(FunctionCallInfo fcinfo, int argument)
{
	int64		lease;

	if (PG_ARGISNULL(argument))
		return check_setting("idempotency.lease",
							 (int64) idempotency_lease * 1000);

	lease = CallIntervalToUsecs(PG_GETARG_INTERVAL_P(argument));
	if (lease < 1000 || !fits_max_ttl(lease))
		ereport(ERROR,
				(errcode(ERRCODE_IDEMPOTENCY_MALFORMED),
				 errmsg("lease is out of range"),
				 errdetail("It must be from 1 ms to %d s, which is \"idempotency.max_ttl\".",
						   idempotency_max_ttl)));
	return lease;
}

/*
 * The wait of a call in milliseconds.
 */
int
CallReadWait(FunctionCallInfo fcinfo, int argument)
{
	int64		wait;

	if (PG_ARGISNULL(argument))
		return idempotency_wait;

	wait = CallIntervalToUsecs(PG_GETARG_INTERVAL_P(argument));
	if (wait < 0 || wait > (int64) MAX_WAIT_MS * 1000)
		ereport(ERROR,
				(errcode(ERRCODE_IDEMPOTENCY_MALFORMED),
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
 * Check the setting of a lifetime, in microseconds.
 *
 * It can be above max_ttl when it comes from the configuration file, or when
 * max_ttl was lowered after it was set.
 */
static int64
check_setting(const char *name, int64 usecs)
{
	if (!fits_max_ttl(usecs))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("invalid value for parameter \"%s\": %d s", name,
						(int) (usecs / USECS_PER_SEC)),
				 errdetail("The value must be at most \"idempotency.max_ttl\", %d s.",
						   idempotency_max_ttl)));
	return usecs;
}

static bool
fits_max_ttl(int64 usecs)
{
	return usecs <= (int64) idempotency_max_ttl * USECS_PER_SEC;
}
