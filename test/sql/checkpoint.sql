--
-- Checkpoints: how far the work under a leased claim got
--
CREATE EXTENSION idempotency;
\set SHOW_CONTEXT never
\pset null (null)

-- a checkpoint, and what became of the row: whether its lease is now the one that
-- was asked for and returned, and whether it is kept for ttl after that
CREATE FUNCTION checkpoint(point text, state jsonb DEFAULT NULL, lease interval DEFAULT NULL,
                           OUT saved_point text, OUT saved_state jsonb, OUT renewed boolean, OUT kept boolean)
LANGUAGE plpgsql AS $$
DECLARE
    before timestamptz := clock_timestamp();
    ends timestamptz := idempotency_checkpoint('t', 'a', 'k', claim_of(1), point, state, lease);
BEGIN
    SELECT k.recovery_point, k.recovery_state,
           k.lease_expires_at = ends AND
           ends - coalesce(lease, current_setting('idempotency.lease')::interval)
               BETWEEN before AND clock_timestamp(),
           k.expires_at >= ends + k.ttl
    INTO saved_point, saved_state, renewed, kept
    FROM idempotency_key k WHERE key = 'k';
END $$;

SELECT attempt FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}', lease => '1 h', ttl => '2 h', claim => claim_of(1));
SELECT created_at, request_hash FROM idempotency_key \gset

--
-- The point and the state that goes with it
--
SELECT * FROM checkpoint('charging');
SELECT * FROM checkpoint('charged', '{"charge": "ch_1", "amount": 100}');
-- a point without a state has none
SELECT * FROM checkpoint('mailed');
-- states of each kind
SELECT * FROM checkpoint('p', 'null');
SELECT * FROM checkpoint('p', '[1, "two", null]');
SELECT * FROM checkpoint('p', '"text"');
SELECT * FROM checkpoint('p', '{}');
-- no point: the lease is renewed, and what was saved stays
SELECT * FROM checkpoint(NULL);
SELECT * FROM checkpoint('charged', '{"charge": "ch_1"}');
SELECT * FROM checkpoint(NULL, NULL, '10 min');
-- an empty point: what was saved is forgotten, all of it was undone
SELECT * FROM checkpoint('');
SELECT * FROM checkpoint(NULL);
SELECT * FROM checkpoint('charged', '{"charge": "ch_1"}');
SELECT * FROM checkpoint('', NULL, '10 min');
SELECT * FROM checkpoint('charged', '{"charge": "ch_1"}', '10 min');
-- a state that belongs to no point
SELECT error_of($$ SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), NULL, '{}') $$);
SELECT error_of($$ SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), '', '{}') $$);
-- points that are no names
SELECT error_of($$ SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), E'charged\n') $$);
SELECT error_of($$ SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), E'\x7f') $$);
SELECT error_of($$ SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), repeat('x', 256)) $$);
SELECT error_of($$ SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), repeat('é', 128)) $$);
-- nothing of this changed anything
SELECT recovery_point, recovery_state, attempt, state FROM idempotency_key;
-- the longest, and what a name may be
SELECT length(saved_point) FROM checkpoint(repeat('x', 255));
SELECT saved_point FROM checkpoint('card charged: 100 €');
SELECT saved_point FROM checkpoint(' ');

-- nothing else of the row changes
SELECT state, status_code, response, headers, body, attempt, created_at = :'created_at' AS created,
       request_hash = :'request_hash' AS request_hash, finished_at, ttl
FROM idempotency_key;

--
-- The scope and the claim
--
SELECT error_of($$ SELECT idempotency_checkpoint('t', 'a', 'k', NULL, 'p') $$);
SELECT error_of($$ SELECT idempotency_checkpoint('t', 'a', 'never-begun', NULL, NULL) $$);
SELECT error_of($$ SELECT idempotency_checkpoint('t', 'a', 'never-begun', claim_of(1), 'p') $$);
SELECT error_of($$ SELECT idempotency_checkpoint('t', 'a', NULL, claim_of(1), 'p') $$);
SELECT error_of($$ SELECT idempotency_checkpoint('t', 'a', '', claim_of(1), 'p') $$);
SELECT error_of($$ SELECT idempotency_checkpoint('t', 'a', 'a key', claim_of(1), 'p') $$);
SELECT error_of($$ SELECT idempotency_checkpoint('t', NULL, 'k', claim_of(1), 'p') $$);
SELECT error_of($$ SELECT idempotency_checkpoint(E't\n', 'a', 'k', claim_of(1), 'p') $$);
SELECT error_of($$ SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), 'p', actor => E'\t') $$);
SELECT error_of($$ SELECT idempotency_checkpoint(NULL, 'a', 'k', claim_of(1), 'p') $$);
SELECT error_of($$ SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), 'p', actor => 'user 1') $$);
SELECT error_of($$ SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(2), 'p') $$);
SELECT attempt FROM idempotency_begin(NULL, 'a', 'k', actor => 'user 1', lease => '1 h', claim => claim_of(1));
SELECT idempotency_checkpoint('', 'a', 'k', claim_of(1), 'of user 1', '1', actor => 'user 1') IS NOT NULL AS renewed;
SELECT tenant, actor, recovery_point, recovery_state FROM idempotency_key ORDER BY tenant;
DELETE FROM idempotency_key WHERE tenant = '';

--
-- The lease: of the call, or of the setting; from the time of the call
--
SELECT renewed, kept FROM checkpoint('p', NULL, '72 h');
SELECT renewed, kept FROM checkpoint('p', NULL, '5 s');
SELECT renewed, kept FROM checkpoint('p', NULL, '1 ms');
SET idempotency.lease = '5min';
SELECT renewed, kept FROM checkpoint('p');
RESET idempotency.lease;
SELECT lease, error_of(format('SELECT idempotency_checkpoint(%L, %L, %L, claim_of(1), %L, lease => %L)', 't', 'a', 'k', 'p', lease))
FROM unnest('{0,999 us,-1 ms,72 h 1 us,170000000 years,-170000000 years}'::text[]) lease;
-- a setting that was made before max_ttl was lowered
SET idempotency.lease = '48h';
SET idempotency.max_ttl = '24h';
SELECT error_of($$ SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), 'p') $$);
SELECT error_of($$ SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), 'p', lease => '25 h') $$);
SELECT error_of($$ SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), 'p', lease => '24 h') $$);
RESET idempotency.max_ttl;
RESET idempotency.lease;

-- after the lease ran out, as long as nobody has taken over
SELECT saved_point, renewed FROM checkpoint('late', NULL, '1 ms');
SELECT pg_sleep(0.01);
SELECT key FROM idempotency_stalled;
SELECT saved_point, renewed, kept FROM checkpoint('in time', NULL, '1 h');
SELECT key FROM idempotency_stalled;
SELECT key FROM idempotency_in_flight;
SELECT outcome, retry_after BETWEEN 3540 AND 3600 AS rest FROM idempotency_try_begin('t', 'a', 'k');
-- it is what the takeover gets
SELECT renewed FROM checkpoint('charged', '{"charge": "ch_1"}', '1 ms');
SELECT pg_sleep(0.01);
SELECT attempt, recovery_point, recovery_state FROM idempotency_begin('t', 'a', 'k', lease => '1 h', claim => claim_of(2));
SELECT error_of($$ SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), 'zombie') $$);
SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(2), 'mailed') IS NOT NULL AS renewed;
SELECT attempt, recovery_point, recovery_state FROM idempotency_key;
-- who undid all of it says so, and the next one begins at the beginning
SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(2), '') IS NOT NULL AS renewed;
SELECT idempotency_release('t', 'a', 'k', claim => claim_of(2));
SELECT attempt, recovery_point, recovery_state FROM idempotency_begin('t', 'a', 'k', lease => '1 h', claim => claim_of(3));
SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(3), 'charged', '{"charge": "ch_2"}') IS NOT NULL AS renewed;
-- and what is no longer needed goes
SELECT idempotency_finish('t', 'a', 'k', 200, '"done"', claim => claim_of(3));
SELECT recovery_point, recovery_state FROM idempotency_key;
SELECT recovery_point, recovery_state FROM idempotency_begin('t', 'a', 'k');
TRUNCATE idempotency_key;

--
-- It is part of its transaction
--
CREATE TABLE charge (id text);
SELECT attempt FROM idempotency_begin('t', 'a', 'k', lease => '1 h', claim => claim_of(1));
BEGIN;
INSERT INTO charge VALUES ('ch_1');
SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), 'charged') IS NOT NULL AS renewed;
ROLLBACK;
SELECT recovery_point, (SELECT count(*) FROM charge) AS charges FROM idempotency_key;
BEGIN;
INSERT INTO charge VALUES ('ch_1');
SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), 'charged') IS NOT NULL AS renewed;
SAVEPOINT s;
SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), 'mailed', '{"mail": 1}') IS NOT NULL AS renewed;
SELECT recovery_point FROM idempotency_key;
ROLLBACK TO s;
COMMIT;
SELECT recovery_point, recovery_state, (SELECT count(*) FROM charge) AS charges FROM idempotency_key;
DROP TABLE charge;
-- many in one statement: the last one counts
SELECT count(*) FROM (SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), 'step ' || i, to_jsonb(i)) FROM generate_series(1, 5) i OFFSET 0) c;
SELECT recovery_point, recovery_state FROM idempotency_key;
-- a read-only transaction cannot
BEGIN READ ONLY;
SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), 'p');
\echo :SQLSTATE
ROLLBACK;
TRUNCATE idempotency_key;

--
-- The size of a state
--
SELECT attempt FROM idempotency_begin('t', 'a', 'k', lease => '1 h', claim => claim_of(1));
SET idempotency.max_response_size = '100B';
-- a text in jsonb is 8 bytes longer
SELECT error_of(format('SELECT idempotency_checkpoint(%L, %L, %L, claim_of(1), %L, %L)', 't', 'a', 'k', 'p', to_json(repeat('x', 93))));
SELECT length(saved_state #>> '{}') FROM checkpoint('p', to_jsonb(repeat('x', 92)));
RESET idempotency.max_response_size;
SELECT error_of(format('SELECT idempotency_checkpoint(%L, %L, %L, claim_of(1), %L, %L)', 't', 'a', 'k', 'p', to_json(repeat('x', 1048569))));
SELECT saved_point, length(saved_state #>> '{}') FROM checkpoint('large', to_jsonb(repeat('x', 1048568)));
-- one that is stored out of line: kept over renewals, replaced, and gone with finish
SELECT string_agg(encode(sha256(i::text::bytea), 'hex'), '') AS hex FROM generate_series(1, 500) i \gset
SELECT saved_point, saved_state = to_jsonb(:'hex'::text) AS same FROM checkpoint('out of line', to_jsonb(:'hex'::text));
SELECT chunks() > 10 AS out_of_line;
SELECT saved_point, saved_state = to_jsonb(:'hex'::text) AS same FROM checkpoint(NULL);
SELECT saved_point, saved_state = to_jsonb(:'hex'::text) AS same FROM checkpoint(NULL, NULL, '1 ms');
SELECT pg_sleep(0.01);
SELECT chunks() > 10 AS out_of_line;
SELECT attempt, recovery_point, recovery_state = to_jsonb(:'hex'::text) AS same FROM idempotency_begin('t', 'a', 'k', lease => '1 h', claim => claim_of(2));
SELECT recovery_state = to_jsonb(:'hex'::text) AS same FROM idempotency_key;
BEGIN;
SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(2), 'small', '1') IS NOT NULL AS renewed;
SELECT chunks();
ROLLBACK;
SELECT recovery_state = to_jsonb(:'hex'::text) AS same FROM idempotency_key;
SELECT idempotency_finish('t', 'a', 'k', 204, claim => claim_of(2));
SELECT chunks();

--
-- The updates of a leased request need no new index entries
--
DROP FUNCTION checkpoint;
DROP EXTENSION idempotency;
CREATE EXTENSION idempotency;
SELECT outcome, count(*) FROM generate_series(1, 5) i, idempotency_begin('t', 'a', 'k' || i, to_jsonb(i), lease => '30 min', claim => claim_of(1))
GROUP BY outcome;
SELECT count(idempotency_checkpoint('t', 'a', 'k' || i, claim_of(1), 'charged', '{"charge": "ch_1"}')) FROM generate_series(1, 5) i;
SELECT count(idempotency_checkpoint('t', 'a', 'k' || i, claim_of(1), 'mailed')) FROM generate_series(1, 5) i;
SELECT count(idempotency_checkpoint('t', 'a', 'k' || i, claim_of(1), NULL)) FROM generate_series(1, 5) i;
SELECT count(idempotency_checkpoint('t', 'a', 'k' || i, claim_of(1), '')) FROM generate_series(1, 5) i;
SELECT idempotency_finish('t', 'a', 'k' || i, 200, '"done"', claim => claim_of(1)) FROM generate_series(1, 4) i;
SELECT idempotency_release('t', 'a', 'k5', claim => claim_of(1));
SELECT pg_stat_force_next_flush();
SELECT n_tup_ins, n_tup_upd, n_tup_hot_upd, n_tup_del FROM pg_stat_user_tables WHERE relid = 'idempotency_key'::regclass;
-- the lookup by either index finds them all the same
SET enable_seqscan = off;
SELECT count(*) FROM idempotency_key WHERE key = 'k1' AND state = 'completed';
SELECT count(*) FROM idempotency_key WHERE expires_at > now();
RESET enable_seqscan;

DROP EXTENSION idempotency;
