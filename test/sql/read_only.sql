--
-- Read-only transactions: a replay works, what would write is refused
--
CREATE EXTENSION idempotency;

BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k', '{"a": 1}');
SELECT idempotency_finish('t', 'a', 'k', 201, '"stored"');
COMMIT;
SELECT outcome FROM idempotency_begin('t', 'a', 'leased', lease => '1 h', claim => '00000000-0000-0000-0000-000000000001');
CREATE FUNCTION handler(request jsonb) RETURNS jsonb LANGUAGE sql AS 'SELECT request';

BEGIN READ ONLY;
SELECT outcome, status_code, response FROM idempotency_replay('t', 'a', 'k', '{"a": 1}');
SELECT r IS NULL AS nothing FROM idempotency_replay('t', 'a', 'k2') r;
SELECT outcome, attempt FROM idempotency_replay('t', 'a', 'leased');
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
SELECT idempotency_begin('t', 'a', 'leased', lease => '1 h', claim => '00000000-0000-0000-0000-000000000001');
\echo :SQLSTATE
ROLLBACK TO s;
SELECT idempotency_checkpoint('t', 'a', 'leased', '00000000-0000-0000-0000-000000000001', 'p');
\echo :SQLSTATE
ROLLBACK TO s;
SELECT idempotency_finish('t', 'a', 'leased', claim => '00000000-0000-0000-0000-000000000001');
\echo :SQLSTATE
ROLLBACK TO s;
SELECT idempotency_release('t', 'a', 'leased', claim => '00000000-0000-0000-0000-000000000001');
\echo :SQLSTATE
ROLLBACK TO s;
SELECT idempotency_store('t', 'a', 'k2', NULL, 404);
\echo :SQLSTATE
ROLLBACK TO s;
SELECT idempotency_run('t', 'a', 'k', '{"a": 1}', 'handler(jsonb)');
\echo :SQLSTATE
ROLLBACK TO s;
SELECT idempotency_try_run('t', 'a', 'k', '{"a": 1}', 'handler(jsonb)');
\echo :SQLSTATE
ROLLBACK TO s;
SELECT idempotency_first_seen('t', 'a', '{k}');
\echo :SQLSTATE
ROLLBACK TO s;
SELECT idempotency_forget('t', 'a', 'k');
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
SELECT key, state FROM idempotency_key ORDER BY key;

-- a parallel query is as good as read-only, whatever a function says of itself
CREATE TABLE n WITH (parallel_workers = 2) AS SELECT n FROM generate_series(1, 10) n;
CREATE FUNCTION call(statement text, n int) RETURNS text LANGUAGE plpgsql PARALLEL SAFE AS $$
DECLARE
    result text;
BEGIN
    EXECUTE statement INTO result;
    RETURN result;
END $$;
SET min_parallel_table_scan_size = 0;
SET parallel_setup_cost = 0;
SET parallel_tuple_cost = 0;
\set VERBOSITY terse
SELECT call($$ SELECT idempotency_replay('t', 'a', 'k') $$, n) FROM n;
\echo :SQLSTATE
SELECT call($$ SELECT idempotency_begin('t', 'a', 'k') $$, n) FROM n;
\echo :SQLSTATE
SELECT call($$ SELECT idempotency_try_begin('t', 'a', 'k') $$, n) FROM n;
\echo :SQLSTATE
SELECT call($$ SELECT idempotency_finish('t', 'a', 'k') $$, n) FROM n;
\echo :SQLSTATE
SELECT call($$ SELECT idempotency_release('t', 'a', 'k') $$, n) FROM n;
\echo :SQLSTATE
SELECT call($$ SELECT idempotency_checkpoint('t', 'a', 'leased', '00000000-0000-0000-0000-000000000001', 'p') $$, n) FROM n;
\echo :SQLSTATE
SELECT call($$ SELECT idempotency_store('t', 'a', 'k', NULL, 404) $$, n) FROM n;
\echo :SQLSTATE
SELECT call($$ SELECT idempotency_run('t', 'a', 'k', '{}', 'handler(jsonb)') $$, n) FROM n;
\echo :SQLSTATE
SELECT call($$ SELECT idempotency_first_seen('t', 'a', '{k}') $$, n) FROM n;
\echo :SQLSTATE
SELECT call($$ SELECT idempotency_forget('t', 'a', 'k') $$, n) FROM n;
\echo :SQLSTATE
\set VERBOSITY default
RESET min_parallel_table_scan_size;
RESET parallel_setup_cost;
RESET parallel_tuple_cost;
SELECT key, state FROM idempotency_key ORDER BY key;

DROP TABLE n;
DROP FUNCTION handler, call;
DROP EXTENSION idempotency;
