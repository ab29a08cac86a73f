/*-------------------------------------------------------------------------
 *
 * settings.h
 *	  The settings.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_SETTINGS_H
#define IDEMPOTENCY_SETTINGS_H

#include "postgres.h"

#include "utils/guc.h"

/* idempotency.key_format */
typedef enum KeyFormat
{
	KEY_FORMAT_ASCII,			/* visible ASCII */
	KEY_FORMAT_SLUG,			/* letters, digits, hyphen, underscore */
	KEY_FORMAT_UUID				/* RFC 9562 text form */
} KeyFormat;

/* the longest wait that settings and calls may ask for */
#define MAX_WAIT_MS			(60 * 60 * 1000)

/* idempotency.log_key */
typedef enum LogKey
{
	LOG_KEY_FULL,
	LOG_KEY_HASH,
	LOG_KEY_NONE
} LogKey;

/* What a setting that is a list is parsed by */
typedef struct ListHooks
{
	GucStringCheckHook check;
	GucStringAssignHook assign;
} ListHooks;

/* settings.c says what each is for */
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
extern bool idempotency_forward_handlers;
extern bool idempotency_commit_guard;
extern char *idempotency_tenant;
extern int	idempotency_sweep_batch_size;	/* rows */
extern bool idempotency_worker;
extern int	idempotency_sweep_interval; /* milliseconds */
extern int	idempotency_metrics_interval;	/* seconds */
extern int	idempotency_metrics_retention;	/* seconds */
extern int	idempotency_max_tracked_claims; /* entries in shared memory */
extern int	idempotency_max_actions;	/* the same */
extern char *idempotency_log_events;
extern int	idempotency_log_key;	/* a LogKey */
extern int	idempotency_log_level;

extern void SettingsInit(const ListHooks *retryable_status,
						 const ListHooks *log_events);
extern const char *KeyFormatName(int format);

#endif							/* IDEMPOTENCY_SETTINGS_H */
