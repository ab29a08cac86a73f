/*-------------------------------------------------------------------------
 *
 * settings.c
 *	  The settings.
 *
 * Who may change a setting follows one rule.  What an application decides for
 * itself (how long to keep an answer, how long to wait, which statuses may be
 * retried) can be set by anyone, for a role, a session or a transaction.
 * Limits that protect the server or other applications, and what a role could
 * otherwise use to step around a guarantee, are the administrator's.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include <limits.h>

#include "access/parallel.h"
#include "miscadmin.h"
#include "nodes/pg_list.h"
#include "settings.h"
#include "utils/guc.h"

#define SETTING_PREFIX	"idempotency."

static List *find_client_settings(void);
static void refuse_client_settings(List *names);
static bool check_ttl(int *newval, void **extra, GucSource source);
static bool check_lifetime(int *newval, void **extra, GucSource source);
static bool may_be_out_of_range(GucSource source, const char *limit,
								const char *bound, int secs);
static bool check_lease(int *newval, void **extra, GucSource source);
static void define_lifetime_settings(void);
static void define_answer_settings(const ListHooks *retryable_status);
static void define_administrator_settings(void);
static void define_server_settings(void);
static void define_log_settings(const ListHooks *log_events);

int			idempotency_ttl;
int			idempotency_error_ttl;
int			idempotency_min_ttl;
int			idempotency_max_ttl;
int			idempotency_lease;
int			idempotency_wait;
int			idempotency_retry_after;
int			idempotency_key_format;
int			idempotency_key_min_length;
int			idempotency_key_max_length;
int			idempotency_max_response_size;
char	   *idempotency_retryable_status;
bool		idempotency_commit_guard;
bool		idempotency_forward_handlers;
char	   *idempotency_tenant;
int			idempotency_sweep_batch_size;
bool		idempotency_worker;
int			idempotency_sweep_interval;
int			idempotency_metrics_interval;
int			idempotency_metrics_retention;
int			idempotency_max_tracked_claims;
int			idempotency_max_actions;
char	   *idempotency_log_events;
int			idempotency_log_key;
int			idempotency_log_level = LOG;

static const struct config_enum_entry key_formats[] = {
	{"ascii", KEY_FORMAT_ASCII, false},
	{"slug", KEY_FORMAT_SLUG, false},
	{"uuid", KEY_FORMAT_UUID, false},
	{NULL, 0, false}
};

static const struct config_enum_entry log_key_options[] = {
	{"full", LOG_KEY_FULL, false},
	{"hash", LOG_KEY_HASH, false},
	{"none", LOG_KEY_NONE, false},
	{NULL, 0, false}
};

static const struct config_enum_entry log_level_options[] = {
	{"debug5", DEBUG5, false},
	{"debug4", DEBUG4, false},
	{"debug3", DEBUG3, false},
	{"debug2", DEBUG2, false},
	{"debug1", DEBUG1, false},
	{"log", LOG, false},
	{"notice", NOTICE, false},
	{"warning", WARNING, false},
	{NULL, 0, false}
};

/*
 * Define all settings.  Two are lists, whose items others know.
 */
void
SettingsInit(const ListHooks *retryable_status, const ListHooks *log_events)
{
	List	   *from_client = find_client_settings();

	define_lifetime_settings();
	define_answer_settings(retryable_status);
	define_administrator_settings();
	define_server_settings();
	define_log_settings(log_events);
	MarkGUCPrefixReserved("idempotency");
	refuse_client_settings(from_client);
}

/*
 * The name of a key format, as the setting spells it.
 */
const char *
KeyFormatName(int format)
{
	return key_formats[format].name;
}

/*
 * Names of our settings that the client gave when it connected.
 *
 * Unless the library is preloaded, a setting is not known when a session
 * starts, and a client can put a value of its own in the place of the one
 * that the administrator gave to its role, its database or the server.
 * Later, when the setting becomes known, that value is thrown away, but the
 * administrator's is not brought back.
 */
static List *
find_client_settings(void)
{
	int			count;
	struct config_generic **settings = get_guc_variables(&count);
	List	   *result = NIL;

	for (int i = 0; i < count; i++)
	{
		struct config_generic *setting = settings[i];

		if (pg_strncasecmp(setting->name, SETTING_PREFIX,
						   strlen(SETTING_PREFIX)) == 0 &&
			setting->reset_source == PGC_S_CLIENT)
			result = lappend(result, pstrdup(setting->name));
	}

	pfree(settings);
	return result;
}

/*
 * End a session whose client tried to change what is the administrator's,
 * which is seen by its value not having been accepted.
 *
 * With the library preloaded the server would not have let it connect.
 */
static void
refuse_client_settings(List *names)
{
	int			count;
	struct config_generic **settings = get_guc_variables(&count);

	for (int i = 0; i < count; i++)
	{
		ListCell   *lc;

		foreach(lc, names)
		{
			if (settings[i]->context != PGC_USERSET &&
				settings[i]->reset_source != PGC_S_CLIENT &&
				pg_strcasecmp(settings[i]->name, lfirst(lc)) == 0)
				ereport(FATAL,
						(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
						 errmsg("permission denied to set parameter \"%s\"",
								settings[i]->name)));
		}
	}

	pfree(settings);
	list_free_deep(names);
}

/*
 * Refuse a ttl that is not from idempotency.min_ttl to idempotency.max_ttl as
 * soon as somebody asks for it.
 */
static bool
check_ttl(int *newval, void **extra, GucSource source)
{
	if (*newval < idempotency_min_ttl &&
		!may_be_out_of_range(source, "least", "idempotency.min_ttl",
							 idempotency_min_ttl))
		return false;
	return check_lifetime(newval, extra, source);
}

/*
 * Refuse a lifetime above idempotency.max_ttl as soon as somebody asks for
 * it.
 */
static bool
check_lifetime(int *newval, void **extra, GucSource source)
{
	return *newval <= idempotency_max_ttl ||
		may_be_out_of_range(source, "most", "idempotency.max_ttl",
							idempotency_max_ttl);
}

/*
 * Whether a lifetime can be set although it is beyond a bound of now.
 *
 * What is used is checked when it is used (see request/arguments.c), because the bound may be
 * changed later.  And a check hook cannot rely on the value of another setting
 * while the configuration file is being read, or when a parallel worker takes
 * over the settings of its leader.  Who sets it for a role or a database is only
 * told, for it may not be the bound that will hold there.
 */
static bool
may_be_out_of_range(GucSource source, const char *limit, const char *bound,
					int secs)
{
	if (source < PGC_S_INTERACTIVE || InitializingParallelWorker)
		return true;

	if (source == PGC_S_TEST)
	{
		ereport(NOTICE,
				(errmsg("value is out of range as long as \"%s\" is %d s",
						bound, secs)));
		return true;
	}

	GUC_check_errdetail("The value must be at %s \"%s\", %d s.",
						limit, bound, secs);
	return false;
}

/*
 * The same for a lease, which is in milliseconds.
 */
static bool
check_lease(int *newval, void **extra, GucSource source)
{
	int			secs = (int) (((int64) *newval + 999) / 1000);

	return check_lifetime(&secs, extra, source);
}

static void
define_lifetime_settings(void)
{
	DefineCustomIntVariable("idempotency.min_ttl",
							"Sets the shortest time that may be asked for to keep a completed answer.",
							NULL,
							&idempotency_min_ttl,
							5 * 60, 1, 366 * 24 * 60 * 60,
							PGC_SUSET, GUC_UNIT_S,
							NULL, NULL, NULL);
	DefineCustomIntVariable("idempotency.max_ttl",
							"Sets the longest time that an answer may be kept.",
							NULL,
							&idempotency_max_ttl,
							72 * 60 * 60, 1, 366 * 24 * 60 * 60,
							PGC_SUSET, GUC_UNIT_S,
							NULL, NULL, NULL);
	DefineCustomIntVariable("idempotency.ttl",
							"Sets how long a completed answer is kept for replay.",
							"From idempotency.min_ttl to idempotency.max_ttl.",
							&idempotency_ttl,
							24 * 60 * 60, 1, INT_MAX,
							PGC_USERSET, GUC_UNIT_S,
							check_ttl, NULL, NULL);
	DefineCustomIntVariable("idempotency.error_ttl",
							"Sets how long a final error is kept for replay.",
							"At most idempotency.max_ttl.",
							&idempotency_error_ttl,
							60 * 60, 1, INT_MAX,
							PGC_USERSET, GUC_UNIT_S,
							check_lifetime, NULL, NULL);
	DefineCustomIntVariable("idempotency.lease",
							"Sets for how long a checkpoint renews a lease.",
							"At most idempotency.max_ttl.",
							&idempotency_lease,
							30 * 60 * 1000, 1, INT_MAX,
							PGC_USERSET, GUC_UNIT_MS,
							check_lease, NULL, NULL);
}

static void
define_answer_settings(const ListHooks *retryable_status)
{
	DefineCustomIntVariable("idempotency.wait",
							"Sets how long a request waits for another one with the same key that is in flight.",
							"Zero answers at once.",
							&idempotency_wait,
							0, 0, MAX_WAIT_MS,
							PGC_USERSET, GUC_UNIT_MS,
							NULL, NULL, NULL);
	DefineCustomIntVariable("idempotency.retry_after",
							"Sets the least time after which a repeat of a request in flight is asked to come again.",
							NULL,
							&idempotency_retry_after,
							1, 1, 60 * 60,
							PGC_USERSET, GUC_UNIT_S,
							NULL, NULL, NULL);
	DefineCustomBoolVariable("idempotency.forward_handlers",
							 "Has a handler called on the node of its tenant, on a cluster.",
							 "When off, it is called on the node that the call of idempotency_run came to.",
							 &idempotency_forward_handlers,
							 false,
							 PGC_USERSET, 0,
							 NULL, NULL, NULL);
	DefineCustomStringVariable("idempotency.retryable_status",
							   "Lists the statuses after which a request may be run again.",
							   "Statuses from 400 to 599, and the classes 4xx and 5xx.",
							   &idempotency_retryable_status,
							   "408,409,425,429,5xx",
							   PGC_USERSET, GUC_LIST_INPUT,
							   retryable_status->check, retryable_status->assign, NULL);
}

static void
define_administrator_settings(void)
{
	DefineCustomEnumVariable("idempotency.key_format",
							 "Sets the form that a key must have.",
							 NULL,
							 &idempotency_key_format,
							 KEY_FORMAT_ASCII, key_formats,
							 PGC_SUSET, 0,
							 NULL, NULL, NULL);
	DefineCustomIntVariable("idempotency.key_min_length",
							"Sets the least length of a key.",
							NULL,
							&idempotency_key_min_length,
							1, 1, 255,
							PGC_SUSET, 0,
							NULL, NULL, NULL);
	DefineCustomIntVariable("idempotency.key_max_length",
							"Sets the greatest length of a key.",
							NULL,
							&idempotency_key_max_length,
							255, 1, 255,
							PGC_SUSET, 0,
							NULL, NULL, NULL);
	DefineCustomIntVariable("idempotency.max_response_size",
							"Sets the greatest size of an answer with its headers.",
							NULL,
							&idempotency_max_response_size,
							1024 * 1024, 0, 256 * 1024 * 1024,
							PGC_SUSET, GUC_UNIT_BYTE,
							NULL, NULL, NULL);
	DefineCustomBoolVariable("idempotency.commit_guard",
							 "Refuses to commit a transaction that has a claim it did not finish.",
							 "When off, such a commit gets a warning.",
							 &idempotency_commit_guard,
							 true,
							 PGC_SUSET, 0,
							 NULL, NULL, NULL);
	DefineCustomStringVariable("idempotency.tenant",
							   "Pins calls to one tenant.",
							   "When set, for example with ALTER ROLE, a call for another tenant is refused.",
							   &idempotency_tenant,
							   "",
							   PGC_SUSET, 0,
							   NULL, NULL, NULL);
	DefineCustomIntVariable("idempotency.sweep_batch_size",
							"Sets how many expired records a sweep deletes in one transaction.",
							NULL,
							&idempotency_sweep_batch_size,
							1000, 1, 1000000,
							PGC_SUSET, 0,
							NULL, NULL, NULL);
}

/*
 * These have an effect only when the library is preloaded.  Otherwise they are
 * accepted all the same, so that a configuration file that has them is no
 * reason to warn each client.
 *
 * A partitioned hash table has 32 free lists with an entry each at least, so
 * that less than that could not be kept to.
 */
static void
define_server_settings(void)
{
	DefineCustomBoolVariable("idempotency.worker",
							 "Sweeps all databases in the background.",
							 "Needs the library to be preloaded.",
							 &idempotency_worker,
							 true,
							 PGC_SIGHUP, 0,
							 NULL, NULL, NULL);
	DefineCustomIntVariable("idempotency.sweep_interval",
							"Sets the time from one sweep of a database in the background to the next.",
							NULL,
							&idempotency_sweep_interval,
							60 * 1000, 100, 24 * 60 * 60 * 1000,
							PGC_SIGHUP, GUC_UNIT_MS,
							NULL, NULL, NULL);
	DefineCustomIntVariable("idempotency.metrics_interval",
							"Sets the time from one flush of a database's metrics to the next.",
							NULL,
							&idempotency_metrics_interval,
							60, 1, 60 * 60,
							PGC_SIGHUP, GUC_UNIT_S,
							NULL, NULL, NULL);
	DefineCustomIntVariable("idempotency.metrics_retention",
							"Sets how long flushed metrics are kept.",
							NULL,
							&idempotency_metrics_retention,
							7 * 24 * 60 * 60, 60 * 60, 366 * 24 * 60 * 60,
							PGC_SIGHUP, GUC_UNIT_S,
							NULL, NULL, NULL);
	DefineCustomIntVariable("idempotency.max_actions",
							"Sets how many actions can have metrics of their own in shared memory.",
							"Actions beyond it are counted together. Zero counts nothing.",
							&idempotency_max_actions,
							256, 0, 64 * 1024,
							process_shared_preload_libraries_in_progress ?
							PGC_POSTMASTER : PGC_SIGHUP, 0,
							NULL, NULL, NULL);
	DefineCustomIntVariable("idempotency.max_tracked_claims",
							"Sets how many claims in flight can be described in shared memory.",
							"Claims beyond it are as safe, but repeats learn less about them.",
							&idempotency_max_tracked_claims,
							1024, 32, 1024 * 1024,
							process_shared_preload_libraries_in_progress ?
							PGC_POSTMASTER : PGC_SIGHUP, 0,
							NULL, NULL, NULL);
}

static void
define_log_settings(const ListHooks *log_events)
{
	DefineCustomStringVariable("idempotency.log_events",
							   "Lists the classes of events that are logged.",
							   "started, replayed, in_flight, mismatched, expired, stalled, taken_over, completed, errored and released; or all, or none.",
							   &idempotency_log_events,
							   "mismatched,in_flight,taken_over,stalled",
							   PGC_SUSET, GUC_LIST_INPUT,
							   log_events->check, log_events->assign, NULL);
	DefineCustomEnumVariable("idempotency.log_key",
							 "Sets how the key of a request is logged.",
							 NULL,
							 &idempotency_log_key,
							 LOG_KEY_FULL, log_key_options,
							 PGC_SUSET, 0,
							 NULL, NULL, NULL);
	DefineCustomEnumVariable("idempotency.log_level",
							 "Sets the level at which events are logged.",
							 NULL,
							 &idempotency_log_level,
							 LOG, log_level_options,
							 PGC_SUSET, 0,
							 NULL, NULL, NULL);
}
