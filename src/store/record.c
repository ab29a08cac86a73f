/*-------------------------------------------------------------------------
 *
 * record.c
 *	  Records.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "store/record.h"

/*
 * Make a record of a scope; all other columns are null.
 */
void
RecordInit(Record *record, const Scope *scope)
{
	memset(record->values, 0, sizeof(record->values));
	memset(record->nulls, true, sizeof(record->nulls));

	for (int i = 0; i < SCOPE_PARTS; i++)
	{
		record->values[i] = scope->parts[i];
		record->nulls[i] = false;
	}
}

/*
 * Refuse a second record for a scope.
 *
 * Errors: ID005.
 */
void
RecordRaiseLost(void)
{
	ereport(ERROR,
			(errcode(ERRCODE_IDEMPOTENCY_CLAIM_LOST),
			 errmsg("claim was lost to another transaction"),
			 errdetail("A record for the same request was committed meanwhile."),
			 errhint("Roll back and call idempotency_begin again: it replays the stored answer.")));
}
