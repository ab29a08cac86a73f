--
-- Savepoints and exceptions
--
CREATE EXTENSION idempotency;
\set SHOW_CONTEXT never

CREATE TABLE payment (amount int CHECK (amount > 0));

-- a claim goes with the rollback of the savepoint that it was begun in
BEGIN;
SAVEPOINT s;
SELECT outcome FROM idempotency_begin('t', 'a', 'k1');
ROLLBACK TO s;
SELECT count(*) FROM pg_locks WHERE locktype = 'userlock' AND pid = pg_backend_pid();
SELECT idempotency_finish('t', 'a', 'k1');
\echo :SQLSTATE
ROLLBACK TO s;
SELECT outcome FROM idempotency_begin('t', 'a', 'k1');
SELECT idempotency_finish('t', 'a', 'k1', 200, '"second"');
COMMIT;
SELECT outcome, response FROM idempotency_begin('t', 'a', 'k1');

-- the guard has nothing to say about a claim that is gone
BEGIN;
SAVEPOINT s;
SELECT outcome FROM idempotency_begin('t', 'a', 'k2');
ROLLBACK TO s;
COMMIT;

-- a claim that was finished in a savepoint that is rolled back is unfinished
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k3');
SAVEPOINT s;
SELECT idempotency_finish('t', 'a', 'k3', 200, '"first"');
SELECT outcome, response FROM idempotency_begin('t', 'a', 'k3');
ROLLBACK TO s;
-- in flight, and there is no answer
SELECT outcome, status_code, response FROM idempotency_replay('t', 'a', 'k3');
SELECT idempotency_begin('t', 'a', 'k3');
\echo :SQLSTATE
ROLLBACK TO s;
COMMIT;
\echo :SQLSTATE
SELECT count(*) FROM idempotency_key WHERE key = 'k3';
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k3');
SAVEPOINT s;
SELECT idempotency_finish('t', 'a', 'k3', 200, '"first"');
ROLLBACK TO s;
SELECT idempotency_finish('t', 'a', 'k3', 402, '"second"');
COMMIT;
SELECT outcome, status_code, response FROM idempotency_begin('t', 'a', 'k3');

-- so is one that was released by its status
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k4');
SAVEPOINT s;
SELECT idempotency_finish('t', 'a', 'k4', 503);
SELECT outcome FROM idempotency_begin('t', 'a', 'k4');
ROLLBACK TO s;
SELECT idempotency_begin('t', 'a', 'k4');
\echo :SQLSTATE
ROLLBACK TO s;
SELECT key, pid = pg_backend_pid() AS mine FROM idempotency_in_flight;
SELECT idempotency_finish('t', 'a', 'k4', 200, '"after all"');
COMMIT;
SELECT outcome, response FROM idempotency_begin('t', 'a', 'k4');

-- begun in a savepoint that is released, finished outside
BEGIN;
SAVEPOINT s;
SELECT outcome FROM idempotency_begin('t', 'a', 'k5');
RELEASE s;
SELECT idempotency_finish('t', 'a', 'k5', 200, '"outside"');
COMMIT;
SELECT outcome, response FROM idempotency_begin('t', 'a', 'k5');

-- begun outside, finished in a savepoint that is released
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k6');
SAVEPOINT s;
SELECT idempotency_finish('t', 'a', 'k6', 200, '"inside"');
RELEASE s;
COMMIT;
SELECT outcome, response FROM idempotency_begin('t', 'a', 'k6');

-- both deep inside: released to a parent that is rolled back
BEGIN;
SAVEPOINT one;
SAVEPOINT two;
SAVEPOINT three;
SELECT outcome FROM idempotency_begin('t', 'a', 'k7');
RELEASE three;
SELECT idempotency_finish('t', 'a', 'k7');
RELEASE two;
SELECT outcome FROM idempotency_begin('t', 'a', 'k7');
ROLLBACK TO one;
SELECT idempotency_release('t', 'a', 'k7');
\echo :SQLSTATE
ROLLBACK TO one;
SELECT count(*) FROM pg_locks WHERE locktype = 'userlock' AND pid = pg_backend_pid();
SELECT outcome FROM idempotency_begin('t', 'a', 'k7');
ROLLBACK;
-- finished deep inside: released to the level of the claim's own parent
BEGIN;
SAVEPOINT one;
SELECT outcome FROM idempotency_begin('t', 'a', 'k7');
SAVEPOINT two;
SAVEPOINT three;
SELECT idempotency_finish('t', 'a', 'k7', 200, '"deep"');
RELEASE three;
ROLLBACK TO two;
SELECT idempotency_finish('t', 'a', 'k7', 200, '"less deep"');
RELEASE one;
COMMIT;
SELECT outcome, response FROM idempotency_begin('t', 'a', 'k7');

-- many savepoints, each with a claim; every third is rolled back
BEGIN;
DO $$
BEGIN
    FOR i IN 1..90 LOOP
        BEGIN
            PERFORM idempotency_begin('t', 'loop', 'k' || i);
            PERFORM idempotency_finish('t', 'loop', 'k' || i, 200, to_json(i));
            IF i % 3 = 0 THEN
                RAISE EXCEPTION 'no';
            END IF;
        EXCEPTION WHEN raise_exception THEN
        END;
    END LOOP;
END $$;
SELECT count(*) AS records, count(*) FILTER (WHERE substr(key, 2)::int % 3 = 0) AS rolled_back
FROM idempotency_key WHERE action = 'loop';
SELECT count(*) AS locks FROM pg_locks WHERE locktype = 'userlock' AND pid = pg_backend_pid();
COMMIT;

--
-- The pattern for "the work failed, keep the error"
--
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'pay', 'k1', '{"amount": -5}');
SAVEPOINT work;
INSERT INTO payment VALUES (5);
INSERT INTO payment VALUES (-5);
ROLLBACK TO work;
SELECT idempotency_finish('t', 'pay', 'k1', 402, '{"error": "amount"}');
COMMIT;
SELECT outcome, status_code, response FROM idempotency_begin('t', 'pay', 'k1', '{"amount": -5}');
SELECT count(*) FROM payment;

--
-- PL/pgSQL: a block with EXCEPTION is a savepoint
--
CREATE FUNCTION pay(key text, amount int) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    result idempotency_result :=
        idempotency_begin('t', 'pay', key, jsonb_build_object('amount', amount));
BEGIN
    IF result.outcome = 'replayed' THEN
        RETURN format('replayed %s %s', result.status_code, result.response);
    END IF;
    BEGIN
        INSERT INTO payment VALUES (amount);
        RETURN idempotency_finish('t', 'pay', key, 201, json_build_object('paid', amount));
    EXCEPTION WHEN check_violation THEN
        RETURN idempotency_finish('t', 'pay', key, 402, '{"error": "amount"}');
    END;
END $$;
SELECT pay('p1', 7);
SELECT pay('p1', 7);
SELECT pay('p2', -7);
SELECT pay('p2', -7);
SELECT pay('p1', 8);
\echo :SQLSTATE
SELECT amount FROM payment;

-- begun inside the block that fails: gone when the handler runs
DO $$
BEGIN
    BEGIN
        PERFORM idempotency_begin('t', 'a', 'block');
        INSERT INTO payment VALUES (-1);
    EXCEPTION WHEN check_violation THEN
        BEGIN
            PERFORM idempotency_release('t', 'a', 'block');
        EXCEPTION WHEN OTHERS THEN
            RAISE NOTICE 'release in handler: %', SQLSTATE;
        END;
    END;
    RAISE NOTICE 'outcome after block: %', (idempotency_begin('t', 'a', 'block')).outcome;
    RAISE NOTICE 'finish: %', idempotency_finish('t', 'a', 'block');
END $$;

-- an error of begin or finish itself can be caught
DO $$
BEGIN
    PERFORM idempotency_begin('t', 'a', 'caught');
    BEGIN
        PERFORM idempotency_begin('t', 'a', 'caught');
    EXCEPTION WHEN OTHERS THEN
        RAISE NOTICE 'second begin: %', SQLSTATE;
    END;
    BEGIN
        PERFORM idempotency_finish('t', 'a', 'caught', 700);
    EXCEPTION WHEN OTHERS THEN
        RAISE NOTICE 'malformed finish: %', SQLSTATE;
    END;
    RAISE NOTICE 'finish: %', idempotency_finish('t', 'a', 'caught', 200);
    BEGIN
        PERFORM idempotency_finish('t', 'a', 'caught', 200);
    EXCEPTION WHEN OTHERS THEN
        RAISE NOTICE 'second finish: %', SQLSTATE;
    END;
END $$;
SELECT outcome FROM idempotency_begin('t', 'a', 'caught');

--
-- An expired record that finish deleted in a savepoint that is rolled back
--
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'old');
SELECT idempotency_finish('t', 'a', 'old', 200, '"old"');
COMMIT;
UPDATE idempotency_key SET expires_at = created_at WHERE key = 'old';
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'old');
SAVEPOINT s;
SELECT idempotency_finish('t', 'a', 'old', 200, '"new"');
ROLLBACK TO s;
SELECT response FROM idempotency_key WHERE key = 'old';
SELECT idempotency_finish('t', 'a', 'old', 200, '"newer"');
COMMIT;
SELECT response FROM idempotency_key WHERE key = 'old';

--
-- The same with so many claims that they are found by an index: of several on one
-- scope the one before comes back
--
BEGIN;
SELECT count(*) FILTER (WHERE outcome = 'started') AS started
FROM generate_series(1, 40) i, idempotency_begin('t', 'many', 'k' || i);
SELECT idempotency_finish('t', 'many', 'k7', 503);
SAVEPOINT s;
SELECT outcome FROM idempotency_begin('t', 'many', 'k7');
SELECT idempotency_finish('t', 'many', 'k8', 503);
SELECT outcome FROM idempotency_begin('t', 'many', 'k8');
SELECT outcome FROM idempotency_begin('t', 'many', 'k41');
ROLLBACK TO s;
-- ended, held, never begun
SELECT error_of($$ SELECT idempotency_finish('t', 'many', 'k7') $$);
SELECT error_of($$ SELECT idempotency_begin('t', 'many', 'k8') $$);
SELECT error_of($$ SELECT idempotency_finish('t', 'many', 'k41') $$);
SELECT count(*) FILTER (WHERE f = 'completed') AS completed
FROM generate_series(1, 40) i, idempotency_finish('t', 'many', 'k' || i) f WHERE i <> 7;
COMMIT;
SELECT count(*) FROM idempotency_key WHERE action = 'many';

--
-- A claim does not depend on the portal that it was begun in
--
BEGIN;
DECLARE c CURSOR FOR SELECT outcome FROM idempotency_begin('t', 'a', 'cursor');
FETCH c;
CLOSE c;
SELECT idempotency_finish('t', 'a', 'cursor');
COMMIT;
SELECT outcome FROM idempotency_begin('t', 'a', 'cursor');
BEGIN;
DECLARE c CURSOR FOR SELECT outcome FROM idempotency_begin('t', 'a', 'cursor2');
FETCH c;
CLOSE c;
SELECT idempotency_release('t', 'a', 'cursor2');
SELECT count(*) FROM pg_locks WHERE locktype = 'userlock' AND pid = pg_backend_pid();
COMMIT;

DROP FUNCTION pay;
DROP TABLE payment;
DROP EXTENSION idempotency;
