/*-------------------------------------------------------------------------
 *
 * finish.h
 *	  How a request ends.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_FINISH_H
#define IDEMPOTENCY_FINISH_H

#include "postgres.h"

#include "call/result.h"
#include "claim/claim.h"
#include "request/status.h"
#include "store/store.h"

/* What a request is answered with */
typedef struct Answer
{
	NullableDatum status_code;	/* int */
	NullableDatum response;		/* json */
	NullableDatum headers;		/* jsonb */
	NullableDatum body;			/* bytea */
	NullableDatum ttl;			/* interval, how long to keep it */
} Answer;

extern void FinishCheckAnswer(const Answer *answer, Oid handler);
extern StatusClass FinishClaim(const Scope *scope, Claim *claim,
							   const Answer *answer, Record *record);
extern void FinishedRow(ResultRow *row, StatusClass class, Record *record);

#endif							/* IDEMPOTENCY_FINISH_H */
