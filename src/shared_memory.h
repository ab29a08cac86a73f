/*-------------------------------------------------------------------------
 *
 * shared_memory.h
 *	  Asking for shared memory, and handing it out.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_SHARED_MEMORY_H
#define IDEMPOTENCY_SHARED_MEMORY_H

#include "postgres.h"

/* Who wants some */
typedef struct SharedMemoryUser
{
	Size		(*get_size) (void); /* how much, 0 for none */
	const char *tranche;		/* of locks, null for none */
	int			locks;			/* in the tranche */

	/* make what is in it, or attach to it; AddinShmemInitLock is held */
	void		(*start_up) (void);
} SharedMemoryUser;

extern void SharedMemoryInit(void);
extern void SharedMemoryRegister(const SharedMemoryUser *user);

#endif							/* IDEMPOTENCY_SHARED_MEMORY_H */
