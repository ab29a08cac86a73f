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

#include "access/tupdesc.h"
#include "in_flight.h"
#include "store.h"

extern Datum ResultStarted(const ClaimFacts *facts, const Record *taken_over);
extern Datum ResultAnswer(const char *outcome, const Record *record);
extern Datum ResultMismatched(void);
extern Datum ResultInFlight(int64 retry_after);
extern Datum ResultNone(void);
extern void ResultCheckShape(TupleDesc desc, const Oid *types, int natts);

#endif							/* IDEMPOTENCY_RESULT_H */
