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
#include "store/store.h"

/* A sweep under way */
typedef struct Sweep
{
	int			batch_size;		/* rows to delete in one transaction */
	Oid			part;			/* where the last batch ended: in this table, */
	StorePosition position;		/* at this place */
	TimestampTz started_at;		/* records that expire later are left alone */
	int64		started;		/* the same by ClockMicros() */
	int64		deadline;		/* no batch starts after this, by the same */
	int64		swept;			/* rows deleted so far */
} Sweep;

extern void SweepStart(Sweep *sweep, int batch_size, int64 duration);
extern bool SweepBatch(Sweep *sweep);

#endif							/* IDEMPOTENCY_SWEEP_H */
