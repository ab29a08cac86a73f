/*-------------------------------------------------------------------------
 *
 * call.c
 *	  What the calls of an application have in common.
 *
 *-------------------------------------------------------------------------
 */
#include "idempotency.h"

#include "access/xact.h"
#include "call.h"
#include "miscadmin.h"
#include "utils/timestamp.h"

static int64 setting_to_usecs(const char *name, int secs);

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
		return setting_to_usecs("idempotency.ttl", idempotency_ttl);

	ttl = CallIntervalToUsecs(PG_GETARG_INTERVAL_P(argument));
	if (ttl < (int64) MIN_TTL_SECS * USECS_PER_SEC ||
		ttl > (int64) idempotency_max_ttl * USECS_PER_SEC)
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
	return setting_to_usecs("idempotency.error_ttl", idempotency_error_ttl);
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
 * A setting of a lifetime in microseconds.
 *
 * It can be above max_ttl when it comes from the configuration file, or when
 * max_ttl was lowered after it was set.
 */
static int64
setting_to_usecs(const char *name, int secs)
{
	if (secs > idempotency_max_ttl)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("invalid value for parameter \"%s\": %d s", name, secs),
				 errdetail("The value must be at most \"idempotency.max_ttl\", %d s.",
						   idempotency_max_ttl)));
	return (int64) secs * USECS_PER_SEC;
}
