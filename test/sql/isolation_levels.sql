--
-- One session at every isolation level
--
CREATE EXTENSION idempotency;

CREATE TABLE work (level text);
CREATE VIEW sireadlock AS
    SELECT l.relation::regclass FROM pg_locks l
    WHERE l.mode = 'SIReadLock' AND l.pid = pg_backend_pid()
      AND l.relation IN (SELECT 'idempotency_key'::regclass
                         UNION ALL SELECT indexrelid FROM pg_index
                         WHERE indrelid = 'idempotency_key'::regclass);

BEGIN ISOLATION LEVEL READ COMMITTED;
SELECT outcome FROM idempotency_begin('t', 'a', 'rc', '{}');
INSERT INTO work VALUES ('rc');
SELECT idempotency_finish('t', 'a', 'rc', 200, '"rc"');
SELECT outcome, response FROM idempotency_begin('t', 'a', 'rc', '{}');
COMMIT;

BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT count(*) FROM work;
SELECT outcome FROM idempotency_begin('t', 'a', 'rr', '{}');
INSERT INTO work VALUES ('rr');
SELECT idempotency_finish('t', 'a', 'rr', 200, '"rr"');
SELECT outcome, response FROM idempotency_begin('t', 'a', 'rr', '{}');
SELECT outcome, response FROM idempotency_begin('t', 'a', 'rc', '{}');
SELECT outcome FROM idempotency_try_begin('t', 'a', 'rc', '[]');
COMMIT;

BEGIN ISOLATION LEVEL SERIALIZABLE;
SELECT count(*) FROM work;
SELECT outcome FROM idempotency_begin('t', 'a', 's', '{}');
INSERT INTO work VALUES ('s');
SELECT idempotency_finish('t', 'a', 's', 200, '"s"');
SELECT outcome, response FROM idempotency_begin('t', 'a', 's', '{}');
SELECT outcome, response FROM idempotency_replay('t', 'a', 's', '{}');
SELECT outcome, response FROM idempotency_begin('t', 'a', 'rr', '{}');
SELECT outcome FROM idempotency_try_begin('t', 'a', 'rc', '[]');
SELECT r IS NULL AS nothing FROM idempotency_replay('t', 'a', 'none') r;
-- requests with keys next to each other do not get in each other's way
SELECT * FROM sireadlock;
SELECT count(*) FROM idempotency_key;
SELECT count(*) > 0 AS would_be_seen FROM sireadlock;
COMMIT;

-- as the default of the session, with savepoints and expired records
UPDATE idempotency_key SET expires_at = created_at;
SET default_transaction_isolation = 'serializable';
BEGIN;
SHOW transaction_isolation;
SELECT outcome FROM idempotency_begin('t', 'a', 'rc');
SAVEPOINT s;
SELECT idempotency_finish('t', 'a', 'rc', 200, '"rolled back"');
ROLLBACK TO s;
SELECT idempotency_finish('t', 'a', 'rc', 200, '"new rc"');
SELECT outcome FROM idempotency_begin('t', 'a', 's');
SELECT idempotency_release('t', 'a', 's');
SELECT * FROM sireadlock;
COMMIT;
SELECT outcome, response FROM idempotency_begin('t', 'a', 'rc');
SELECT outcome FROM idempotency_begin('t', 'a', 'forgotten');
\echo :SQLSTATE
CALL idempotency_sweep();
SET default_transaction_isolation = 'repeatable read';
BEGIN;
SELECT count(*) FROM idempotency_key;
SELECT outcome FROM idempotency_begin('t', 'a', 'rr');
SELECT idempotency_finish('t', 'a', 'rr', 404, '"new rr"');
COMMIT;
SELECT outcome, status_code, response FROM idempotency_begin('t', 'a', 'rr');
UPDATE idempotency_key SET expires_at = created_at;
CALL idempotency_sweep();
SELECT count(*) FROM idempotency_key;
RESET default_transaction_isolation;

-- read-only and deferrable: a replay needs no more
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k');
SELECT idempotency_finish('t', 'a', 'k');
COMMIT;
BEGIN ISOLATION LEVEL SERIALIZABLE READ ONLY DEFERRABLE;
SELECT outcome, status_code FROM idempotency_replay('t', 'a', 'k');
COMMIT;

-- prepared under each
BEGIN ISOLATION LEVEL SERIALIZABLE;
SELECT outcome FROM idempotency_begin('t', 'a', 'prepared');
SELECT idempotency_finish('t', 'a', 'prepared', 200, '"s"');
PREPARE TRANSACTION 'serializable';
BEGIN ISOLATION LEVEL SERIALIZABLE;
SELECT outcome FROM idempotency_try_begin('t', 'a', 'prepared');
SELECT outcome FROM idempotency_try_begin('t', 'a', 'prepared', wait => '10 ms');
COMMIT;
COMMIT PREPARED 'serializable';
BEGIN ISOLATION LEVEL SERIALIZABLE;
SELECT outcome, response FROM idempotency_try_begin('t', 'a', 'prepared');
COMMIT;

SELECT level FROM work;
DROP VIEW sireadlock;
DROP TABLE work;
DROP EXTENSION idempotency;
