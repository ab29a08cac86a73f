/*-------------------------------------------------------------------------
 *
 * base.h
 *	  What every file begins with.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_BASE_H
#define IDEMPOTENCY_BASE_H

#include "postgres.h"

#include "compat.h"

#define EXTENSION_NAME	"idempotency"

/*
 * One SQLSTATE for each condition that an application has to tell apart.
 * Class ID is in the range that the SQL standard leaves to implementations.
 *
 * ID001 and ID002 are for what a client sent, which is only the key of a request
 * and the id of a message.  Everything else comes from the service, and a wrong
 * value is 22023, or 22004 if it is null: no fault of the client's.
 */
#define ERRCODE_IDEMPOTENCY_KEY_MISSING		MAKE_SQLSTATE('I','D','0','0','1')
#define ERRCODE_IDEMPOTENCY_MALFORMED		MAKE_SQLSTATE('I','D','0','0','2')
#define ERRCODE_IDEMPOTENCY_IN_FLIGHT		MAKE_SQLSTATE('I','D','0','0','3')
#define ERRCODE_IDEMPOTENCY_MISMATCH		MAKE_SQLSTATE('I','D','0','0','4')
#define ERRCODE_IDEMPOTENCY_CLAIM_LOST		MAKE_SQLSTATE('I','D','0','0','5')
#define ERRCODE_IDEMPOTENCY_NOT_FINISHED	MAKE_SQLSTATE('I','D','0','0','6')
#define ERRCODE_IDEMPOTENCY_TOO_LARGE		MAKE_SQLSTATE('I','D','0','0','7')
#define ERRCODE_IDEMPOTENCY_OUT_OF_ORDER	MAKE_SQLSTATE('I','D','0','0','8')

#endif							/* IDEMPOTENCY_BASE_H */
