/*-------------------------------------------------------------------------
 *
 * log.h
 *	  Lines in the server's log about events.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_LOG_H
#define IDEMPOTENCY_LOG_H

#include "postgres.h"

#include "observe/event_class.h"
#include "utils/guc.h"

extern bool LogCheckEvents(char **newval, void **extra, GucSource source);
extern void LogAssignEvents(const char *newval, void *extra);
extern bool LogWants(EventClass class);
extern char *LogMakeDetail(const Event *event);
extern void LogWrite(EventClass class, const char *detail);
extern void LogWriteAtCommit(EventClass class, const char *detail);

#endif							/* IDEMPOTENCY_LOG_H */
