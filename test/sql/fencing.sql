--
-- Fencing: finish, checkpoint and release of a leased claim bring its id, and only
-- that of the latest one has an effect
--
CREATE EXTENSION idempotency;
\set SHOW_CONTEXT never

-- all of a row, and whether it is another version of it
CREATE FUNCTION image() RETURNS text LANGUAGE sql VOLATILE AS
$$ SELECT string_agg(concat_ws(' ', ctid, xmin, k), E'\n') FROM idempotency_key k $$;

-- What a call returns, with a star if it wrote anything, or its SQLSTATE; what
-- it did is undone.
CREATE FUNCTION probe(call text) RETURNS text
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    before text := image();
    result text;
BEGIN
    EXECUTE 'SELECT ' || call INTO result;
    IF image() IS DISTINCT FROM before THEN
        result := result || '*';
    END IF;
    RAISE EXCEPTION USING ERRCODE = 'UNDO1', MESSAGE = result;
EXCEPTION
    WHEN SQLSTATE 'UNDO1' THEN
        RETURN SQLERRM;
    WHEN OTHERS THEN
        RETURN SQLSTATE;
END $$;

-- each of the calls with many ids; that of the claim is 2, and 3 was never one
CREATE FUNCTION probe_all(
    OUT claim int, OUT finish text, OUT finish_other text, OUT finish_errored text,
    OUT finish_released text, OUT release text, OUT checkpoint text, OUT renewal text)
RETURNS SETOF record LANGUAGE sql VOLATILE AS $$
    SELECT n,
           probe(format('idempotency_finish(%L, %L, %L, 200, %L, claim => %L)', 't', 'a', 'k', '"done"', claim_of(n))),
           probe(format('idempotency_finish(%L, %L, %L, 200, %L, claim => %L)', 't', 'a', 'k', '"other"', claim_of(n))),
           probe(format('idempotency_finish(%L, %L, %L, 404, %L, claim => %L)', 't', 'a', 'k', '"not found"', claim_of(n))),
           probe(format('idempotency_finish(%L, %L, %L, 503, claim => %L)', 't', 'a', 'k', claim_of(n))),
           probe(format('idempotency_release(%L, %L, %L, claim => %L)', 't', 'a', 'k', claim_of(n))),
           probe(format('idempotency_checkpoint(%L, %L, %L, %L, %L) IS NOT NULL', 't', 'a', 'k', claim_of(n), 'point')),
           probe(format('idempotency_checkpoint(%L, %L, %L, %L, NULL) IS NOT NULL', 't', 'a', 'k', claim_of(n)))
    FROM unnest('{NULL,0,1,2,3}'::int[]) WITH ORDINALITY a (n, i) ORDER BY i
$$;

-- a leased claim that was taken over
CREATE PROCEDURE lease_twice() LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM idempotency_key;
    PERFORM idempotency_begin('t', 'a', 'k', '{"amount": 1}', lease => '1 h', claim => claim_of(1));
    UPDATE idempotency_key SET lease_expires_at = clock_timestamp();
    COMMIT;
    PERFORM idempotency_begin('t', 'a', 'k', '{"amount": 1}', lease => '1 h', claim => claim_of(2));
    COMMIT;
    PERFORM idempotency_checkpoint('t', 'a', 'k', claim_of(2), 'charged', '{"charge": "ch_1"}');
END $$;

-- no claim at all
SELECT * FROM probe_all();
-- in flight
CALL lease_twice();
SELECT * FROM probe_all();
-- the lease ran out, and nobody has taken over
UPDATE idempotency_key SET lease_expires_at = clock_timestamp();
SELECT * FROM probe_all();
-- the lease and more ran out
UPDATE idempotency_key SET expires_at = clock_timestamp();
SELECT * FROM probe_all();
-- completed
CALL lease_twice();
SELECT idempotency_finish('t', 'a', 'k', 200, '"done"', claim => claim_of(2));
SELECT * FROM probe_all();
-- errored
CALL lease_twice();
SELECT idempotency_finish('t', 'a', 'k', 404, '"not found"', claim => claim_of(2));
SELECT * FROM probe_all();
-- released
CALL lease_twice();
SELECT idempotency_release('t', 'a', 'k', claim => claim_of(2));
SELECT * FROM probe_all();
-- released by a status that may be retried
CALL lease_twice();
SELECT idempotency_finish('t', 'a', 'k', 500, claim => claim_of(2));
SELECT * FROM probe_all();
-- an answer whose time is over
CALL lease_twice();
SELECT idempotency_finish('t', 'a', 'k', 200, '"done"', claim => claim_of(2));
UPDATE idempotency_key SET expires_at = clock_timestamp();
SELECT * FROM probe_all();
-- finished by a transaction claim that took over
CALL lease_twice();
UPDATE idempotency_key SET lease_expires_at = clock_timestamp();
BEGIN;
SELECT attempt FROM idempotency_begin('t', 'a', 'k');
SELECT idempotency_finish('t', 'a', 'k', 200, '"done"');
COMMIT;
SELECT * FROM probe_all();
-- taken over by one that gave it back: that fences as well
CALL lease_twice();
UPDATE idempotency_key SET lease_expires_at = clock_timestamp();
BEGIN;
SELECT attempt FROM idempotency_begin('t', 'a', 'k');
SELECT idempotency_release('t', 'a', 'k');
COMMIT;
SELECT * FROM probe_all();
-- and one that was rolled back does not
CALL lease_twice();
UPDATE idempotency_key SET lease_expires_at = clock_timestamp();
BEGIN;
SELECT attempt FROM idempotency_begin('t', 'a', 'k');
ROLLBACK;
SELECT * FROM probe_all();
-- a request that never had a lease
TRUNCATE idempotency_key;
BEGIN;
SELECT attempt FROM idempotency_begin('t', 'a', 'k');
SELECT idempotency_finish('t', 'a', 'k', 200, '"done"');
COMMIT;
SELECT * FROM probe_all();
-- within the transaction that began the claim
TRUNCATE idempotency_key;
SELECT attempt FROM idempotency_begin('t', 'a', 'k', lease => '1 h', claim => claim_of(1));
SELECT idempotency_release('t', 'a', 'k', claim => claim_of(1));
BEGIN;
SELECT attempt FROM idempotency_begin('t', 'a', 'k', lease => '1 h', claim => claim_of(2));
SELECT * FROM probe_all();
ROLLBACK;
-- of another scope
CALL lease_twice();
SELECT probe($$ idempotency_finish('t', 'a', 'k', claim => claim_of(2), actor => 'user 1') $$) AS actor,
       probe($$ idempotency_finish('t', 'b', 'k', claim => claim_of(2)) $$) AS action,
       probe($$ idempotency_finish(NULL, 'a', 'k', claim => claim_of(2)) $$) AS tenant,
       probe($$ idempotency_finish('t', 'a', 'K', claim => claim_of(2)) $$) AS key,
       probe($$ idempotency_checkpoint('t', 'a', 'k', claim_of(2), 'point', actor => 'user 1') $$) AS checkpoint,
       probe($$ idempotency_release('t', 'a', 'k', 'user 1', claim_of(2)) $$) AS release;

--
-- What the errors say
--
SELECT error_of($$ SELECT idempotency_finish('t', 'a', 'k', 200, '"late"', claim => claim_of(1)) $$);
SELECT error_of($$ SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), 'late') $$);
SELECT error_of($$ SELECT idempotency_release('t', 'a', 'k', claim => claim_of(1)) $$);
SELECT error_of($$ SELECT idempotency_finish('t', 'a', 'k', claim => claim_of(3)) $$);
SELECT error_of($$ SELECT idempotency_finish('t', 'a', 'k') $$);
SELECT error_of($$ SELECT idempotency_release('t', 'a', 'k') $$);
SELECT error_of($$ SELECT idempotency_finish('t', 'a', 'k2', claim => claim_of(1)) $$);
SELECT error_of($$ SELECT idempotency_checkpoint('t', 'a', 'k', NULL, 'late') $$);
SELECT idempotency_finish('t', 'a', 'k', 200, '"done"', claim => claim_of(2));
SELECT error_of($$ SELECT idempotency_finish('t', 'a', 'k', 200, '"other"', claim => claim_of(2)) $$);
SELECT error_of($$ SELECT idempotency_finish('t', 'a', 'k', 503, claim => claim_of(2)) $$);
SELECT error_of($$ SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(2), 'late') $$);
SELECT error_of($$ SELECT idempotency_release('t', 'a', 'k', claim => claim_of(2)) $$);
CALL lease_twice();
SELECT idempotency_release('t', 'a', 'k', claim => claim_of(2));
SELECT error_of($$ SELECT idempotency_finish('t', 'a', 'k', 200, '"late"', claim => claim_of(2)) $$);
SELECT error_of($$ SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(2), 'late') $$);

--
-- A finish that took effect may be repeated with the same answer, which is
-- compared exactly
--
CALL lease_twice();
SELECT idempotency_finish('t', 'a', 'k', 201, '{"a": 1,  "b": 2}', '{"x": 1, "y": "2"}', claim => claim_of(2));
SELECT what, probe(format('idempotency_finish(%L, %L, %L, %s, claim => claim_of(2))', 't', 'a', 'k', answer))
FROM (VALUES
    (1, 'the same', $$201, '{"a": 1,  "b": 2}', '{"x": 1, "y": "2"}'$$),
    (2, 'headers that are the same', $$201, '{"a": 1,  "b": 2}', '{"y":"2","x":1,"x":1}'$$),
    (3, 'another status', $$200, '{"a": 1,  "b": 2}', '{"x": 1, "y": "2"}'$$),
    (4, 'a final error', $$404, '{"a": 1,  "b": 2}', '{"x": 1, "y": "2"}'$$),
    (5, 'the default status', $$response => '{"a": 1,  "b": 2}', headers => '{"x": 1, "y": "2"}'$$),
    (6, 'another text with the same meaning', $$201, '{"a": 1, "b": 2}', '{"x": 1, "y": "2"}'$$),
    (7, 'another order', $$201, '{"b": 2,  "a": 1}', '{"x": 1, "y": "2"}'$$),
    (8, 'another response', $$201, '{"a": 1,  "b": 3}', '{"x": 1, "y": "2"}'$$),
    (9, 'no response', $$201, headers => '{"x": 1, "y": "2"}'$$),
    (10, 'null for a response', $$201, 'null', '{"x": 1, "y": "2"}'$$),
    (11, 'other headers', $$201, '{"a": 1,  "b": 2}', '{"x": 1, "y": "3"}'$$),
    (12, 'headers of another type', $$201, '{"a": 1,  "b": 2}', '{"x": 1, "y": 2}'$$),
    (13, 'more headers', $$201, '{"a": 1,  "b": 2}', '{"x": 1, "y": "2", "z": 3}'$$),
    (14, 'no headers', $$201, '{"a": 1,  "b": 2}'$$),
    (15, 'a body', $$201, body => '{"a": 1,  "b": 2}', headers => '{"x": 1, "y": "2"}'$$),
    (16, 'no answer', $$201$$),
    (17, 'not an answer', $$99, '{"a": 1,  "b": 2}', '{"x": 1, "y": "2"}'$$),
    (18, 'the same, to be kept for another time', $$201, '{"a": 1,  "b": 2}', '{"x": 1, "y": "2"}', ttl => '10 min'$$)
) v (n, what, answer) ORDER BY n;
-- without any part of an answer
CALL lease_twice();
SELECT idempotency_finish('t', 'a', 'k', 204, claim => claim_of(2));
SELECT answer, probe(format('idempotency_finish(%L, %L, %L, %s, claim => claim_of(2))', 't', 'a', 'k', answer))
FROM unnest(ARRAY['204', '200', $$204, 'null'$$, $$204, NULL, 'null'$$, $$204, body => ''$$]) answer;
-- a body
CALL lease_twice();
SELECT idempotency_finish('t', 'a', 'k', 404, body => '\x00ff22', claim => claim_of(2));
SELECT answer, probe(format('idempotency_finish(%L, %L, %L, %s, claim => claim_of(2))', 't', 'a', 'k', answer))
FROM unnest(ARRAY[$$404, body => '\x00ff22'$$, $$404, body => '\x00ff2200'$$, $$404, body => '\x00ff'$$, $$404, body => ''$$,
                  $$404$$, $$404, '"\u00ff"'$$, $$410, body => '\x00ff22'$$, $$200, body => '\x00ff22'$$]) answer;
-- a large answer, which is stored out of line
CALL lease_twice();
SELECT string_agg(encode(sha256(i::text::bytea), 'hex'), '') AS hex FROM generate_series(1, 2000) i \gset
SELECT idempotency_finish('t', 'a', 'k', 200, to_json(:'hex'::text), jsonb_build_object('h', :'hex'), claim => claim_of(2));
SELECT probe(format('idempotency_finish(%L, %L, %L, 200, %L, %L, claim => claim_of(2))', 't', 'a', 'k',
                    to_json(:'hex'::text), jsonb_build_object('h', :'hex'))) AS same,
       probe(format('idempotency_finish(%L, %L, %L, 200, %L, %L, claim => claim_of(2))', 't', 'a', 'k',
                    to_json(left(:'hex', -1) || 'x'), jsonb_build_object('h', :'hex'))) AS other_response,
       probe(format('idempotency_finish(%L, %L, %L, 200, %L, %L, claim => claim_of(2))', 't', 'a', 'k',
                    to_json(:'hex'::text), jsonb_build_object('h', left(:'hex', -1)))) AS other_headers;
-- by another session, as often as it likes, and in one transaction
\c -
SELECT image() AS before \gset
SELECT idempotency_finish('t', 'a', 'k', 200, response, headers, claim => claim_of(2))
FROM (SELECT response, headers FROM idempotency_key) r;
BEGIN;
SELECT idempotency_finish('t', 'a', 'k', 200, response, headers, claim => claim_of(2))
FROM (SELECT response, headers FROM idempotency_key) r, generate_series(1, 3);
COMMIT;
SELECT image() = :'before' AS unchanged;
-- what is kept is that of the first one
CALL lease_twice();
BEGIN;
SELECT idempotency_finish('t', 'a', 'k', 201, '"done"', claim => claim_of(2));
SELECT idempotency_finish('t', 'a', 'k', 201, '"done"', claim => claim_of(2));
SAVEPOINT s;
SELECT idempotency_finish('t', 'a', 'k', 201, '"other"', claim => claim_of(2));
\echo :SQLSTATE
ROLLBACK TO s;
COMMIT;
SELECT finished_at, expires_at FROM idempotency_key \gset
SELECT pg_sleep(0.002);
SELECT idempotency_finish('t', 'a', 'k', 201, '"done"', claim => claim_of(2));
SELECT finished_at = :'finished_at' AS finished, expires_at = :'expires_at' AS expires, response FROM idempotency_key;

-- released may be repeated too, until somebody else has it
CALL lease_twice();
SELECT idempotency_finish('t', 'a', 'k', 503, '"try again later"', claim => claim_of(2));
SELECT image() AS before \gset
SELECT idempotency_finish('t', 'a', 'k', 503, '"try again later"', claim => claim_of(2));
SELECT idempotency_finish('t', 'a', 'k', 429, claim => claim_of(2));
SELECT idempotency_release('t', 'a', 'k', claim => claim_of(2));
SELECT image() = :'before' AS unchanged;
SELECT attempt FROM idempotency_begin('t', 'a', 'k', lease => '1 h', claim => claim_of(3));
SELECT idempotency_finish('t', 'a', 'k', 503, '"try again later"', claim => claim_of(2));
\echo :SQLSTATE
SELECT idempotency_release('t', 'a', 'k', claim => claim_of(2));
\echo :SQLSTATE
SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(2), 'late');
\echo :SQLSTATE

--
-- The same at each isolation level
--
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT count(*) FROM idempotency_key;
SELECT * FROM probe_all() WHERE claim IN (1, 2, 3);
COMMIT;
BEGIN ISOLATION LEVEL SERIALIZABLE;
SELECT count(*) FROM idempotency_key;
SELECT * FROM probe_all() WHERE claim IN (1, 2, 3);
COMMIT;

--
-- Who was taken over cannot commit what it did
--
CREATE TABLE payment (amount int);
BEGIN;
INSERT INTO payment VALUES (100);
SELECT idempotency_finish('t', 'a', 'k', 200, '"late"', claim => claim_of(1));
\echo :SQLSTATE
COMMIT;
SELECT count(*) FROM payment;
DROP TABLE payment;

--
-- A transaction claim has no id
--
TRUNCATE idempotency_key;
BEGIN;
SELECT claim, attempt FROM idempotency_begin('t', 'a', 'k');
SELECT * FROM probe_all();
-- there is no lease to renew
SELECT error_of($$ SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), 'point') $$);
SELECT idempotency_finish('t', 'a', 'k', 200, '"done"');
-- and it cannot be finished twice
SELECT probe($$ idempotency_finish('t', 'a', 'k', 200, '"done"') $$);
COMMIT;
SELECT state, claim, attempt, lease_expires_at FROM idempotency_key;
-- the same where it took over a leased claim: the lease is nobody's
CALL lease_twice();
UPDATE idempotency_key SET lease_expires_at = clock_timestamp();
BEGIN;
SELECT claim, attempt FROM idempotency_begin('t', 'a', 'k');
SELECT * FROM probe_all();
ROLLBACK;

DROP FUNCTION image, probe, probe_all;
DROP PROCEDURE lease_twice;
DROP EXTENSION idempotency;
