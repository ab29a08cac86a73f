/*-------------------------------------------------------------------------
 *
 * result.h
 *	  Rows of type idempotency_result.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_RESULT_H
#define IDEMPOTENCY_RESULT_H

#include "postgres.h"

#include "access/htup.h"
#include "access/tupdesc.h"
#include "claim/in_flight.h"
#include "fmgr.h"
#include "nodes/primnodes.h"
#include "store/store.h"

/* Columns of idempotency_result */
#define Natts_result				13

/* A row as its columns; a column is at [Anum - 1] */
typedef struct ResultRow
{
	Datum		values[Natts_result];
	bool		nulls[Natts_result];
} ResultRow;

extern void ResultStarted(ResultRow *row, const ClaimFacts *facts,
						  const Record *taken_over);
extern void ResultAnswer(ResultRow *row, const char *outcome,
						 const Record *record);
extern void ResultMismatched(ResultRow *row);
extern void ResultPending(ResultRow *row, const char *outcome, int retry_after,
						  int attempt, TimestampTz created_at,
						  const Record *record);
extern void ResultNone(ResultRow *row);
extern void ResultFromTuple(ResultRow *row, HeapTupleHeader header);
extern const char *ResultOutcome(const ResultRow *row);
extern bool ResultIsOf(const FuncExpr *call);
extern Expr *ResultCallInto(const FuncExpr *call, ResultRow *row);
extern Datum ResultGetDatum(ResultRow *row);
extern Datum ResultReturn(FunctionCallInfo fcinfo, ResultRow *row);
extern void ResultCheckShape(TupleDesc desc, const Oid *types, int natts);

#endif							/* IDEMPOTENCY_RESULT_H */
