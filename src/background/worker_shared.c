/*-------------------------------------------------------------------------
 *
 * worker_shared.c
 *	  What the launcher shares with its workers and with sessions.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "background/worker_shared.h"
#include "shared_memory.h"
#include "storage/shmem.h"

static Size get_size(void);
static void start_up(void);

/* in shared memory, null unless the library is preloaded */
WorkerState *worker_shared = NULL;

/*
 * Ask for shared memory.
 */
void
WorkerSharedInit(void)
{
	static const SharedMemoryUser user = {
		.get_size = get_size,
		.start_up = start_up
	};

	SharedMemoryRegister(&user);
}

/*
 * Have the launcher look again where there was no extension.
 */
void
WorkerSharedTellLauncher(void)
{
	Latch	   *launcher = worker_shared->launcher;

	pg_atomic_fetch_add_u32(&worker_shared->created, 1);

	/* should it be another process's by now, that will not mind */
	if (launcher != NULL)
		SetLatch(launcher);
}

static Size
get_size(void)
{
	return MAXALIGN(sizeof(WorkerState));
}

static void
start_up(void)
{
	bool		found;

	worker_shared = ShmemInitStruct("idempotency worker", sizeof(WorkerState),
									&found);
	if (!found)
	{
		worker_shared->launcher = NULL;
		worker_shared->out_of_slots = false;
		pg_atomic_init_u32(&worker_shared->created, 0);
		pg_atomic_init_u64(&worker_shared->report, 0);
	}
}
