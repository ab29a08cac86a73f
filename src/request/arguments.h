/*-------------------------------------------------------------------------
 *
 * arguments.h
 *	  What the calls of an application have in common.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_ARGUMENTS_H
#define IDEMPOTENCY_ARGUMENTS_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "fmgr.h"

extern void CallNeedsReadWrite(const char *function);
extern int64 CallReadTtl(const NullableDatum *argument);
extern int64 CallReadErrorTtl(const NullableDatum *argument);
extern int64 CallReadLease(const NullableDatum *argument);
extern int	CallReadWait(const NullableDatum *argument);
extern Size CallGetSize(const NullableDatum *argument);
extern void CallCheckSize(const char *what, Size size);
extern int64 CallIntervalToUsecs(const Interval *interval);

#endif							/* IDEMPOTENCY_ARGUMENTS_H */
