--
-- Commit guard: no commit with a claim that was not finished
--
CREATE EXTENSION idempotency;
\set SHOW_CONTEXT never

CREATE TABLE payment (amount int);

-- a forgotten finish
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'pay', 'k1', '{"card": "secret"}', 'user 1');
INSERT INTO payment VALUES (100);
COMMIT;
\echo :SQLSTATE
SELECT count(*) FROM payment;
-- it left nothing: the request can be begun again
SELECT count(*) FROM pg_locks WHERE locktype = 'userlock' AND pid = pg_backend_pid();
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'pay', 'k1');
ROLLBACK;

-- begin outside of a transaction block is a forgotten finish, too
SELECT outcome FROM idempotency_begin('acme', 'pay', 'k1');
\echo :SQLSTATE
SELECT outcome FROM idempotency_try_begin('acme', 'pay', 'k1');
\echo :SQLSTATE
-- a rollback is always allowed
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'pay', 'k1');
ROLLBACK;

-- one of two
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'pay', 'k1');
SELECT outcome FROM idempotency_begin('acme', 'pay', 'k2');
SELECT idempotency_finish('acme', 'pay', 'k1');
COMMIT;
\echo :SQLSTATE
SELECT count(*) FROM idempotency_key;

-- PREPARE TRANSACTION is refused as well
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'pay', 'k1');
INSERT INTO payment VALUES (100);
PREPARE TRANSACTION 'unfinished';
\echo :SQLSTATE
SELECT count(*) FROM pg_prepared_xacts;
SELECT count(*) FROM payment;

-- COMMIT AND CHAIN
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'pay', 'k1');
COMMIT AND CHAIN;
\echo :SQLSTATE
ROLLBACK;

-- COMMIT in a procedure
DO $$
BEGIN
    PERFORM idempotency_begin('acme', 'pay', 'k1');
    COMMIT;
END $$;
\echo :SQLSTATE
DO $$
BEGIN
    PERFORM idempotency_begin('acme', 'pay', 'k1');
    PERFORM idempotency_finish('acme', 'pay', 'k1', 200, '"by a procedure"');
    COMMIT;
    RAISE NOTICE '%', (idempotency_begin('acme', 'pay', 'k1')).response;
END $$;
TRUNCATE idempotency_key;

-- a function that does it all is a transaction of one statement
SELECT b.outcome, f
FROM idempotency_begin('acme', 'pay', 'k1') b,
     idempotency_finish('acme', 'pay', 'k1' || left(b.outcome, 0)) f;
SELECT outcome FROM idempotency_begin('acme', 'pay', 'k1');
TRUNCATE idempotency_key;

-- a deferred trigger may finish at the last moment
CREATE FUNCTION finish_late() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM idempotency_finish('acme', 'pay', 'k1', 200, to_json(NEW.amount));
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER late AFTER INSERT ON payment
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION finish_late();
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'pay', 'k1');
INSERT INTO payment VALUES (100);
COMMIT;
SELECT outcome, response FROM idempotency_begin('acme', 'pay', 'k1');
DROP TRIGGER late ON payment;
-- and what begins at the last moment is seen
CREATE FUNCTION begin_late() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM idempotency_begin('acme', 'pay', 'k2');
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER late AFTER INSERT ON payment
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION begin_late();
BEGIN;
INSERT INTO payment VALUES (100);
COMMIT;
\echo :SQLSTATE
BEGIN;
DECLARE c CURSOR WITH HOLD FOR SELECT outcome FROM idempotency_begin('acme', 'pay', 'k3');
COMMIT;
\echo :SQLSTATE
DROP TRIGGER late ON payment;
DROP FUNCTION begin_late, finish_late;
TRUNCATE payment, idempotency_key;

--
-- commit_guard = off: a warning for each, and the commit goes on
--
SET idempotency.commit_guard = off;
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'pay', 'k1');
SELECT outcome FROM idempotency_begin('acme', 'pay', 'k2');
SELECT outcome FROM idempotency_begin('acme', 'pay', 'k3');
INSERT INTO payment VALUES (100);
SELECT idempotency_finish('acme', 'pay', 'k2');
COMMIT;
SELECT count(*) FROM payment;
SELECT key FROM idempotency_key;
SELECT count(*) FROM pg_locks WHERE locktype = 'userlock' AND pid = pg_backend_pid();
SELECT outcome FROM idempotency_begin('acme', 'pay', 'k1');
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'pay', 'k1');
PREPARE TRANSACTION 'unfinished';
SELECT outcome FROM idempotency_try_begin('acme', 'pay', 'k1');
COMMIT PREPARED 'unfinished';
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'pay', 'k1');
SELECT idempotency_release('acme', 'pay', 'k1');
COMMIT;
RESET idempotency.commit_guard;

-- the setting counts at the commit
BEGIN;
SET LOCAL idempotency.commit_guard = off;
SELECT outcome FROM idempotency_begin('acme', 'pay', 'k1');
SET LOCAL idempotency.commit_guard = on;
COMMIT;
\echo :SQLSTATE

-- the names are told as they are, whatever is in them
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'pay "now" %s %m', 'k%n');
COMMIT;
\echo :SQLSTATE

-- where the functions that it would name are gone, it says what else to do
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'pay', 'k1');
DROP EXTENSION idempotency;
COMMIT;
\echo :SQLSTATE
SELECT count(*) FROM pg_extension WHERE extname = 'idempotency';
-- unless they were made anew
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'pay', 'k1');
DROP EXTENSION idempotency;
CREATE EXTENSION idempotency;
COMMIT;
\echo :SQLSTATE
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'pay', 'k1');
DROP EXTENSION idempotency;
CREATE EXTENSION idempotency;
SELECT idempotency_finish('acme', 'pay', 'k1', 201, '"kept"');
COMMIT;
SELECT state, response FROM idempotency_key;
SELECT outcome, status_code, response FROM idempotency_begin('acme', 'pay', 'k1');

DROP TABLE payment;
DROP EXTENSION idempotency;
