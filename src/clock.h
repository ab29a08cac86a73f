/*-------------------------------------------------------------------------
 *
 * clock.h
 *	  The clock for deadlines.
 *
 * When something was begun, and when it expires, is a matter of the calendar,
 * and of GetCurrentTimestamp().  How long somebody waits is not: when an
 * administrator sets the clock back, nobody should wait for it to catch up.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_CLOCK_H
#define IDEMPOTENCY_CLOCK_H

#include "postgres.h"

#include "portability/instr_time.h"

/*
 * Microseconds since some moment that stays the same for this process, by a
 * clock that nobody sets.
 */
static inline int64
ClockMicros(void)
{
	instr_time	now;

	INSTR_TIME_SET_CURRENT(now);
	return (int64) INSTR_TIME_GET_MICROSEC(now);
}

/*
 * Milliseconds that are left until a deadline, rounded up; 0 when it is over.
 */
static inline long
ClockRestMillis(int64 deadline)
{
	int64		rest = deadline - ClockMicros();

	return rest > 0 ? (long) ((rest + 999) / 1000) : 0;
}

#endif							/* IDEMPOTENCY_CLOCK_H */
