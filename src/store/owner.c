/*-------------------------------------------------------------------------
 *
 * owner.c
 *	  Acting with the rights of the owner of a table.
 *
 * What is done in the background, or on behalf of somebody who may call a
 * function but has no right on its table, is done as the owner of the table,
 * restricted as maintenance commands are.  So whatever the owner has attached
 * to the table runs with no more rights than the owner's own, and cannot make
 * a setting or a role outlast it.  And it finds nothing by a search_path that
 * somebody else has chosen.
 *
 * An error restores what was before with the end of the transaction.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "access/htup_details.h"
#include "catalog/pg_class.h"
#include "miscadmin.h"
#include "store/owner.h"
#include "utils/guc.h"
#include "utils/syscache.h"

/*
 * Become the owner of a table, which is locked.
 */
void
OwnerBecome(Owner *owner, Oid table)
{
	HeapTuple	tuple = SearchSysCache1(RELOID, ObjectIdGetDatum(table));

	if (!HeapTupleIsValid(tuple))
		elog(ERROR, "cache lookup failed for relation %u", table);

	GetUserIdAndSecContext(&owner->user, &owner->sec_context);
	SetUserIdAndSecContext(((Form_pg_class) GETSTRUCT(tuple))->relowner,
						   owner->sec_context | SECURITY_RESTRICTED_OPERATION);
	ReleaseSysCache(tuple);

	owner->nest_level = NewGUCNestLevel();
	(void) set_config_option("search_path", "pg_catalog, pg_temp",
							 PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_SAVE, true, 0, false);
}

/*
 * Be who we were before.
 */
void
OwnerLeave(const Owner *owner)
{
	AtEOXact_GUC(false, owner->nest_level);
	SetUserIdAndSecContext(owner->user, owner->sec_context);
}
