--
-- Expired records are treated as absent, and replaced
--
CREATE EXTENSION idempotency;

-- an answer of each kind whose time is over
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'completed', '{"a": 1}');
SELECT idempotency_finish('t', 'a', 'completed', 200, '"old"');
SELECT outcome FROM idempotency_begin('t', 'a', 'errored', '{"a": 1}');
SELECT idempotency_finish('t', 'a', 'errored', 404, '"old"');
SELECT outcome FROM idempotency_begin('t', 'a', 'live', '{"a": 1}');
SELECT idempotency_finish('t', 'a', 'live', 200, '"live"');
COMMIT;
UPDATE idempotency_key SET created_at = '2020-01-01', finished_at = '2020-01-02', expires_at = '2020-01-03'
WHERE key <> 'live';
SELECT count(*) FROM unnest('{completed,errored}'::text[]) k, idempotency_replay('t', 'a', k) r
WHERE r IS NULL;

-- the repeat runs, and leaves one record
BEGIN;
SELECT outcome, created_at > now() - interval '1 hour' AS now
FROM idempotency_begin('t', 'a', 'completed', '{"a": 2}');
SELECT idempotency_finish('t', 'a', 'completed', 404, '"new"');
SELECT outcome FROM idempotency_begin('t', 'a', 'errored', '{"a": 2}');
SELECT idempotency_finish('t', 'a', 'errored', 200, '"new"');
COMMIT;
SELECT key, state, status_code, response, attempt, created_at > '2021-01-01' AS created,
       request_hash = idempotency_request_hash('{"a": 2}') AS request,
       expires_at - finished_at AS kept_for
FROM idempotency_key ORDER BY key;
SELECT outcome, response FROM idempotency_begin('t', 'a', 'completed', '{"a": 2}');

-- the end of the time is its first moment without the answer
SELECT clock_timestamp() + interval '1 hour' AS later \gset
UPDATE idempotency_key SET expires_at = :'later' WHERE key = 'live';
SELECT outcome FROM idempotency_begin('t', 'a', 'live');
UPDATE idempotency_key SET expires_at = clock_timestamp() WHERE key = 'live';
SELECT r IS NULL AS nothing FROM idempotency_replay('t', 'a', 'live') r;

-- a repeat that is rolled back leaves the record as it was
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'live');
SELECT idempotency_finish('t', 'a', 'live', 200, '"rolled back"');
ROLLBACK;
SELECT response FROM idempotency_key WHERE key = 'live';
-- one whose answer is not kept, too
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'live');
SELECT idempotency_finish('t', 'a', 'live', 503, '"later"');
SELECT outcome FROM idempotency_begin('t', 'a', 'live');
SELECT idempotency_finish('t', 'a', 'live', 503, '"later still"');
COMMIT;
SELECT response FROM idempotency_key WHERE key = 'live';
-- and then one that is kept
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'live');
SELECT idempotency_finish('t', 'a', 'live', 503, '"later"');
SELECT outcome FROM idempotency_begin('t', 'a', 'live');
SELECT idempotency_finish('t', 'a', 'live', 200, '"now"');
SELECT outcome, response FROM idempotency_begin('t', 'a', 'live');
COMMIT;
SELECT response FROM idempotency_key WHERE key = 'live';

-- somebody swept it between begin and finish
UPDATE idempotency_key SET expires_at = '2020-01-03' WHERE key = 'live';
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'live');
DELETE FROM idempotency_key WHERE key = 'live';
SELECT idempotency_finish('t', 'a', 'live', 200, '"swept before"');
COMMIT;
SELECT outcome, response FROM idempotency_begin('t', 'a', 'live');

-- a record that a transaction wrote itself can expire in it
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'own');
SELECT idempotency_finish('t', 'a', 'own', 200, '"first"');
UPDATE idempotency_key SET expires_at = created_at WHERE key = 'own';
SELECT outcome FROM idempotency_begin('t', 'a', 'own');
SELECT idempotency_finish('t', 'a', 'own', 200, '"second"');
SELECT outcome, response FROM idempotency_begin('t', 'a', 'own');
COMMIT;
SELECT key, response FROM idempotency_key ORDER BY key;

-- again and again, with a vacuum in between: always one record
CREATE FUNCTION once_more(i int) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    UPDATE idempotency_key SET expires_at = '2020-01-03' WHERE key = 'again';
    PERFORM idempotency_begin('t', 'a', 'again');
    RETURN idempotency_finish('t', 'a', 'again', 200, to_json(i));
END $$;
SELECT count(*) FILTER (WHERE o = 'completed') FROM generate_series(1, 500) i, once_more(i) o;
VACUUM idempotency_key;
SELECT once_more(501);
SELECT count(*), max(response::text) FROM idempotency_key WHERE key = 'again';

DROP FUNCTION once_more;
DROP EXTENSION idempotency;
