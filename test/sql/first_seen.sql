--
-- Which messages of a batch are new
--
CREATE EXTENSION idempotency;

-- errors as text, without a hint, and the element of the batch that they are at
CREATE FUNCTION error_at(statement text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    message text;
    detail text;
    context text;
BEGIN
    EXECUTE statement;
    RETURN 'no error';
EXCEPTION WHEN OTHERS THEN
    GET STACKED DIAGNOSTICS message = MESSAGE_TEXT,
        detail = PG_EXCEPTION_DETAIL, context = PG_EXCEPTION_CONTEXT;
    RETURN concat_ws(E'\n', SQLSTATE, message, nullif(detail, ''), substring(context from 'element \d+ of \w+'));
END $$;

--
-- New ones are returned, once each and in the order of the batch
--
SELECT * FROM idempotency_first_seen('t', 'mailer', '{m3,m1,m2,m1,m3}');
\x on
SELECT tenant, action, key, actor, state, request_hash, status_code, headers, response, body,
       claim, attempt, recovery_point, recovery_state, lease_expires_at,
       created_at = finished_at AS at_once, expires_at - finished_at AS kept_for, ttl
FROM idempotency_key WHERE key = 'm1';
\x off
SELECT count(*), count(DISTINCT created_at) AS times FROM idempotency_key;
-- seen before
SELECT * FROM idempotency_first_seen('t', 'mailer', '{m3,m1,m2,m1,m3}');
SELECT * FROM idempotency_first_seen('t', 'mailer', '{m4,m3,m0,m4}');
-- as a text, an id is another one in another spelling
SELECT * FROM idempotency_first_seen('t', 'mailer', '{M1,m1,m01,"m1.",m1}');
-- for another consumer, and another tenant
SELECT * FROM idempotency_first_seen('t', 'billing', '{m1,m2}');
SELECT * FROM idempotency_first_seen('u', 'mailer', '{m1,m2}');
SELECT * FROM idempotency_first_seen(NULL, 'mailer', '{m1,m2}');
SELECT * FROM idempotency_first_seen('', 'mailer', '{m2,m3}');
SELECT tenant, action, count(*) FROM idempotency_key GROUP BY 1, 2 ORDER BY 1, 2;
TRUNCATE idempotency_key;

-- batches without ids, and of another shape
SELECT count(*) FROM idempotency_first_seen('t', 'mailer', '{}');
SELECT count(*) FROM idempotency_key;
SELECT * FROM idempotency_first_seen('t', 'mailer', '{{m4,m2},{m3,m2}}');
SELECT * FROM idempotency_first_seen('t', 'mailer', '[-1:1]={m5,m2,m6}');
SELECT length(s) FROM idempotency_first_seen('t', 'mailer', ARRAY[repeat('x', 255), repeat('x', 254), repeat('x', 255)]) s;
SELECT * FROM idempotency_first_seen('t', repeat('c', 255), ARRAY['m1']);
TRUNCATE idempotency_key;

--
-- Bad arguments: nothing is recorded, and the error tells which id it was
--
SELECT error_at($$ SELECT idempotency_first_seen('t', 'mailer', NULL) $$);
SELECT error_at($$ SELECT idempotency_first_seen('t', NULL, '{m1}') $$);
SELECT error_at($$ SELECT idempotency_first_seen('t', '', '{m1}') $$);
SELECT error_at($$ SELECT idempotency_first_seen('t', NULL, NULL) $$);
SELECT error_at($$ SELECT idempotency_first_seen('t', E'mail\ner', '{m1}') $$);
SELECT error_at($$ SELECT idempotency_first_seen('t', repeat('c', 256), '{m1}') $$);
SELECT error_at($$ SELECT idempotency_first_seen(E'\t', 'mailer', '{m1}') $$);
SELECT error_at($$ SELECT idempotency_first_seen(repeat('t', 256), 'mailer', '{m1}') $$);
SELECT error_at($$ SELECT idempotency_first_seen('t', 'mailer', '{m1,NULL,m2}') $$);
SELECT error_at($$ SELECT idempotency_first_seen('t', 'mailer', '{m1,m2,""}') $$);
SELECT error_at($$ SELECT idempotency_first_seen('t', 'mailer', '{"m 1"}') $$);
SELECT error_at($$ SELECT idempotency_first_seen('t', 'mailer', '{m1,m2,m3,m4,é}') $$);
SELECT error_at($$ SELECT idempotency_first_seen('t', 'mailer', ARRAY['m1', E'm2\n']) $$);
SELECT error_at($$ SELECT idempotency_first_seen('t', 'mailer', ARRAY['m1', repeat('x', 256)]) $$);
SELECT error_at($$ SELECT idempotency_first_seen('t', 'mailer', '{{m1,m2},{m3,NULL}}') $$);
-- as the server reports it
SELECT * FROM idempotency_first_seen('t', 'mailer', '{m1,m2,m3,""}');
\echo :SQLSTATE
SELECT count(*) FROM idempotency_key;
-- the form of a key is that of the setting
SET idempotency.key_format = 'uuid';
SELECT error_at($$ SELECT idempotency_first_seen('t', 'mailer', '{88fdc32e-0669-54dd-bebd-d7c024675888,m1}') $$);
SELECT * FROM idempotency_first_seen('t', 'mailer', ARRAY[idempotency_event_key('order.paid', '42', 1)::text]);
SET idempotency.key_format = 'slug';
SELECT error_at($$ SELECT idempotency_first_seen('t', 'mailer', '{a_1,a-2,a.3}') $$);
RESET idempotency.key_format;
SET idempotency.key_min_length = 3;
SELECT error_at($$ SELECT idempotency_first_seen('t', 'mailer', '{m12,m1}') $$);
RESET idempotency.key_min_length;
-- a tenant that the session is pinned to
SET idempotency.tenant = 'acme';
SELECT error_at($$ SELECT idempotency_first_seen('t', 'mailer', '{m1}') $$);
SELECT error_at($$ SELECT idempotency_first_seen(NULL, 'mailer', '{}') $$);
SELECT * FROM idempotency_first_seen('acme', 'mailer', '{m1}');
RESET idempotency.tenant;
BEGIN READ ONLY;
SELECT idempotency_first_seen('t', 'mailer', '{m1}');
\echo :SQLSTATE
ROLLBACK;
TRUNCATE idempotency_key;

--
-- How long an id is known
--
CREATE FUNCTION kept_for(ttl interval) RETURNS interval LANGUAGE plpgsql AS $$
DECLARE
    result interval;
BEGIN
    PERFORM idempotency_first_seen('t', 'kept', '{m}', kept_for.ttl);
    SELECT expires_at - finished_at INTO result FROM idempotency_key WHERE action = 'kept';
    DELETE FROM idempotency_key WHERE action = 'kept';
    RETURN result;
END $$;
SELECT kept_for(NULL), kept_for('5 min'), kept_for('72 h');
SET idempotency.ttl = '2h';
SELECT kept_for(NULL), kept_for('1 h');
RESET idempotency.ttl;
SELECT ttl, error_at(format('SELECT idempotency_first_seen(%L, %L, %L, %L)', 't', 'mailer', '{m1}', ttl))
FROM unnest('{299 s,72 h 1 us,0,-1 h,170000000 years}'::text[]) ttl;
DROP FUNCTION kept_for;
-- after that it is new again, as often as it takes
SELECT * FROM idempotency_first_seen('t', 'mailer', '{m1,m2,m3}');
UPDATE idempotency_key SET expires_at = clock_timestamp() WHERE key <> 'm2';
SELECT * FROM idempotency_first_seen('t', 'mailer', '{m3,m1,m2,m1}');
SELECT key, state, attempt, expires_at > now() AS live FROM idempotency_key ORDER BY key;
SELECT * FROM idempotency_first_seen('t', 'mailer', '{m3,m1,m2,m1}');
UPDATE idempotency_key SET expires_at = clock_timestamp();
CALL idempotency_sweep();
SELECT * FROM idempotency_first_seen('t', 'mailer', '{m3,m1,m2,m1}');
TRUNCATE idempotency_key;

--
-- The caller's transaction
--
BEGIN;
SELECT * FROM idempotency_first_seen('t', 'mailer', '{m1,m2}');
-- seen by the same transaction, also in the same statement
SELECT * FROM idempotency_first_seen('t', 'mailer', '{m2,m3}');
SELECT n, s FROM generate_series(1, 2) n, idempotency_first_seen('t', 'mailer', ARRAY['m2', 'm4', 'x' || n]) s ORDER BY n, s;
SELECT n, idempotency_first_seen('t', 'mailer', ARRAY['m4', 'm5', 'y' || n]) FROM generate_series(1, 2) n;
SAVEPOINT s;
SELECT * FROM idempotency_first_seen('t', 'mailer', '{m5,m6}');
ROLLBACK TO s;
SELECT * FROM idempotency_first_seen('t', 'mailer', '{m5,m6}');
ROLLBACK;
SELECT count(*) FROM idempotency_key;
SELECT * FROM idempotency_first_seen('t', 'mailer', '{m1,m2}');
-- the guard has nothing to guard
BEGIN;
SELECT * FROM idempotency_first_seen('t', 'mailer', '{m2,m3}');
PREPARE TRANSACTION 'seen';
ROLLBACK PREPARED 'seen';
BEGIN;
SELECT * FROM idempotency_first_seen('t', 'mailer', '{m2,m3}');
PREPARE TRANSACTION 'seen';
COMMIT PREPARED 'seen';
SELECT * FROM idempotency_first_seen('t', 'mailer', '{m2,m3}');
-- at the other isolation levels
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT count(*) FROM idempotency_key;
SELECT * FROM idempotency_first_seen('t', 'mailer', '{m3,m4}');
COMMIT;
BEGIN ISOLATION LEVEL SERIALIZABLE;
SELECT count(*) FROM idempotency_key;
SELECT * FROM idempotency_first_seen('t', 'mailer', '{m4,m5,m4}');
SELECT * FROM idempotency_first_seen('t', 'mailer', '{m5,m6}');
COMMIT;
TRUNCATE idempotency_key;

--
-- In queries
--
CREATE TABLE message (id text, body text);
INSERT INTO message SELECT 'm' || i, 'text ' || i FROM generate_series(1, 6) i;
SELECT * FROM idempotency_first_seen('t', 'mailer', '{m2,m5}');
SELECT m.id, m.body FROM idempotency_first_seen('t', 'mailer', (SELECT array_agg(id ORDER BY id) FROM message)) s
JOIN message m ON m.id = s ORDER BY m.id;
SELECT count(*) FROM idempotency_key;
WITH new AS MATERIALIZED (SELECT id FROM idempotency_first_seen('t', 'billing', '{m1,m9,m2,m1}') id)
INSERT INTO message SELECT id, 'billed' FROM new RETURNING id;
SELECT idempotency_first_seen('t', 'list', '{b,a,c,a}');
-- all are recorded, however many of them are read
SELECT * FROM idempotency_first_seen('t', 'limit', '{b,a,c}') LIMIT 1;
SELECT key FROM idempotency_key WHERE action = 'limit' ORDER BY key;
BEGIN;
DECLARE c CURSOR FOR SELECT * FROM idempotency_first_seen('t', 'cursor', '{b,a,c}');
FETCH 1 FROM c;
SELECT * FROM idempotency_first_seen('t', 'cursor', '{a,b,c,d}');
FETCH ALL FROM c;
COMMIT;
SELECT count(*) FROM idempotency_key WHERE action = 'cursor';
-- nothing is done for a query that asks for nothing
SELECT * FROM idempotency_first_seen('t', 'none', '{a}') LIMIT 0;
SELECT count(*) FROM idempotency_key WHERE action = 'none';
DROP TABLE message;
TRUNCATE idempotency_key;

--
-- An id that was seen is a record like any other
--
-- what begin and finish recorded was seen
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'mailer', 'm1');
SELECT idempotency_finish('t', 'mailer', 'm1', 201, '"mailed"');
SELECT outcome FROM idempotency_begin('t', 'mailer', 'm2');
SELECT idempotency_finish('t', 'mailer', 'm2', 404, '"no such address"');
SELECT outcome FROM idempotency_begin('t', 'mailer', 'm3');
SELECT idempotency_finish('t', 'mailer', 'm3', 503, '"try again later"');
SELECT outcome FROM idempotency_begin('t', 'mailer', 'm4', actor => 'user 1');
SELECT idempotency_finish('t', 'mailer', 'm4', 200, actor => 'user 1');
COMMIT;
SELECT * FROM idempotency_first_seen('t', 'mailer', '{m1,m2,m3,m4}');
SELECT key, actor, state, status_code, response FROM idempotency_key ORDER BY key, actor;
-- what was seen is replayed, whatever the request
SELECT outcome, status_code, response, headers, body, attempt, retry_after, created_at = finished_at AS at_once
FROM idempotency_begin('t', 'mailer', 'm3', '{"to": "a@example.com"}');
SELECT outcome, status_code FROM idempotency_begin('t', 'mailer', 'm3', lease => '1 h');
SELECT outcome, status_code FROM idempotency_try_begin('t', 'mailer', 'm4');
SELECT outcome, status_code FROM idempotency_replay('t', 'mailer', 'm4');
SELECT error_at($$ SELECT idempotency_finish('t', 'mailer', 'm3', claim => claim_of(1)) $$);
SELECT outcome, status_code FROM idempotency_store('t', 'mailer', 'm4', NULL, 404);
-- forgotten, it is new again
SELECT idempotency_forget('t', 'mailer', 'm4'), idempotency_forget('t', 'mailer', 'm4');
SELECT * FROM idempotency_first_seen('t', 'mailer', '{m3,m4}');
-- a claim in the same transaction: the record is there when it is finished
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'mailer', 'm5');
SELECT * FROM idempotency_first_seen('t', 'mailer', '{m5}');
SELECT error_at($$ SELECT idempotency_finish('t', 'mailer', 'm5') $$);
ROLLBACK;
-- the same where the claim took over a lease that ran out
SELECT outcome FROM idempotency_begin('t', 'mailer', 'm5', lease => '1 ms');
SELECT pg_sleep(0.01);
BEGIN;
SELECT outcome, attempt FROM idempotency_begin('t', 'mailer', 'm5');
SELECT * FROM idempotency_first_seen('t', 'mailer', '{m5}');
SELECT left(error_at($$ SELECT idempotency_finish('t', 'mailer', 'm5') $$), 5);
ROLLBACK;
TRUNCATE idempotency_key;

-- leased claims: seen while somebody has it, and new when nobody has
SELECT outcome FROM idempotency_begin('t', 'mailer', 'held', lease => '1 h', claim => claim_of(1));
SELECT outcome FROM idempotency_begin('t', 'mailer', 'stalled', '{"a": 1}', lease => '1 h', claim => claim_of(2));
SELECT idempotency_checkpoint('t', 'mailer', 'stalled', claim_of(2), 'half-way', '{"b": 2}', '1 ms') IS NOT NULL AS renewed;
SELECT outcome FROM idempotency_begin('t', 'mailer', 'released', lease => '1 h', claim => claim_of(3));
SELECT idempotency_release('t', 'mailer', 'released', claim => claim_of(3));
SELECT outcome FROM idempotency_begin('t', 'mailer', 'expired', lease => '1 h', claim => claim_of(4));
SELECT outcome FROM idempotency_begin('t', 'mailer', 'finished', lease => '1 h', claim => claim_of(5));
SELECT idempotency_finish('t', 'mailer', 'finished', claim => claim_of(5));
SELECT pg_sleep(0.01);
UPDATE idempotency_key SET expires_at = clock_timestamp() WHERE key = 'expired';
SELECT * FROM idempotency_first_seen('t', 'mailer', '{stalled,released,held,new,finished,expired}');
SELECT key, state, status_code, right(claim::text, 1) AS claim, attempt, request_hash, recovery_point, recovery_state, lease_expires_at > now() AS lease
FROM idempotency_key ORDER BY key;
-- the old claim is fenced off
SELECT error_at($$ SELECT idempotency_finish('t', 'mailer', 'stalled', claim => claim_of(2)) $$);
SELECT error_at($$ SELECT idempotency_checkpoint('t', 'mailer', 'stalled', claim_of(2), 'zombie') $$);
SELECT error_at($$ SELECT idempotency_release('t', 'mailer', 'released', claim => claim_of(3)) $$);
SELECT error_at($$ SELECT idempotency_finish('t', 'mailer', 'expired', claim => claim_of(4)) $$);
SELECT idempotency_finish('t', 'mailer', 'held', claim => claim_of(1));
SELECT count(*) FROM idempotency_in_flight;
SELECT count(*) FROM idempotency_stalled;
-- rolled back, it is stalled as it was
SELECT outcome FROM idempotency_begin('t', 'mailer', 'again', lease => '1 ms');
SELECT pg_sleep(0.01);
BEGIN;
SELECT * FROM idempotency_first_seen('t', 'mailer', '{again}');
ROLLBACK;
SELECT key, attempt FROM idempotency_stalled;
SELECT outcome, attempt FROM idempotency_begin('t', 'mailer', 'again', lease => '1 h');
TRUNCATE idempotency_key;

--
-- Tens of thousands in one call, without a lock for each
--
BEGIN;
SELECT count(*), count(DISTINCT s), bool_and(s LIKE 'm%') AS ours
FROM idempotency_first_seen('t', 'many', ARRAY(SELECT 'm' || i % 20000 FROM generate_series(1, 40000) i)) s;
SELECT locks();
SELECT count(*) < 20 AS few_locks FROM pg_locks WHERE pid = pg_backend_pid();
COMMIT;
SELECT count(*) FROM idempotency_key;
-- half of them again, in another order
SELECT count(*), min(substr(s, 2)::int), max(substr(s, 2)::int)
FROM idempotency_first_seen('t', 'many', ARRAY(SELECT 'm' || i FROM generate_series(10000, 29999) i ORDER BY md5(i::text))) s;
SELECT count(*) FROM idempotency_key;
-- they come in the order of the batch
SELECT count(*) FILTER (WHERE s <> 'n' || n) AS out_of_order, count(*)
FROM idempotency_first_seen('t', 'many', ARRAY(SELECT 'n' || 10001 - i FROM generate_series(1, 10000) i))
    WITH ORDINALITY v (s, i), LATERAL (SELECT 10001 - i) w (n);
-- a call that is cancelled leaves nothing
BEGIN;
SET LOCAL statement_timeout = '1ms';
SELECT count(*) FROM idempotency_first_seen('t', 'cancelled', ARRAY(SELECT 'm' || i FROM generate_series(1, 30000) i));
\echo :SQLSTATE
ROLLBACK;
SELECT count(*) FROM idempotency_key WHERE action = 'cancelled';

DROP FUNCTION error_at;
DROP EXTENSION idempotency;
