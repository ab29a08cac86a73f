/*-------------------------------------------------------------------------
 *
 * forward.h
 *	  Sending a call to the node of its tenant.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_FORWARD_H
#define IDEMPOTENCY_FORWARD_H

#include "postgres.h"

#include "call/result.h"
#include "fmgr.h"
#include "request/scope.h"

/* The settings of the session that travel with a call, as an array of texts */
#define FORWARD_SETTINGS	6

/*
 * Behind the settings come a backslash and a null, which are something else where a
 * node reads literals or arrays in another way than they were written.
 */
#define FORWARD_PROBES		2
#define FORWARD_PROBE		"\\"

extern const char *const ForwardSettings[FORWARD_SETTINGS];

extern void ForwardInit(void);
extern bool ForwardNeeded(const Scope *scope);
extern bool ForwardIsUnderWay(void);
extern void ForwardBegun(const Scope *scope);
extern void ForwardEnded(const Scope *scope);
extern char *ForwardCall(FunctionCallInfo fcinfo, const char *function,
						 const Scope *scope);
extern Datum ForwardRow(FunctionCallInfo fcinfo, const char *function,
						const Scope *scope);
extern char *ForwardArguments(const char *function, const Scope *scope,
							  int nargs, const Oid *types,
							  const NullableDatum *args);
extern void ForwardGetRow(const char *text, ResultRow *row);
extern Datum ForwardGetValue(const char *text, Oid type);
extern void ForwardUseStyles(void);

#endif							/* IDEMPOTENCY_FORWARD_H */
