/*-------------------------------------------------------------------------
 *
 * shared_memory.c
 *	  Asking for shared memory, and handing it out.
 *
 * There is some only when the library is preloaded: it has to be asked for while
 * the server starts.  Everybody who wants some says so then, and is called when
 * it is there: in the postmaster, again after a crash, and on systems without
 * fork() in each process.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "miscadmin.h"
#include "shared_memory.h"
#include "storage/ipc.h"
#include "storage/lwlock.h"
#include "storage/shmem.h"

#define MAX_USERS	8

static void request(void);
static void start_up(void);

static shmem_request_hook_type previous_request_hook = NULL;
static shmem_startup_hook_type previous_startup_hook = NULL;

static const SharedMemoryUser *users[MAX_USERS];
static int	users_count = 0;

/*
 * Hook into the start of the server, if this is it.
 */
void
SharedMemoryInit(void)
{
	if (!process_shared_preload_libraries_in_progress)
		return;

	previous_request_hook = shmem_request_hook;
	shmem_request_hook = request;
	previous_startup_hook = shmem_startup_hook;
	shmem_startup_hook = start_up;
}

/*
 * Note who wants some; the user must live as long as the process.
 */
void
SharedMemoryRegister(const SharedMemoryUser *user)
{
	Assert(users_count < MAX_USERS);
	users[users_count++] = user;
}

/*
 * shmem_request hook
 */
static void
request(void)
{
	if (previous_request_hook)
		previous_request_hook();

	for (int i = 0; i < users_count; i++)
	{
		Size		size = users[i]->get_size();

		if (size == 0)
			continue;
		RequestAddinShmemSpace(size);
		if (users[i]->tranche != NULL)
			RequestNamedLWLockTranche(users[i]->tranche, users[i]->locks);
	}
}

/*
 * shmem_startup hook
 */
static void
start_up(void)
{
	if (previous_startup_hook)
		previous_startup_hook();

	LWLockAcquire(AddinShmemInitLock, LW_EXCLUSIVE);
	for (int i = 0; i < users_count; i++)
	{
		if (users[i]->get_size() > 0)
			users[i]->start_up();
	}
	LWLockRelease(AddinShmemInitLock);
}
