// Pays by payments.go, and checks each promise.
//
// DATABASE_URL names a database with the extension and the tables of tables.sql,
// anew.  A line for each promise says whether it was kept; the first that was not
// ends the program with status 1.

package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/lib/pq"
)

const body = `{"account": "zoë", "amount": 20, "invoice": 9007199254740993}`

var (
	ctx = context.Background()
	db  *sql.DB
)

func main() {
	var err error
	db, err = sql.Open("postgres", os.Getenv("DATABASE_URL"))
	must(err)

	promise("a payment is made once, and committed with its answer", paysOnce)
	promise("a repeat gets the same bytes, and pays nothing", replays)
	promise("a malformed key or body is answered with 400", refusesMalformed)
	promise("another request under the key is answered with 422", refusesMismatch)
	promise("a request in flight is answered with 409 and Retry-After", tellsInFlight)
	promise("a commit without finish is refused, and leaves no row", cannotForgetFinish)
	promise("a 402 is kept, and its rows are not", keepsRefusal)
	promise("an answer whose commit fails is not given", reportsFailedCommit)
	promise("an answer whose error was swallowed is not given", reportsSwallowedError)
	promise("an answer that cannot be kept is not given", reportsFailedFinish)
	promise("a duration is as long as it was meant", keepsDuration)
	promise("a connection lost in COMMIT is an error, and a repeat pays once", losesConnection)
	promise("a request whose context ends leaves nothing, and a repeat runs", endsWithContext)
}

func paysOnce() {
	answer := pay("key-1", body)
	expect(201, answer.Status)
	expect(`{"account" : "zoë", "paid" : 20}`, answer.Body)
	expect("payments 1, balance 80", state())
}

func replays() {
	answer := pay("key-1", `{"invoice":9007199254740993,"amount":20.0,"account":"zo\u00eb"}`)
	expect(201, answer.Status)
	expect(`{"account" : "zoë", "paid" : 20}`, answer.Body)
	expect("payments 1, balance 80", state())
}

func refusesMalformed() {
	expect(400, pay("", body).Status)
	expect(400, pay("key-0", `{"account": "zo`).Status)
	expect(400, pay("key-0", `{"account": "\u0000"}`).Status)
	expect(0, db.Stats().InUse)
}

// Pairs of numbers that a parser of JSON with 64 bits for a number makes one
func refusesMismatch() {
	expect(422, pay("key-1", strings.Replace(body, "993", "992", 1)).Status)
	expect(422, pay("key-1", strings.Replace(body, "20", "20.00000000000000000001", 1)).Status)
	expect("payments 1, balance 80", state())
}

func tellsInFlight() {
	body := request(10, 2)
	other, err := db.Begin()
	must(err)
	_, _, err = begin(ctx, other, "key-2", []byte(body))
	must(err)
	answer := pay("key-2", body)
	expect(409, answer.Status)
	expect(true, answer.RetryAfter >= 1)
	expect("payments 1, balance 80", state())

	must(other.Rollback())
	expect(201, pay("key-2", body).Status)
	expect("payments 2, balance 70", state())
}

func cannotForgetFinish() {
	body := request(10, 3)
	tx, err := db.Begin()
	must(err)
	_, _, err = begin(ctx, tx, "key-3", []byte(body))
	must(err)
	_, err = work(ctx, tx, []byte(body))
	must(err)
	expect("ID006", sqlState(tx.Commit()))
	expect("payments 2, balance 70", state())
	expect("nothing", whatIsKnownOf("key-3"))

	expect(201, pay("key-3", body).Status)
	expect("payments 3, balance 60", state())
}

func keepsRefusal() {
	body := request(900, 4)
	first := pay("key-4", body)
	expect(402, first.Status)
	expect("payments 3, balance 60", state())

	query("UPDATE accounts SET balance = balance + 1000 RETURNING id")
	again := pay("key-4", body)
	expect(first.Status, again.Status)
	expect(first.Body, again.Body)
	expect("payments 3, balance 1060", state())
}

// Another key pays an invoice again, and the deferred constraint fails in COMMIT
func reportsFailedCommit() {
	answer, err := Pay(ctx, db, "key-5", []byte(body))
	expect("23505", sqlState(err))
	expect(0, answer.Status)
	expect("payments 3, balance 1060", state())
	expect("nothing", whatIsKnownOf("key-5"))
	expect(201, pay("key-1", body).Status)
}

func reportsSwallowedError() {
	body := request(10, 6)
	tx, err := db.Begin()
	must(err)
	_, _, err = begin(ctx, tx, "key-6", []byte(body))
	must(err)
	answer, err := work(ctx, tx, []byte(body))
	must(err)
	must(finish(ctx, tx, "key-6", answer))
	_, swallowed := tx.Exec("INSERT INTO audit_log_that_is_missing VALUES (1)")
	expect("42P01", sqlState(swallowed))
	expect(true, errors.Is(tx.Commit(), pq.ErrInFailedTransaction))
	expect("payments 3, balance 1060", state())
	expect("nothing", whatIsKnownOf("key-6"))
}

func reportsFailedFinish() {
	_, err := Pay(ctx, db, "key-7", []byte(request(10, 14)))
	expect("ID007", sqlState(err))
	expect("payments 3, balance 1060", state())
	expect("nothing", whatIsKnownOf("key-7"))
}

func keepsDuration() {
	expect("00:30:00", query(`
		SELECT expires_at - finished_at
		FROM idempotency.idempotency_replay('acme', 'payments.create', 'key-4')`))
}

func losesConnection() {
	body := request(10, 13)
	_, err := Pay(ctx, db, "key-8", []byte(body))
	expect(true, err != nil)
	expect("payments 3, balance 1060", state())

	expect(201, pay("key-8", body).Status)
	expect("payments 4, balance 1050", state())
}

// The client hangs up while the work waits for the account
func endsWithContext() {
	body := request(10, 7)
	locks, err := db.Begin()
	must(err)
	_, err = locks.Exec("SELECT FROM accounts FOR UPDATE")
	must(err)
	request, hangUp := context.WithCancel(ctx)
	ended := make(chan error)
	go func() {
		_, err := Pay(request, db, "key-9", []byte(body))
		ended <- err
	}()
	waitUntil(func() bool {
		return query(`
			SELECT count(*) FROM pg_stat_activity
			WHERE datname = current_database() AND wait_event_type = 'Lock'`) == "1"
	})
	hangUp()
	expect(true, <-ended != nil)
	must(locks.Rollback())

	// the driver does not wait for the server, which rolls back on its own
	waitUntil(func() bool { return whatIsKnownOf("key-9") == "nothing" })
	expect("payments 4, balance 1050", state())
	expect(201, pay("key-9", body).Status)
	expect("payments 5, balance 1040", state())
}

func waitUntil(condition func() bool) {
	for !condition() {
		time.Sleep(10 * time.Millisecond)
	}
}

func pay(key, body string) Answer {
	answer, err := Pay(ctx, db, key, []byte(body))
	must(err)
	return answer
}

func request(amount, invoice int) string {
	return fmt.Sprintf(`{"account": "zoë", "amount": %d, "invoice": %d}`, amount, invoice)
}

func state() string {
	return query(`
		SELECT format('payments %s, balance %s', (SELECT count(*) FROM payments), balance)
		FROM accounts`)
}

func whatIsKnownOf(key string) string {
	return query(fmt.Sprintf(`
		SELECT coalesce(outcome, 'nothing')
		FROM idempotency.idempotency_replay('acme', 'payments.create', '%s')`, key))
}

func query(sql string) (value string) {
	must(db.QueryRow(sql).Scan(&value))
	return
}

func sqlState(err error) string {
	var failure *pq.Error
	errors.As(err, &failure)
	if failure == nil {
		return fmt.Sprint(err)
	}
	return string(failure.Code)
}

// promise runs a step, and says whether it kept what is promised.
func promise(what string, step func()) {
	defer func() {
		if reason := recover(); reason != nil {
			fmt.Printf("failed: %s: %v\n", what, reason)
			os.Exit(1)
		}
	}()
	step()
	fmt.Printf("ok: %s\n", what)
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

func expect(expected, found any) {
	if expected != found {
		panic(fmt.Sprintf("expected %v, found %v", expected, found))
	}
}
