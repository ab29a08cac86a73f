--
-- store: keep an answer that is known already
--
CREATE EXTENSION idempotency;
\set SHOW_CONTEXT never
-- an answer "in flight" that knows of no lease: the same each time with this
SET idempotency.retry_after = '90s';

-- a record, without what differs from run to run
CREATE VIEW record AS
    SELECT tenant, action, key, actor, state, status_code, response, headers, body, attempt,
           request_hash IS NOT NULL AS hashed, expires_at - finished_at AS kept_for
    FROM idempotency_key;

--
-- What it is for: a transaction failed and was rolled back, and the next one keeps
-- the failure
--
CREATE TABLE payment (amount int CHECK (amount > 0));
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'pay', 'k', '{"amount": -1}');
INSERT INTO payment VALUES (-1);
ROLLBACK;
SELECT outcome, status_code, response
FROM idempotency_store('t', 'pay', 'k', '{"amount": -1}', 402, '{"error":  "amount"}');
SELECT outcome, status_code, response FROM idempotency_begin('t', 'pay', 'k', '{"amount": -1}');
SELECT outcome FROM idempotency_try_begin('t', 'pay', 'k', '{"amount": 1}');
DROP TABLE payment;
TRUNCATE idempotency_key;

--
-- What it stores, and returns
--
BEGIN;
SELECT pg_sleep(0.002);
\x on
-- completed
SELECT outcome, status_code, response, headers, body, claim, attempt, recovery_point, recovery_state, retry_after,
       created_at BETWEEN now() AND clock_timestamp() AND created_at > now() AS created_at_the_call,
       finished_at BETWEEN created_at AND clock_timestamp() AS finished_now, expires_at - finished_at AS kept_for
FROM idempotency_store('t', 'a', 'completed', '{"amount": 1}', 201, '{"order":  7}', '{"Location": "/orders/7"}', 'user 1');
-- errored, with an answer that is not JSON
SELECT outcome, status_code, response, headers, body, claim, attempt, recovery_point, recovery_state, retry_after,
       created_at > now() AS created_at_the_call, finished_at >= created_at AS finished_now, expires_at - finished_at AS kept_for
FROM idempotency_store('t', 'a', 'errored', NULL, 404, body => 'not found');
-- released: nothing is kept
SELECT outcome, status_code, response, headers, body, claim, attempt, recovery_point, recovery_state, retry_after,
       created_at > now() AS created_at_the_call, finished_at, expires_at
FROM idempotency_store('t', 'a', 'released', NULL, 503, '"later"');
\x off
COMMIT;
SELECT * FROM record ORDER BY key;
SELECT request_hash = idempotency_request_hash('{"amount": 1}') AS hash_of_request, claim, lease_expires_at, ttl,
       recovery_point, recovery_state
FROM idempotency_key WHERE key = 'completed';
-- the first answer stays, and is what is told
SELECT s.outcome, s.status_code, s.response, s.headers, s.attempt, s.created_at = k.created_at AS created,
       s.finished_at = k.finished_at AS finished, s.expires_at = k.expires_at AS expires
FROM idempotency_key k, idempotency_store('t', 'a', 'completed', '{"amount": 1}', 500, '"other"', actor => 'user 1') s
WHERE k.key = 'completed';
SELECT outcome, status_code, body FROM idempotency_store('t', 'a', 'errored', NULL, 200, '"other"');
-- where nothing was kept, the next one is the first
SELECT outcome, status_code, response FROM idempotency_store('t', 'a', 'released', NULL, 200, '"now"');
SELECT * FROM record ORDER BY key;
SELECT outcome, response FROM idempotency_begin('t', 'a', 'released');
TRUNCATE idempotency_key;
-- no answer at all, by position, and all of it by name
SELECT outcome, status_code, response, headers, body FROM idempotency_store(NULL, 'a', 'k1', NULL, 204);
SELECT outcome FROM idempotency_store('t', 'a', 'k2', '{"a": 1}', 200, '1', '{"h": 1}', 'user 1', NULL, interval '10 min', NULL);
SELECT outcome FROM idempotency_store(
    request_hash => idempotency_request_hash('{"a": 1}'), ttl => '10 min', actor => 'user 1', headers => '{"h": 1}',
    response => '1', status_code => 200, request => NULL, key => 'k3', action => 'a', tenant => 't');
SELECT * FROM record ORDER BY key;
SELECT count(DISTINCT request_hash) FROM idempotency_key WHERE key <> 'k1';
TRUNCATE idempotency_key;
-- many in one statement, some of them twice
SELECT outcome, count(*) FROM generate_series(1, 150) i,
       idempotency_store('t', 'import', 'k' || i % 100, to_jsonb(i % 100), 200, to_json(i)) GROUP BY outcome ORDER BY outcome;
SELECT count(*), max(response::text::int) FROM idempotency_key;
TRUNCATE idempotency_key;

--
-- How long it is kept: for ttl, else for the setting that its status asks for
--
CREATE FUNCTION kept_for(status int, ttl interval) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    result idempotency_result;
BEGIN
    result := idempotency_store('t', 'a', 'k', NULL, status, ttl => kept_for.ttl);
    RAISE EXCEPTION USING ERRCODE = 'UNDO1', MESSAGE = concat_ws(' ', result.outcome, result.expires_at - result.finished_at);
EXCEPTION
    WHEN SQLSTATE 'UNDO1' THEN
        RETURN SQLERRM;
    WHEN OTHERS THEN
        RETURN SQLSTATE;
END $$;
SELECT ttl, kept_for(200, ttl) AS completed, kept_for(404, ttl) AS errored, kept_for(503, ttl) AS released
FROM unnest('{NULL,72 h 1 us,72 h,300 s,299.999999 s,1 s,999999 us,0,-1 h}'::interval[]) WITH ORDINALITY t (ttl, n) ORDER BY n;
BEGIN;
SET LOCAL idempotency.ttl = '2h';
SET LOCAL idempotency.error_ttl = '10s';
SET LOCAL idempotency.retryable_status = '404';
SELECT kept_for(200, NULL) AS completed, kept_for(402, NULL) AS errored, kept_for(404, NULL) AS released, kept_for(503, NULL) AS errored_too;
ROLLBACK;
SET idempotency.min_ttl = '1s';
SELECT kept_for(200, '1 s');
RESET idempotency.min_ttl;

--
-- Fingerprints
--
SELECT outcome FROM idempotency_store('t', 'a', 'with', '{"amount": 1}', 200, '"first"');
SELECT outcome FROM idempotency_store('t', 'a', 'without', NULL, 200, '"first"');
SELECT what, outcome, s.status_code, s.response
FROM (VALUES (1, 'the same', 'with', '{"amount": 1.0}'::jsonb, NULL::bytea), (2, 'its digest', 'with', NULL, idempotency_request_hash('{"amount": 1}')),
             (3, 'none', 'with', NULL, NULL), (4, 'another', 'with', '{"amount": 2}', NULL), (5, 'another digest', 'with', NULL, sha256('x')),
             (6, 'one where there was none', 'without', '{"amount": 1}', NULL)) v (n, what, k, request, digest),
     idempotency_store('t', 'a', k, request, 500, '"second"', request_hash => digest) s ORDER BY n;
-- a mismatch tells nothing
SELECT * FROM idempotency_store('t', 'a', 'with', '{"amount": 2}', 200, '"second"');
-- both are one too many
SELECT error_of($$ SELECT idempotency_store('t', 'a', 'k', '{"amount": 1}', 200, request_hash => sha256('x')) $$);
SELECT key, state, status_code, response FROM record ORDER BY key;
TRUNCATE idempotency_key;

--
-- Arguments
--
SELECT error_of($$ SELECT idempotency_store('t', 'a', NULL, NULL, 200) $$);
SELECT error_of($$ SELECT idempotency_store('t', 'a', 'a key', NULL, 200) $$);
SELECT error_of($$ SELECT idempotency_store('t', NULL, 'k', NULL, 200) $$);
SELECT error_of($$ SELECT idempotency_store('t', 'a', 'k', NULL, NULL) $$);
SELECT error_of($$ SELECT idempotency_store('t', 'a', 'k', NULL, 600) $$);
SELECT error_of($$ SELECT idempotency_store('t', 'a', 'k', NULL, 200, '1', body => '1') $$);
SELECT error_of($$ SELECT idempotency_store('t', 'a', 'k', NULL, 200, request_hash => '\x00') $$);
SET idempotency.max_response_size = '10B';
SELECT error_of($$ SELECT idempotency_store('t', 'a', 'k', NULL, 200, '"12345678x"') $$);
SELECT outcome FROM idempotency_store('t', 'a', 'k', NULL, 200, '"12345678"');
-- what is not kept may have any size
SELECT outcome FROM idempotency_store('t', 'a', 'k2', NULL, 503, '"12345678x"');
RESET idempotency.max_response_size;
BEGIN READ ONLY;
SELECT error_of($$ SELECT idempotency_store('t', 'a', 'k', NULL, 200) $$);
COMMIT;
SELECT locks();
TRUNCATE idempotency_key;

--
-- A claim of another transaction: in flight
--
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}');
SELECT idempotency_finish('t', 'a', 'k', 200, '"of another"');
PREPARE TRANSACTION 'held';
SELECT s.outcome, s.status_code, s.response, s.attempt, s.retry_after, s.created_at = i.started_at AS created
FROM idempotency_in_flight i, idempotency_store('t', 'a', 'k', '{"amount": 1}', 402, '"failed"') s;
SELECT outcome FROM idempotency_store('t', 'a', 'k', '{"amount": 2}', 402, '"failed"');
SET idempotency.wait = '20ms';
SELECT outcome, retry_after FROM idempotency_store('t', 'a', 'k', '{"amount": 1}', 402, '"failed"');
RESET idempotency.wait;
SELECT locks();
SELECT count(*) FROM idempotency_key;
COMMIT PREPARED 'held';
SELECT outcome, status_code, response FROM idempotency_store('t', 'a', 'k', '{"amount": 1}', 402, '"failed"');
TRUNCATE idempotency_key;
-- what store keeps is in flight for others until its transaction is over
BEGIN;
SELECT outcome FROM idempotency_store('t', 'a', 'k', '{"amount": 1}', 402, '"failed"');
SELECT locks();
PREPARE TRANSACTION 'store';
SELECT outcome FROM idempotency_try_begin('t', 'a', 'k', '{"amount": 1}');
SELECT outcome FROM idempotency_try_begin('t', 'a', 'k', '{"amount": 2}');
SELECT outcome FROM idempotency_store('t', 'a', 'k', '{"amount": 1}', 200, '"other"');
ROLLBACK PREPARED 'store';
SELECT outcome FROM idempotency_store('t', 'a', 'k', '{"amount": 1}', 200, '"other"');
TRUNCATE idempotency_key;

--
-- A claim of this transaction: out of order, for its end is finish
--
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k');
SELECT error_of($$ SELECT idempotency_store('t', 'a', 'k', NULL, 200) $$);
SELECT error_of($$ SELECT idempotency_store('t', 'a', 'k', '{"amount": 2}', 503) $$);
-- which is still there
SELECT idempotency_finish('t', 'a', 'k', 200, '"by finish"');
SELECT outcome, response FROM idempotency_store('t', 'a', 'k', NULL, 200, '"by store"');
COMMIT;
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'leased', lease => '1 h', claim => claim_of(1));
SELECT error_of($$ SELECT idempotency_store('t', 'a', 'leased', NULL, 200) $$);
ROLLBACK;
-- released there, it is nobody's
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k2');
SELECT idempotency_release('t', 'a', 'k2');
SELECT outcome FROM idempotency_store('t', 'a', 'k2', NULL, 402, '"by store"');
SELECT outcome, response FROM idempotency_begin('t', 'a', 'k2');
COMMIT;
SELECT key, response FROM record ORDER BY key;
TRUNCATE idempotency_key;
-- it leaves no claim, so that the guard has nothing to say
BEGIN;
SELECT outcome FROM idempotency_store('t', 'a', 'k', NULL, 503);
SELECT outcome FROM idempotency_store('t', 'a', 'k', NULL, 200, '"kept"');
SELECT error_of($$ SELECT idempotency_finish('t', 'a', 'k') $$);
COMMIT;
SELECT key, response FROM record;
TRUNCATE idempotency_key;

--
-- A leased claim: never taken over, whether it runs, stalled or was released
--
SELECT outcome FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}', lease => '1 h', claim => claim_of(1));
SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), 'charged', '{"charge": "ch_1"}', '1 h') IS NOT NULL AS renewed;
SELECT s.outcome, s.status_code, s.response, s.claim, s.attempt, s.recovery_point, s.recovery_state,
       s.retry_after BETWEEN 3480 AND 3600 AS rest, s.created_at = k.created_at AS created
FROM idempotency_key k, idempotency_store('t', 'a', 'k', '{"amount": 1}', 200, '"by store"') s;
SELECT outcome FROM idempotency_store('t', 'a', 'k', '{"amount": 2}', 200, '"by store"');
CALL run_out();
SELECT outcome, attempt, recovery_point FROM idempotency_store('t', 'a', 'k', '{"amount": 1}', 200, '"by store"');
SELECT outcome FROM idempotency_store('t', 'a', 'k', NULL, 503);
SELECT outcome FROM idempotency_store('t', 'a', 'k', '{"amount": 2}', 200, '"by store"');
SELECT locks();
-- nobody was fenced
SELECT state, claim, attempt, recovery_point, recovery_state FROM idempotency_key;
SELECT idempotency_release('t', 'a', 'k', claim => claim_of(1));
SELECT outcome, retry_after FROM idempotency_store('t', 'a', 'k', '{"amount": 1}', 200, '"by store"');
SELECT outcome FROM idempotency_store('t', 'a', 'k', '{"amount": 2}', 200, '"by store"');
SELECT state, claim, attempt, recovery_point, recovery_state, lease_expires_at FROM idempotency_key;
-- the next attempt goes on where that one was
SELECT outcome, attempt, recovery_point FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}', lease => '1 h', claim => claim_of(2));
SELECT idempotency_finish('t', 'a', 'k', 200, '"by finish"', claim => claim_of(2));
SELECT outcome, response, attempt FROM idempotency_store('t', 'a', 'k', '{"amount": 1}', 200, '"by store"');
-- when the time of the record is over, it is not there
UPDATE idempotency_key SET expires_at = clock_timestamp();
SELECT outcome, response, attempt FROM idempotency_store('t', 'a', 'k', '{"amount": 2}', 404, '"by store"');
SELECT key, state, response, attempt, kept_for FROM record;
SELECT claim, lease_expires_at FROM idempotency_key;
TRUNCATE idempotency_key;
SELECT outcome FROM idempotency_begin('t', 'a', 'k', lease => '1 h', claim => claim_of(1));
UPDATE idempotency_key SET lease_expires_at = now() - interval '2 h', expires_at = now() - interval '1 h';
-- which one that is not kept leaves as it was
SELECT outcome, attempt FROM idempotency_store('t', 'a', 'k', NULL, 503);
SELECT state, number FROM idempotency_key, generate_series(1, 3) number WHERE claim = claim_of(number);
SELECT outcome, attempt FROM idempotency_store('t', 'a', 'k', NULL, 200, '"by store"');
SELECT state, response, claim FROM idempotency_key;
TRUNCATE idempotency_key;

--
-- Savepoints: it goes with the rollback
--
BEGIN;
SAVEPOINT s;
SELECT outcome FROM idempotency_store('t', 'a', 'k', NULL, 402, '"undone"');
ROLLBACK TO s;
SELECT locks();
SELECT count(*) FROM idempotency_key;
SELECT outcome FROM idempotency_store('t', 'a', 'k', NULL, 402, '"kept"');
RELEASE s;
SELECT outcome, response FROM idempotency_store('t', 'a', 'k', NULL, 402, '"once more"');
COMMIT;
SELECT key, response FROM record;

--
-- At each isolation level
--
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT outcome, response FROM idempotency_store('t', 'a', 'k', NULL, 200, '"repeatable"');
SELECT outcome, response FROM idempotency_store('t', 'a', 'repeatable', NULL, 200, '"repeatable"');
COMMIT;
BEGIN ISOLATION LEVEL SERIALIZABLE;
SELECT outcome, response FROM idempotency_store('t', 'a', 'k', NULL, 200, '"serializable"');
SELECT outcome, response FROM idempotency_store('t', 'a', 'serializable', NULL, 200, '"serializable"');
COMMIT;
SELECT key, response FROM record ORDER BY key;

--
-- Waiting for a lease that ran out, which is not to be taken over, is sleeping
-- and not looking all the time
--
SELECT outcome FROM idempotency_begin('t', 'keep.wait', 'k', lease => '1 ms');
SELECT pg_sleep(0.01);
SET idempotency.wait = '200ms';
SELECT outcome FROM idempotency_store('t', 'keep.wait', 'k', NULL, 402);
RESET idempotency.wait;
SELECT (SELECT sum(n) FROM unnest(lookup_time_histogram) AS n) < 100 AS sleeps
FROM idempotency_stats WHERE action = 'keep.wait';

DROP VIEW record;
DROP FUNCTION kept_for;
DROP EXTENSION idempotency;
