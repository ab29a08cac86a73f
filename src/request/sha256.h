/*-------------------------------------------------------------------------
 *
 * sha256.h
 *	  SHA-256, as cheap as it can be had.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_SHA256_H
#define IDEMPOTENCY_SHA256_H

#include "postgres.h"

#include "common/sha2.h"		/* for PG_SHA256_DIGEST_LENGTH */

extern void Sha256Start(void);
extern void Sha256Add(const void *data, size_t len);
extern void Sha256Finish(uint8 *digest);

#endif							/* IDEMPOTENCY_SHA256_H */
