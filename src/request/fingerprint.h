/*-------------------------------------------------------------------------
 *
 * fingerprint.h
 *	  What tells a repeat from a different request under the same key.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_FINGERPRINT_H
#define IDEMPOTENCY_FINGERPRINT_H

#include "postgres.h"

#include "fmgr.h"

/* Lengths of a digest that a caller may bring, from 128 to 512 bits */
#define FINGERPRINT_MIN		16
#define FINGERPRINT_MAX		64

typedef struct Fingerprint
{
	uint8		len;			/* 0 when it is not known */
	uint8		data[FINGERPRINT_MAX];
} Fingerprint;

extern void FingerprintFromArguments(Fingerprint *fingerprint,
									 FunctionCallInfo fcinfo,
									 int request_argument,
									 int hash_argument);
extern void FingerprintFromRequest(Fingerprint *fingerprint,
								   const NullableDatum *request);
extern bool FingerprintDiffers(const Fingerprint *a, const Fingerprint *b);
extern void FingerprintFromBytea(Fingerprint *fingerprint, Datum value);
extern Datum FingerprintGetBytea(const Fingerprint *fingerprint);

#endif							/* IDEMPOTENCY_FINGERPRINT_H */
