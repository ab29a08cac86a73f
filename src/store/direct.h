/*-------------------------------------------------------------------------
 *
 * direct.h
 *	  Locking and writing records by the access methods.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_DIRECT_H
#define IDEMPOTENCY_DIRECT_H

#include "postgres.h"

#include "store/record.h"

extern const StoreMethods DirectMethods;

#endif							/* IDEMPOTENCY_DIRECT_H */
