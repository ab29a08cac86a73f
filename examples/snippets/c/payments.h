/*
 * payments.h
 *	  A payment that a client can repeat, with libpq.
 */
#ifndef PAYMENTS_H
#define PAYMENTS_H

#include <libpq-fe.h>
#include <stdbool.h>

/* What to answer a client */
typedef struct Answer
{
	int			status;			/* the HTTP status */
	char	   *body;			/* a JSON text, to be freed */
	int			retry_after;	/* seconds for the header Retry-After, or 0 */
} Answer;

/* What went wrong, if it was not the request */
typedef struct Failure
{
	char		sqlstate[6];	/* "" where the server did not send one */
	char		message[512];
	int			retry_after;	/* of ID003, else 0 */
} Failure;

/*
 * pay
 *		Pays once for each key, and answers every repeat with the first answer.
 *
 * No transaction may be open on the connection, nor is one afterwards.  The key is
 * what the client sent as Idempotency-Key, and the body the text of the request as
 * it came, in the encoding of the connection.
 *
 * Returns true with an answer, which is committed if its status is 201 or 402; or
 * false with a failure, after which nothing is kept: answer 500, or 503 where a
 * repeat may help (40001, 40P01, a lost connection).
 */
extern bool pay(PGconn *conn, const char *key, const char *body,
				Answer *answer, Failure *failure);

/* The steps of pay, which return false with a failure */
extern bool begin_request(PGconn *conn, const char *key, const char *body,
						  bool *started, Answer *answer, Failure *failure);
extern bool do_payment(PGconn *conn, const char *body, Answer *answer, Failure *failure);
extern bool finish_request(PGconn *conn, const char *key, const Answer *answer, Failure *failure);
extern bool commit_work(PGconn *conn, Failure *failure);

#endif							/* PAYMENTS_H */
