--
-- What finish stores
--
CREATE EXTENSION idempotency;
\set SHOW_CONTEXT never

-- begins and finishes a request of its own for each status
CREATE FUNCTION finish_with(status int) RETURNS text
LANGUAGE sql VOLATILE AS $$
    SELECT idempotency_begin('t', 'status', 'k' || status);
    SELECT idempotency_finish('t', 'status', 'k' || status, status, '"answer"');
$$;

-- repeats it, and tells the outcome
CREATE FUNCTION repeat_of(status int) RETURNS text
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    result idempotency_result := idempotency_begin('t', 'status', 'k' || status);
BEGIN
    IF result.outcome = 'started' THEN
        PERFORM idempotency_release('t', 'status', 'k' || status);
    END IF;
    RETURN result.outcome;
END $$;

--
-- The class of every status decides what becomes of the request
--
SELECT finish_with AS became, count(*), min(status), max(status),
       array_agg(status) FILTER (WHERE status BETWEEN 400 AND 499
                                 AND finish_with = 'released') AS retryable_4xx
FROM generate_series(100, 599) status, finish_with(status)
GROUP BY finish_with ORDER BY finish_with;
SELECT state, count(*), min(status_code), max(status_code),
       min(expires_at - finished_at) AS shortest, max(expires_at - finished_at) AS longest
FROM idempotency_key GROUP BY state ORDER BY state;
-- what was released is begun again, everything else is replayed
SELECT repeat_of AS outcome, count(*), min(status), max(status)
FROM generate_series(100, 599) status, repeat_of(status)
GROUP BY repeat_of ORDER BY repeat_of;
TRUNCATE idempotency_key;

-- by name, the ones that people ask about
SELECT status, finish_with(status)
FROM unnest('{200,204,302,304,400,402,404,408,409,410,422,425,429,500,503,599}'::int[]) status;
SELECT status_code, state, response FROM idempotency_key ORDER BY status_code;
TRUNCATE idempotency_key;

-- the list of statuses that may be retried is the caller's
SET idempotency.retryable_status = '404,503';
SELECT status, finish_with(status)
FROM unnest('{200,404,408,409,425,429,500,503}'::int[]) status;
TRUNCATE idempotency_key;
SET idempotency.retryable_status = '4xx';
SELECT status, finish_with(status)
FROM unnest('{200,399,400,404,499,500,503}'::int[]) status;
TRUNCATE idempotency_key;
SET idempotency.retryable_status = '';
SELECT status, finish_with(status)
FROM unnest('{200,404,408,409,425,429,500,503}'::int[]) status;
TRUNCATE idempotency_key;
RESET idempotency.retryable_status;

-- a status that is no status
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k');
SAVEPOINT s;
SELECT idempotency_finish('t', 'a', 'k', 99);
\echo :SQLSTATE
ROLLBACK TO s;
SELECT idempotency_finish('t', 'a', 'k', 600);
\echo :SQLSTATE
ROLLBACK TO s;
SELECT idempotency_finish('t', 'a', 'k', NULL);
\echo :SQLSTATE
ROLLBACK TO s;
SELECT idempotency_finish('t', 'a', 'k', -200);
\echo :SQLSTATE
ROLLBACK TO s;
-- 200 when none is given
SELECT idempotency_finish('t', 'a', 'k');
COMMIT;
SELECT state, status_code, response, headers, body FROM idempotency_key;
TRUNCATE idempotency_key;

--
-- How long an answer is kept: ttl of the call, else of the setting; a final
-- error for error_ttl
--
CREATE FUNCTION kept_for(status int, ttl interval) RETURNS interval
LANGUAGE sql VOLATILE AS $$
    SELECT idempotency_begin('t', 'a', 'k', ttl => kept_for.ttl);
    SELECT idempotency_finish('t', 'a', 'k', status);
    SELECT expires_at - finished_at FROM idempotency_key;
$$;
SELECT kept_for(200, NULL);
TRUNCATE idempotency_key;
SELECT kept_for(200, '300 s');
TRUNCATE idempotency_key;
SELECT kept_for(200, '3 days');
TRUNCATE idempotency_key;
SELECT kept_for(404, '3 days');
TRUNCATE idempotency_key;
BEGIN;
SET LOCAL idempotency.ttl = '2h';
SET LOCAL idempotency.error_ttl = '10s';
SELECT kept_for(200, NULL);
TRUNCATE idempotency_key;
SELECT kept_for(200, '10 min');
TRUNCATE idempotency_key;
SELECT kept_for(404, '10 min');
ROLLBACK;
-- a limit that was lowered holds for a setting that was made before
SET idempotency.ttl = '48h';
SET idempotency.max_ttl = '24h';
SELECT kept_for(200, NULL);
\echo :SQLSTATE
SELECT kept_for(200, '24 h');
TRUNCATE idempotency_key;
SET idempotency.max_ttl = '10min';
SELECT kept_for(404, NULL);
\echo :SQLSTATE
-- that of a final error only where there is one
SELECT kept_for(404, '10 min');
\echo :SQLSTATE
SELECT kept_for(200, '10 min');
TRUNCATE idempotency_key;
RESET idempotency.max_ttl;
RESET idempotency.ttl;

--
-- How long finish asks for it to be kept: completed from min_ttl to max_ttl, a
-- final error from a second
--

-- For how long the answer of a request is kept that is begun, as a leased claim if
-- so asked, and finished with a ttl, or the SQLSTATE; all of it is undone.  The
-- answer of a leased claim may be kept an eighth longer.
CREATE FUNCTION kept_by_finish(status int, ttl interval, lease interval DEFAULT NULL, begun_for interval DEFAULT NULL)
RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    id uuid := CASE WHEN lease IS NOT NULL THEN '00000000-0000-0000-0000-000000000001' END;
    asked interval := coalesce(kept_by_finish.ttl, begun_for, '24 h');
    became text;
    kept interval;
BEGIN
    PERFORM idempotency_begin('t', 'a', 'k', ttl => begun_for, lease => lease, claim => id);
    became := idempotency_finish('t', 'a', 'k', status, claim => id, ttl => kept_by_finish.ttl);
    SELECT k.expires_at - finished_at INTO kept FROM idempotency_key k;
    IF lease IS NOT NULL AND became = 'completed' AND kept BETWEEN asked AND asked * 9 / 8 THEN
        kept := justify_hours(asked);
    END IF;
    RAISE EXCEPTION USING ERRCODE = 'UNDO1', MESSAGE = concat_ws(' ', became, justify_hours(kept));
EXCEPTION
    WHEN SQLSTATE 'UNDO1' THEN
        RETURN SQLERRM;
    WHEN OTHERS THEN
        RETURN SQLSTATE;
END $$;
SELECT status, ttl, kept_by_finish(status, ttl) AS of_transaction, kept_by_finish(status, ttl, '1 h') AS leased
FROM unnest('{200,404,503}'::int[]) status,
     unnest('{NULL,170000000 years,72 h 1 us,72 h,10 min,300 s,299.999999 s,1 s,999999 us,0,-1 h}'::interval[]) WITH ORDINALITY t (ttl, n)
ORDER BY status, n;
SELECT idempotency_begin('t', 'a', 'k'), idempotency_finish('t', 'a', 'k', ttl => '299 s');
SELECT idempotency_begin('t', 'a', 'k'), idempotency_finish('t', 'a', 'k', 404, ttl => '999 ms');
-- it comes before that of begin, be that longer or shorter
SELECT status, kept_by_finish(status, '10 min', NULL, '20 min') AS shorter, kept_by_finish(status, '20 min', NULL, '10 min') AS longer,
       kept_by_finish(status, '10 min', '1 h', '20 min') AS shorter_leased, kept_by_finish(status, '20 min', '1 h', '10 min') AS longer_leased,
       kept_by_finish(status, NULL, NULL, '20 min') AS of_begin, kept_by_finish(status, NULL, '1 h', '20 min') AS of_begin_leased
FROM unnest('{200,404}'::int[]) status;
-- the bounds are the administrator's
SET idempotency.min_ttl = '2s';
SET idempotency.max_ttl = '12h';
SELECT status, ttl, kept_by_finish(status, ttl, NULL, '1 h') AS of_transaction, kept_by_finish(status, ttl, '1 h', '1 h') AS leased
FROM unnest('{200,404}'::int[]) status,
     unnest('{12 h 1 us,12 h,2 s,1999999 us,1 s,999999 us}'::interval[]) WITH ORDINALITY t (ttl, n)
ORDER BY status, n;
RESET idempotency.min_ttl;
RESET idempotency.max_ttl;
-- the claim is still there after one that is out of range
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k');
SAVEPOINT s;
SELECT idempotency_finish('t', 'a', 'k', ttl => '1 min');
\echo :SQLSTATE
ROLLBACK TO s;
SELECT idempotency_finish('t', 'a', 'k', ttl => '5 min');
COMMIT;
SELECT state, expires_at - finished_at AS kept_for, ttl FROM idempotency_key;
TRUNCATE idempotency_key;

--
-- What depends on the status is read when that is known, and not at begin
--
SELECT '00000000-0000-0000-0000-000000000001' AS claim \gset
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'of-transaction');
SELECT outcome FROM idempotency_begin('t', 'a', 'leased-here', lease => '1 h', claim => :'claim');
SELECT outcome FROM idempotency_begin('t', 'a', 'completed', ttl => '10 min');
SET LOCAL idempotency.error_ttl = '10s';
SELECT idempotency_finish('t', 'a', 'of-transaction', 404);
SELECT idempotency_finish('t', 'a', 'leased-here', 404, claim => :'claim');
SELECT idempotency_finish('t', 'a', 'completed');
COMMIT;
SELECT outcome FROM idempotency_begin('t', 'a', 'leased-before', lease => '1 h', claim => :'claim');
BEGIN;
SET LOCAL idempotency.error_ttl = '1min';
SELECT idempotency_finish('t', 'a', 'leased-before', 404, claim => :'claim');
COMMIT;
SELECT key, state, expires_at - finished_at AS kept_for FROM idempotency_key ORDER BY key;
TRUNCATE idempotency_key;
-- what may be retried
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'of-transaction');
SELECT outcome FROM idempotency_begin('t', 'a', 'of-transaction-503');
SELECT outcome FROM idempotency_begin('t', 'a', 'leased-here', lease => '1 h', claim => :'claim');
SELECT outcome FROM idempotency_begin('t', 'a', 'leased-here-503', lease => '1 h', claim => :'claim');
SET LOCAL idempotency.retryable_status = '404';
SELECT idempotency_finish('t', 'a', 'of-transaction', 404), idempotency_finish('t', 'a', 'of-transaction-503', 503);
SELECT idempotency_finish('t', 'a', 'leased-here', 404, claim => :'claim'),
       idempotency_finish('t', 'a', 'leased-here-503', 503, claim => :'claim');
COMMIT;
SELECT outcome FROM idempotency_begin('t', 'a', 'leased-before', lease => '1 h', claim => :'claim');
SELECT outcome FROM idempotency_begin('t', 'a', 'leased-before-503', lease => '1 h', claim => :'claim');
BEGIN;
SET LOCAL idempotency.retryable_status = '404';
SELECT idempotency_finish('t', 'a', 'leased-before', 404, claim => :'claim'),
       idempotency_finish('t', 'a', 'leased-before-503', 503, claim => :'claim');
COMMIT;
SELECT key, state, status_code, state = 'pending' AND lease_expires_at IS NULL AS released FROM idempotency_key ORDER BY key;
-- a repeat of finish says what it said before, whatever the status means today
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'repeated', lease => '1 h', claim => :'claim');
SELECT idempotency_finish('t', 'a', 'repeated', 404, claim => :'claim');
COMMIT;
SET idempotency.retryable_status = '404';
SELECT idempotency_finish('t', 'a', 'repeated', 404, claim => :'claim');
RESET idempotency.retryable_status;
SELECT state, status_code FROM idempotency_key WHERE key = 'repeated';
TRUNCATE idempotency_key;

--
-- No claim: ID008
--
SELECT idempotency_finish('t', 'a', 'never-begun');
\echo :SQLSTATE
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'twice');
SELECT idempotency_finish('t', 'a', 'twice');
SELECT idempotency_finish('t', 'a', 'twice');
\echo :SQLSTATE
COMMIT;
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'twice');
SELECT idempotency_finish('t', 'a', 'twice', 503);
SELECT idempotency_finish('t', 'a', 'twice', 200);
\echo :SQLSTATE
ROLLBACK;
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'rolled-back');
ROLLBACK;
SELECT idempotency_finish('t', 'a', 'rolled-back');
\echo :SQLSTATE
-- a claim is on one scope, to the last part
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k', actor => 'user 1');
SAVEPOINT s;
SELECT idempotency_finish('t', 'a', 'k');
\echo :SQLSTATE
ROLLBACK TO s;
SELECT idempotency_finish('t', 'a', 'k', actor => 'user 2');
\echo :SQLSTATE
ROLLBACK TO s;
SELECT idempotency_finish('t', 'b', 'k', actor => 'user 1');
\echo :SQLSTATE
ROLLBACK TO s;
SELECT idempotency_finish('u', 'a', 'k', actor => 'user 1');
\echo :SQLSTATE
ROLLBACK TO s;
SELECT idempotency_finish('t', 'a', 'K', actor => 'user 1');
\echo :SQLSTATE
ROLLBACK TO s;
SELECT idempotency_finish('t', 'a', 'k', actor => 'user 1');
COMMIT;
-- who ignores the outcome and does the work anyway cannot commit it
CREATE TABLE payment (amount int);
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k', actor => 'user 1');
INSERT INTO payment VALUES (100);
SELECT idempotency_finish('t', 'a', 'k', actor => 'user 1');
\echo :SQLSTATE
COMMIT;
SELECT count(*) FROM payment;
DROP TABLE payment;
TRUNCATE idempotency_key;

--
-- response, headers and body
--
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k');
SAVEPOINT s;
SELECT idempotency_finish('t', 'a', 'k', 200, '{}', body => '\x00');
\echo :SQLSTATE
ROLLBACK TO s;
SELECT idempotency_finish('t', 'a', 'k', 200, body => '\x00ff0a27');
COMMIT;
SELECT outcome, status_code, response, headers, body FROM idempotency_begin('t', 'a', 'k');
TRUNCATE idempotency_key;
-- JSON null is an answer, SQL NULL is none
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k1');
SELECT idempotency_finish('t', 'a', 'k1', 200, 'null', 'null');
SELECT outcome FROM idempotency_begin('t', 'a', 'k2');
SELECT idempotency_finish('t', 'a', 'k2', 200, NULL, NULL);
SELECT outcome FROM idempotency_begin('t', 'a', 'k3');
SELECT idempotency_finish('t', 'a', 'k3', 200, body => '');
COMMIT;
\pset null (null)
SELECT k, response, headers, body FROM unnest('{k1,k2,k3}'::text[]) k, idempotency_begin('t', 'a', k);
\pset null ''
TRUNCATE idempotency_key;

--
-- The size of an answer is that of response, headers and body together
--
SET idempotency.max_response_size = '100B';
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k');
SAVEPOINT s;
SELECT idempotency_finish('t', 'a', 'k', 200, body => convert_to(repeat('x', 101), 'UTF8'));
\echo :SQLSTATE
ROLLBACK TO s;
SELECT idempotency_finish('t', 'a', 'k', 200, body => convert_to(repeat('x', 100), 'UTF8'));
ROLLBACK TO s;
SELECT idempotency_finish('t', 'a', 'k', 200, to_json(repeat('x', 99)));
\echo :SQLSTATE
ROLLBACK TO s;
SELECT idempotency_finish('t', 'a', 'k', 200, to_json(repeat('x', 98)));
ROLLBACK TO s;
-- bytes, not characters
SELECT idempotency_finish('t', 'a', 'k', 200, to_json(repeat('é', 50)));
\echo :SQLSTATE
ROLLBACK TO s;
SELECT idempotency_finish('t', 'a', 'k', 200, to_json(repeat('é', 49)));
ROLLBACK TO s;
-- the headers count
SELECT idempotency_finish('t', 'a', 'k', 200, to_json(repeat('x', 98)), '{}');
\echo :SQLSTATE
ROLLBACK TO s;
SELECT idempotency_finish('t', 'a', 'k', 200, body => '', headers => jsonb_build_object('h', repeat('x', 101)));
\echo :SQLSTATE
ROLLBACK TO s;
-- an answer that compresses well is as large as it is
SET LOCAL idempotency.max_response_size = '100kB';
SELECT idempotency_finish('t', 'a', 'k', 200, to_json(repeat('x', 102399)));
\echo :SQLSTATE
ROLLBACK;
SET idempotency.max_response_size = 0;
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k');
SAVEPOINT s;
SELECT idempotency_finish('t', 'a', 'k', 200, '1');
\echo :SQLSTATE
ROLLBACK TO s;
SELECT idempotency_finish('t', 'a', 'k', 204);
ROLLBACK;
-- what is not kept may have any size
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'size', 'retryable');
SELECT idempotency_finish('t', 'size', 'retryable', 503, '"try again later"');
COMMIT;
RESET idempotency.max_response_size;
-- the default, at the last byte and past it
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k');
SAVEPOINT s;
SELECT idempotency_finish('t', 'a', 'k', 200, to_json(repeat('x', 1048575)));
\echo :SQLSTATE
ROLLBACK TO s;
SELECT idempotency_finish('t', 'a', 'k', 200, to_json(repeat('x', 1048574)));
COMMIT;
SELECT octet_length(response::text), response #>> '{}' = repeat('x', 1048574) AS same
FROM idempotency_begin('t', 'a', 'k');

DROP FUNCTION finish_with, repeat_of, kept_for, kept_by_finish;
DROP EXTENSION idempotency;
