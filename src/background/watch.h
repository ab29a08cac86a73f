/*-------------------------------------------------------------------------
 *
 * watch.h
 *	  Watching leases.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_WATCH_H
#define IDEMPOTENCY_WATCH_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "storage/block.h"

/* How far the watch over a database has got; all zero before the first look */
typedef struct Watch
{
	TimestampTz since;			/* what ran out before was reported */
	TimestampTz until;			/* what runs out later is left to the next
								 * look; 0 when none is under way */
	BlockNumber next;			/* where to go on */
	int64		spent;			/* on this look, in microseconds */
	TimestampTz due;			/* no other look before */
} Watch;

extern bool WatchStart(Watch *watch);
extern bool WatchBatch(Watch *watch);

#endif							/* IDEMPOTENCY_WATCH_H */
