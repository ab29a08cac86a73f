--
-- The id of a leased claim: who brings it, who makes it, and who asks again
--
CREATE EXTENSION idempotency;
\set SHOW_CONTEXT never
-- an answer "in flight" that knows of no lease: the same each time with this
SET idempotency.retry_after = '90s';

-- the number of the id of a claim
CREATE FUNCTION number_of(claim uuid) RETURNS text LANGUAGE sql IMMUTABLE AS
$$ SELECT CASE WHEN claim::text LIKE '00000000-%' THEN right(claim::text, 1) WHEN claim IS NOT NULL THEN 'random' END $$;

-- a record, without what differs from run to run
CREATE VIEW record AS
    SELECT key, state, response, number_of(claim) AS claim, attempt, request_hash IS NOT NULL AS hashed,
           recovery_point AS point, recovery_state AS saved,
           CASE WHEN lease_expires_at > clock_timestamp() THEN 'held'
                WHEN lease_expires_at IS NOT NULL THEN 'over' END AS lease
    FROM idempotency_key;

-- Ask for a claim by its id.  What came of it, and whether the lease is now that
-- which was asked for.
CREATE FUNCTION ask(number int, request jsonb DEFAULT NULL, lease interval DEFAULT '1 h',
                    OUT outcome text, OUT claim text, OUT attempt int, OUT point text, OUT saved jsonb, OUT leased boolean)
LANGUAGE plpgsql AS $$
DECLARE
    before timestamptz := clock_timestamp();
BEGIN
    SELECT r.outcome, number_of(r.claim), r.attempt, r.recovery_point, r.recovery_state
    INTO outcome, claim, attempt, point, saved
    FROM idempotency_try_begin('t', 'a', 'k', request, lease => lease, claim => claim_of(number)) r;
    leased := EXISTS (
        SELECT FROM idempotency_key
        WHERE key = 'k' AND lease_expires_at BETWEEN before + lease AND clock_timestamp() + lease);
END $$;

-- what each of the calls that bring an id says to one, all of it undone
CREATE FUNCTION calls_with(claim uuid, OUT finish text, OUT released text, OUT release text, OUT checkpoint text)
LANGUAGE plpgsql AS $$
BEGIN
    BEGIN
        finish := idempotency_finish('t', 'a', 'k', claim => calls_with.claim);
        RAISE SQLSTATE 'UNDO1';
    EXCEPTION WHEN SQLSTATE 'UNDO1' THEN NULL; WHEN OTHERS THEN finish := SQLSTATE;
    END;
    BEGIN
        released := idempotency_finish('t', 'a', 'k', 503, claim => calls_with.claim);
        RAISE SQLSTATE 'UNDO1';
    EXCEPTION WHEN SQLSTATE 'UNDO1' THEN NULL; WHEN OTHERS THEN released := SQLSTATE;
    END;
    BEGIN
        release := idempotency_release('t', 'a', 'k', claim => calls_with.claim);
        RAISE SQLSTATE 'UNDO1';
    EXCEPTION WHEN SQLSTATE 'UNDO1' THEN NULL; WHEN OTHERS THEN release := SQLSTATE;
    END;
    BEGIN
        checkpoint := idempotency_checkpoint('t', 'a', 'k', claim, 'point') IS NOT NULL;
        RAISE SQLSTATE 'UNDO1';
    EXCEPTION WHEN SQLSTATE 'UNDO1' THEN NULL; WHEN OTHERS THEN checkpoint := SQLSTATE;
    END;
END $$;

-- what was counted for the action of this test
CREATE FUNCTION counts() RETURNS text LANGUAGE sql AS $$
    SELECT format('started %s, in flight %s, expired %s, taken over %s', started, in_flight, expired, taken_over)
    FROM idempotency_stats WHERE action = 'claim.counted'
$$;

--
-- Made by begin, if the caller brings none: a random one, and never the same
--
SELECT count(*), count(DISTINCT r.claim) AS different,
       bool_and(r.claim::text ~ '^.{8}-.{4}-4.{3}-[89ab].{3}-.{12}$') AS random
FROM generate_series(1, 100) i, idempotency_begin('t', 'many', 'k' || i, lease => '1 h') r;
SELECT count(DISTINCT claim) AS different FROM idempotency_key;
TRUNCATE idempotency_key;
SELECT claim AS made FROM idempotency_try_begin('t', 'a', 'k', lease => '1 h') \gset
SELECT claim = :'made' AS of_row FROM idempotency_key;
-- it is what the calls need, and what another begin takes
SELECT * FROM calls_with(:'made');
SELECT * FROM calls_with(claim_of(1));
SELECT outcome, claim = :'made' AS same, attempt FROM idempotency_begin('t', 'a', 'k', lease => '1 h', claim => :'made');
-- a takeover has another one
CALL run_out();
SELECT outcome, claim <> :'made' AS another, attempt FROM idempotency_begin('t', 'a', 'k', lease => '1 h');
SELECT claim <> :'made' AS another FROM idempotency_key;
SELECT * FROM calls_with(:'made');
TRUNCATE idempotency_key;

--
-- Nobody is told the id but who began the claim
--
SELECT * FROM ask(1);
SELECT outcome, claim FROM idempotency_try_begin('t', 'a', 'k');
SELECT outcome, claim FROM idempotency_try_begin('t', 'a', 'k', lease => '1 h');
SELECT outcome, claim FROM idempotency_replay('t', 'a', 'k');
CALL run_out();
SELECT outcome, claim FROM idempotency_replay('t', 'a', 'k');
BEGIN;
SELECT outcome, claim, attempt FROM idempotency_begin('t', 'a', 'k');
ROLLBACK;
SELECT idempotency_finish('t', 'a', 'k', claim => claim_of(1));
SELECT outcome, claim FROM idempotency_try_begin('t', 'a', 'k', lease => '1 h');
SELECT outcome, claim FROM idempotency_replay('t', 'a', 'k');
-- and a transaction claim has none
BEGIN;
SELECT outcome, claim FROM idempotency_begin('t', 'a', 'k2');
SELECT idempotency_finish('t', 'a', 'k2');
COMMIT;
SELECT key, number_of(claim) AS claim FROM idempotency_key ORDER BY key;
TRUNCATE idempotency_key;

--
-- Without a lease there is nothing to bring an id for, whatever there is
--
SELECT error_of($$ SELECT idempotency_begin('t', 'a', 'k', claim => claim_of(1)) $$);
SELECT error_of($$ SELECT idempotency_try_begin('t', 'a', 'k', claim => claim_of(1)) $$);
SELECT outcome FROM ask(1);
SELECT error_of($$ SELECT idempotency_begin('t', 'a', 'k', claim => claim_of(1)) $$);
SELECT error_of($$ SELECT idempotency_begin('t', 'a', 'k', lease => NULL, claim => claim_of(1)) $$);
-- not even by the setting, which is about checkpoints
SET idempotency.lease = '1h';
SELECT error_of($$ SELECT idempotency_begin('t', 'a', 'k', claim => claim_of(1)) $$);
RESET idempotency.lease;
TRUNCATE idempotency_key;

--
-- Asked again after the commit: the same claim, with its lease from now on
--
SELECT * FROM ask(1, '{"amount": 1}', '10 min');
SELECT created_at FROM idempotency_key \gset
SELECT * FROM ask(1, '{"amount": 1}', '1 h');
SELECT * FROM ask(1, '{"amount": 1}', '5 min');
SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), 'charged', '{"charge": "ch_1"}') IS NOT NULL AS renewed;
-- with how far it got
SELECT * FROM ask(1, '{"amount": 1}');
SELECT * FROM record;
SELECT created_at = :'created_at' AS created FROM idempotency_key;
SELECT outcome, claim = claim_of(1) AS same, created_at = :'created_at' AS created
FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}', lease => '1 h', claim => claim_of(1), ttl => '2 h');
-- the ttl is that of the last one
SELECT ttl, expires_at >= lease_expires_at + interval '2 h' AS kept_for_ttl FROM idempotency_key;
-- by another session, and as often as it likes
\c -
SET idempotency.retry_after = '90s';
\set SHOW_CONTEXT never
SELECT count(*) FROM generate_series(1, 3) i, ask(1) WHERE claim = '1' AND attempt = 1 AND outcome = 'started';
-- with no wait, however long one could
SELECT outcome FROM idempotency_begin('t', 'a', 'k', lease => '1 h', claim => claim_of(1), wait => '1 h');
-- another request is a different one, whoever asks
SELECT * FROM ask(1, '{"amount": 2}');
SELECT error_of($$ SELECT idempotency_begin('t', 'a', 'k', '{"amount": 2}', lease => '1 h', claim => claim_of(1)) $$);
-- another id is another caller
SELECT * FROM ask(2, '{"amount": 1}');
SELECT * FROM record;
-- it has taken no lock with it
SELECT locks();
SELECT key, pid, attempt FROM idempotency_in_flight;
SELECT idempotency_finish('t', 'a', 'k', 200, '"done"', claim => claim_of(1));
SELECT * FROM record;
TRUNCATE idempotency_key;
-- a request that was not given the first time is known from now on
SELECT * FROM ask(1);
SELECT * FROM ask(1, '{"amount": 1}');
SELECT * FROM ask(1, '{"amount": 2}');
SELECT * FROM record;
TRUNCATE idempotency_key;
-- an id that is used for several scopes is as good as several
SELECT outcome FROM ask(1);
SELECT outcome FROM idempotency_begin('t', 'a', 'k2', lease => '1 h', claim => claim_of(1));
SELECT idempotency_finish('t', 'a', 'k', 200, '"of k"', claim => claim_of(1));
SELECT key, state, response, claim FROM record ORDER BY key;
SELECT idempotency_finish('t', 'a', 'k2', 200, '"of k2"', claim => claim_of(1));
SELECT key, state, response, claim FROM record ORDER BY key;
TRUNCATE idempotency_key;

--
-- Within the transaction that began it
--
BEGIN;
SELECT * FROM ask(1, '{"amount": 1}', '10 min');
SELECT locks();
SELECT * FROM ask(1, '{"amount": 1}');
SELECT locks();
SELECT key, pid = pg_backend_pid() AS mine, attempt FROM idempotency_in_flight;
SELECT * FROM record;
-- any other begin is out of order
SELECT error_of($$ SELECT idempotency_begin('t', 'a', 'k', lease => '1 h', claim => claim_of(2)) $$);
SELECT error_of($$ SELECT idempotency_begin('t', 'a', 'k', lease => '1 h') $$);
SELECT error_of($$ SELECT idempotency_begin('t', 'a', 'k') $$);
SELECT error_of($$ SELECT idempotency_try_begin('t', 'a', 'k', '{"amount": 2}') $$);
-- and a different request is mismatched, and takes nothing away
SELECT * FROM ask(1, '{"amount": 2}');
SELECT locks();
SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), 'charged') IS NOT NULL AS renewed;
SELECT * FROM ask(1);
COMMIT;
SELECT locks();
SELECT * FROM record;
-- ended there, it is not to be had again
BEGIN;
SELECT * FROM ask(1);
SELECT idempotency_finish('t', 'a', 'k', 200, '"done"', claim => claim_of(1));
SELECT * FROM ask(1);
COMMIT;
SELECT * FROM ask(1);
TRUNCATE idempotency_key;
BEGIN;
SELECT * FROM ask(1);
SELECT idempotency_release('t', 'a', 'k', claim => claim_of(1));
SELECT error_of($$ SELECT ask(1) $$);
SELECT * FROM ask(2);
COMMIT;
SELECT * FROM record;
TRUNCATE idempotency_key;
-- nor by the holder of a transaction claim
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k');
SELECT error_of($$ SELECT ask(1) $$);
ROLLBACK;

--
-- Savepoints: asked again in one that is rolled back, it is as it was
--
BEGIN;
SELECT * FROM ask(1, NULL, '10 min');
SELECT lease_expires_at AS ends FROM idempotency_key \gset
SAVEPOINT s;
SELECT * FROM ask(1);
SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), 'charged') IS NOT NULL AS renewed;
SAVEPOINT s2;
SELECT * FROM ask(1, NULL, '5 min');
ROLLBACK TO s2;
SELECT * FROM ask(1);
ROLLBACK TO s;
SELECT claim, attempt, point, lease FROM record;
SELECT lease_expires_at = :'ends' AS as_before FROM idempotency_key;
-- still held by this transaction
SELECT locks();
SELECT error_of($$ SELECT idempotency_begin('t', 'a', 'k', lease => '1 h', claim => claim_of(2)) $$);
SELECT key, pid = pg_backend_pid() AS mine FROM idempotency_in_flight;
SELECT * FROM ask(1);
SAVEPOINT s;
SELECT idempotency_finish('t', 'a', 'k', claim => claim_of(1));
ROLLBACK TO s;
SELECT * FROM ask(1);
COMMIT;
SELECT * FROM record;
-- of a claim of before: the lease goes back, and the lock goes
SELECT lease_expires_at AS ends FROM idempotency_key \gset
BEGIN;
SAVEPOINT s;
SELECT * FROM ask(1, NULL, '2 h');
SELECT locks();
ROLLBACK TO s;
SELECT locks();
SELECT lease_expires_at = :'ends' AS as_before FROM idempotency_key;
COMMIT;
BEGIN;
SELECT * FROM ask(1, NULL, '2 h');
ROLLBACK;
SELECT lease_expires_at = :'ends' AS as_before FROM idempotency_key;
TRUNCATE idempotency_key;
-- begun in one that is rolled back, there is no claim
BEGIN;
SAVEPOINT s;
SELECT * FROM ask(1);
ROLLBACK TO s;
SELECT count(*) FROM idempotency_key;
SELECT * FROM ask(1);
SELECT * FROM ask(1);
COMMIT;
SELECT * FROM record;
TRUNCATE idempotency_key;

--
-- Stalled: the same claim, as long as nobody has taken it over
--
SELECT * FROM ask(1, '{"amount": 1}');
SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), 'charged', '{"charge": "ch_1"}') IS NOT NULL AS renewed;
CALL run_out();
SELECT key FROM idempotency_stalled;
SELECT * FROM ask(1, '{"amount": 2}');
SELECT * FROM ask(1, '{"amount": 1}');
SELECT key FROM idempotency_stalled;
SELECT * FROM calls_with(claim_of(1));

-- taken over by a leased claim: in flight
CALL run_out();
SELECT * FROM ask(2, '{"amount": 1}');
SELECT * FROM ask(1, '{"amount": 1}');
SELECT * FROM ask(1, '{"amount": 2}');
SELECT * FROM ask(2, '{"amount": 1}');
SELECT * FROM calls_with(claim_of(1));
-- when that has run out, who asks is one who takes over, as anybody else
CALL run_out();
SELECT * FROM ask(1, '{"amount": 1}');
SELECT * FROM calls_with(claim_of(2));
TRUNCATE idempotency_key;

-- taken over by a transaction claim: in flight while that may be committed
SELECT * FROM ask(1, '{"amount": 1}');
CALL run_out();
BEGIN;
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'k');
SELECT idempotency_finish('t', 'a', 'k', 200, '"by a transaction"');
PREPARE TRANSACTION 'takeover';
SELECT * FROM ask(1);
SELECT * FROM ask(1, '{"amount": 2}');
SELECT error_of($$ SELECT idempotency_begin('t', 'a', 'k', lease => '1 h', claim => claim_of(1)) $$) LIKE 'ID003%' AS in_flight;
ROLLBACK PREPARED 'takeover';
-- rolled back: nobody has taken over
SELECT * FROM ask(1);
CALL run_out();
-- released: it is nobody's, and who asks takes over
BEGIN;
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'k');
SELECT idempotency_release('t', 'a', 'k');
COMMIT;
SELECT * FROM record;
SELECT * FROM ask(1);
CALL run_out();
-- committed: its answer
BEGIN;
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'k');
SELECT idempotency_finish('t', 'a', 'k', 200, '"by a transaction"');
COMMIT;
SELECT * FROM ask(1);
SELECT * FROM record;
TRUNCATE idempotency_key;

--
-- While another transaction works on it: in flight, for its own caller as well
--
BEGIN;
SELECT * FROM ask(1);
PREPARE TRANSACTION 'begin';
SELECT outcome FROM ask(1);
COMMIT PREPARED 'begin';
SELECT * FROM ask(1);
BEGIN;
SELECT * FROM ask(1, NULL, '2 h');
PREPARE TRANSACTION 'again';
SELECT outcome FROM ask(1);
ROLLBACK PREPARED 'again';
BEGIN;
SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), 'charged') IS NOT NULL AS renewed;
PREPARE TRANSACTION 'checkpoint';
SELECT outcome FROM ask(1);
SELECT outcome FROM idempotency_try_begin('t', 'a', 'k', lease => '1 h', claim => claim_of(1), wait => '20 ms');
SELECT locks();
COMMIT PREPARED 'checkpoint';
SELECT * FROM ask(1);
BEGIN;
SELECT idempotency_finish('t', 'a', 'k', 200, '"prepared"', claim => claim_of(1));
PREPARE TRANSACTION 'finish';
SELECT outcome FROM ask(1);
COMMIT PREPARED 'finish';
SELECT * FROM ask(1);
TRUNCATE idempotency_key;

--
-- Ended
--
-- completed and errored: the answer
SELECT * FROM ask(1);
SELECT idempotency_finish('t', 'a', 'k', 200, '"done"', claim => claim_of(1));
SELECT outcome, status_code, response, claim FROM idempotency_begin('t', 'a', 'k', lease => '1 h', claim => claim_of(1));
TRUNCATE idempotency_key;
SELECT * FROM ask(1);
SELECT idempotency_finish('t', 'a', 'k', 402, '"no funds"', claim => claim_of(1));
SELECT outcome, status_code, response, claim FROM idempotency_begin('t', 'a', 'k', lease => '1 h', claim => claim_of(1));
TRUNCATE idempotency_key;
-- released: lost
SELECT * FROM ask(1, '{"amount": 1}');
SELECT idempotency_release('t', 'a', 'k', claim => claim_of(1));
SELECT error_of($$ SELECT idempotency_begin('t', 'a', 'k', lease => '1 h', claim => claim_of(1)) $$);
SELECT error_of($$ SELECT idempotency_try_begin('t', 'a', 'k', '{"amount": 1}', lease => '1 h', claim => claim_of(1)) $$);
-- though a different request is one
SELECT * FROM ask(1, '{"amount": 2}');
SELECT * FROM record;
SELECT locks();
SELECT * FROM ask(2, '{"amount": 1}');
SELECT outcome FROM ask(1);
-- the same by a status that may be retried
SELECT idempotency_finish('t', 'a', 'k', 503, claim => claim_of(2));
SELECT error_of($$ SELECT ask(2) $$);
SELECT * FROM ask(3);
-- expired: a new attempt, the first one
UPDATE idempotency_key SET lease_expires_at = now() - interval '2 h', expires_at = now() - interval '1 h';
SELECT * FROM ask(3, '{"amount": 2}');
SELECT * FROM record;
-- swept: the same
UPDATE idempotency_key SET lease_expires_at = now() - interval '2 h', expires_at = now() - interval '1 h';
CALL idempotency_sweep();
SELECT count(*) FROM idempotency_key;
SELECT * FROM calls_with(claim_of(3));
SELECT * FROM ask(3, '{"amount": 3}');
SELECT * FROM record;
TRUNCATE idempotency_key;

--
-- Who asks again is counted as nothing
--
SELECT outcome FROM idempotency_begin('t', 'claim.counted', 'k', lease => '1 h', claim => claim_of(1));
SELECT counts();
SELECT outcome FROM idempotency_begin('t', 'claim.counted', 'k', lease => '1 h', claim => claim_of(1));
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'claim.counted', 'k', lease => '1 h', claim => claim_of(1));
SELECT outcome FROM idempotency_begin('t', 'claim.counted', 'k', lease => '1 h', claim => claim_of(1));
COMMIT;
CALL run_out();
SELECT outcome FROM idempotency_begin('t', 'claim.counted', 'k', lease => '1 h', claim => claim_of(1));
SELECT counts();
-- unlike a takeover, and a repeat that is in flight
CALL run_out();
SELECT outcome FROM idempotency_begin('t', 'claim.counted', 'k', lease => '1 h', claim => claim_of(2));
SELECT outcome FROM idempotency_try_begin('t', 'claim.counted', 'k', lease => '1 h', claim => claim_of(1));
SELECT counts();
TRUNCATE idempotency_key;

--
-- A claim whose record was swept cannot be mistaken for the next one, which has
-- the same attempt number
--
SELECT * FROM ask(1);
CALL run_out();
SELECT * FROM ask(2);
SET idempotency.error_ttl = '1s';
SELECT idempotency_finish('t', 'a', 'k', 402, '"of 2"', claim => claim_of(2));
RESET idempotency.error_ttl;
UPDATE idempotency_key SET expires_at = clock_timestamp();
CALL idempotency_sweep();
SELECT count(*) FROM idempotency_key;
SELECT * FROM ask(3);
-- who had the first one comes back
SELECT * FROM calls_with(claim_of(1));
SELECT * FROM calls_with(claim_of(2));
SELECT outcome FROM ask(1);
SELECT outcome FROM ask(2);
SELECT * FROM calls_with(claim_of(3));
SELECT idempotency_finish('t', 'a', 'k', 201, '"of 3"', claim => claim_of(3));
SELECT outcome, status_code, response, attempt FROM idempotency_replay('t', 'a', 'k');
SELECT * FROM calls_with(claim_of(1));
TRUNCATE idempotency_key;

--
-- At each isolation level
--
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT * FROM ask(1);
SELECT * FROM ask(1);
COMMIT;
BEGIN ISOLATION LEVEL SERIALIZABLE;
SELECT * FROM ask(1);
SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), 'charged') IS NOT NULL AS renewed;
SELECT * FROM ask(1);
COMMIT;
SELECT * FROM record;

DROP VIEW record;
DROP FUNCTION number_of, ask, calls_with, counts;
DROP EXTENSION idempotency;
