/*
 * main.c
 *	  Pays by payments.c, and checks each promise.
 *
 * DATABASE_URL names a database with the extension and the tables of tables.sql,
 * anew.  A line for each promise says whether it was kept; the first that was not
 * ends the program with status 1.
 */
#include "payments.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BODY "{\"account\": \"zo\xc3\xab\", \"amount\": 20, \"invoice\": 9007199254740993}"
#define PAID_20 "{\"account\" : \"zo\xc3\xab\", \"paid\" : 20}"
#define REQUEST(amount, invoice) \
	"{\"account\": \"zo\xc3\xab\", \"amount\": " #amount ", \"invoice\": " #invoice "}"

static PGconn *service;			/* pays */
static PGconn *other;			/* is in the way */
static PGconn *observer;		/* looks */

static const char *promised;	/* what is being checked */

static void
fail(const char *expected, const char *found)
{
	printf("failed: %s: expected %s, found %s\n", promised, expected, found);
	exit(1);
}

static void
expect(const char *expected, const char *found)
{
	if (strcmp(expected, found) != 0)
		fail(expected, found);
}

static void
expect_success(bool success, const Failure *failure)
{
	if (!success)
		fail("success", failure->message);
}

static void
expect_failure(const char *sqlstate, bool success, const Failure *failure)
{
	expect(sqlstate, success ? "success" : failure->sqlstate);
}

/* The first value that a query returns, until the next call */
static const char *
query(const char *sql)
{
	static char value[200];
	PGresult   *row = PQexec(observer, sql);

	if (PQresultStatus(row) != PGRES_TUPLES_OK)
		fail("a row", PQresultErrorMessage(row));
	snprintf(value, sizeof(value), "%s", PQgetvalue(row, 0, 0));
	PQclear(row);
	return value;
}

static void
expect_state(const char *state)
{
	expect(state, query("SELECT format('payments %s, balance %s',"
						" (SELECT count(*) FROM payments), balance) FROM accounts"));
}

static void
expect_nothing_known_of(const char *key)
{
	char		sql[200];

	snprintf(sql, sizeof(sql),
			 "SELECT coalesce(outcome, 'nothing')"
			 " FROM idempotency.idempotency_replay('acme', 'payments.create', '%s')", key);
	expect("nothing", query(sql));
}

/* Pay, and expect a status, and a body unless it is NULL; returns Retry-After */
static int
expect_answer(PGconn *conn, const char *key, const char *request, int status, const char *body)
{
	Answer		answer;
	Failure		failure;
	char		wanted[12];
	char		found[12];

	expect_success(pay(conn, key, request, &answer, &failure), &failure);
	snprintf(wanted, sizeof(wanted), "%d", status);
	snprintf(found, sizeof(found), "%d", answer.status);
	expect(wanted, found);
	if (body)
		expect(body, answer.body);
	free(answer.body);
	return answer.retry_after;
}

static void
begin_transaction(PGconn *conn, const char *key, const char *request)
{
	Answer		answer;
	Failure		failure;
	bool		started;

	PQclear(PQexec(conn, "BEGIN"));
	expect_success(begin_request(conn, key, request, &started, &answer, &failure), &failure);
	expect("started", started ? "started" : "replayed");
}

static void
pays_once(void)
{
	expect_answer(service, "key-1", BODY, 201, PAID_20);
	expect_state("payments 1, balance 80");
}

static void
replays(void)
{
	expect_answer(service, "key-1",
				  "{\"invoice\":9007199254740993,\"amount\":20.0,\"account\":\"zo\\u00eb\"}",
				  201, PAID_20);
	expect_state("payments 1, balance 80");
}

static void
refuses_malformed(void)
{
	expect_answer(service, "", BODY, 400, NULL);
	expect_answer(service, "key-0", "{\"account\": \"zo", 400, NULL);
	expect_answer(service, "key-0", "{\"account\": \"\\u0000\"}", 400, NULL);
}

/* Pairs of numbers that a parser of JSON with 64 bits for a number makes one */
static void
refuses_mismatch(void)
{
	expect_answer(service, "key-1", REQUEST(20, 9007199254740992), 422, NULL);
	expect_answer(service, "key-1", REQUEST(20.00000000000000000001, 9007199254740993), 422, NULL);
	expect_state("payments 1, balance 80");
}

static void
tells_in_flight(void)
{
	begin_transaction(other, "key-2", REQUEST(10, 2));
	if (expect_answer(service, "key-2", REQUEST(10, 2), 409, NULL) < 1)
		fail("Retry-After", "none");
	expect_state("payments 1, balance 80");

	PQclear(PQexec(other, "ROLLBACK"));
	expect_answer(service, "key-2", REQUEST(10, 2), 201, NULL);
	expect_state("payments 2, balance 70");
}

static void
cannot_forget_finish(void)
{
	Answer		answer;
	Failure		failure;

	begin_transaction(service, "key-3", REQUEST(10, 3));
	expect_success(do_payment(service, REQUEST(10, 3), &answer, &failure), &failure);
	free(answer.body);
	expect_failure("ID006", commit_work(service, &failure), &failure);
	expect_state("payments 2, balance 70");
	expect_nothing_known_of("key-3");

	expect_answer(service, "key-3", REQUEST(10, 3), 201, NULL);
	expect_state("payments 3, balance 60");
}

static void
keeps_refusal(void)
{
	expect_answer(service, "key-4", REQUEST(900, 4), 402, "{\"error\": \"not enough money\"}");
	expect_state("payments 3, balance 60");

	query("UPDATE accounts SET balance = balance + 1000 RETURNING id");
	expect_answer(service, "key-4", REQUEST(900, 4), 402, "{\"error\": \"not enough money\"}");
	expect_state("payments 3, balance 1060");
}

/* Another key pays an invoice again, and the deferred constraint fails in COMMIT */
static void
reports_failed_commit(void)
{
	Answer		answer;
	Failure		failure;

	expect_failure("23505", pay(service, "key-5", BODY, &answer, &failure), &failure);
	expect_state("payments 3, balance 1060");
	expect_nothing_known_of("key-5");
	expect_answer(service, "key-1", BODY, 201, PAID_20);
}

static void
reports_swallowed_error(void)
{
	Answer		answer;
	Failure		failure;

	begin_transaction(service, "key-6", REQUEST(10, 6));
	expect_success(do_payment(service, REQUEST(10, 6), &answer, &failure), &failure);
	expect_success(finish_request(service, "key-6", &answer, &failure), &failure);
	free(answer.body);
	PQclear(PQexec(service, "INSERT INTO audit_log_that_is_missing VALUES (1)"));
	expect_failure("25P02", commit_work(service, &failure), &failure);
	expect_state("payments 3, balance 1060");
	expect_nothing_known_of("key-6");
}

static void
reports_failed_finish(void)
{
	Answer		answer;
	Failure		failure;

	expect_failure("ID007", pay(service, "key-7", REQUEST(10, 14), &answer, &failure), &failure);
	expect_state("payments 3, balance 1060");
	expect_nothing_known_of("key-7");
}

static void
loses_connection(void)
{
	Answer		answer;
	Failure		failure;

	if (pay(service, "key-8", REQUEST(10, 13), &answer, &failure))
		fail("a failure", answer.body);
	expect_state("payments 3, balance 1060");

	expect_answer(other, "key-8", REQUEST(10, 13), 201, NULL);
	expect_state("payments 4, balance 1050");
}

static void
promise(const char *what, void (*check) (void))
{
	promised = what;
	check();
	printf("ok: %s\n", what);
}

static PGconn *
connect_to_database(void)
{
	PGconn	   *conn = PQconnectdb(getenv("DATABASE_URL"));

	if (PQstatus(conn) != CONNECTION_OK)
		fail("a connection", PQerrorMessage(conn));
	return conn;
}

int
main(void)
{
	promised = "to connect";
	service = connect_to_database();
	other = connect_to_database();
	observer = connect_to_database();

	promise("a payment is made once, and committed with its answer", pays_once);
	promise("a repeat gets the same bytes, and pays nothing", replays);
	promise("a malformed key or body is answered with 400", refuses_malformed);
	promise("another request under the key is answered with 422", refuses_mismatch);
	promise("a request in flight is answered with 409 and Retry-After", tells_in_flight);
	promise("a commit without finish is refused, and leaves no row", cannot_forget_finish);
	promise("a 402 is kept, and its rows are not", keeps_refusal);
	promise("an answer whose commit fails is not given", reports_failed_commit);
	promise("an answer whose error was swallowed is not given", reports_swallowed_error);
	promise("an answer that cannot be kept is not given", reports_failed_finish);
	promise("a connection lost in COMMIT is an error, and a repeat pays once", loses_connection);

	PQfinish(service);
	PQfinish(other);
	PQfinish(observer);
	return 0;
}
