/*-------------------------------------------------------------------------
 *
 * event.h
 *	  What becomes of requests: to be counted, and to be logged.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_EVENT_H
#define IDEMPOTENCY_EVENT_H

#include "postgres.h"

#include "observe/event_class.h"

extern void EventInit(void);
extern void EventHappened(const Event *event);
extern void EventAtCommit(const Event *event);
extern void EventCount(EventClass class, Datum action, uint64 count);
extern void EventCountAtCommit(EventClass class, Datum action, uint64 count);

#endif							/* IDEMPOTENCY_EVENT_H */
