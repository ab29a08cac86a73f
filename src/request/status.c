/*-------------------------------------------------------------------------
 *
 * status.c
 *	  What an HTTP status means for the record of a request.
 *
 * An answer is kept when repeating the request could not give a better one.
 * That holds for every status below 400, and for an error that says that the
 * request itself is at fault.  It does not hold for an error that says "not
 * now": those are listed in idempotency.retryable_status, and nothing is kept
 * of them.  The list may not name a status below 400, because forgetting a
 * success is how work gets done twice.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "nodes/pg_list.h"
#include "request/status.h"
#include "utils/varlena.h"

#define FIRST_ERROR_STATUS	400
#define NUM_ERROR_STATUSES	(STATUS_MAX - FIRST_ERROR_STATUS + 1)

/* idempotency.retryable_status, parsed: one flag per status from 400 on */
typedef struct RetryableStatuses
{
	bool		retryable[NUM_ERROR_STATUSES];
} RetryableStatuses;

static bool parse_item(const char *item, RetryableStatuses *statuses);

static RetryableStatuses *retryable_statuses;

/*
 * Whether this is an HTTP status, from STATUS_MIN to STATUS_MAX.
 */
bool
StatusIsValid(const NullableDatum *status)
{
	return !status->isnull &&
		DatumGetInt32(status->value) >= STATUS_MIN &&
		DatumGetInt32(status->value) <= STATUS_MAX;
}

/*
 * What becomes of a request that is finished with this status.
 *
 * status must be from STATUS_MIN to STATUS_MAX.
 */
StatusClass
StatusClassify(int status)
{
	Assert(status >= STATUS_MIN && status <= STATUS_MAX);

	if (status < FIRST_ERROR_STATUS)
		return STATUS_COMPLETED;
	if (retryable_statuses->retryable[status - FIRST_ERROR_STATUS])
		return STATUS_RELEASED;
	return STATUS_ERRORED;
}

/*
 * What finish says of a request.
 */
const char *
StatusClassName(StatusClass class)
{
	static const char *const names[] = {
		[STATUS_COMPLETED] = "completed",
		[STATUS_ERRORED] = "errored",
		[STATUS_RELEASED] = "released",
	};

	return names[class];
}

/*
 * Check hook of idempotency.retryable_status: parses the list.
 */
bool
StatusCheckRetryable(char **newval, void **extra, GucSource source)
{
	char	   *rawstring = pstrdup(*newval);
	List	   *items;
	ListCell   *lc;
	RetryableStatuses statuses = {0};

	if (!SplitIdentifierString(rawstring, ',', &items))
	{
		GUC_check_errdetail("List syntax is invalid.");
		return false;
	}

	foreach(lc, items)
	{
		const char *item = lfirst(lc);

		if (!parse_item(item, &statuses))
		{
			GUC_check_errdetail("\"%s\" is neither a status from %d to %d nor one of the classes 4xx and 5xx.",
								item, FIRST_ERROR_STATUS, STATUS_MAX);
			return false;
		}
	}

	*extra = guc_malloc(LOG, sizeof(RetryableStatuses));
	if (*extra == NULL)
		return false;
	memcpy(*extra, &statuses, sizeof(RetryableStatuses));
	return true;
}

/*
 * Assign hook of idempotency.retryable_status.
 */
void
StatusAssignRetryable(const char *newval, void *extra)
{
	retryable_statuses = extra;
}

/*
 * Set the flags for one item of the list, such as "429" or "5xx".
 */
static bool
parse_item(const char *item, RetryableStatuses *statuses)
{
	int			first;
	int			count;

	if (strlen(item) != 3 || (item[0] != '4' && item[0] != '5'))
		return false;

	if (item[1] == 'x' && item[2] == 'x')
	{
		first = (item[0] - '0') * 100;
		count = 100;
	}
	else if (strspn(item, "0123456789") == 3)
	{
		first = atoi(item);
		count = 1;
	}
	else
		return false;

	memset(&statuses->retryable[first - FIRST_ERROR_STATUS], true, count);
	return true;
}
