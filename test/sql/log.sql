--
-- The log: which events are logged, and what the client sees of that.  The
-- detail goes to the server's log only (test/t/024_log.pl looks there), and so
-- does all of what is logged after a commit.
--
CREATE EXTENSION idempotency;
SET client_min_messages = log;

-- by default what went wrong
SELECT outcome FROM idempotency_begin('t', 'a', 'lease', '{}', lease => '1 hour');
SELECT outcome FROM idempotency_try_begin('t', 'a', 'lease', '{}');
\set VERBOSITY terse
SELECT outcome FROM idempotency_begin('t', 'a', 'lease', '{}');
\set VERBOSITY default
SELECT outcome FROM idempotency_try_begin('t', 'a', 'lease', '[]');
SELECT outcome FROM idempotency_begin('t', 'a', 'lease', '[]');
UPDATE idempotency_key SET lease_expires_at = clock_timestamp();
SELECT outcome FROM idempotency_begin('t', 'a', 'lease', '{}', lease => '1 hour', claim => '00000000-0000-0000-0000-000000000002');
SELECT idempotency_finish('t', 'a', 'lease', claim => '00000000-0000-0000-0000-000000000002');
SELECT outcome FROM idempotency_begin('t', 'a', 'lease', '{}');

-- a rollback takes back only what would have come of it
SET idempotency.log_events = 'all';
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k');
SAVEPOINT s;
SELECT idempotency_finish('t', 'a', 'k', 404);
ROLLBACK TO s;
SELECT idempotency_finish('t', 'a', 'k', 200);
COMMIT;
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k2');
SELECT idempotency_finish('t', 'a', 'k2', 404);
ROLLBACK;
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k2');
SELECT idempotency_release('t', 'a', 'k2');
SELECT outcome FROM idempotency_begin('t', 'a', 'k2');
SELECT idempotency_finish('t', 'a', 'k2', 404);
COMMIT;
UPDATE idempotency_key SET expires_at = clock_timestamp() WHERE key = 'k2';
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k2');
ROLLBACK;
SELECT outcome FROM idempotency_replay('t', 'a', 'k');
CALL idempotency_sweep();

-- one class, or none
SET idempotency.log_events = 'replayed';
SELECT outcome FROM idempotency_begin('t', 'a', 'k');
SELECT outcome FROM idempotency_try_begin('t', 'a', 'lease', '[]');
SET idempotency.log_events = ' Mismatched , "replayed" ';
SELECT outcome FROM idempotency_try_begin('t', 'a', 'lease', '[]');
SET idempotency.log_events = 'none';
SELECT outcome FROM idempotency_try_begin('t', 'a', 'lease', '[]');
SET idempotency.log_events = '';
SELECT outcome FROM idempotency_try_begin('t', 'a', 'lease', '[]');
SET idempotency.log_events = 'swept';
SET idempotency.log_events = 'replayed,,in_flight';
SET idempotency.log_events = 'everything';
SHOW idempotency.log_events;

-- at another level
SET idempotency.log_events = 'all';
SET idempotency.log_level = 'warning';
SELECT outcome FROM idempotency_begin('t', 'a', 'k');
SET idempotency.log_level = 'notice';
SELECT outcome FROM idempotency_begin('t', 'a', 'k');
SET idempotency.log_level = 'debug1';
SELECT outcome FROM idempotency_begin('t', 'a', 'k');
SET idempotency.log_level = 'error';
SET idempotency.log_level = 'info';

RESET client_min_messages;
RESET idempotency.log_events;
RESET idempotency.log_level;
DROP EXTENSION idempotency;
