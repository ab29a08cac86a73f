/*-------------------------------------------------------------------------
 *
 * log.c
 *	  Lines in the server's log about events.
 *
 * A line says in its message which class of event it is about, and in its
 * detail, as one JSON object, what there is to know:
 *
 *		LOG:  idempotency event "mismatched"
 *		DETAIL:  {"event": "mismatched", "tenant": "acme", ...}
 *
 * The detail goes to the log only, never to a client, whatever the level.  The
 * statement and the context are left out, because they may contain what
 * idempotency.log_key keeps from the log.
 *
 * A line that is written when a transaction has committed must not fail, or the
 * server would have to stop.  So no function that describes a context is called,
 * which could look for something in the catalogs, and a client is told nothing,
 * because the words may have no equivalent in its encoding.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "common/sha2.h"
#include "fmgr.h"
#include "lib/stringinfo.h"
#include "mb/pg_wchar.h"
#include "nodes/pg_list.h"
#include "observe/event_class.h"
#include "observe/log.h"
#include "settings.h"
#include "tcop/tcopprot.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/guc.h"
#include "utils/json.h"
#include "utils/timestamp.h"
#include "utils/varlena.h"

static bool parse_class(const char *item, uint32 *classes);
static const char *get_outcome(EventClass class);
static void append_part(StringInfo detail, const char *member,
						const ScopeName *name, ScopePart part);
static void append_key(StringInfo detail, const ScopeName *name);
static void append_string(StringInfo detail, const char *string);

/* idempotency.log_events, parsed: a bit for each EventClass */
static uint32 logged_classes;

/*
 * Whether events of a class are to be logged.
 */
bool
LogWants(EventClass class)
{
	return (logged_classes & (1U << class)) != 0;
}

/*
 * The detail of the line for an event, allocated in the current context.
 */
char *
LogMakeDetail(const Event *event)
{
	const char *outcome = get_outcome(event->class);
	StringInfoData detail;

	initStringInfo(&detail);
	appendStringInfo(&detail, "{\"event\": \"%s\"", EventClassName(event->class));
	append_part(&detail, "tenant", event->name, SCOPE_TENANT);
	append_part(&detail, "action", event->name, SCOPE_ACTION);
	append_part(&detail, "actor", event->name, SCOPE_ACTOR);
	append_key(&detail, event->name);
	if (outcome != NULL)
		appendStringInfo(&detail, ", \"outcome\": \"%s\"", outcome);
	if (event->status != 0)
		appendStringInfo(&detail, ", \"status\": %d", event->status);
	if (event->since != 0)
		appendStringInfo(&detail, ", \"duration_ms\": %.3f",
						 Max(GetCurrentTimestamp() - event->since, 0) / 1000.0);
	if (event->attempt != 0)
		appendStringInfo(&detail, ", \"attempt\": %d", event->attempt);
	appendStringInfoChar(&detail, '}');

	return detail.data;
}

/*
 * Write the line for an event.
 */
void
LogWrite(EventClass class, const char *detail)
{
	ErrorContextCallback *context = error_context_stack;

	error_context_stack = NULL;
	ereport(idempotency_log_level,
			(errmsg("idempotency event \"%s\"", EventClassName(class)),
			 errdetail_log("%s", detail),
			 errhidestmt(true)));
	error_context_stack = context;
}

/*
 * The same when the transaction has committed, while interrupts are held off.
 */
void
LogWriteAtCommit(EventClass class, const char *detail)
{
	CommandDest dest = whereToSendOutput;

	whereToSendOutput = DestNone;
	LogWrite(class, detail);
	whereToSendOutput = dest;
}

/*
 * Check hook of idempotency.log_events: parses the list.
 */
bool
LogCheckEvents(char **newval, void **extra, GucSource source)
{
	char	   *rawstring = pstrdup(*newval);
	List	   *items;
	ListCell   *lc;
	uint32		classes = 0;

	if (!SplitIdentifierString(rawstring, ',', &items))
	{
		GUC_check_errdetail("List syntax is invalid.");
		return false;
	}

	foreach(lc, items)
	{
		const char *item = lfirst(lc);

		if (!parse_class(item, &classes))
		{
			GUC_check_errdetail("There is no class of events \"%s\".", item);
			return false;
		}
	}

	*extra = guc_malloc(LOG, sizeof(classes));
	if (*extra == NULL)
		return false;
	memcpy(*extra, &classes, sizeof(classes));
	return true;
}

/*
 * Assign hook of idempotency.log_events.
 */
void
LogAssignEvents(const char *newval, void *extra)
{
	memcpy(&logged_classes, extra, sizeof(logged_classes));
}

/*
 * Set the bits for one item of the list.  What is swept is only counted.
 */
static bool
parse_class(const char *item, uint32 *classes)
{
	if (strcmp(item, "none") == 0)
		return true;
	if (strcmp(item, "all") == 0)
	{
		*classes |= (1U << EVENT_SWEPT) - 1;
		return true;
	}

	for (EventClass class = 0; class < EVENT_SWEPT; class++)
	{
		if (strcmp(item, EventClassName(class)) == 0)
		{
			*classes |= 1U << class;
			return true;
		}
	}
	return false;
}

/*
 * What the caller is told, null when there is no caller.
 */
static const char *
get_outcome(EventClass class)
{
	switch (class)
	{
		case EVENT_STALLED:
			return NULL;
		case EVENT_EXPIRED:
		case EVENT_TAKEN_OVER:
			return EventClassName(EVENT_STARTED);
		default:
			return EventClassName(class);
	}
}

/*
 * Append a part of a scope as a member of the object.
 */
static void
append_part(StringInfo detail, const char *member, const ScopeName *name,
			ScopePart part)
{
	appendStringInfo(detail, ", \"%s\": ", member);
	append_string(detail, TextDatumGetCString(ScopeNamePart(name, part)));
}

/*
 * Append the key as far as it may be known: as it is, or as the hexadecimal
 * SHA-256 of its bytes.
 */
static void
append_key(StringInfo detail, const ScopeName *name)
{
	Datum		key;
	bytea	   *hash;
	char		hex[2 * PG_SHA256_DIGEST_LENGTH];

	if (idempotency_log_key == LOG_KEY_FULL)
		append_part(detail, "key", name, SCOPE_KEY);
	if (idempotency_log_key != LOG_KEY_HASH)
		return;

	/* a text is laid out as a bytea of its bytes */
	key = ScopeNamePart(name, SCOPE_KEY);
	hash = DatumGetByteaPP(DirectFunctionCall1(sha256_bytea, key));
	hex_encode(VARDATA_ANY(hash), PG_SHA256_DIGEST_LENGTH, hex);
	appendStringInfo(detail, ", \"key_sha256\": \"%.*s\"",
					 (int) sizeof(hex), hex);
}

/*
 * Append a string of JSON.
 *
 * JSON is UTF-8.  The text of a database with another encoding may not be
 * convertible to that, and logging must not fail.  So bytes beyond ASCII are
 * then written as the characters that they are in LATIN1.
 */
static void
append_string(StringInfo detail, const char *string)
{
	const char *at;
	StringInfoData quoted;

	if (GetDatabaseEncoding() == PG_UTF8)
	{
		escape_json(detail, string);
		return;
	}

	initStringInfo(&quoted);
	escape_json(&quoted, string);
	for (at = quoted.data; *at != '\0'; at++)
	{
		if (IS_HIGHBIT_SET(*at))
			appendStringInfo(detail, "\\u%04x", (unsigned char) *at);
		else
			appendStringInfoChar(detail, *at);
	}
}
