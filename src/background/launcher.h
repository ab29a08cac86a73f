/*-------------------------------------------------------------------------
 *
 * launcher.h
 *	  The background worker that starts the others.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_LAUNCHER_H
#define IDEMPOTENCY_LAUNCHER_H

#include "postgres.h"

extern void LauncherInit(void);
extern PGDLLEXPORT void idempotency_launcher_main(Datum arg);

#endif							/* IDEMPOTENCY_LAUNCHER_H */
