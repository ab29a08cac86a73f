/*-------------------------------------------------------------------------
 *
 * event_key.c
 *	  Keys for events, which everybody derives in the same way.
 *
 * A client that sends a request makes up a key for it.  An event of a system
 * that numbers its events has all that it takes to tell it from others: its
 * type, the aggregate that it is about, and its sequence number there.  The
 * key is a name-based UUID of these (RFC 9562, section 5.5, version 5), so that
 * a producer, its retries and each consumer get the same key without asking
 * each other, in any language that has such UUIDs.
 *
 * The name is "type:aggregate:sequence" in UTF-8.  A type has no colon in it,
 * and a sequence number neither, so that two different events never have the
 * same name.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "common/cryptohash.h"
#include "common/sha1.h"
#include "fmgr.h"
#include "lib/stringinfo.h"
#include "mb/pg_wchar.h"
#include "utils/builtins.h"
#include "utils/uuid.h"

static char *make_name(FunctionCallInfo fcinfo);
static void hash_name(const pg_uuid_t *namespace, const char *name,
					  uint8 *digest);

PG_FUNCTION_INFO_V1(idempotency_event_key);

/*
 * idempotency_event_key(event_type text, aggregate_id text, sequence bigint,
 *						 namespace uuid) returns uuid
 *
 * The key of an event.
 *
 * Errors: 22023 for an empty type or aggregate, or a type with a colon.
 */
Datum
idempotency_event_key(PG_FUNCTION_ARGS)
{
	uint8		digest[SHA1_DIGEST_LENGTH];
	pg_uuid_t  *result = palloc_object(pg_uuid_t);

	hash_name(PG_GETARG_UUID_P(3), make_name(fcinfo), digest);

	memcpy(result->data, digest, UUID_LEN);
	result->data[6] = (result->data[6] & 0x0f) | 0x50;	/* version 5 */
	result->data[8] = (result->data[8] & 0x3f) | 0x80;	/* variant of the RFC */

	PG_RETURN_UUID_P(result);
}

/*
 * The name of the event that the arguments describe, in UTF-8.
 */
static char *
make_name(FunctionCallInfo fcinfo)
{
	char	   *event_type = text_to_cstring(PG_GETARG_TEXT_PP(0));
	char	   *aggregate_id = text_to_cstring(PG_GETARG_TEXT_PP(1));
	StringInfoData name;

	if (event_type[0] == '\0' || strchr(event_type, ':') != NULL)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("event_type is malformed"),
				 errdetail("It must not be empty or have a colon.")));
	if (aggregate_id[0] == '\0')
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("aggregate_id is malformed"),
				 errdetail("It must not be empty.")));

	initStringInfo(&name);
	appendStringInfo(&name, "%s:%s:" INT64_FORMAT,
					 event_type, aggregate_id, PG_GETARG_INT64(2));

	return pg_server_to_any(name.data, name.len, PG_UTF8);
}

/*
 * SHA-1 of the namespace and the name.
 */
static void
hash_name(const pg_uuid_t *namespace, const char *name, uint8 *digest)
{
	pg_cryptohash_ctx *context = pg_cryptohash_create(PG_SHA1);

	if (pg_cryptohash_init(context) < 0 ||
		pg_cryptohash_update(context, namespace->data, UUID_LEN) < 0 ||
		pg_cryptohash_update(context, (const uint8 *) name, strlen(name)) < 0 ||
		pg_cryptohash_final(context, digest, SHA1_DIGEST_LENGTH) < 0)
		elog(ERROR, "could not compute %s hash: %s", "SHA1",
			 pg_cryptohash_error(context));

	pg_cryptohash_free(context);
}
