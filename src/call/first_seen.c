/*-------------------------------------------------------------------------
 *
 * first_seen.c
 *	  first_seen: which messages of a batch are new.
 *
 * A queue that delivers at least once delivers some messages again.  A
 * consumer hands over the ids of a batch, and gets back those that it has to
 * work on; the others were seen before.  The work and the memory of it are one
 * transaction.
 *
 * An id that was seen is a record, as if the consumer had begun and finished a
 * request with that key: the consumer is the action, there is no actor, and
 * the answer is status 200 and nothing else.  So everything that is true of
 * records (how long they are kept, who is told what, the sweep) is true here.
 *
 * Claims would cost a lock for each id until the end of the transaction.
 * There are none; the unique index alone decides, in the way of INSERT ... ON
 * CONFLICT: where another transaction is just inserting an id, we wait for its
 * end, and if it commits, the id was seen.  Records are inserted in the order
 * of their ids, so that two consumers with batches that overlap wait for each
 * other in one direction only.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "access/xact.h"
#include "call/forward.h"
#include "catalog/pg_type_d.h"
#include "claim/lease.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "observe/event.h"
#include "request/arguments.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"
#include "utils/tuplestore.h"

#define STATUS_SEEN		200

/* Arguments of first_seen */
enum
{
	FIRST_SEEN_TENANT,
	FIRST_SEEN_CONSUMER,
	FIRST_SEEN_MESSAGE_IDS,
	FIRST_SEEN_TTL
};

/* One element of a batch */
typedef struct MessageId
{
	Datum		id;				/* text */
	int			position;		/* in the batch, from 0 */
	bool		is_new;
} MessageId;

static MessageId *read_batch(ArrayType *batch, int *count);
static void forward_batch(FunctionCallInfo fcinfo, const Scope *scope);
static void add_position(void *arg);
static text *read_name(FunctionCallInfo fcinfo, int argument);
static void record_batch(MessageId *ids, int count, Scope *scope,
						 int64 ttl);
static bool record_id(Store *store, const Scope *scope, Record *record);
static bool is_over(const Record *record);
static int	compare_ids(const void *a, const void *b);
static int	compare_positions(const void *a, const void *b);
static int	compare_texts(Datum a, Datum b);

PG_FUNCTION_INFO_V1(idempotency_first_seen);

/*
 * idempotency_first_seen(tenant text, consumer text, message_ids text[],
 *						  ttl interval) returns setof text
 *
 * Record the ids of messages, and return those that are new, once each and in
 * the order of the batch.
 *
 * Errors: ID001 for a null or empty id, ID002 for a malformed one, 22004 and
 * 22023 for the other arguments, 25006 in a read-only transaction, 40001 in a
 * serializable one, 42501.
 */
Datum
idempotency_first_seen(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *rsinfo;
	Scope		scope = {0};
	int64		ttl;
	MessageId  *ids;
	int			count;
	text	   *tenant = read_name(fcinfo, FIRST_SEEN_TENANT);
	text	   *consumer = read_name(fcinfo, FIRST_SEEN_CONSUMER);

	PreventCommandIfReadOnly("idempotency_first_seen()");
	PreventCommandIfParallelMode("idempotency_first_seen()");

	ScopeCheckTenant(tenant);
	if (VARSIZE_ANY_EXHDR(consumer) == 0)
		ereport(ERROR,
				(errcode(PG_ARGISNULL(FIRST_SEEN_CONSUMER) ?
						 ERRCODE_NULL_VALUE_NOT_ALLOWED :
						 ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("consumer is missing")));
	if (PG_ARGISNULL(FIRST_SEEN_MESSAGE_IDS))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("message_ids is missing")));
	ScopeCheckName("consumer", consumer);
	scope.parts[SCOPE_TENANT] = PointerGetDatum(tenant);
	scope.parts[SCOPE_ACTION] = PointerGetDatum(consumer);
	scope.parts[SCOPE_ACTOR] = PointerGetDatum(cstring_to_text(""));
	ttl = CallReadTtl(&fcinfo->args[FIRST_SEEN_TTL]);
	ids = read_batch(PG_GETARG_ARRAYTYPE_P(FIRST_SEEN_MESSAGE_IDS), &count);

	/* refuses a caller that is not prepared for a set */
	InitMaterializedSRF(fcinfo, MAT_SRF_USE_EXPECTED_DESC);
	rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	if (ForwardNeeded(&scope))
	{
		forward_batch(fcinfo, &scope);
		return (Datum) 0;
	}
	record_batch(ids, count, &scope, ttl);

	qsort(ids, count, sizeof(MessageId), compare_positions);
	for (int i = 0; i < count; i++)
	{
		bool		isnull = false;

		if (ids[i].is_new)
			tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc,
								 &ids[i].id, &isnull);
	}

	return (Datum) 0;
}

/*
 * Have the node of the tenant record a batch, and return what it returns.
 */
static void
forward_batch(FunctionCallInfo fcinfo, const Scope *scope)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	char	   *result = ForwardCall(fcinfo, "idempotency_first_seen", scope);
	Datum	   *ids;
	int			count;

	if (result == NULL)
		return;
	deconstruct_array(DatumGetArrayTypeP(ForwardGetValue(result, TEXTARRAYOID)),
					  TEXTOID, -1, false, TYPALIGN_INT, &ids, NULL, &count);
	for (int i = 0; i < count; i++)
	{
		bool		isnull = false;

		tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, &ids[i],
							 &isnull);
	}
}

/*
 * A text argument, '' when it is null.
 */
static text *
read_name(FunctionCallInfo fcinfo, int argument)
{
	if (PG_ARGISNULL(argument))
		return cstring_to_text("");
	return PG_GETARG_TEXT_PP(argument);
}

/*
 * The ids of a batch, checked.
 */
static MessageId *
read_batch(ArrayType *batch, int *count)
{
	Datum	   *elements;
	bool	   *nulls;
	MessageId  *ids;
	int			position = 0;
	ErrorContextCallback context = {
		.previous = error_context_stack,
		.callback = add_position,
		.arg = &position
	};

	deconstruct_array(batch, TEXTOID, -1, false, TYPALIGN_INT,
					  &elements, &nulls, count);
	ids = MemoryContextAllocHuge(CurrentMemoryContext,
								 sizeof(MessageId) * (Size) Max(*count, 1));

	error_context_stack = &context;
	for (; position < *count; position++)
	{
		if (nulls[position])
			elements[position] = PointerGetDatum(cstring_to_text(""));
		ScopeCheckKey(DatumGetTextPP(elements[position]));
		ids[position].id = elements[position];
		ids[position].position = position;
		ids[position].is_new = false;
	}
	error_context_stack = context.previous;

	return ids;
}

/*
 * Error context callback: say which id of the batch is meant.
 */
static void
add_position(void *arg)
{
	errcontext("element %d of message_ids", *(int *) arg + 1);
}

/*
 * Record the ids of a batch, and mark those that are new.
 */
static void
record_batch(MessageId *ids, int count, Scope *scope, int64 ttl)
{
	TimestampTz now = GetCurrentTimestamp();
	Store		store;
	Record		record;
	uint64		seen = 0;
	uint64		unseen = 0;

	qsort(ids, count, sizeof(MessageId), compare_ids);

	StoreOpen(&store, scope, RowExclusiveLock);
	RecordInit(&record, scope);
	RecordSetState(&record, RECORD_COMPLETED);
	RecordSet(&record, status_code, Int32GetDatum(STATUS_SEEN));
	RecordSet(&record, attempt, Int32GetDatum(1));
	RecordSet(&record, created_at, TimestampTzGetDatum(now));
	RecordSet(&record, finished_at, TimestampTzGetDatum(now));
	RecordSet(&record, expires_at, TimestampTzGetDatum(now + ttl));

	for (int i = 0; i < count; i++)
	{
		CHECK_FOR_INTERRUPTS();

		/* the second of two that are the same in the batch is not new */
		if (i > 0 && compare_texts(ids[i - 1].id, ids[i].id) == 0)
		{
			seen++;
			continue;
		}

		scope->parts[SCOPE_KEY] = ids[i].id;
		RecordSet(&record, key, ids[i].id);
		ids[i].is_new = record_id(&store, scope, &record);
		if (ids[i].is_new)
			unseen++;
		else
			seen++;
	}
	StoreClose(&store);

	/* as if each had been begun, and the new ones finished */
	EventCount(EVENT_STARTED, scope->parts[SCOPE_ACTION], unseen);
	EventCountAtCommit(EVENT_COMPLETED, scope->parts[SCOPE_ACTION], unseen);
	EventCount(EVENT_REPLAYED, scope->parts[SCOPE_ACTION], seen);
}

/*
 * Record an id, unless it was seen before.  Returns whether it is new.
 *
 * A row that counts as absent is replaced, and if it was that of a leased
 * claim, that is fenced off.
 *
 * A serializable transaction also has to know of an id that was recorded after
 * its snapshot was taken, and is swept already: that is not in the index any more
 * for who inserts.
 */
static bool
record_id(Store *store, const Scope *scope, Record *record)
{
	Record		found;

	if (IsolationIsSerializable())
	{
		(void) StoreFind(store, scope, GetCurrentTimestamp(), &found);
		StoreCheckSerializable(store);
	}

	while (!StoreInsertUnlessFound(store, record, &found))
	{
		StoreCheckSerializable(store);
		if (!is_over(&found))
			return false;
		if (StoreLock(store, true, &found) == ROW_LOCKED)
			(void) StoreDelete(store, true);
	}
	return true;
}

/*
 * Whether a row is no answer, and no claim that somebody holds.
 */
static bool
is_over(const Record *record)
{
	return LeaseIsOver(record) ||
		DatumGetTimestampTz(RecordValue(record, expires_at)) <=
		GetCurrentTimestamp();
}

/*
 * qsort comparator: by id, and the first of the batch first.
 */
static int
compare_ids(const void *a, const void *b)
{
	int			result = compare_texts(((const MessageId *) a)->id,
									   ((const MessageId *) b)->id);

	return result != 0 ? result : compare_positions(a, b);
}

/*
 * qsort comparator: in the order of the batch.
 */
static int
compare_positions(const void *a, const void *b)
{
	return ((const MessageId *) a)->position - ((const MessageId *) b)->position;
}

/*
 * Compare two texts by their bytes, as the primary key does.
 */
static int
compare_texts(Datum a, Datum b)
{
	text	   *text_a = DatumGetTextPP(a);
	text	   *text_b = DatumGetTextPP(b);
	int			len_a = VARSIZE_ANY_EXHDR(text_a);
	int			len_b = VARSIZE_ANY_EXHDR(text_b);
	int			result = memcmp(VARDATA_ANY(text_a), VARDATA_ANY(text_b),
								Min(len_a, len_b));

	return result != 0 ? result : len_a - len_b;
}
