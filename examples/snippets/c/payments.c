/*
 * payments.c
 *	  A payment that a client can repeat, with libpq.
 *
 * begin, the work and finish are one transaction, so the payment and its answer are
 * committed together or not at all.  A repeat is answered by begin, with the text
 * that was stored.
 *
 * The server answers the COMMIT of a failed transaction with ROLLBACK, and the status
 * of that result is PGRES_COMMAND_OK.  Who looks at nothing else tells the client 201,
 * and nothing is stored: commit_work looks at the command tag.
 *
 * Parameters are sent as text without a type, which suits every argument.  The database
 * reads the body, so that numbers stay as they are.
 */
#define _POSIX_C_SOURCE 200809L

#include "payments.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Whose data it is; a service takes it from the log-in, never from the body */
#define TENANT "acme"
#define ACTION "payments.create"

#define CHECK_VIOLATION "23514"
#define IN_FAILED_TRANSACTION "25P02"

/* The number in the hint of ID003, "Retry after 2 s." */
static int
seconds_of(const char *hint)
{
	const char *digits = hint ? strpbrk(hint, "0123456789") : NULL;

	return digits ? atoi(digits) : 1;
}

/* Keep what a result that is an error says */
static void
describe(const PGconn *conn, const PGresult *result, Failure *failure)
{
	const char *sqlstate = PQresultErrorField(result, PG_DIAG_SQLSTATE);
	const char *message = PQresultErrorField(result, PG_DIAG_MESSAGE_PRIMARY);

	memset(failure, 0, sizeof(*failure));
	snprintf(failure->sqlstate, sizeof(failure->sqlstate), "%s", sqlstate ? sqlstate : "");
	snprintf(failure->message, sizeof(failure->message), "%s",
			 message ? message : PQerrorMessage(conn));
	if (strcmp(failure->sqlstate, "ID003") == 0)
		failure->retry_after = seconds_of(PQresultErrorField(result, PG_DIAG_MESSAGE_HINT));
}

/* Run a statement; returns its result, to be cleared, or NULL with a failure */
static PGresult *
call(PGconn *conn, const char *sql, int count, const char *const *values, Failure *failure)
{
	PGresult   *result = PQexecParams(conn, sql, count, NULL, values, NULL, NULL, 0);
	ExecStatusType status = PQresultStatus(result);

	if (status == PGRES_TUPLES_OK || status == PGRES_COMMAND_OK)
		return result;
	describe(conn, result, failure);
	PQclear(result);
	return NULL;
}

/* Run a statement whose result does not matter */
static bool
run(PGconn *conn, const char *sql, int count, const char *const *values, Failure *failure)
{
	PGresult   *result = call(conn, sql, count, values, failure);

	PQclear(result);
	return result != NULL;
}

static void
set_answer(Answer *answer, int status, const char *body)
{
	answer->status = status;
	answer->body = strdup(body);
	answer->retry_after = 0;
}

/*
 * begin_request
 *		Claim the request, which then is started; or get its answer, if it has one.
 */
bool
begin_request(PGconn *conn, const char *key, const char *body,
			  bool *started, Answer *answer, Failure *failure)
{
	const char *values[] = {TENANT, ACTION, key, body};
	PGresult   *row = call(conn,
						   "SELECT outcome, status_code, response::text"
						   " FROM idempotency.idempotency_begin($1, $2, $3, $4)",
						   4, values, failure);

	if (!row)
		return false;
	*started = strcmp(PQgetvalue(row, 0, 0), "started") == 0;
	if (!*started)
		set_answer(answer, atoi(PQgetvalue(row, 0, 1)), PQgetvalue(row, 0, 2));
	PQclear(row);
	return true;
}

/*
 * do_payment
 *		Do the work.
 */
bool
do_payment(PGconn *conn, const char *body, Answer *answer, Failure *failure)
{
	PGresult   *row;

	if (!run(conn,
			 "INSERT INTO payments (account, amount, invoice)"
			 " SELECT account, amount, invoice"
			 " FROM jsonb_to_record($1) AS r (account text, amount numeric, invoice bigint)",
			 1, &body, failure))
		return false;
	row = call(conn,
			   "UPDATE accounts SET balance = balance - amount"
			   " FROM jsonb_to_record($1) AS r (account text, amount numeric)"
			   " WHERE id = account"
			   " RETURNING json_build_object('account', account, 'paid', amount)::text",
			   1, &body, failure);
	if (!row)
		return false;
	set_answer(answer, 201, PQgetvalue(row, 0, 0));
	PQclear(row);
	return true;
}

/* Do the work, or make an answer to keep of its failure, whose rows are rolled back */
static bool
pay_or_refuse(PGconn *conn, const char *body, Answer *answer, Failure *failure)
{
	if (!run(conn, "SAVEPOINT work", 0, NULL, failure))
		return false;
	if (do_payment(conn, body, answer, failure))
		return true;
	if (strcmp(failure->sqlstate, CHECK_VIOLATION) != 0 ||
		!run(conn, "ROLLBACK TO SAVEPOINT work", 0, NULL, failure))
		return false;
	set_answer(answer, 402, "{\"error\": \"not enough money\"}");
	return true;
}

/*
 * finish_request
 *		Store the answer: the last statement before COMMIT.
 */
bool
finish_request(PGconn *conn, const char *key, const Answer *answer, Failure *failure)
{
	char		status[12];
	const char *values[] = {TENANT, ACTION, key, status, answer->body};

	snprintf(status, sizeof(status), "%d", answer->status);
	return run(conn, "SELECT idempotency.idempotency_finish($1, $2, $3, $4, $5)",
			   5, values, failure);
}

/*
 * commit_work
 *		Commit; a transaction that failed, which COMMIT rolls back, is a failure.
 */
bool
commit_work(PGconn *conn, Failure *failure)
{
	PGresult   *result = call(conn, "COMMIT", 0, NULL, failure);
	bool		committed = result && strcmp(PQcmdStatus(result), "COMMIT") == 0;

	if (result && !committed)
		*failure = (Failure) {IN_FAILED_TRANSACTION, "the transaction has failed", 0};
	PQclear(result);
	return committed;
}

/* Make an answer of a failure of begin; false for any other failure */
static bool
refuse(const Failure *failure, Answer *answer)
{
	static const struct
	{
		const char *sqlstate;
		int			status;
		const char *body;
	}			refusals[] =
	{
		{"ID001", 400, "{\"error\": \"key or body is malformed\"}"},
		{"ID002", 400, "{\"error\": \"key or body is malformed\"}"},
		{"22P02", 400, "{\"error\": \"key or body is malformed\"}"},
		{"22P05", 400, "{\"error\": \"key or body is malformed\"}"},
		{"ID003", 409, "{\"error\": \"request is in flight\"}"},
		{"ID004", 422, "{\"error\": \"key was used with a different request\"}"},
		{"ID005", 409, "{\"error\": \"another request was faster\"}"},
	};

	for (size_t i = 0; i < sizeof(refusals) / sizeof(refusals[0]); i++)
	{
		if (strcmp(failure->sqlstate, refusals[i].sqlstate) == 0)
		{
			set_answer(answer, refusals[i].status, refusals[i].body);
			answer->retry_after = failure->retry_after;
			return true;
		}
	}
	return false;
}

bool
pay(PGconn *conn, const char *key, const char *body, Answer *answer, Failure *failure)
{
	bool		started = false;

	answer->body = NULL;
	if (run(conn, "BEGIN", 0, NULL, failure) &&
		begin_request(conn, key, body, &started, answer, failure) &&
		(!started ||
		 (pay_or_refuse(conn, body, answer, failure) &&
		  finish_request(conn, key, answer, failure))) &&
		commit_work(conn, failure))
		return true;

	free(answer->body);
	answer->body = NULL;
	if (PQtransactionStatus(conn) != PQTRANS_IDLE)
		PQclear(PQexec(conn, "ROLLBACK"));
	return refuse(failure, answer);
}
