--
-- Leased claims: begin with a lease, repeats, takeover
--
CREATE EXTENSION idempotency;
\set SHOW_CONTEXT never
-- an answer "in flight" that knows of no lease: the same each time with this
SET idempotency.retry_after = '90s';

-- a record, without what differs from run to run
CREATE VIEW record AS
    SELECT key, state, status_code, response,
           CASE WHEN claim::text LIKE '00000000-%' THEN right(claim::text, 1) WHEN claim IS NOT NULL THEN 'random' END AS claim,
           attempt, request_hash IS NOT NULL AS hashed,
           recovery_point AS point, recovery_state AS saved,
           CASE WHEN lease_expires_at > clock_timestamp() THEN 'held'
                WHEN lease_expires_at IS NOT NULL THEN 'over' END AS lease,
           finished_at IS NOT NULL AS finished, ttl
    FROM idempotency_key;

-- whether a retry_after is the rest of a lease
CREATE FUNCTION is_rest_of(retry_after int, lease interval) RETURNS boolean LANGUAGE sql AS
$$ SELECT retry_after <= extract(epoch FROM lease) AND retry_after > extract(epoch FROM lease) - 120 $$;

--
-- In the transaction that begins it
--
SELECT clock_timestamp() AS before \gset
BEGIN;
SELECT pg_sleep(0.002);
\x on
SELECT outcome, status_code, response, headers, body, claim, attempt,
       recovery_point, recovery_state, retry_after,
       created_at BETWEEN :'before' AND clock_timestamp() AS created_now,
       created_at > now() AS created_at_the_call,
       finished_at, expires_at
FROM idempotency_begin('acme', 'pay', 'k1', '{"amount": 1}', 'user 1', lease => '1 h', ttl => '2 h', claim => claim_of(1));
-- the row is there
SELECT tenant, action, key, actor, state,
       request_hash = idempotency_request_hash('{"amount": 1}') AS hash_of_request,
       status_code, headers, response, body, claim, attempt, recovery_point, recovery_state,
       lease_expires_at - created_at AS lease, created_at >= :'before' AS created_now,
       finished_at, expires_at >= lease_expires_at + interval '2 h' AS kept_for_ttl,
       expires_at <= lease_expires_at + interval '2 h 15 min' AS kept_no_longer, ttl
FROM idempotency_key;
SELECT pid = pg_backend_pid() AS mine, i.tenant, i.actor, i.action, i.key, i.attempt,
       i.started_at = k.created_at AS started, i.lease_expires_at = k.lease_expires_at AS lease
FROM idempotency_in_flight i, idempotency_key k;
\x off
SELECT count(*) FROM idempotency_stalled;
SELECT locks();
-- it was begun here
SELECT error_of($$ SELECT idempotency_begin('acme', 'pay', 'k1', actor => 'user 1') $$);
SELECT error_of($$ SELECT idempotency_try_begin('acme', 'pay', 'k1', '{"amount": 2}', 'user 1', lease => '1 h') $$);
-- the guard lets it go
COMMIT;
SELECT locks();

--
-- Afterwards it belongs to whoever knows its id
--
SELECT i.pid, i.tenant, i.actor, i.action, i.key, i.attempt,
       i.started_at = k.created_at AS started, i.lease_expires_at = k.lease_expires_at AS lease
FROM idempotency_in_flight i, idempotency_key k;
SELECT count(*) FROM idempotency_stalled;
-- a repeat is told the rest of the lease, and not the id
SELECT r.outcome, r.status_code, r.response, r.claim, r.attempt, is_rest_of(r.retry_after, '1 h') AS rest,
       r.created_at = k.created_at AS created
FROM idempotency_key k, idempotency_try_begin('acme', 'pay', 'k1', '{"amount": 1}', 'user 1') r;
SELECT outcome, is_rest_of(retry_after, '1 h') AS rest
FROM idempotency_try_begin('acme', 'pay', 'k1', '{"amount": 1}', 'user 1', lease => '1 ms');
SELECT outcome, is_rest_of(retry_after, '1 h') AS rest
FROM idempotency_try_begin('acme', 'pay', 'k1', actor => 'user 1');
SELECT error_of($$ SELECT idempotency_begin('acme', 'pay', 'k1', '{"amount": 1}', 'user 1') $$);
SELECT error_of($$ SELECT idempotency_begin('acme', 'pay', 'k1', actor => 'user 1', lease => '2 h') $$);
-- a mismatch outranks that
SELECT r FROM idempotency_try_begin('acme', 'pay', 'k1', '{"amount": 2}', 'user 1') r;
SELECT r FROM idempotency_try_begin('acme', 'pay', 'k1', '{"amount": 2}', 'user 1', wait => '1 min') r;
SELECT error_of($$ SELECT idempotency_begin('acme', 'pay', 'k1', '{"amount": 2}', 'user 1', lease => '1 h') $$);
-- there is no answer yet
SELECT r.outcome, r.status_code, r.response, r.claim, r.attempt, is_rest_of(r.retry_after, '1 h') AS rest,
       r.created_at = k.created_at AS created
FROM idempotency_key k, idempotency_replay('acme', 'pay', 'k1', '{"amount": 1}', 'user 1') r;
SELECT error_of($$ SELECT idempotency_replay('acme', 'pay', 'k1', '{"amount": 2}', 'user 1') $$);
-- a wait that is too short, of the call or of the session
SELECT outcome, is_rest_of(retry_after, '1 h') AS rest
FROM idempotency_try_begin('acme', 'pay', 'k1', '{"amount": 1}', 'user 1', wait => '20 ms');
SET idempotency.wait = '20ms';
SELECT error_of($$ SELECT idempotency_begin('acme', 'pay', 'k1', '{"amount": 1}', 'user 1') $$);
RESET idempotency.wait;
-- a repeat takes no lock, and changed nothing
BEGIN;
SELECT outcome FROM idempotency_try_begin('acme', 'pay', 'k1', actor => 'user 1');
SELECT locks();
COMMIT;
SELECT * FROM record;
-- another scope is another request
SELECT outcome, attempt FROM idempotency_begin('acme', 'pay', 'k1', lease => '1 h');
SELECT outcome, attempt FROM idempotency_begin('acme', 'pay', 'k1', actor => 'user 2', lease => '1 h');
SELECT outcome, attempt FROM idempotency_begin(NULL, 'pay', 'k1', actor => 'user 1', lease => '1 h');
SELECT tenant, actor, pid FROM idempotency_in_flight ORDER BY tenant, actor;

-- it is finished by another session
\c -
SELECT idempotency_finish('acme', 'pay', 'k1', 201, '{"paid": 1}', actor => 'user 1', claim => claim_of(1));
SELECT outcome, status_code, response, attempt, retry_after
FROM idempotency_begin('acme', 'pay', 'k1', '{"amount": 1}', 'user 1');
SELECT outcome, status_code, response, attempt, retry_after
FROM idempotency_begin('acme', 'pay', 'k1', '{"amount": 1}', 'user 1', lease => '1 h');
SELECT outcome, status_code, response
FROM idempotency_replay('acme', 'pay', 'k1', '{"amount": 1}', 'user 1');
SELECT outcome FROM idempotency_try_begin('acme', 'pay', 'k1', '{"amount": 2}', 'user 1', lease => '1 h');
SELECT tenant, actor FROM idempotency_in_flight ORDER BY tenant, actor;
SELECT * FROM record WHERE response IS NOT NULL;
TRUNCATE idempotency_key;
SET idempotency.retry_after = '90s';
\set SHOW_CONTEXT never

-- all of it in one transaction
BEGIN;
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'k', lease => '1 h', claim => claim_of(1));
SELECT idempotency_finish('t', 'a', 'k', 200, '"once"', claim => claim_of(1));
SELECT outcome, response FROM idempotency_begin('t', 'a', 'k', lease => '1 h');
SELECT key, pid = pg_backend_pid() AS mine FROM idempotency_in_flight;
COMMIT;
SELECT key FROM idempotency_in_flight;
SELECT outcome, response FROM idempotency_begin('t', 'a', 'k', lease => '1 h');
TRUNCATE idempotency_key;
-- rolled back: nothing
BEGIN;
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'k', lease => '1 h');
ROLLBACK;
SELECT count(*) FROM idempotency_key;
SELECT count(*) FROM idempotency_in_flight;
-- many in one statement
SELECT outcome, attempt, count(*)
FROM generate_series(1, 100) i, idempotency_begin('t', 'many', 'k' || i, lease => '1 h', claim => claim_of(1))
GROUP BY outcome, attempt;
SELECT count(*), count(pid) AS held_by_a_process FROM idempotency_in_flight;
SELECT f, count(*) FROM generate_series(1, 100) i, idempotency_finish('t', 'many', 'k' || i, claim => claim_of(1)) f
GROUP BY f;
SELECT count(*) FROM idempotency_in_flight;
TRUNCATE idempotency_key;

--
-- A leased claim and a transaction claim in one transaction: the guard is
-- about the latter
--
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'leased', lease => '1 h');
SELECT outcome FROM idempotency_begin('t', 'a', 'of-transaction');
COMMIT;
\echo :SQLSTATE
SELECT count(*) FROM idempotency_key;
SET idempotency.commit_guard = off;
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'leased', lease => '1 h');
SELECT outcome FROM idempotency_begin('t', 'a', 'of-transaction');
COMMIT;
RESET idempotency.commit_guard;
SELECT key, state FROM idempotency_key;
TRUNCATE idempotency_key;

--
-- Takeover of a lease that ran out
--
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}', lease => '1 ms', ttl => '2 h', claim => claim_of(1));
SELECT created_at FROM idempotency_key \gset
SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), 'charged', '{"charge": "ch_1"}', '1 ms') IS NOT NULL AS renewed;
SELECT pg_sleep(0.01);
SELECT count(*) FROM idempotency_in_flight;
SELECT s.tenant, s.actor, s.action, s.key, s.attempt, s.recovery_point,
       s.started_at = :'created_at' AS started, s.lease_expires_at = k.lease_expires_at AS lease
FROM idempotency_stalled s, idempotency_key k;
-- a different request is still a mismatch, and there is still no answer
SELECT outcome FROM idempotency_try_begin('t', 'a', 'k', '{"amount": 2}');
SELECT outcome FROM idempotency_try_begin('t', 'a', 'k', '{"amount": 2}', lease => '1 h');
SELECT error_of($$ SELECT idempotency_begin('t', 'a', 'k', '{"amount": 2}', lease => '1 h') $$);
SELECT outcome, status_code, response, claim, attempt, recovery_point, recovery_state, retry_after,
       created_at = :'created_at' AS created
FROM idempotency_replay('t', 'a', 'k', '{"amount": 1}');
SELECT * FROM record;
-- rolled back, nobody took over
BEGIN;
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'k', lease => '1 h');
SELECT i.pid = pg_backend_pid() AS mine, i.attempt, i.lease_expires_at = k.lease_expires_at AS lease
FROM idempotency_in_flight i, idempotency_key k;
SELECT count(*) FROM idempotency_stalled;
SELECT error_of($$ SELECT idempotency_begin('t', 'a', 'k', lease => '1 h') $$);
ROLLBACK;
SELECT * FROM record;
SELECT locks();
-- the next repeat goes on where the first one was
SELECT outcome, attempt, recovery_point, recovery_state, retry_after,
       created_at = :'created_at' AS created, finished_at, expires_at
FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}', lease => '1 h', ttl => '3 h', claim => claim_of(2));
SELECT * FROM record;
SELECT created_at = :'created_at' AS created,
       expires_at BETWEEN lease_expires_at + ttl AND lease_expires_at + ttl * 9 / 8 AS expires
FROM idempotency_key;
SELECT i.pid, i.attempt, i.started_at = :'created_at' AS started, i.lease_expires_at = k.lease_expires_at AS lease
FROM idempotency_in_flight i, idempotency_key k;
SELECT count(*) FROM idempotency_stalled;
SELECT outcome, is_rest_of(retry_after, '1 h') AS rest FROM idempotency_try_begin('t', 'a', 'k', '{"amount": 1}');
SELECT error_of($$ SELECT idempotency_begin('t', 'a', 'k', '{"amount": 1}') $$);
-- and so on
CALL run_out();
SELECT outcome, attempt, recovery_point FROM idempotency_begin('t', 'a', 'k', lease => '1 h', claim => claim_of(3));
SELECT idempotency_finish('t', 'a', 'k', 200, '"done"', claim => claim_of(3));
SELECT * FROM record;
SELECT created_at = :'created_at' AS created FROM idempotency_key;
SELECT outcome, response, attempt, created_at = :'created_at' AS created
FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}');
TRUNCATE idempotency_key;

-- a wait that outlasts the lease
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'k', lease => '100 ms');
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'k', lease => '100 ms', wait => '1 min');
SELECT outcome, attempt FROM idempotency_try_begin('t', 'a', 'k', lease => '1 h', wait => '1 min');
TRUNCATE idempotency_key;

-- the fingerprint: who gives none leaves that of the first request, and who
-- gives one adds it where there was none
SELECT attempt FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}', lease => '1 h');
CALL run_out();
SELECT attempt FROM idempotency_begin('t', 'a', 'k', lease => '1 h');
SELECT outcome FROM idempotency_try_begin('t', 'a', 'k', '{"amount": 2}');
CALL run_out();
BEGIN;
SELECT attempt FROM idempotency_begin('t', 'a', 'k');
SELECT idempotency_finish('t', 'a', 'k', 200, '"done"');
COMMIT;
SELECT outcome FROM idempotency_try_begin('t', 'a', 'k', '{"amount": 2}');
SELECT outcome FROM idempotency_try_begin('t', 'a', 'k', '{"amount": 1}');
TRUNCATE idempotency_key;
SELECT attempt FROM idempotency_begin('t', 'a', 'k', lease => '1 h');
SELECT outcome FROM idempotency_try_begin('t', 'a', 'k', '{"amount": 1}');
CALL run_out();
SELECT attempt FROM idempotency_begin('t', 'a', 'k', request_hash => sha256('x'), lease => '1 h', claim => claim_of(2));
SELECT outcome FROM idempotency_try_begin('t', 'a', 'k', '{"amount": 1}');
SELECT outcome FROM idempotency_try_begin('t', 'a', 'k', request_hash => sha256('x'));
SELECT idempotency_finish('t', 'a', 'k', claim => claim_of(2));
SELECT outcome FROM idempotency_try_begin('t', 'a', 'k', '{"amount": 1}');
SELECT outcome FROM idempotency_try_begin('t', 'a', 'k', request_hash => sha256('x'));
TRUNCATE idempotency_key;

--
-- A released claim: the next repeat runs at once, and goes on where that one was
--
SELECT attempt FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}', lease => '1 h', claim => claim_of(1));
SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), 'charged', '{"charge": "ch_1"}') IS NOT NULL AS renewed;
SELECT idempotency_release('t', 'a', 'k', claim => claim_of(1));
-- all of it is kept, but nobody holds it, and there is nothing to replay
SELECT * FROM record;
SELECT count(*) FROM idempotency_in_flight;
SELECT count(*) FROM idempotency_stalled;
SELECT r IS NULL AS nothing FROM idempotency_replay('t', 'a', 'k', '{"amount": 1}') r;
-- a different request is one as before
SELECT outcome FROM idempotency_try_begin('t', 'a', 'k', '{"amount": 2}', lease => '1 h');
SELECT outcome FROM idempotency_try_begin('t', 'a', 'k', '{"amount": 2}');
SELECT error_of($$ SELECT idempotency_begin('t', 'a', 'k', '{"amount": 2}') $$);
SELECT error_of($$ SELECT idempotency_replay('t', 'a', 'k', '{"amount": 2}') $$);
SELECT outcome, attempt, recovery_point, recovery_state
FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}', lease => '1 h', claim => claim_of(2));
SELECT outcome FROM idempotency_try_begin('t', 'a', 'k', '{"amount": 2}');
-- released by a status that may be retried
SELECT idempotency_finish('t', 'a', 'k', 503, '"try again later"', claim => claim_of(2));
SELECT * FROM record;
SELECT outcome, attempt, recovery_point FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}', lease => '1 h', claim => claim_of(3));
-- and begun again in the transaction that released it
BEGIN;
SELECT idempotency_release('t', 'a', 'k', claim => claim_of(3));
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'k', lease => '1 h', claim => claim_of(4));
SELECT idempotency_release('t', 'a', 'k', claim => claim_of(4));
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'k', lease => '1 h', claim => claim_of(5));
SELECT error_of($$ SELECT idempotency_begin('t', 'a', 'k') $$);
COMMIT;
SELECT * FROM record;
-- by a transaction claim, which keeps it as well when it is released
SELECT idempotency_release('t', 'a', 'k', claim => claim_of(5));
BEGIN;
SELECT outcome, attempt, recovery_point, recovery_state FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}');
SELECT idempotency_finish('t', 'a', 'k', 503);
COMMIT;
SELECT * FROM record;
BEGIN;
SELECT outcome, attempt, recovery_point FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}');
SELECT idempotency_release('t', 'a', 'k');
SELECT outcome FROM idempotency_try_begin('t', 'a', 'k', '{"amount": 2}');
SELECT outcome, attempt, recovery_point FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}');
SELECT idempotency_finish('t', 'a', 'k', 404, '"not found"');
COMMIT;
SELECT * FROM record;
TRUNCATE idempotency_key;

--
-- A pending record whose time is over counts as absent: the next attempt is the
-- first one
--
SELECT attempt FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}', lease => '1 h', claim => claim_of(1));
SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), 'charged', '{"charge": "ch_1"}') IS NOT NULL AS renewed;
UPDATE idempotency_key SET lease_expires_at = now() - interval '2 h', expires_at = now() - interval '1 h',
    created_at = now() - interval '3 h';
SELECT count(*) FROM idempotency_in_flight;
SELECT count(*) FROM idempotency_stalled;
SELECT r IS NULL AS nothing FROM idempotency_replay('t', 'a', 'k') r;
-- who had it has lost it
SELECT error_of($$ SELECT idempotency_finish('t', 'a', 'k', claim => claim_of(1)) $$);
SELECT error_of($$ SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), 'later') $$);
SELECT error_of($$ SELECT idempotency_release('t', 'a', 'k', claim => claim_of(1)) $$);
SELECT error_of($$ SELECT idempotency_finish('t', 'a', 'k') $$);
SELECT error_of($$ SELECT idempotency_release('t', 'a', 'k') $$);
SELECT outcome, attempt, recovery_point, recovery_state, created_at > now() - interval '1 h' AS created_now
FROM idempotency_begin('t', 'a', 'k', '{"amount": 2}', lease => '1 h', claim => claim_of(2));
SELECT * FROM record;
SELECT error_of($$ SELECT idempotency_finish('t', 'a', 'k', claim => claim_of(1)) $$);
-- a transaction claim replaces it, or leaves it as it was
UPDATE idempotency_key SET lease_expires_at = now() - interval '2 h', expires_at = now() - interval '1 h';
BEGIN;
SELECT outcome, attempt, recovery_point FROM idempotency_begin('t', 'a', 'k', '{"amount": 3}');
SELECT idempotency_release('t', 'a', 'k');
COMMIT;
SELECT * FROM record;
BEGIN;
SELECT outcome, attempt, recovery_point FROM idempotency_begin('t', 'a', 'k', '{"amount": 3}');
SELECT idempotency_finish('t', 'a', 'k', 200, '"anew"');
COMMIT;
SELECT key, state, response, attempt, lease, ttl FROM record;
SELECT error_of($$ SELECT idempotency_finish('t', 'a', 'k', claim => claim_of(2)) $$);
-- the same with an answer whose time is over
UPDATE idempotency_key SET expires_at = now(), attempt = 5;
SELECT outcome, attempt, recovery_point FROM idempotency_begin('t', 'a', 'k', lease => '1 h', claim => claim_of(3));
SELECT * FROM record;
-- one that somebody has locked is in flight for a lease, as it would have to
-- wait, and left to finish by a transaction claim
UPDATE idempotency_key SET lease_expires_at = now() - interval '2 h', expires_at = now() - interval '1 h';
BEGIN;
SELECT key FROM idempotency_key FOR UPDATE;
PREPARE TRANSACTION 'locked';
SELECT outcome, retry_after FROM idempotency_try_begin('t', 'a', 'k', lease => '1 h');
SELECT outcome, retry_after FROM idempotency_try_begin('t', 'a', 'k', lease => '1 h', wait => '20 ms');
SELECT error_of($$ SELECT idempotency_begin('t', 'a', 'k', lease => '1 h') $$);
BEGIN;
SELECT outcome, attempt FROM idempotency_try_begin('t', 'a', 'k');
ROLLBACK;
SELECT locks();
COMMIT PREPARED 'locked';
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'k', lease => '1 h');
TRUNCATE idempotency_key;

--
-- Takeover by a transaction claim
--
SELECT attempt FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}', lease => '1 h', ttl => '2 h', claim => claim_of(1));
SELECT created_at FROM idempotency_key \gset
SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), 'charged', '{"charge": "ch_1"}') IS NOT NULL AS renewed;
CALL run_out();
-- rolled back: stalled as it was
BEGIN;
SELECT outcome, attempt, recovery_point, recovery_state, created_at = :'created_at' AS created
FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}', ttl => '3 h');
SELECT pid = pg_backend_pid() AS mine, attempt, lease_expires_at FROM idempotency_in_flight;
SELECT error_of($$ SELECT idempotency_begin('t', 'a', 'k', lease => '1 h') $$);
ROLLBACK;
SELECT * FROM record;
-- neither finished nor released: refused
BEGIN;
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'k');
COMMIT;
\echo :SQLSTATE
SELECT * FROM record;
-- released: stalled with the next attempt number
BEGIN;
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'k');
SELECT idempotency_release('t', 'a', 'k');
SELECT locks();
SELECT error_of($$ SELECT idempotency_release('t', 'a', 'other') $$);
COMMIT;
SELECT * FROM record;
SELECT key, attempt, recovery_point FROM idempotency_stalled;
-- and again in the same transaction
BEGIN;
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'k');
SELECT idempotency_release('t', 'a', 'k');
SELECT outcome, attempt, recovery_point FROM idempotency_begin('t', 'a', 'k');
SELECT idempotency_finish('t', 'a', 'k', 503);
COMMIT;
SELECT * FROM record;
-- with savepoints
BEGIN;
SAVEPOINT s;
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'k');
ROLLBACK TO s;
SELECT * FROM record;
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}', ttl => '3 h');
-- it has no id, so that an id is that of another one
SELECT error_of($$ SELECT idempotency_finish('t', 'a', 'k', claim => claim_of(1)) $$);
SELECT error_of($$ SELECT idempotency_release('t', 'a', 'k', claim => claim_of(2)) $$);
SAVEPOINT s;
SELECT idempotency_finish('t', 'a', 'k', 200, '"undone"');
SELECT state, response FROM record;
ROLLBACK TO s;
SELECT * FROM record;
SELECT idempotency_finish('t', 'a', 'k', 201, '"done"');
SELECT outcome, response, attempt FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}');
COMMIT;
SELECT * FROM record;
SELECT created_at = :'created_at' AS created, expires_at - finished_at AS kept_for FROM idempotency_key;
SELECT outcome, response, created_at = :'created_at' AS created FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}');
-- it is not the record of a leased claim any more
SELECT error_of($$ SELECT idempotency_finish('t', 'a', 'k', 201, '"done"', claim => claim_of(1)) $$);
TRUNCATE idempotency_key;

--
-- Savepoints
--
BEGIN;
SAVEPOINT s;
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'k', lease => '1 h', claim => claim_of(1));
ROLLBACK TO s;
SELECT count(*) FROM idempotency_key;
SELECT count(*) FROM idempotency_in_flight;
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'k', lease => '1 h', claim => claim_of(1));
RELEASE s;
SAVEPOINT s;
SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), 'one') IS NOT NULL AS renewed;
SAVEPOINT s2;
SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), 'two') IS NOT NULL AS renewed;
SELECT idempotency_finish('t', 'a', 'k', 200, '"undone"', claim => claim_of(1));
SELECT state, response, point FROM record;
ROLLBACK TO s2;
-- pending again, and held again by this transaction
SELECT state, response, point FROM record;
SELECT error_of($$ SELECT idempotency_begin('t', 'a', 'k') $$);
SELECT idempotency_release('t', 'a', 'k', claim => claim_of(1));
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'k', lease => '1 h', claim => claim_of(2));
ROLLBACK TO s2;
SELECT state, attempt, point FROM record;
ROLLBACK TO s;
SELECT state, attempt, point FROM record;
SELECT idempotency_finish('t', 'a', 'k', 200, '"done"', claim => claim_of(1));
COMMIT;
SELECT state, attempt, response FROM record;
TRUNCATE idempotency_key;
-- the same over transactions
SELECT attempt FROM idempotency_begin('t', 'a', 'k', lease => '1 h', claim => claim_of(1));
BEGIN;
SAVEPOINT s;
SELECT idempotency_finish('t', 'a', 'k', 200, '"undone"', claim => claim_of(1));
ROLLBACK TO s;
SELECT idempotency_release('t', 'a', 'k', claim => claim_of(1));
ROLLBACK TO s;
SELECT idempotency_finish('t', 'a', 'k', 402, '"no funds"', claim => claim_of(1));
COMMIT;
SELECT state, attempt, response FROM record;
TRUNCATE idempotency_key;

--
-- Prepared transactions
--
BEGIN;
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}', lease => '1 h');
PREPARE TRANSACTION 'begin';
-- what it wrote cannot be seen, but the claim is known
SELECT outcome, retry_after FROM idempotency_try_begin('t', 'a', 'k', '{"amount": 1}');
SELECT outcome, claim, attempt, retry_after FROM idempotency_replay('t', 'a', 'k', '{"amount": 1}');
SELECT error_of($$ SELECT idempotency_replay('t', 'a', 'k', '{"amount": 2}') $$);
SELECT outcome FROM idempotency_try_begin('t', 'a', 'k', '{"amount": 2}', lease => '1 h');
SELECT pid, key, attempt, lease_expires_at - clock_timestamp() BETWEEN '58 min' AND '1 h' AS rest FROM idempotency_in_flight;
ROLLBACK PREPARED 'begin';
SELECT count(*) FROM idempotency_in_flight;
BEGIN;
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}', lease => '1 h', claim => claim_of(1));
PREPARE TRANSACTION 'begin';
COMMIT PREPARED 'begin';
SELECT pid, key, attempt, lease_expires_at - clock_timestamp() BETWEEN '58 min' AND '1 h' AS rest FROM idempotency_in_flight;
SELECT outcome, is_rest_of(retry_after, '1 h') AS rest FROM idempotency_try_begin('t', 'a', 'k', '{"amount": 1}');
-- a finish that is prepared: in flight, also when the lease is over
BEGIN;
SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), 'charged', NULL, '1 ms') IS NOT NULL AS renewed;
COMMIT;
SELECT pg_sleep(0.01);
BEGIN;
SELECT idempotency_finish('t', 'a', 'k', 200, '"prepared"', claim => claim_of(1));
PREPARE TRANSACTION 'finish';
SELECT key FROM idempotency_stalled;
SELECT outcome, retry_after FROM idempotency_try_begin('t', 'a', 'k', '{"amount": 1}');
SELECT outcome, retry_after FROM idempotency_try_begin('t', 'a', 'k', lease => '1 h');
SELECT outcome, retry_after FROM idempotency_try_begin('t', 'a', 'k', lease => '1 h', wait => '20 ms');
SELECT outcome FROM idempotency_try_begin('t', 'a', 'k', '{"amount": 2}', lease => '1 h');
SELECT locks();
ROLLBACK PREPARED 'finish';
-- it did not come to anything, so the claim is taken over
BEGIN;
SELECT outcome, attempt, recovery_point FROM idempotency_begin('t', 'a', 'k', lease => '1 ms', claim => claim_of(2));
PREPARE TRANSACTION 'takeover';
SELECT pg_sleep(0.01);
SELECT outcome, retry_after FROM idempotency_try_begin('t', 'a', 'k', lease => '1 h');
SELECT outcome FROM idempotency_try_begin('t', 'a', 'k', '{"amount": 2}');
COMMIT PREPARED 'takeover';
SELECT outcome, attempt, recovery_point FROM idempotency_begin('t', 'a', 'k', lease => '1 h', claim => claim_of(3));
BEGIN;
SELECT idempotency_finish('t', 'a', 'k', 200, '"prepared"', claim => claim_of(3));
PREPARE TRANSACTION 'finish';
SELECT outcome, is_rest_of(retry_after, '1 h') AS rest FROM idempotency_try_begin('t', 'a', 'k', lease => '1 h');
COMMIT PREPARED 'finish';
SELECT outcome, response, attempt FROM idempotency_begin('t', 'a', 'k', lease => '1 h');
SELECT count(*) FROM idempotency_in_flight;
TRUNCATE idempotency_key;

--
-- How long a record is kept: for ttl of begin, by whomever it is finished, and
-- an eighth longer at most; a final error for error_ttl
--
CREATE FUNCTION bounds(ttl interval, lease interval, renewed interval, OUT pending text, OUT completed text, OUT errored interval)
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM idempotency_begin('t', 'a', 'k' || i, ttl => bounds.ttl, lease => bounds.lease, claim => claim_of(1))
    FROM generate_series(1, 2) i;
    SELECT CASE WHEN count(*) = 2 THEN 'within bounds' END INTO pending FROM idempotency_key k
    WHERE k.expires_at BETWEEN lease_expires_at + bounds.ttl AND lease_expires_at + bounds.ttl * 9 / 8
      AND k.ttl = bounds.ttl AND lease_expires_at = created_at + bounds.lease;
    IF renewed IS NOT NULL THEN
        PERFORM idempotency_checkpoint('t', 'a', 'k' || i, claim_of(1), 'p', NULL, renewed) FROM generate_series(1, 2) i;
        -- never less than ttl after the lease
        SELECT pending || CASE WHEN count(*) = 2 THEN ', renewed' END INTO pending FROM idempotency_key k
        WHERE k.expires_at >= lease_expires_at + bounds.ttl;
    END IF;
    PERFORM idempotency_finish('t', 'a', 'k1', claim => claim_of(1));
    PERFORM idempotency_finish('t', 'a', 'k2', 402, claim => claim_of(1));
    SELECT 'within bounds' INTO completed FROM idempotency_key k
    WHERE state = 'completed' AND k.expires_at BETWEEN finished_at + bounds.ttl AND finished_at + bounds.ttl * 9 / 8;
    SELECT k.expires_at - finished_at INTO errored FROM idempotency_key k WHERE state = 'errored';
    DELETE FROM idempotency_key;
END $$;
SELECT ttl, lease, renewed, b.*
FROM (VALUES ('24 h'::interval, '30 min'::interval, NULL::interval), ('24 h', '30 min', '30 min'), ('24 h', '30 min', '3 h'),
             ('24 h', '30 min', '1 ms'), ('24 h', '72 h', NULL), ('24 h', '72 h', '1 s'),
             ('24 h', '1 ms', NULL), ('24 h', '1 ms', '72 h'),
             ('5 min', '30 min', NULL), ('5 min', '1 s', '30 min'), ('5 min', '72 h', '1 ms'), ('5 min', '1 s', NULL),
             ('72 h', '72 h', NULL), ('72 h', '72 h', '72 h'), ('72 h', '1 min', NULL)) v (ttl, lease, renewed),
     bounds(ttl, lease, renewed) b;
SET idempotency.error_ttl = '10s';
SELECT * FROM bounds('24 h', '1 h', NULL);
RESET idempotency.error_ttl;
-- the setting counts when it is begun, also in another session
SET idempotency.ttl = '1h';
SELECT attempt FROM idempotency_begin('t', 'a', 'of-setting', lease => '1 h', claim => claim_of(1));
SELECT attempt FROM idempotency_begin('t', 'a', 'of-call', lease => '1 h', ttl => '10 min', claim => claim_of(1));
RESET idempotency.ttl;
\c -
SELECT key, ttl FROM idempotency_key ORDER BY key;
SELECT idempotency_finish('t', 'a', 'of-setting', claim => claim_of(1)), idempotency_finish('t', 'a', 'of-call', claim => claim_of(1));
SELECT key, expires_at - finished_at BETWEEN '1 h' AND '1 h 7.5 min' AS an_hour,
       expires_at - finished_at BETWEEN '10 min' AND '11.25 min' AS ten_minutes, ttl
FROM idempotency_key ORDER BY key;
TRUNCATE idempotency_key;

--
-- The sweep leaves alone what may be finished or taken over
--
SELECT attempt FROM idempotency_begin('t', 'a', 'held', lease => '1 h', claim => claim_of(1));
SELECT attempt FROM idempotency_begin('t', 'a', 'stalled', lease => '1 ms', claim => claim_of(1));
SELECT attempt FROM idempotency_begin('t', 'a', 'released', lease => '1 h', claim => claim_of(1));
SELECT idempotency_release('t', 'a', 'released', claim => claim_of(1));
SELECT attempt FROM idempotency_begin('t', 'a', 'expired', lease => '1 ms', claim => claim_of(1));
SELECT pg_sleep(0.01);
UPDATE idempotency_key SET expires_at = clock_timestamp() WHERE key = 'expired';
CALL idempotency_sweep();
SELECT key FROM idempotency_key ORDER BY key;
SELECT key FROM idempotency_in_flight;
SELECT key FROM idempotency_stalled;
SELECT idempotency_finish('t', 'a', 'held', claim => claim_of(1)), idempotency_finish('t', 'a', 'stalled', claim => claim_of(1));
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'released', lease => '1 h');
-- after the sweep nothing is known of it
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'expired', lease => '1 h');
TRUNCATE idempotency_key;

--
-- A lease is from a millisecond to max_ttl
--
SELECT lease, error_of(format('SELECT idempotency_begin(%L, %L, %L, lease => %L)', 't', 'a', md5(lease), lease))
FROM unnest('{1 ms,72 h,3 days,0,999 us,-1 ms,-1 h,72 h 1 us,1 year,170000000 years,-170000000 years,1 month -30 days}'::text[]) lease;
SELECT lease_expires_at - created_at AS lease FROM idempotency_key ORDER BY 1;
TRUNCATE idempotency_key;
SELECT error_of($$ SELECT idempotency_try_begin('t', 'a', 'k', lease => '0') $$);
SET idempotency.max_ttl = '24h';
SELECT error_of($$ SELECT idempotency_begin('t', 'a', 'k', lease => '25 h') $$);
RESET idempotency.max_ttl;
-- the setting is about checkpoints: without a lease it is a transaction claim
SET idempotency.lease = '1h';
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k');
SELECT count(*) FROM idempotency_key;
COMMIT;
\echo :SQLSTATE
RESET idempotency.lease;

--
-- At each isolation level
--
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'k', lease => '1 h', claim => claim_of(1));
SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), 'one') IS NOT NULL AS renewed;
COMMIT;
BEGIN ISOLATION LEVEL SERIALIZABLE;
-- the checkpoint was for the time of the setting
SELECT outcome, is_rest_of(retry_after, '30 min') AS rest FROM idempotency_try_begin('t', 'a', 'k');
SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), 'two', NULL, '1 ms') IS NOT NULL AS renewed;
COMMIT;
SELECT pg_sleep(0.01);
BEGIN ISOLATION LEVEL SERIALIZABLE;
SELECT outcome, attempt, recovery_point FROM idempotency_begin('t', 'a', 'k', lease => '1 h', claim => claim_of(2));
SELECT idempotency_finish('t', 'a', 'k', 200, '"done"', claim => claim_of(2));
SELECT outcome, response FROM idempotency_begin('t', 'a', 'k', lease => '1 h');
COMMIT;
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT outcome, response FROM idempotency_begin('t', 'a', 'k', lease => '1 h');
COMMIT;

DROP FUNCTION is_rest_of, bounds;
DROP VIEW record;
DROP EXTENSION idempotency;
