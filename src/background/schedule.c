/*-------------------------------------------------------------------------
 *
 * schedule.c
 *	  schedule and unschedule: have pg_cron do the sweeping.
 *
 * This is for servers where the launcher does not run.  We depend on pg_cron
 * only here, and look for it when we are called.  It keeps all jobs of a server
 * in the one database that cron.database_name names, with the database that
 * each is for.  A job that is written down in any other database never runs,
 * and nothing would tell; so where the call is not made in that database, it
 * is refused, with the statement that does the same there.
 *
 * pg_cron identifies a job by its name and the role that it runs as, not by
 * its database.  For each database but its own, the name must say which.
 *
 * The schema cron is part of the extension pg_cron, which is not created where
 * somebody else has a schema of that name.  So if the extension is there, the
 * schema can be trusted.  Everything runs with the rights of the caller.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "catalog/pg_type_d.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "store/catalog.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"

#define JOB_NAME	"idempotency sweep"

/* The most parameters that a query has */
#define MAX_PARAMETERS	3

/* The type of jobname depends on the version of pg_cron */
#define UNSCHEDULE \
	"SELECT pg_catalog.count(cron.unschedule(jobid)) FROM cron.job" \
	" WHERE jobname OPERATOR(pg_catalog.=) $1" \
	" AND username OPERATOR(pg_catalog.=) current_user"

static char *get_command(void);
static char *quote_name_elsewhere(void);
static void check_cron(const char *elsewhere);
static const char *get_cron_database(void);
static int64 run_query(const char *query, int count, char **parameters);

PG_FUNCTION_INFO_V1(idempotency_schedule);
PG_FUNCTION_INFO_V1(idempotency_unschedule);

/*
 * idempotency_schedule(schedule text) returns bigint
 *
 * Have pg_cron sweep this database, and return the id of its job.  A job that
 * is there already gets the new schedule.
 *
 * Errors: 22004 for a null schedule, 25006 in a read-only transaction, those
 * of check_cron, and those of pg_cron: 22023 for a malformed schedule.
 */
Datum
idempotency_schedule(PG_FUNCTION_ARGS)
{
	char	   *job[MAX_PARAMETERS] = {JOB_NAME};

	PreventCommandIfReadOnly("idempotency_schedule()");

	if (PG_ARGISNULL(0))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("schedule is missing")));
	job[1] = text_to_cstring(PG_GETARG_TEXT_PP(0));
	job[2] = get_command();

	check_cron(psprintf("SELECT cron.schedule_in_database(%s, %s, %s, %s)",
						quote_name_elsewhere(), quote_literal_cstr(job[1]),
						quote_literal_cstr(job[2]),
						quote_literal_cstr(get_database_name(MyDatabaseId))));

	/*
	 * A job that is scheduled again can stay inactive, or keep the former
	 * name of a database.  Don't take over one that would not run here.
	 */
	(void) run_query(UNSCHEDULE " AND NOT (active AND database"
					 " OPERATOR(pg_catalog.=) pg_catalog.current_database())",
					 1, job);

	PG_RETURN_INT64(run_query("SELECT cron.schedule($1, $2, $3)", 3, job));
}

/*
 * idempotency_unschedule() returns boolean
 *
 * Drop the job, and say whether there was one.
 *
 * Errors: 25006 in a read-only transaction, and those of check_cron.
 */
Datum
idempotency_unschedule(PG_FUNCTION_ARGS)
{
	char	   *name = JOB_NAME;

	PreventCommandIfReadOnly("idempotency_unschedule()");
	check_cron(psprintf("SELECT cron.unschedule(%s)", quote_name_elsewhere()));

	PG_RETURN_BOOL(run_query(UNSCHEDULE, 1, &name) > 0);
}

/*
 * What the job does.
 */
static char *
get_command(void)
{
	return psprintf("CALL %s()",
					quote_qualified_identifier(get_namespace_name(CatalogSchema()),
											   "idempotency_sweep"));
}

/*
 * The name, as a literal, of the job for this database where jobs are kept in
 * another one.
 */
static char *
quote_name_elsewhere(void)
{
	return quote_literal_cstr(psprintf("%s of %s", JOB_NAME,
									   get_database_name(MyDatabaseId)));
}

/*
 * Make sure that pg_cron runs the jobs of this database.
 *
 * "elsewhere" is the statement to use where it keeps them in another database.
 *
 * Errors: 55000 when pg_cron is not loaded or keeps its jobs elsewhere, 42704
 * when its extension is missing.
 */
static void
check_cron(const char *elsewhere)
{
	const char *database = get_cron_database();

	if (database == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("pg_cron is not loaded"),
				 errdetail("It runs jobs only when it is in \"shared_preload_libraries\"."),
				 errhint("Install pg_cron and add it there. Or add \"idempotency\" and turn \"idempotency.worker\" on, which needs no pg_cron.")));

	if (strcmp(database, get_database_name(MyDatabaseId)) != 0)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("pg_cron does not keep its jobs in this database"),
				 errdetail("It keeps them in database \"%s\".", database),
				 errhint("Run there: %s", elsewhere)));

	if (!OidIsValid(get_extension_oid("pg_cron", true)))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("extension \"pg_cron\" does not exist"),
				 errhint("Use CREATE EXTENSION pg_cron to create it in this database.")));
}

/*
 * The database where pg_cron keeps its jobs, or null when it is not loaded.
 *
 * The setting is pg_cron's only when that is loaded; before, it is a
 * placeholder, which anybody can set.  Its value is for administrators, but
 * the database of the launcher of pg_cron is shown to all in pg_stat_activity.
 */
static const char *
get_cron_database(void)
{
	const char *setting = "cron.database_name";

	if (GetConfigOptionFlags(setting, true) & GUC_CUSTOM_PLACEHOLDER)
		return NULL;
	return GetConfigOption(setting, true, false);
}

/*
 * Run a query that gives one bigint, with parameters of type text.
 */
static int64
run_query(const char *query, int count, char **parameters)
{
	Oid			types[MAX_PARAMETERS];
	Datum		values[MAX_PARAMETERS];
	bool		isnull;
	int64		result;

	for (int i = 0; i < count; i++)
	{
		types[i] = TEXTOID;
		values[i] = CStringGetTextDatum(parameters[i]);
	}

	SPI_connect();
	if (SPI_execute_with_args(query, count, types, values, NULL,
							  false, 0) != SPI_OK_SELECT)
		elog(ERROR, "unexpected result of query: %s", query);
	result = DatumGetInt64(SPI_getbinval(SPI_tuptable->vals[0],
										 SPI_tuptable->tupdesc, 1, &isnull));
	SPI_finish();

	return result;
}
