--
-- What begin and try_begin find, and what they answer
--
CREATE EXTENSION idempotency;

-- an answer "in flight" tells for how long: the same each time with this
SET idempotency.retry_after = '90s';

--
-- Nothing is found: started
--
SELECT clock_timestamp() AS before \gset
BEGIN;
SELECT pg_sleep(0.002);
\x on
-- the clock is that of the call, not that of the transaction
SELECT outcome, status_code, response, headers, body, claim, attempt,
       recovery_point, recovery_state, retry_after,
       created_at BETWEEN :'before' AND clock_timestamp() AS created_now,
       created_at > now() AS created_at_the_call,
       finished_at, expires_at
FROM idempotency_begin('acme', 'orders.create', 'k1', '{"amount": 1}');
\x off
-- nothing is written before finish
SELECT count(*) FROM idempotency_key;
SELECT pg_sleep(0.002);
SELECT idempotency_finish('acme', 'orders.create', 'k1', 201, '{"order": 7}',
                          '{"Location": "/orders/7"}');
COMMIT;

-- the one row that it left
\x on
SELECT tenant, action, key, actor, state,
       request_hash = idempotency_request_hash('{"amount": 1}') AS hash_of_request,
       status_code, headers, response, body, claim, attempt,
       recovery_point, recovery_state, lease_expires_at,
       created_at >= :'before' AS created_now,
       finished_at > created_at AS finished_later,
       expires_at - finished_at AS kept_for
FROM idempotency_key;

--
-- A completed record: replayed
--
SELECT r.outcome, r.status_code, r.response, r.headers, r.body, r.claim, r.attempt,
       r.recovery_point, r.recovery_state, r.retry_after,
       r.created_at = k.created_at AS created, r.finished_at = k.finished_at AS finished,
       r.expires_at = k.expires_at AS expires
FROM idempotency_begin('acme', 'orders.create', 'k1', '{"amount": 1}') r,
     idempotency_key k;
SELECT r.outcome, r.status_code, r.response, r.headers, r.body, r.claim, r.attempt,
       r.recovery_point, r.recovery_state, r.retry_after,
       r.created_at = k.created_at AS created, r.finished_at = k.finished_at AS finished,
       r.expires_at = k.expires_at AS expires
FROM idempotency_try_begin('acme', 'orders.create', 'k1', '{"amount": 1}') r,
     idempotency_key k;
SELECT r.outcome, r.status_code, r.response, r.headers, r.body, r.claim, r.attempt,
       r.recovery_point, r.recovery_state, r.retry_after,
       r.created_at = k.created_at AS created, r.finished_at = k.finished_at AS finished,
       r.expires_at = k.expires_at AS expires
FROM idempotency_replay('acme', 'orders.create', 'k1', '{"amount": 1}') r,
     idempotency_key k;
\x off
-- a replay is no claim, and leaves no lock behind
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'orders.create', 'k1');
SELECT count(*) FROM pg_locks WHERE locktype = 'userlock' AND pid = pg_backend_pid();
COMMIT;
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'orders.create', 'k1');
SELECT idempotency_finish('acme', 'orders.create', 'k1', 200, '{"order": 8}');
\echo :SQLSTATE
ROLLBACK;
SELECT response FROM idempotency_key;

-- no request on this side
SELECT outcome, response
FROM idempotency_begin('acme', 'orders.create', 'k1');
-- no request on the other side
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'orders.create', 'no-request');
SELECT idempotency_finish('acme', 'orders.create', 'no-request', 200, '"kept"');
COMMIT;
SELECT request_hash FROM idempotency_key WHERE key = 'no-request';
SELECT outcome, response
FROM idempotency_begin('acme', 'orders.create', 'no-request', '{"amount": 1}');
SELECT outcome, response
FROM idempotency_begin('acme', 'orders.create', 'no-request', '{"amount": 2}');

--
-- An errored record: replayed
--
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'orders.create', 'k2', '{"amount": 1}');
SELECT idempotency_finish('acme', 'orders.create', 'k2', 402, '{"error": "no funds"}');
COMMIT;
SELECT outcome, status_code, response
FROM idempotency_begin('acme', 'orders.create', 'k2', '{"amount": 1}');
SELECT outcome, status_code, response
FROM idempotency_try_begin('acme', 'orders.create', 'k2', '{"amount": 1}');
SELECT outcome, status_code, response
FROM idempotency_replay('acme', 'orders.create', 'k2', '{"amount": 1}');

--
-- A different request: mismatched.  Neither the key nor the stored answer is
-- told.
--
SELECT * FROM idempotency_begin('acme', 'orders.create', 'k1', '{"amount": 2}');
\echo :SQLSTATE
SELECT * FROM idempotency_begin('acme', 'orders.create', 'k2', '{"amount": 2}');
\echo :SQLSTATE
SELECT * FROM idempotency_replay('acme', 'orders.create', 'k1', '{"amount": 2}');
\echo :SQLSTATE
SELECT * FROM idempotency_try_begin('acme', 'orders.create', 'k1', '{"amount": 2}');
SELECT * FROM idempotency_try_begin('acme', 'orders.create', 'k2', '{"amount": 2}');
-- an outcome does not abort the transaction, and leaves no lock
BEGIN;
SELECT outcome FROM idempotency_try_begin('acme', 'orders.create', 'k1', '{"amount": 2}');
SELECT count(*) FROM pg_locks WHERE locktype = 'userlock' AND pid = pg_backend_pid();
COMMIT;

-- digests that the caller brings
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'orders.create', 'k3',
    request_hash => '\x000102030405060708090a0b0c0d0e0f');
SELECT idempotency_finish('acme', 'orders.create', 'k3', 204);
COMMIT;
SELECT request_hash FROM idempotency_key WHERE key = 'k3';
SELECT outcome, status_code FROM idempotency_begin('acme', 'orders.create', 'k3',
    request_hash => '\x000102030405060708090a0b0c0d0e0f');
SELECT outcome FROM idempotency_try_begin('acme', 'orders.create', 'k3',
    request_hash => '\x000102030405060708090a0b0c0d0eff');
-- one byte more is another digest
SELECT outcome FROM idempotency_try_begin('acme', 'orders.create', 'k3',
    request_hash => '\x000102030405060708090a0b0c0d0e0f00');
SELECT outcome FROM idempotency_replay('acme', 'orders.create', 'k3',
    request_hash => '\x000102030405060708090a0b0c0d0e0f');
SELECT outcome FROM idempotency_replay('acme', 'orders.create', 'k3',
    request_hash => '\x000102030405060708090a0b0c0d0eff');
\echo :SQLSTATE
-- the hash of a request is the digest that the extension computes itself
SELECT outcome FROM idempotency_begin('acme', 'orders.create', 'k1',
    request_hash => idempotency_request_hash('{"amount": 1}'));

--
-- An expired record: started anew, and finish replaces it
--
UPDATE idempotency_key SET created_at = created_at - interval '2 days',
    finished_at = finished_at - interval '2 days',
    expires_at = expires_at - interval '2 days';
-- all columns are null when there is nothing to replay
SELECT * FROM idempotency_replay('acme', 'orders.create', 'k1', '{"amount": 1}');
-- nor is anything compared with the request of an expired record
SELECT r IS NULL AS nothing
FROM idempotency_replay('acme', 'orders.create', 'k1', '{"amount": 2}') r;
BEGIN;
SELECT outcome, attempt, response
FROM idempotency_begin('acme', 'orders.create', 'k1', '{"amount": 2}');
SELECT idempotency_finish('acme', 'orders.create', 'k1', 200, '{"order": 9}');
COMMIT;
SELECT outcome, response
FROM idempotency_begin('acme', 'orders.create', 'k1', '{"amount": 2}');
SELECT status_code, response, attempt, created_at > :'before' AS created_now,
       expires_at - finished_at AS kept_for
FROM idempotency_key WHERE key = 'k1';

--
-- A claim that this transaction holds already
--
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'orders.create', 'twice');
SAVEPOINT s;
SELECT idempotency_begin('acme', 'orders.create', 'twice');
\echo :SQLSTATE
ROLLBACK TO s;
SELECT idempotency_try_begin('acme', 'orders.create', 'twice');
\echo :SQLSTATE
ROLLBACK TO s;
-- whatever the request
SELECT idempotency_begin('acme', 'orders.create', 'twice', '{"amount": 2}');
\echo :SQLSTATE
ROLLBACK TO s;
-- the claim is still there
SELECT idempotency_finish('acme', 'orders.create', 'twice');
-- and after finish the same transaction gets the answer
SELECT outcome, status_code FROM idempotency_begin('acme', 'orders.create', 'twice');
SELECT outcome, status_code FROM idempotency_replay('acme', 'orders.create', 'twice');
COMMIT;

-- a claim whose answer was not kept may be begun again
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'orders.create', 'again');
SELECT idempotency_finish('acme', 'orders.create', 'again', 503, '"later"');
SELECT outcome FROM idempotency_begin('acme', 'orders.create', 'again');
SELECT idempotency_finish('acme', 'orders.create', 'again', 200, '"now"');
SELECT outcome, response FROM idempotency_begin('acme', 'orders.create', 'again');
COMMIT;
SELECT status_code, response FROM idempotency_key WHERE key = 'again';

--
-- A claim that another transaction holds.  A prepared transaction is another
-- one even for the session that prepared it.
--
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'orders.create', 'held', '{"amount": 1}');
SELECT idempotency_finish('acme', 'orders.create', 'held', 201, '{"order": 10}');
PREPARE TRANSACTION 'held';

SELECT error_of($$ SELECT idempotency_begin('acme', 'orders.create', 'held', '{"amount": 1}') $$);
-- a request that is not given cannot be told from the one that runs
SELECT error_of($$ SELECT idempotency_begin('acme', 'orders.create', 'held') $$);
-- when it was begun is known, and nothing else of it is told
\x on
SELECT r.outcome, r.status_code, r.response, r.headers, r.body, r.claim, r.attempt,
       r.recovery_point, r.recovery_state, r.retry_after,
       r.created_at = i.started_at AS created, r.finished_at, r.expires_at
FROM idempotency_try_begin('acme', 'orders.create', 'held', '{"amount": 1}') r,
     idempotency_in_flight i;
\x off
-- there is nothing to replay yet
SELECT outcome, status_code, response, retry_after
FROM idempotency_replay('acme', 'orders.create', 'held');
-- a mismatch outranks in flight
SELECT idempotency_begin('acme', 'orders.create', 'held', '{"amount": 2}');
\echo :SQLSTATE
SELECT outcome, retry_after
FROM idempotency_try_begin('acme', 'orders.create', 'held', '{"amount": 2}');
-- also when one could wait
SELECT outcome, retry_after
FROM idempotency_try_begin('acme', 'orders.create', 'held', '{"amount": 2}', wait => '1 hour');
-- try_begin does not abort its transaction
BEGIN;
SELECT outcome FROM idempotency_try_begin('acme', 'orders.create', 'held', '{"amount": 1}');
SELECT count(*) FROM pg_locks WHERE locktype = 'userlock' AND pid = pg_backend_pid();
SELECT outcome FROM idempotency_begin('acme', 'orders.create', 'other');
SELECT idempotency_finish('acme', 'orders.create', 'other');
COMMIT;
-- other scopes are free
BEGIN;
SELECT outcome FROM idempotency_begin('other', 'orders.create', 'held');
SELECT outcome FROM idempotency_begin('acme', 'orders.cancel', 'held');
SELECT outcome FROM idempotency_begin('acme', 'orders.create', 'held', actor => 'user 1');
ROLLBACK;

-- retry_after is the setting, when the claim was not held for longer
SET idempotency.retry_after = '1s';
SELECT outcome, retry_after BETWEEN 1 AND 60 AS soon
FROM idempotency_try_begin('acme', 'orders.create', 'held', '{"amount": 1}');
SET idempotency.retry_after = '90s';

-- a wait that times out
SELECT outcome, retry_after
FROM idempotency_try_begin('acme', 'orders.create', 'held', '{"amount": 1}', wait => '20 ms');
SELECT outcome, retry_after
FROM idempotency_try_begin('acme', 'orders.create', 'held', '{"amount": 1}', wait => '1 us');
SELECT error_of($$ SELECT idempotency_begin('acme', 'orders.create', 'held',
                                            '{"amount": 1}', wait => '20 ms') $$);
SET idempotency.wait = '20ms';
SELECT outcome, retry_after
FROM idempotency_try_begin('acme', 'orders.create', 'held', '{"amount": 1}');
RESET idempotency.wait;
-- the transaction that waited in vain can go on
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'orders.create', 'before');
SELECT outcome FROM idempotency_try_begin('acme', 'orders.create', 'held', wait => '20 ms');
SELECT idempotency_finish('acme', 'orders.create', 'before');
COMMIT;
SELECT outcome FROM idempotency_begin('acme', 'orders.create', 'before');
-- a shorter lock_timeout or statement_timeout of the session keeps its meaning
\set SHOW_CONTEXT never
SET lock_timeout = '20ms';
SELECT idempotency_try_begin('acme', 'orders.create', 'held', '{"amount": 1}', wait => '1 hour');
\echo :SQLSTATE
-- one of the same length is not shorter
SELECT outcome
FROM idempotency_try_begin('acme', 'orders.create', 'held', '{"amount": 1}', wait => '20 ms');
-- a longer one does not lengthen the wait, and is left as it was
SET lock_timeout = '1h';
SELECT outcome
FROM idempotency_try_begin('acme', 'orders.create', 'held', '{"amount": 1}', wait => '20 ms');
SHOW lock_timeout;
RESET lock_timeout;
SET statement_timeout = '20ms';
SELECT idempotency_try_begin('acme', 'orders.create', 'held', '{"amount": 1}', wait => '1 hour');
\echo :SQLSTATE
RESET statement_timeout;
\set SHOW_CONTEXT errors

-- committed: its answer
COMMIT PREPARED 'held';
SELECT outcome, status_code, response
FROM idempotency_begin('acme', 'orders.create', 'held', '{"amount": 1}');

-- rolled back: nothing is left of it
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'orders.create', 'gone', '{"amount": 1}');
SELECT idempotency_finish('acme', 'orders.create', 'gone', 201, '{"order": 11}');
PREPARE TRANSACTION 'gone';
SELECT outcome FROM idempotency_try_begin('acme', 'orders.create', 'gone', '{"amount": 1}');
ROLLBACK PREPARED 'gone';
SELECT r IS NULL AS nothing FROM idempotency_replay('acme', 'orders.create', 'gone') r;
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'orders.create', 'gone', '{"amount": 2}');
ROLLBACK;

--
-- Many claims in one statement, and one scope twice in one statement
--
BEGIN;
SELECT count(*) FILTER (WHERE outcome = 'started') AS started
FROM generate_series(1, 200) i, idempotency_begin('acme', 'bulk', 'key-' || i);
SELECT count(*) FILTER (WHERE f = 'completed') AS completed
FROM generate_series(1, 200) i, idempotency_finish('acme', 'bulk', 'key-' || i, 200, to_json(i)) f;
COMMIT;
SELECT count(*) AS replayed, sum(i - response::text::int) AS difference
FROM generate_series(1, 200) i, idempotency_begin('acme', 'bulk', 'key-' || i)
WHERE outcome = 'replayed';
SELECT idempotency_begin('acme', 'bulk', 'one') FROM generate_series(1, 2);
\echo :SQLSTATE

--
-- Arguments by position and by name
--
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'orders.create', 'position', '{"a": 1}', 'user 1',
                                      interval '10 min', interval '0', NULL, NULL, NULL);
SELECT idempotency_finish('acme', 'orders.create', 'position', 200, '"answer"', '{"h": "1"}',
                          'user 1', NULL, NULL, interval '20 min');
SELECT outcome FROM idempotency_begin(
    key => 'name', action => 'orders.create', tenant => 'acme', actor => 'user 1',
    request_hash => idempotency_request_hash('{"a": 1}'), wait => '0', ttl => '10 min');
SELECT idempotency_finish(
    key => 'name', action => 'orders.create', tenant => 'acme', actor => 'user 1',
    headers => '{"h": "1"}', response => '"answer"', status_code => 200, ttl => '20 min');
COMMIT;
SELECT count(*), count(DISTINCT (request_hash, actor, status_code, response::text, headers,
                                 expires_at - finished_at)) AS different,
       min(expires_at - finished_at) AS kept_for
FROM idempotency_key WHERE key IN ('position', 'name');

DROP EXTENSION idempotency;
