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

#include "datatype/timestamp.h"
#include "store.h"

extern Datum ResultStarted(TimestampTz started_at);
extern Datum ResultReplayed(const Record *record);
extern Datum ResultMismatched(void);
extern Datum ResultInFlight(int64 retry_after);
extern Datum ResultNone(void);

#endif							/* IDEMPOTENCY_RESULT_H */
