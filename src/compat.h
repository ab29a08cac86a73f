/*-------------------------------------------------------------------------
 *
 * compat.h
 *	  Everything that differs between the supported PostgreSQL versions.
 *
 * The rest of the source is written for the newest version; the definitions
 * here make older servers look like it, so that no other file needs a version
 * test.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_COMPAT_H
#define IDEMPOTENCY_COMPAT_H

#include "postgres.h"

#if PG_VERSION_NUM < 150000
#error "idempotency needs PostgreSQL 15 or later"
#endif

#include "access/genam.h"
#include "access/table.h"
#include "access/tableam.h"
#include "catalog/pg_database.h"
#include "catalog/pg_extension.h"
#include "commands/explain.h"
#include "commands/extension.h"
#include "executor/executor.h"
#include "storage/shmem.h"
#include "utils/fmgroids.h"
#include "utils/guc_tables.h"
#include "utils/relcache.h"

#if PG_VERSION_NUM < 190000
#include "commands/dbcommands.h"	/* had get_database_name() */
#endif

#if PG_VERSION_NUM >= 180000
#include "commands/explain_format.h"	/* was part of explain.h */
#endif

#if PG_VERSION_NUM >= 160000
#include "varatt.h"				/* was part of postgres.h */
#endif

/* Minor versions learned to mark a database whose DROP did not come to its end */
#ifndef DATCONNLIMIT_INVALID_DB
#define DATCONNLIMIT_INVALID_DB	(-2)
#endif

#if PG_VERSION_NUM < 180000
/* replaces pg_attribute_noreturn(), which stood behind the declaration */
#define pg_noreturn __attribute__((noreturn))
#endif

#if PG_VERSION_NUM < 190000

/* ShmemInitHash() lost the initial size */
#define ShmemInitHash(name, nelems, info, flags) \
	ShmemInitHash(name, nelems, nelems, info, flags)

/* table_tuple_delete() got options; none of them is known before */
#define table_tuple_delete(rel, tid, cid, options, snapshot, crosscheck, wait, failure) \
	table_tuple_delete(rel, tid, cid, snapshot, crosscheck, wait, failure, false)

/* ExecInsertIndexTuples() got flags for what were three arguments */
#define EIIT_IS_UPDATE			(1<<0)
#define EIIT_NO_DUPE_ERROR		(1<<1)
#define EIIT_ONLY_SUMMARIZING	(1<<2)
#if PG_VERSION_NUM >= 160000
#define ExecInsertIndexTuples(rri, estate, flags, slot, arbiters, conflict) \
	ExecInsertIndexTuples(rri, slot, estate, ((flags) & EIIT_IS_UPDATE) != 0, \
						  ((flags) & EIIT_NO_DUPE_ERROR) != 0, conflict, arbiters, \
						  ((flags) & EIIT_ONLY_SUMMARIZING) != 0)
#else
#define ExecInsertIndexTuples(rri, estate, flags, slot, arbiters, conflict) \
	ExecInsertIndexTuples(rri, slot, estate, ((flags) & EIIT_IS_UPDATE) != 0, \
						  ((flags) & EIIT_NO_DUPE_ERROR) != 0, conflict, arbiters)
#endif

/* index_beginscan() got flags, and before them a place for statistics */
#if PG_VERSION_NUM >= 180000
#define index_beginscan(heap, index, snapshot, instrument, nkeys, norderbys, flags) \
	index_beginscan(heap, index, snapshot, instrument, nkeys, norderbys)
#else
#define index_beginscan(heap, index, snapshot, instrument, nkeys, norderbys, flags) \
	index_beginscan(heap, index, snapshot, nkeys, norderbys)
#endif

#endif							/* before 19 */

#if PG_VERSION_NUM < 180000

/* RelationGetPrimaryKeyIndex() learned to return a deferrable one */
#define RelationGetPrimaryKeyIndex(rel, deferrable_ok) \
	RelationGetPrimaryKeyIndex(rel)

/* ExecCheckIndexConstraints() got the row that is to be passed over */
#define ExecCheckIndexConstraints(rri, slot, estate, conflict, tupleid, arbiters) \
	ExecCheckIndexConstraints(rri, slot, estate, conflict, arbiters)

#endif							/* before 18 */

#if PG_VERSION_NUM < 170000

/* Was renamed when it lost some of its members */
#define TransamVariables ShmemVariableCache

/* What an index keeps from one insertion to the next needs to be let go of */
#define index_insert_cleanup(index, info) ((void) (info))

#endif							/* before 17 */

#if PG_VERSION_NUM < 160000

/* The extra data of a setting moved from malloc to a memory context */
#define guc_malloc(elevel, size) malloc(size)

/* get_guc_variables() gives an array that the caller may free */
static inline struct config_generic **
copy_guc_variables(int *num_vars)
{
	Size		size;
	struct config_generic **result;

	*num_vars = GetNumConfigOptions();
	size = *num_vars * sizeof(struct config_generic *);
	result = palloc(size);
	memcpy(result, get_guc_variables(), size);
	return result;
}

#define get_guc_variables(num_vars) copy_guc_variables(num_vars)

/*
 * An update told only whether there is anything to do for indexes, which is
 * then to be done for all of them.
 */
#define TU_UpdateIndexes	bool
#define TU_None				false
#define TU_Summarizing		TU_None

/* The right to use an object was asked for by a function for each kind */
#define object_aclcheck(classid, objectid, roleid, mode) \
	((classid) == NamespaceRelationId ? \
	 pg_namespace_aclcheck(objectid, roleid, mode) : \
	 pg_proc_aclcheck(objectid, roleid, mode))

/* get_extension_schema() was private to extension.c */
static inline Oid
get_extension_schema(Oid ext_oid)
{
	Relation	rel = table_open(ExtensionRelationId, AccessShareLock);
	ScanKeyData entry;
	SysScanDesc scan;
	HeapTuple	tuple;
	Oid			result = InvalidOid;

	ScanKeyInit(&entry, Anum_pg_extension_oid, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(ext_oid));
	scan = systable_beginscan(rel, ExtensionOidIndexId, true, NULL, 1, &entry);
	tuple = systable_getnext(scan);
	if (HeapTupleIsValid(tuple))
		result = ((Form_pg_extension) GETSTRUCT(tuple))->extnamespace;
	systable_endscan(scan);
	table_close(rel, AccessShareLock);

	return result;
}

#endif							/* before 16 */

#endif							/* IDEMPOTENCY_COMPAT_H */
