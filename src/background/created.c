/*-------------------------------------------------------------------------
 *
 * created.c
 *	  Noticing that the extension is created.
 *
 * Whether a database has the extension can only be seen from within, and the
 * launcher does not look often where it has none.  So who creates it tells the
 * launcher, when that is committed.  If that is done in a transaction that is
 * prepared, no code of ours can tell what becomes of it, so each COMMIT PREPARED
 * looks whether its database has the extension and has never been seen to.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "background/created.h"
#include "background/worker_shared.h"
#include "background/worker_status.h"
#include "catalog/objectaccess.h"
#include "tcop/utility.h"
#include "transaction.h"
#include "utils/fmgroids.h"
#include "utils/inval.h"
#include "utils/snapmgr.h"

static void note_object(ObjectAccessType access, Oid classId, Oid objectId,
						int subId, void *arg);
static bool is_ours(Oid extension);
static void at_end_of_xact(XactEvent event);
static void run_utility(PlannedStmt *statement, const char *query,
						bool read_only_tree, ProcessUtilityContext context,
						ParamListInfo params, QueryEnvironment *environment,
						DestReceiver *dest, QueryCompletion *completion);

static object_access_hook_type previous_object_access_hook = NULL;
static ProcessUtility_hook_type previous_process_utility_hook = NULL;

/* whether this transaction creates our extension */
static bool creates_extension = false;

/*
 * Hook into the creation of objects, and the end of transactions.
 */
void
CreatedInit(void)
{
	previous_object_access_hook = object_access_hook;
	object_access_hook = note_object;
	previous_process_utility_hook = ProcessUtility_hook;
	ProcessUtility_hook = run_utility;
	TransactionAtEnd(AT_END_CREATED, at_end_of_xact, NULL);
}

/*
 * object_access hook: note that our extension is being created.
 */
static void
note_object(ObjectAccessType access, Oid classId, Oid objectId, int subId,
			void *arg)
{
	if (previous_object_access_hook)
		previous_object_access_hook(access, classId, objectId, subId, arg);

	if (access == OAT_POST_CREATE && classId == ExtensionRelationId &&
		is_ours(objectId))
		creates_extension = true;
}

/*
 * Whether an extension that is just being created is ours.
 *
 * The command counter has not been incremented yet, so that no catalog
 * snapshot shows its row.
 */
static bool
is_ours(Oid extension)
{
	Relation	rel = table_open(ExtensionRelationId, AccessShareLock);
	ScanKeyData key;
	SysScanDesc scan;
	HeapTuple	tuple;
	bool		result;

	ScanKeyInit(&key, Anum_pg_extension_oid, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(extension));
	scan = systable_beginscan(rel, ExtensionOidIndexId, true, SnapshotSelf,
							  1, &key);
	tuple = systable_getnext(scan);
	result = HeapTupleIsValid(tuple) &&
		strcmp(NameStr(((Form_pg_extension) GETSTRUCT(tuple))->extname),
			   EXTENSION_NAME) == 0;
	systable_endscan(scan);
	table_close(rel, AccessShareLock);

	return result;
}

/*
 * The end of a transaction: tell the launcher of an extension that is there now.
 */
static void
at_end_of_xact(XactEvent event)
{
	if (!creates_extension)
		return;

	if (event == XACT_EVENT_COMMIT)
		WorkerSharedTellLauncher();
	creates_extension = false;
}

/*
 * ProcessUtility hook: tell the launcher of an extension that is there now
 * because a prepared transaction was committed.
 */
static void
run_utility(PlannedStmt *statement, const char *query, bool read_only_tree,
			ProcessUtilityContext context, ParamListInfo params,
			QueryEnvironment *environment, DestReceiver *dest,
			QueryCompletion *completion)
{
	/* the statement may be freed by what it does */
	bool		commits_prepared = IsA(statement->utilityStmt, TransactionStmt) &&
		castNode(TransactionStmt, statement->utilityStmt)->kind ==
		TRANS_STMT_COMMIT_PREPARED;

	if (previous_process_utility_hook)
		previous_process_utility_hook(statement, query, read_only_tree, context,
									  params, environment, dest, completion);
	else
		standard_ProcessUtility(statement, query, read_only_tree, context,
								params, environment, dest, completion);

	if (commits_prepared && !WorkerStatusKnown())
	{
		/* we may have looked before, and remember that there was none */
		AcceptInvalidationMessages();
		if (OidIsValid(get_extension_oid(EXTENSION_NAME, true)))
			WorkerSharedTellLauncher();
	}
}
