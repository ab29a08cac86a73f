/*-------------------------------------------------------------------------
 *
 * idempotency.c
 *	  Load time: one call for each file that has something to set up.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "background/launcher.h"
#include "background/worker_status.h"
#include "call/forward.h"
#include "call/scan.h"
#include "claim/claim.h"
#include "claim/in_flight.h"
#include "claim/wake.h"
#include "fmgr.h"
#include "observe/event.h"
#include "observe/flush.h"
#include "observe/log.h"
#include "observe/metrics.h"
#include "request/status.h"
#include "settings.h"
#include "shared_memory.h"
#include "store/catalog.h"
#include "transaction.h"

PG_MODULE_MAGIC;

PGDLLEXPORT void _PG_init(void);

/*
 * Library entry point.
 */
void
_PG_init(void)
{
	static const ListHooks retryable_status = {
		.check = StatusCheckRetryable,
		.assign = StatusAssignRetryable
	};
	static const ListHooks log_events = {
		.check = LogCheckEvents,
		.assign = LogAssignEvents
	};

	SettingsInit(&retryable_status, &log_events);
	SharedMemoryInit();
	TransactionInit();

	CatalogInit();
	ClaimInit();
	EventInit();
	WakeInit();
	LauncherInit();
	WorkerStatusInit();
	InFlightInit();
	MetricsInit();
	FlushInit();
	ScanInit();
	ForwardInit();
}
