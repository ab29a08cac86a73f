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

#include "background/worker_status.h"

extern bool WatchStart(Watch *watch);
extern bool WatchBatch(Watch *watch);

#endif							/* IDEMPOTENCY_WATCH_H */
