/*-------------------------------------------------------------------------
 *
 * scope.c
 *	  The scope of a request: tenant, action, key and actor.
 *
 * What a client sends as a key ends up in an index, in shared memory and in
 * logs, so it is checked here, once, before anything else looks at it.  There
 * is no default for a missing key: one that strangers share would hand the
 * answer of one to the other.
 *
 * A scope has a lock.  Its tag is made of the database and of 80 bits of hash
 * of the name; that is all that a LOCKTAG has room for.  Two scopes with the
 * same tag can keep each other waiting, but never make each other run twice,
 * because the unique index of the table decides (see store.c).  The hash is
 * SHA-256, because clients choose keys: for a hash that can be inverted, one
 * could be made up with the tag of another tenant's request, to keep that
 * waiting.  It has no secret, because a prepared transaction keeps its lock, and
 * so its tag, when the server is restarted.  It is worked out only where the
 * lock is needed; who finds an answer does without.
 *
 * The lock type is "userlock", which nothing in PostgreSQL uses any more, so
 * that the application's own advisory locks cannot meet ours.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "miscadmin.h"
#include "request/scope.h"
#include "request/sha256.h"
#include "settings.h"
#include "utils/builtins.h"

static text *read_argument(FunctionCallInfo fcinfo, int argument);
static void append_part(Scope *scope, ScopePart part, text *value);
static bool key_has_format(const char *data, int len, int format);
static bool is_uuid(const char *data, int len);

/*
 * Read the scope from the arguments of a call, and check it.
 *
 * The first three arguments must be tenant, action and key; actor_argument is
 * the number of the fourth.  A null tenant is the global one, a null actor
 * is nobody in particular; both are stored as ''.
 *
 * Errors: ID001 for a missing key, ID002 for a malformed one, 22004 for a null
 * action, 22023 for anything else that is malformed, 42501 for a tenant that the
 * role is not pinned to.
 */
void
ScopeFromArguments(Scope *scope, FunctionCallInfo fcinfo, int actor_argument)
{
	text	   *part[SCOPE_PARTS];

	part[SCOPE_TENANT] = read_argument(fcinfo, 0);
	part[SCOPE_ACTION] = read_argument(fcinfo, 1);
	part[SCOPE_KEY] = read_argument(fcinfo, 2);
	part[SCOPE_ACTOR] = read_argument(fcinfo, actor_argument);

	ScopeCheckTenant(part[SCOPE_TENANT]);
	if (VARSIZE_ANY_EXHDR(part[SCOPE_ACTION]) == 0)
		ereport(ERROR,
				(errcode(PG_ARGISNULL(SCOPE_ACTION) ?
						 ERRCODE_NULL_VALUE_NOT_ALLOWED :
						 ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("action is missing"),
				 errhint("Name the operation, for example \"orders.create\".")));
	ScopeCheckName("action", part[SCOPE_ACTION]);
	ScopeCheckKey(part[SCOPE_KEY]);
	ScopeCheckName("actor", part[SCOPE_ACTOR]);

	/* they fit, as was just checked */
	scope->name.len = 0;
	for (int i = 0; i < SCOPE_PARTS; i++)
		append_part(scope, i, part[i]);
}

/*
 * Make a scope of four texts.
 *
 * Returns false when one is too long, which only a row that did not come from
 * these functions can have; nobody can claim such a scope.
 */
bool
ScopeFromParts(Scope *scope, const Datum *parts)
{
	scope->name.len = 0;
	for (int i = 0; i < SCOPE_PARTS; i++)
	{
		text	   *part = DatumGetTextPP(parts[i]);

		if (VARSIZE_ANY_EXHDR(part) > SCOPE_PART_MAX)
			return false;
		append_part(scope, i, part);
	}
	return true;
}

/*
 * Set the next part of a scope, which is not too long.
 */
static void
append_part(Scope *scope, ScopePart part, text *value)
{
	unsigned char *end = scope->name.data + scope->name.len;
	int			len = VARSIZE_ANY_EXHDR(value);

	scope->parts[part] = PointerGetDatum(value);
	*end = (unsigned char) len;
	memcpy(end + 1, VARDATA_ANY(value), len);
	scope->name.len += 1 + len;
}

/*
 * Work out the lock that stands for a scope; the head of this file says how.
 */
void
ScopeSetLocktag(Scope *scope)
{
	LOCKTAG    *tag = &scope->locktag;
	uint8		digest[PG_SHA256_DIGEST_LENGTH];

	Sha256Start();
	Sha256Add(scope->name.data, scope->name.len);
	Sha256Finish(digest);

	tag->locktag_field1 = MyDatabaseId;
	memcpy(&tag->locktag_field2, digest, 4);
	memcpy(&tag->locktag_field3, digest + 4, 4);
	memcpy(&tag->locktag_field4, digest + 8, 2);
	tag->locktag_type = LOCKTAG_USERLOCK;
	tag->locktag_lockmethodid = USER_LOCKMETHOD;
}

/*
 * One part of a name, as a text that is allocated here.
 */
Datum
ScopeNamePart(const ScopeName *name, ScopePart part)
{
	const unsigned char *at = name->data;

	for (ScopePart i = 0; i < part; i++)
		at += 1 + *at;

	return PointerGetDatum(cstring_to_text_with_len((const char *) at + 1, *at));
}

/*
 * An argument as text, '' when it is null.
 */
static text *
read_argument(FunctionCallInfo fcinfo, int argument)
{
	static char empty[VARHDRSZ_SHORT];

	if (!PG_ARGISNULL(argument))
		return PG_GETARG_TEXT_PP(argument);

	SET_VARSIZE_SHORT(empty, VARHDRSZ_SHORT);
	return (text *) empty;
}

/*
 * Refuse a malformed tenant, and one that the role has no business with.
 */
void
ScopeCheckTenant(const text *tenant)
{
	const char *data = VARDATA_ANY(tenant);
	int			len = VARSIZE_ANY_EXHDR(tenant);

	ScopeCheckName("tenant", tenant);

	if (idempotency_tenant[0] != '\0' &&
		(strlen(idempotency_tenant) != (size_t) len ||
		 memcmp(idempotency_tenant, data, len) != 0))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("permission denied for tenant"),
				 errdetail("Setting \"idempotency.tenant\" pins calls to tenant \"%s\".",
						   idempotency_tenant)));
}

/*
 * Refuse a part that does not fit, or that could forge a line of a log.
 *
 * "what" is its name in the error, which is 22023: these are names that the
 * service makes up.
 *
 * The encodings that a server can have keep ASCII bytes for ASCII characters,
 * so that looking at bytes is enough.
 */
void
ScopeCheckName(const char *what, const text *name)
{
	const char *data = VARDATA_ANY(name);
	int			len = VARSIZE_ANY_EXHDR(name);

	if (len > SCOPE_PART_MAX)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("%s is malformed", what),
				 errdetail("Its length in bytes is %d, and at most %d is allowed.",
						   len, SCOPE_PART_MAX)));

	for (int i = 0; i < len; i++)
	{
		unsigned char c = data[i];

		if (c < 0x20 || c == 0x7f)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("%s is malformed", what),
					 errdetail("It has a control character.")));
	}
}

/*
 * Refuse a key that is missing or does not have the form that is asked for.
 *
 * The error does not repeat the key: it is the client's, and may be anything.
 * It is ID001 for none, ID002 for a malformed one.
 */
void
ScopeCheckKey(const text *key)
{
	const char *data = VARDATA_ANY(key);
	int			len = VARSIZE_ANY_EXHDR(key);
	static const char *const descriptions[] = {
		[KEY_FORMAT_ASCII] = "made of visible ASCII characters without spaces",
		[KEY_FORMAT_SLUG] = "made of letters, digits, hyphens and underscores",
		[KEY_FORMAT_UUID] = "a UUID in its standard text form",
	};

	if (len == 0)
		ereport(ERROR,
				(errcode(ERRCODE_IDEMPOTENCY_KEY_MISSING),
				 errmsg("idempotency key is missing"),
				 errhint("Have the client send a unique key with each request that it may repeat.")));

	if (len < idempotency_key_min_length || len > idempotency_key_max_length)
		ereport(ERROR,
				(errcode(ERRCODE_IDEMPOTENCY_MALFORMED),
				 errmsg("idempotency key is malformed"),
				 errdetail("Its length in bytes is %d, and settings \"%s\" and \"%s\" allow %d to %d.",
						   len,
						   "idempotency.key_min_length",
						   "idempotency.key_max_length",
						   idempotency_key_min_length,
						   idempotency_key_max_length)));

	if (!key_has_format(data, len, idempotency_key_format))
		ereport(ERROR,
				(errcode(ERRCODE_IDEMPOTENCY_MALFORMED),
				 errmsg("idempotency key is malformed"),
				 errdetail("Setting \"%s\" is \"%s\": a key must be %s.",
						   "idempotency.key_format",
						   KeyFormatName(idempotency_key_format),
						   descriptions[idempotency_key_format])));
}

static bool
key_has_format(const char *data, int len, int format)
{
	if (format == KEY_FORMAT_UUID)
		return is_uuid(data, len);

	for (int i = 0; i < len; i++)
	{
		unsigned char c = data[i];

		/* not isgraph() and isalnum(): they depend on the locale */
		if (c <= ' ' || c > '~')
			return false;
		if (format == KEY_FORMAT_SLUG &&
			!((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
			  (c >= '0' && c <= '9') || c == '-' || c == '_'))
			return false;
	}
	return true;
}

/*
 * Whether this is 8-4-4-4-12 hexadecimal digits (RFC 9562, section 4).
 *
 * uuid_in() is more generous (braces, missing hyphens); two spellings of one
 * UUID would be two keys.
 */
static bool
is_uuid(const char *data, int len)
{
	if (len != 36)
		return false;

	for (int i = 0; i < len; i++)
	{
		char		c = data[i];

		if (i == 8 || i == 13 || i == 18 || i == 23)
		{
			if (c != '-')
				return false;
		}
		else if (!((c >= '0' && c <= '9') || (c >= 'a' && c <= 'f') ||
				   (c >= 'A' && c <= 'F')))
			return false;
	}
	return true;
}
