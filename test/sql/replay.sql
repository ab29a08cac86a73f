--
-- replay: what became of a request, for who only wants to know
--
CREATE EXTENSION idempotency;
\set SHOW_CONTEXT never
-- what is told when no lease is known: the same each time with this
SET idempotency.retry_after = '90s';

-- all that a look must leave as it is
CREATE FUNCTION image() RETURNS text LANGUAGE sql VOLATILE AS $$
    SELECT concat_ws(' ',
                     (SELECT string_agg(concat_ws(' ', ctid, xmin, xmax, k), E'\n') FROM idempotency_key k),
                     (SELECT count(*) FROM pg_locks WHERE locktype = 'userlock'),
                     (SELECT string_agg(i::text, E'\n') FROM idempotency_in_flight i))
$$;

-- What is told to who gives no request, the one that was begun with, and another
-- one: all of it, but for times that differ from run to run; or an SQLSTATE.
CREATE FUNCTION look(OUT request jsonb, OUT outcome text, OUT status int, OUT response json, OUT headers jsonb, OUT body bytea,
                     OUT claim uuid, OUT attempt int, OUT point text, OUT saved jsonb, OUT retry text,
                     OUT created boolean, OUT finished boolean, OUT expires boolean, OUT changed boolean)
RETURNS SETOF record LANGUAGE plpgsql AS $$
DECLARE
    before text;
    k idempotency_key;
    r idempotency_result;
BEGIN
    SELECT * INTO k FROM idempotency_key WHERE key = 'k' AND expires_at > clock_timestamp();
    FOREACH request IN ARRAY '{NULL,"{\"amount\": 1}","{\"amount\": 2}"}'::jsonb[] LOOP
        before := image();
        r := NULL;
        BEGIN
            r := idempotency_replay('t', 'a', 'k', request);
        EXCEPTION WHEN OTHERS THEN
            r.outcome := SQLSTATE;
        END;
        SELECT r.outcome, r.status_code, r.response, r.headers, r.body, r.claim, r.attempt, r.recovery_point, r.recovery_state,
               CASE WHEN r.retry_after = 90 THEN 'setting'
                    WHEN r.retry_after BETWEEN 3480 AND 3600 THEN 'rest' ELSE r.retry_after::text END,
               r.created_at = coalesce(k.created_at, (SELECT i.started_at FROM idempotency_in_flight i WHERE i.key = 'k')),
               r.finished_at = k.finished_at, r.expires_at = k.expires_at
        INTO outcome, status, response, headers, body, claim, attempt, point, saved, retry, created, finished, expires;
        changed := image() IS DISTINCT FROM before;
        RETURN NEXT;
    END LOOP;
END $$;

-- nothing is known
SELECT * FROM look();

--
-- The claim of a transaction
--
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}');
SELECT * FROM look();
-- of one scope, to the last part
SELECT part, r IS NULL AS nothing
FROM (VALUES ('tenant', idempotency_replay('u', 'a', 'k')), ('no tenant', idempotency_replay(NULL, 'a', 'k')),
             ('action', idempotency_replay('t', 'b', 'k')), ('key', idempotency_replay('t', 'a', 'K')),
             ('actor', idempotency_replay('t', 'a', 'k', actor => 'user 1'))) v (part, r);
-- finished, it is there for this transaction
SELECT idempotency_finish('t', 'a', 'k', 201, '{"paid":  1}', '{"Location": "/payments/1"}');
SELECT * FROM look();
PREPARE TRANSACTION 'finish';
-- but in flight for others
SELECT * FROM look();
ROLLBACK PREPARED 'finish';
SELECT * FROM look();
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k');
SELECT idempotency_finish('t', 'a', 'k', 200, '"without a request"');
PREPARE TRANSACTION 'finish';
-- what its request is cannot be known
SELECT request, outcome, attempt, retry, created FROM look();
ROLLBACK PREPARED 'finish';
-- released
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}');
SELECT idempotency_release('t', 'a', 'k');
SELECT request, outcome FROM look();
COMMIT;
SELECT request, outcome FROM look();
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}');
SELECT idempotency_finish('t', 'a', 'k', 503);
COMMIT;
SELECT request, outcome FROM look();
-- it does not keep others from beginning
BEGIN;
SELECT request, outcome FROM look();
SELECT outcome FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}');
ROLLBACK;
-- completed
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}');
SELECT idempotency_finish('t', 'a', 'k', 201, '{"paid":  1}', '{"Location": "/payments/1"}');
COMMIT;
SELECT * FROM look();
-- its time is over
UPDATE idempotency_key SET expires_at = clock_timestamp();
SELECT * FROM look();
-- and it is begun anew
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}');
SELECT idempotency_finish('t', 'a', 'k', 404, body => 'not found');
PREPARE TRANSACTION 'anew';
SELECT request, outcome, attempt, retry, created, changed FROM look();
COMMIT PREPARED 'anew';
-- errored
SELECT * FROM look();
TRUNCATE idempotency_key;

--
-- A leased claim
--
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}', lease => '1 h', claim => claim_of(1));
SELECT * FROM look();
PREPARE TRANSACTION 'begin';
-- the rest of a lease that is not there yet is not known
SELECT request, outcome, attempt, point, retry, created, changed FROM look();
COMMIT PREPARED 'begin';
SELECT * FROM look();
-- how far it got, but not with what: that is for who takes over
SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), 'charged', '{"charge": "ch_1"}', '1 h') IS NOT NULL AS renewed;
SELECT * FROM look();
-- its request may be unknown
UPDATE idempotency_key SET request_hash = NULL;
SELECT request, outcome FROM look();
UPDATE idempotency_key SET request_hash = idempotency_request_hash('{"amount": 1}');
-- stalled
CALL run_out();
SELECT * FROM look();
-- being taken over, by a leased claim
BEGIN;
SELECT attempt FROM idempotency_begin('t', 'a', 'k', lease => '1 h', claim => claim_of(2));
SELECT request, outcome, attempt, point, retry, created, changed FROM look();
PREPARE TRANSACTION 'takeover';
SELECT * FROM look();
ROLLBACK PREPARED 'takeover';
SELECT request, outcome, attempt, point, retry, created, changed FROM look();
-- by a transaction claim
BEGIN;
SELECT attempt FROM idempotency_begin('t', 'a', 'k');
SELECT request, outcome, attempt, point, retry, created, changed FROM look();
SELECT idempotency_finish('t', 'a', 'k', 200, '"taken over"');
SELECT request, outcome, attempt, response FROM look();
PREPARE TRANSACTION 'takeover';
SELECT * FROM look();
ROLLBACK PREPARED 'takeover';
-- all the looks have fenced nobody
SELECT request, outcome, attempt, point, retry, created, changed FROM look();
SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), 'mailed', NULL, '1 h') IS NOT NULL AS renewed;
SELECT request, outcome, attempt, point, retry FROM look();
-- released, there is nobody who works on it
SELECT idempotency_release('t', 'a', 'k', claim => claim_of(1));
SELECT * FROM look();
-- until the next one does
BEGIN;
SELECT attempt FROM idempotency_begin('t', 'a', 'k');
SELECT idempotency_finish('t', 'a', 'k', 200, '"next"');
PREPARE TRANSACTION 'next';
SELECT * FROM look();
ROLLBACK PREPARED 'next';
SELECT attempt FROM idempotency_begin('t', 'a', 'k', lease => '1 h', claim => claim_of(2));
SELECT request, outcome, attempt, point, retry, created FROM look();
-- being finished: as it was
BEGIN;
SELECT idempotency_finish('t', 'a', 'k', 200, '"leased"', claim => claim_of(2));
PREPARE TRANSACTION 'finish';
SELECT request, outcome, attempt, point, retry FROM look();
COMMIT PREPARED 'finish';
SELECT * FROM look();
-- its time is over, before and after a sweep
UPDATE idempotency_key SET expires_at = clock_timestamp();
SELECT request, outcome FROM look();
CALL idempotency_sweep();
SELECT request, outcome FROM look();
SELECT attempt FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}', lease => '1 h', claim => claim_of(1));
UPDATE idempotency_key SET lease_expires_at = now() - interval '2 h', expires_at = now() - interval '1 h';
SELECT request, outcome FROM look();
TRUNCATE idempotency_key;

--
-- Counted are a replay and a mismatch, and nothing else
--
CREATE FUNCTION counts() RETURNS text LANGUAGE sql AS $$
    SELECT format('started %s, replayed %s, in flight %s, mismatched %s, expired %s', started, replayed, in_flight, mismatched, expired)
    FROM idempotency_stats WHERE action = 'replay.counted'
$$;
SELECT outcome FROM idempotency_begin('t', 'replay.counted', 'leased', '{"amount": 1}', lease => '1 h', claim => claim_of(1));
SELECT outcome FROM idempotency_begin('t', 'replay.counted', 'stalled', '{"amount": 1}', lease => '1 ms', claim => claim_of(1));
SELECT pg_sleep(0.01);
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'replay.counted', 'held', '{"amount": 1}');
SELECT idempotency_finish('t', 'replay.counted', 'held');
PREPARE TRANSACTION 'held';
SELECT counts();
SELECT k, outcome
FROM unnest('{leased,stalled,held,never-begun}'::text[]) k, idempotency_replay('t', 'replay.counted', k) ORDER BY k;
SELECT counts();
DO $$
BEGIN
    FOR i IN 1..3 LOOP
        BEGIN
            PERFORM idempotency_replay('t', 'replay.counted', ('{leased,stalled,held}'::text[])[i], '{"amount": 2}');
        EXCEPTION WHEN SQLSTATE 'ID004' THEN NULL;
        END;
    END LOOP;
END $$;
SELECT counts();
COMMIT PREPARED 'held';
SELECT outcome FROM idempotency_replay('t', 'replay.counted', 'held');
SELECT counts();
TRUNCATE idempotency_key;

--
-- In a read-only transaction
--
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}');
SELECT idempotency_finish('t', 'a', 'k', 200, '"prepared"');
PREPARE TRANSACTION 'held';
BEGIN READ ONLY;
SELECT request, outcome, attempt, retry, created FROM look();
COMMIT;
COMMIT PREPARED 'held';
BEGIN READ ONLY;
SELECT request, outcome, response FROM look();
SELECT r IS NULL AS nothing FROM idempotency_replay('t', 'a', 'never-begun') r;
COMMIT;
TRUNCATE idempotency_key;
SELECT outcome FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}', lease => '1 h', claim => claim_of(1));
BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;
SELECT request, outcome, attempt, retry FROM look();
COMMIT;
CALL run_out();
BEGIN ISOLATION LEVEL SERIALIZABLE READ ONLY DEFERRABLE;
SELECT request, outcome, attempt, retry FROM look();
COMMIT;
-- what is begun in a transaction that is read-only later
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k2');
SET TRANSACTION READ ONLY;
SELECT outcome FROM idempotency_replay('t', 'a', 'k2');
ROLLBACK;

--
-- Not in parallel, as begin is not
--
CREATE TABLE request AS SELECT 'k' AS key FROM generate_series(1, 10);
ALTER TABLE request SET (parallel_workers = 1);
ANALYZE request;
CREATE FUNCTION replay_wrongly(key text) RETURNS text LANGUAGE plpgsql PARALLEL SAFE AS
$$ BEGIN RETURN (idempotency_replay('t', 'a', key)).outcome; END $$;
CREATE FUNCTION begin_wrongly(key text) RETURNS text LANGUAGE plpgsql PARALLEL SAFE AS
$$ BEGIN RETURN (idempotency_begin('t', 'a', key)).outcome; END $$;
SELECT DISTINCT replay_wrongly(key) FROM request;
SET parallel_setup_cost = 0;
SET parallel_tuple_cost = 0;
SET max_parallel_workers_per_gather = 1;
EXPLAIN (COSTS OFF) SELECT replay_wrongly(key) FROM request;
SELECT replay_wrongly(key) FROM request;
\echo :SQLSTATE
SELECT begin_wrongly(key) FROM request;
\echo :SQLSTATE
-- as it is declared, the plan has no part for a worker
EXPLAIN (COSTS OFF) SELECT (idempotency_replay('t', 'a', key)).outcome FROM request;
SELECT DISTINCT (idempotency_replay('t', 'a', key)).outcome FROM request;
RESET parallel_setup_cost;
RESET parallel_tuple_cost;
RESET max_parallel_workers_per_gather;

DROP TABLE request;
DROP FUNCTION image, look, counts, replay_wrongly, begin_wrongly;
DROP EXTENSION idempotency;
