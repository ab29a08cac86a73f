// A payment that a client can repeat, with lib/pq.
//
// begin, the work and finish are one transaction, so the payment and its answer
// are committed together or not at all.  A repeat is answered by begin, with the
// text that was stored.
//
// Two types of Go are not what they seem here.  A number that json.Unmarshal puts
// into an any is a float64, and two requests become one: begin gets the body as it
// came.  A time.Duration goes to the server as its nanoseconds, which an interval
// reads as seconds: it is given as its String.

package main

import (
	"context"
	"database/sql"
	"errors"
	"regexp"
	"strconv"
	"time"

	"github.com/lib/pq"
)

const (
	tenant = "acme" // whose data it is; a service takes it from the log-in, never from the body
	action = "payments.create"

	checkViolation = "23514"

	// how long a 402 is kept: by then there may be money
	keepRefusal = 30 * time.Minute
)

// Answer is what to answer a client.
type Answer struct {
	Status     int
	Body       string        // a JSON text
	RetryAfter int           // the seconds for the header Retry-After, or 0 for no such header
	Keep       time.Duration // how long to keep it, or 0 for as long as the server says
}

// Pay pays once for each key, and answers every repeat with the first answer.
//
// key is what the client sent as Idempotency-Key, and body the request as it came.
// The answer is committed if its status is 201 or 402.  After an error nothing is
// kept: answer 500, or 503 where a repeat may help (40001, 40P01, a lost connection).
//
// When ctx ends, the transaction is rolled back.  The context of an HTTP request
// ends when the client hangs up, so that a repeat has to do the work again.
func Pay(ctx context.Context, db *sql.DB, key string, body []byte) (Answer, error) {
	answer, err := payInTransaction(ctx, db, key, body)
	if err != nil {
		return refusal(err)
	}
	return answer, nil
}

func payInTransaction(ctx context.Context, db *sql.DB, key string, body []byte) (Answer, error) {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return Answer{}, err
	}
	defer tx.Rollback() // does nothing after Commit

	answer, started, err := begin(ctx, tx, key, body)
	if err != nil {
		return Answer{}, err
	}
	if started {
		if answer, err = workOrRefuse(ctx, tx, body); err != nil {
			return Answer{}, err
		}
		if err = finish(ctx, tx, key, answer); err != nil {
			return Answer{}, err
		}
	}
	// fails if the transaction has; Exec("COMMIT") would not
	return answer, tx.Commit()
}

// begin claims the request, which then is started; or returns its answer, if it has one.
func begin(ctx context.Context, tx *sql.Tx, key string, body []byte) (answer Answer, started bool, err error) {
	var outcome string
	var status sql.NullInt64
	var response sql.NullString
	err = tx.QueryRowContext(ctx, `
		SELECT outcome, status_code, response::text
		FROM idempotency.idempotency_begin($1, $2, $3, $4)`,
		tenant, action, key, string(body)).Scan(&outcome, &status, &response)
	return Answer{Status: int(status.Int64), Body: response.String}, outcome == "started", err
}

// work pays; the database reads the body, so that numbers stay as they are.
func work(ctx context.Context, tx *sql.Tx, body []byte) (Answer, error) {
	_, err := tx.ExecContext(ctx, `
		INSERT INTO payments (account, amount, invoice)
		SELECT account, amount, invoice
		FROM jsonb_to_record($1) AS r (account text, amount numeric, invoice bigint)`,
		string(body))
	if err != nil {
		return Answer{}, err
	}
	answer := Answer{Status: 201}
	err = tx.QueryRowContext(ctx, `
		UPDATE accounts SET balance = balance - amount
		FROM jsonb_to_record($1) AS r (account text, amount numeric)
		WHERE id = account
		RETURNING json_build_object('account', account, 'paid', amount)::text`,
		string(body)).Scan(&answer.Body)
	return answer, err
}

// workOrRefuse pays, or makes an answer to keep of the failure, whose rows are rolled back.
func workOrRefuse(ctx context.Context, tx *sql.Tx, body []byte) (Answer, error) {
	if _, err := tx.ExecContext(ctx, "SAVEPOINT work"); err != nil {
		return Answer{}, err
	}
	answer, err := work(ctx, tx, body)
	var failure *pq.Error
	if !errors.As(err, &failure) || failure.Code != checkViolation {
		return answer, err
	}
	_, err = tx.ExecContext(ctx, "ROLLBACK TO SAVEPOINT work")
	return Answer{Status: 402, Body: `{"error": "not enough money"}`, Keep: keepRefusal}, err
}

// finish stores the answer: the last statement before the Commit.
func finish(ctx context.Context, tx *sql.Tx, key string, answer Answer) error {
	var keep sql.NullString
	if answer.Keep > 0 {
		keep = sql.NullString{String: answer.Keep.String(), Valid: true}
	}
	_, err := tx.ExecContext(ctx,
		"SELECT idempotency.idempotency_finish($1, $2, $3, $4, $5, ttl => $6)",
		tenant, action, key, answer.Status, answer.Body, keep)
	return err
}

// refusal makes an answer of an error of begin, and returns any other error.
func refusal(err error) (Answer, error) {
	var failure *pq.Error
	if !errors.As(err, &failure) {
		return Answer{}, err
	}
	switch failure.Code {
	case "ID001", "ID002", "22P02", "22P05":
		return Answer{Status: 400, Body: `{"error": "key or body is malformed"}`}, nil
	case "ID003":
		return Answer{Status: 409, Body: `{"error": "request is in flight"}`, RetryAfter: seconds(failure.Hint)}, nil
	case "ID004":
		return Answer{Status: 422, Body: `{"error": "key was used with a different request"}`}, nil
	case "ID005":
		return Answer{Status: 409, Body: `{"error": "another request was faster"}`}, nil
	}
	return Answer{}, err
}

// seconds finds how long to wait in the hint of ID003.
func seconds(hint string) int {
	n, err := strconv.Atoi(regexp.MustCompile(`\d+`).FindString(hint))
	if err != nil {
		return 1
	}
	return n
}
