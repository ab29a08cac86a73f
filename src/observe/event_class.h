/*-------------------------------------------------------------------------
 *
 * event_class.h
 *	  What can become of a request.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_EVENT_CLASS_H
#define IDEMPOTENCY_EVENT_CLASS_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "request/scope.h"

/* Classes of events, in the order in which their counters are shown */
typedef enum EventClass
{
	EVENT_STARTED,
	EVENT_REPLAYED,
	EVENT_IN_FLIGHT,
	EVENT_MISMATCHED,
	EVENT_EXPIRED,				/* a record was found whose time was over */
	EVENT_STALLED,				/* a lease has run out */
	EVENT_TAKEN_OVER,			/* a stalled lease, by who was started */
	EVENT_COMPLETED,
	EVENT_ERRORED,
	EVENT_RELEASED,
	EVENT_SWEPT
} EventClass;

#define EVENT_CLASSES	(EVENT_SWEPT + 1)

/* One event, about one request */
typedef struct Event
{
	EventClass	class;
	const ScopeName *name;
	int			attempt;		/* 0 when there is none */
	int			status;			/* HTTP status, 0 when there is none */
	TimestampTz since;			/* when what took a while began, 0 for nothing */
} Event;

extern const char *EventClassName(EventClass class);

#endif							/* IDEMPOTENCY_EVENT_CLASS_H */
