/*-------------------------------------------------------------------------
 *
 * fingerprint.c
 *	  What tells a repeat from a different request under the same key.
 *
 * The fingerprint is the SHA-256 of a canonical form of the request.  Two
 * requests have the same form if and only if they are equal as jsonb: the
 * order of keys, white space and the spelling of numbers and strings do not
 * count.  Stored fingerprints outlive the server that made them, so the form
 * is defined here, in bytes, and uses nothing of how a jsonb is laid out:
 *
 *	form	0x01, the version of the form, then one value
 *	null	'n'
 *	true	't'
 *	false	'f'
 *	number	'#' length text		a minus sign if negative, the decimal digits
 *								without zeros at either end, 'e', and the
 *								power of ten of the first digit; zero is 0e0
 *	string	'"' length bytes	UTF-8
 *	array	'[' count values
 *	object	'{' count members	a member is a length, the bytes of the key and
 *								a value; shorter keys come first, and keys of
 *								equal length are in the order of their bytes
 *
 * So 1, 1.0 and 1e0 are all 1e0, and -0.25 is -25e-1.  Leaving out the zeros
 * keeps the work in proportion to the request: 1e100000 has nine bytes.
 *
 * A length or count is four bytes, most significant first.  In a database
 * whose encoding is SQL_ASCII nobody knows what the bytes of a string mean,
 * and they are taken as they are.
 *
 * Whoever changes the form must give it a new version, and has to know that
 * repeats of requests from before the change will be refused as different.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "port/pg_bswap.h"
#include "request/fingerprint.h"
#include "request/sha256.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/jsonb.h"
#include "utils/numeric.h"

#define FORM_VERSION	0x01

/* Hash what was written so far when it is longer than this */
#define FLUSH_BYTES		8192

/* A member of an object, with the key as it goes into the form */
typedef struct FormMember
{
	char	   *key;
	int			key_len;
	JsonbValue	value;
} FormMember;

static void hash_request(Jsonb *request, uint8 *digest);
static void write_container(StringInfo form, JsonbContainer *container);
static void write_array(StringInfo form, JsonbIterator **it, int count);
static void write_object(StringInfo form, JsonbIterator **it, int count);
static void write_value(StringInfo form, JsonbValue *value);
static void write_number(StringInfo form, Numeric number);
static uint16 read_uint16(const char **at);
static void write_header(StringInfo form, char type, int count);
static void write_bytes(StringInfo form, const char *data, int len);
static void flush_form(StringInfo form);
static char *to_utf8(char *data, int *len);
static int	compare_members(const void *a, const void *b);

PG_FUNCTION_INFO_V1(idempotency_request_hash);

/*
 * idempotency_request_hash(request jsonb) returns bytea
 *
 * The fingerprint of a request, 32 bytes.
 */
Datum
idempotency_request_hash(PG_FUNCTION_ARGS)
{
	Fingerprint fingerprint;

	fingerprint.len = PG_SHA256_DIGEST_LENGTH;
	hash_request(PG_GETARG_JSONB_P(0), fingerprint.data);

	return FingerprintGetBytea(&fingerprint);
}

/*
 * Get the fingerprint of a call: of the request, or the digest that the
 * caller brought, or none at all.
 *
 * Errors: 22023 when both are given or the digest has no sensible length.
 */
void
FingerprintFromArguments(Fingerprint *fingerprint, FunctionCallInfo fcinfo,
						 int request_argument, int hash_argument)
{
	if (!PG_ARGISNULL(hash_argument))
	{
		bytea	   *digest = PG_GETARG_BYTEA_PP(hash_argument);
		int			len = VARSIZE_ANY_EXHDR(digest);

		if (!PG_ARGISNULL(request_argument))
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("both request and request_hash were given"),
					 errhint("Give the request, or a digest of it that does not change between retries.")));

		if (len < FINGERPRINT_MIN || len > FINGERPRINT_MAX)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("request_hash is malformed"),
					 errdetail("Its length in bytes is %d, and must be from %d to %d.",
							   len, FINGERPRINT_MIN, FINGERPRINT_MAX)));

		FingerprintFromBytea(fingerprint, PointerGetDatum(digest));
	}
	else if (!PG_ARGISNULL(request_argument))
		FingerprintFromRequest(fingerprint, &fcinfo->args[request_argument]);
	else
		fingerprint->len = 0;
}

/*
 * Get the fingerprint of a request, jsonb; that of null is not known.
 */
void
FingerprintFromRequest(Fingerprint *fingerprint, const NullableDatum *request)
{
	fingerprint->len = 0;

	if (!request->isnull)
	{
		fingerprint->len = PG_SHA256_DIGEST_LENGTH;
		hash_request(DatumGetJsonbP(request->value), fingerprint->data);
	}
}

/*
 * Whether two fingerprints are of different requests.  One that is not known
 * differs from none.
 */
bool
FingerprintDiffers(const Fingerprint *a, const Fingerprint *b)
{
	if (a->len == 0 || b->len == 0)
		return false;
	return a->len != b->len || memcmp(a->data, b->data, a->len) != 0;
}

/*
 * Read a fingerprint from a bytea of at most FINGERPRINT_MAX bytes.
 */
void
FingerprintFromBytea(Fingerprint *fingerprint, Datum value)
{
	bytea	   *digest = DatumGetByteaPP(value);
	int			len = VARSIZE_ANY_EXHDR(digest);

	if (len > FINGERPRINT_MAX)
		elog(ERROR, "request_hash of idempotency record is too long");

	fingerprint->len = (uint8) len;
	memcpy(fingerprint->data, VARDATA_ANY(digest), len);
}

/*
 * A known fingerprint as a bytea that is allocated here.
 */
Datum
FingerprintGetBytea(const Fingerprint *fingerprint)
{
	bytea	   *result = palloc(VARHDRSZ + fingerprint->len);

	SET_VARSIZE(result, VARHDRSZ + fingerprint->len);
	memcpy(VARDATA(result), fingerprint->data, fingerprint->len);

	return PointerGetDatum(result);
}

/*
 * Write the form of a request and hash it.
 */
static void
hash_request(Jsonb *request, uint8 *digest)
{
	StringInfoData form;

	Sha256Start();
	initStringInfo(&form);

	appendStringInfoCharMacro(&form, FORM_VERSION);
	write_container(&form, &request->root);

	flush_form(&form);
	Sha256Finish(digest);
	pfree(form.data);
}

/*
 * Write an array, an object, or the lone value that a jsonb can also be.
 */
static void
write_container(StringInfo form, JsonbContainer *container)
{
	JsonbIterator *it = JsonbIteratorInit(container);
	JsonbValue	value;

	check_stack_depth();

	if (JsonbIteratorNext(&it, &value, true) == WJB_BEGIN_OBJECT)
		write_object(form, &it, value.val.object.nPairs);
	else if (value.val.array.rawScalar)
	{
		JsonbIteratorNext(&it, &value, true);
		write_value(form, &value);
	}
	else
		write_array(form, &it, value.val.array.nElems);

	pfree(it);
}

static void
write_array(StringInfo form, JsonbIterator **it, int count)
{
	JsonbValue	value;

	write_header(form, '[', count);
	for (int i = 0; i < count; i++)
	{
		JsonbIteratorNext(it, &value, true);
		write_value(form, &value);
	}
}

static void
write_object(StringInfo form, JsonbIterator **it, int count)
{
	FormMember *members = palloc_array(FormMember, count);

	for (int i = 0; i < count; i++)
	{
		JsonbValue	key;

		JsonbIteratorNext(it, &key, true);
		members[i].key_len = key.val.string.len;
		members[i].key = to_utf8(key.val.string.val, &members[i].key_len);
		JsonbIteratorNext(it, &members[i].value, true);
	}

	/* costs one comparison a member where jsonb happens to have this order */
	qsort(members, count, sizeof(FormMember), compare_members);

	write_header(form, '{', count);
	for (int i = 0; i < count; i++)
	{
		write_bytes(form, members[i].key, members[i].key_len);
		write_value(form, &members[i].value);
	}
	pfree(members);
}

static void
write_value(StringInfo form, JsonbValue *value)
{
	CHECK_FOR_INTERRUPTS();

	switch (value->type)
	{
		case jbvNull:
			appendStringInfoCharMacro(form, 'n');
			break;
		case jbvBool:
			appendStringInfoCharMacro(form,
									  value->val.boolean ? 't' : 'f');
			break;
		case jbvNumeric:
			write_number(form, value->val.numeric);
			break;
		case jbvString:
			{
				int			len = value->val.string.len;
				char	   *data = to_utf8(value->val.string.val, &len);

				appendStringInfoCharMacro(form, '"');
				write_bytes(form, data, len);
				break;
			}
		case jbvBinary:
			write_container(form, value->val.binary.data);
			break;
		default:
			elog(ERROR, "unrecognized jsonb value type: %d", (int) value->type);
	}

	if (form->len > FLUSH_BYTES)
		flush_form(form);
}

/*
 * Write a number.
 *
 * Its digits come in the binary format of the wire protocol: how many digits
 * to base 10000 there are, the power of 10000 of the first one, the sign, the
 * display scale, and the digits.
 */
static void
write_number(StringInfo form, Numeric number)
{
	bytea	   *wire = DatumGetByteaPP(DirectFunctionCall1(numeric_send,
														   NumericGetDatum(number)));
	const char *at = VARDATA_ANY(wire);
	int			count = read_uint16(&at);
	int			weight = (int16) read_uint16(&at);
	bool		negative = (read_uint16(&at) != 0);
	int			exponent = weight * 4 + 3;
	char	   *buffer = palloc(1 + count * 4 + 1 + MAXINT8LEN);
	char	   *first = buffer + 1; /* leaves room for a sign */
	char	   *end = first;

	(void) read_uint16(&at);
	for (int i = 0; i < count; i++)
		end = pg_ultostr_zeropad(end, read_uint16(&at), 4);

	while (first < end && *first == '0')
	{
		first++;
		exponent--;
	}
	while (first < end && end[-1] == '0')
		end--;
	if (first == end)
	{
		*end++ = '0';
		exponent = 0;
	}
	if (negative)
		*--first = '-';
	*end++ = 'e';
	end += pg_ltoa(exponent, end);

	appendStringInfoCharMacro(form, '#');
	write_bytes(form, first, end - first);

	pfree(buffer);
	pfree(wire);
}

/*
 * The next integer of two bytes, most significant first.
 */
static uint16
read_uint16(const char **at)
{
	uint16		n;

	memcpy(&n, *at, sizeof(n));
	*at += sizeof(n);
	return pg_ntoh16(n);
}

static void
write_header(StringInfo form, char type, int count)
{
	uint32		n = pg_hton32((uint32) count);

	appendStringInfoCharMacro(form, type);
	appendBinaryStringInfo(form, (char *) &n, sizeof(n));
}

static void
write_bytes(StringInfo form, const char *data, int len)
{
	uint32		n = pg_hton32((uint32) len);

	appendBinaryStringInfo(form, (char *) &n, sizeof(n));
	appendBinaryStringInfo(form, data, len);
}

static void
flush_form(StringInfo form)
{
	Sha256Add(form->data, form->len);
	resetStringInfo(form);
}

/*
 * A string in UTF-8; it is the string itself where the server has UTF-8.
 */
static char *
to_utf8(char *data, int *len)
{
	char	   *utf8;

	if (GetDatabaseEncoding() == PG_UTF8 ||
		GetDatabaseEncoding() == PG_SQL_ASCII)
		return data;

	utf8 = pg_server_to_any(data, *len, PG_UTF8);
	if (utf8 != data)
		*len = strlen(utf8);
	return utf8;
}

static int
compare_members(const void *a, const void *b)
{
	const FormMember *left = a;
	const FormMember *right = b;

	if (left->key_len != right->key_len)
		return left->key_len < right->key_len ? -1 : 1;
	return memcmp(left->key, right->key, left->key_len);
}
