--
-- Read-only transactions: a replay works, what would write is refused
--
CREATE EXTENSION idempotency;

BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k', '{"a": 1}');
SELECT idempotency_finish('t', 'a', 'k', 201, '"stored"');
COMMIT;

BEGIN READ ONLY;
SELECT outcome, status_code, response FROM idempotency_replay('t', 'a', 'k', '{"a": 1}');
SELECT r IS NULL AS nothing FROM idempotency_replay('t', 'a', 'k2') r;
SAVEPOINT s;
SELECT idempotency_replay('t', 'a', 'k', '{"a": 2}');
\echo :SQLSTATE
ROLLBACK TO s;
SELECT idempotency_begin('t', 'a', 'k', '{"a": 1}');
\echo :SQLSTATE
ROLLBACK TO s;
SELECT idempotency_try_begin('t', 'a', 'k2');
\echo :SQLSTATE
ROLLBACK TO s;
SELECT idempotency_finish('t', 'a', 'k2');
\echo :SQLSTATE
ROLLBACK TO s;
SELECT idempotency_release('t', 'a', 'k2');
\echo :SQLSTATE
ROLLBACK TO s;
SELECT idempotency_schedule();
\echo :SQLSTATE
ROLLBACK TO s;
SELECT idempotency_unschedule();
\echo :SQLSTATE
ROLLBACK TO s;
SELECT count(*) FROM idempotency_in_flight;
SELECT capacity FROM idempotency_tracking();
SELECT state FROM idempotency_worker_status();
SELECT octet_length(idempotency_request_hash('{}'));
COMMIT;

-- the same as a default of the session
SET default_transaction_read_only = on;
SELECT idempotency_begin('t', 'a', 'k2');
\echo :SQLSTATE
SELECT outcome FROM idempotency_replay('t', 'a', 'k');
CALL idempotency_sweep();
\echo :SQLSTATE
RESET default_transaction_read_only;

-- a transaction that becomes read-only cannot finish, and cannot commit
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k2');
SET TRANSACTION READ ONLY;
SAVEPOINT s;
SELECT idempotency_finish('t', 'a', 'k2');
\echo :SQLSTATE
ROLLBACK TO s;
COMMIT;
\echo :SQLSTATE
SELECT key FROM idempotency_key;

DROP EXTENSION idempotency;
