/*-------------------------------------------------------------------------
 *
 * run.h
 *	  The two halves of run, for a handler that is called on another node.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_RUN_H
#define IDEMPOTENCY_RUN_H

#include "postgres.h"

#include "call/result.h"
#include "fmgr.h"

/* Names by which they are sent */
#define RUN_BEGIN		"begin of idempotency_run"
#define RUN_TRY_BEGIN	"begin of idempotency_try_run"
#define RUN_FINISH		"finish of idempotency_run"

#define RUN_ARGUMENTS			8
#define RUN_ANSWER_ARGUMENTS	9

extern const Oid RunTypes[RUN_ARGUMENTS];
extern const Oid RunAnswerTypes[RUN_ANSWER_ARGUMENTS];

extern void RunBegin(FunctionCallInfo fcinfo, bool raise, ResultRow *row);
extern void RunFinish(FunctionCallInfo fcinfo, ResultRow *row);

#endif							/* IDEMPOTENCY_RUN_H */
