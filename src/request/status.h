/*-------------------------------------------------------------------------
 *
 * status.h
 *	  What an HTTP status means for the record of a request.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_STATUS_H
#define IDEMPOTENCY_STATUS_H

#include "postgres.h"

#include "utils/guc.h"

#define STATUS_MIN	100
#define STATUS_MAX	599

typedef enum StatusClass
{
	STATUS_COMPLETED,			/* keep the answer for ttl */
	STATUS_ERRORED,				/* keep the answer for error_ttl */
	STATUS_RELEASED				/* keep nothing, a repeat may run */
} StatusClass;

extern bool StatusIsValid(const NullableDatum *status);
extern StatusClass StatusClassify(int status);
extern const char *StatusClassName(StatusClass class);
extern bool StatusCheckRetryable(char **newval, void **extra, GucSource source);
extern void StatusAssignRetryable(const char *newval, void *extra);

#endif							/* IDEMPOTENCY_STATUS_H */
