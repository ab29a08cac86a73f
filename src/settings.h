/*-------------------------------------------------------------------------
 *
 * idempotency.h
 *	  The error codes and the settings that all files share.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_H
#define IDEMPOTENCY_H

#include "postgres.h"

#include "compat.h"
#include "datatype/timestamp.h"

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

/* idempotency.key_format */
typedef enum KeyFormat
{
	KEY_FORMAT_ASCII,			/* visible ASCII */
	KEY_FORMAT_SLUG,			/* letters, digits, hyphen, underscore */
	KEY_FORMAT_UUID				/* RFC 9562 text form */
} KeyFormat;

/* the longest wait that settings and calls may ask for */
#define MAX_WAIT_MS			(60 * 60 * 1000)

/* settings; idempotency.c says what each is for */
extern int	idempotency_ttl;	/* seconds */
extern int	idempotency_error_ttl;	/* seconds */
extern int	idempotency_min_ttl;	/* seconds */
extern int	idempotency_max_ttl;	/* seconds */
extern int	idempotency_lease;	/* milliseconds */
extern int	idempotency_wait;	/* milliseconds */
extern int	idempotency_retry_after;	/* seconds */
extern int	idempotency_key_format; /* a KeyFormat */
extern int	idempotency_key_min_length; /* bytes */
extern int	idempotency_key_max_length; /* bytes */
extern int	idempotency_max_response_size;	/* bytes */
extern char *idempotency_retryable_status;
extern bool idempotency_commit_guard;
extern char *idempotency_tenant;
extern int	idempotency_sweep_batch_size;	/* rows */
extern bool idempotency_worker;
extern int	idempotency_sweep_interval; /* milliseconds */
extern int	idempotency_metrics_interval;	/* seconds */
extern int	idempotency_metrics_retention;	/* seconds */
extern int	idempotency_max_tracked_claims; /* entries in shared memory */
extern int	idempotency_max_actions;	/* the same */

/* idempotency.c */
extern const char *KeyFormatName(int format);

#endif							/* IDEMPOTENCY_H */
