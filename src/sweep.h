/*-------------------------------------------------------------------------
 *
 * sweep.h
 *	  Giving back the space of expired records.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_SWEEP_H
#define IDEMPOTENCY_SWEEP_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "store.h"

/* A sweep under way */
typedef struct Sweep
{
	int			batch_size;		/* rows to delete in one transaction */
	StorePosition position;		/* where the last batch ended */
	TimestampTz until;			/* records that expire later are left alone */
	TimestampTz deadline;		/* no batch starts after this */
	int64		swept;			/* rows deleted so far */
} Sweep;

extern void SweepStart(Sweep *sweep, int batch_size, int64 duration);
extern bool SweepBatch(Sweep *sweep);

#endif							/* IDEMPOTENCY_SWEEP_H */
