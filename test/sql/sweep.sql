--
-- Sweep: giving back the space of expired records
--
CREATE EXTENSION idempotency;
\set SHOW_CONTEXT never

-- how many records the last sweep deleted
CREATE VIEW swept AS SELECT swept FROM idempotency_worker_status();
-- makes n records of an action
CREATE FUNCTION add_records(action text, n int) RETURNS bigint
LANGUAGE sql VOLATILE AS $$
    SELECT count(*) FROM generate_series(1, n) i, idempotency_begin('t', action, 'k' || i);
    SELECT count(*) FROM generate_series(1, n) i,
        idempotency_finish('t', action, 'k' || i, CASE WHEN i % 2 = 0 THEN 200 ELSE 404 END, to_json(i));
$$;

-- nothing to do
CALL idempotency_sweep();

-- expired records only, completed and errored
SELECT add_records('old', 25);
UPDATE idempotency_key SET expires_at = created_at;
SELECT add_records('new', 10);
CALL idempotency_sweep();
SELECT * FROM swept;
SELECT action, count(*) FROM idempotency_key GROUP BY action;
CALL idempotency_sweep();
SELECT * FROM swept;
SELECT action, count(*) FROM idempotency_key GROUP BY action;
-- a moment is enough, and a moment more is too much
UPDATE idempotency_key SET expires_at = clock_timestamp() WHERE key = 'k1';
UPDATE idempotency_key SET expires_at = clock_timestamp() + interval '1 hour' WHERE key <> 'k1';
CALL idempotency_sweep();
SELECT count(*) FROM idempotency_key;
TRUNCATE idempotency_key;

-- batches of every size sweep the same
SELECT add_records('old', 25);
UPDATE idempotency_key SET expires_at = created_at;
CALL idempotency_sweep(1);
SELECT swept, (SELECT count(*) FROM idempotency_key) AS rest FROM swept;
SELECT add_records('old', 25);
UPDATE idempotency_key SET expires_at = created_at;
CALL idempotency_sweep(7);
SELECT swept, (SELECT count(*) FROM idempotency_key) AS rest FROM swept;
SELECT add_records('old', 25);
-- as many to a batch as there are, one more and one less; all expire at once
UPDATE idempotency_key SET expires_at = '2020-01-01';
CALL idempotency_sweep(24);
SELECT swept, (SELECT count(*) FROM idempotency_key) AS rest FROM swept;
SELECT add_records('old', 25);
UPDATE idempotency_key SET expires_at = '2020-01-01';
CALL idempotency_sweep(25);
SELECT swept, (SELECT count(*) FROM idempotency_key) AS rest FROM swept;
SELECT add_records('old', 25);
UPDATE idempotency_key SET expires_at = '-infinity';
CALL idempotency_sweep(26);
SELECT swept, (SELECT count(*) FROM idempotency_key) AS rest FROM swept;
SELECT add_records('old', 25);
UPDATE idempotency_key SET expires_at = created_at;
SET idempotency.sweep_batch_size = 2;
CALL idempotency_sweep();
SELECT swept, (SELECT count(*) FROM idempotency_key) AS rest FROM swept;
RESET idempotency.sweep_batch_size;
SELECT add_records('old', 25);
UPDATE idempotency_key SET expires_at = created_at;
CALL idempotency_sweep(batch_size => 1000000, max_duration => '1 hour');
SELECT swept, (SELECT count(*) FROM idempotency_key) AS rest FROM swept;

-- each batch is a transaction of its own
SELECT add_records('old', 60);
UPDATE idempotency_key SET expires_at = created_at;
SELECT pg_current_xact_id()::text AS before \gset
CALL idempotency_sweep(1);
SELECT pg_current_xact_id()::text::bigint - :before > 60 AS transactions;

-- by position, and from PL/pgSQL, where that can commit
SELECT add_records('old', 3);
UPDATE idempotency_key SET expires_at = created_at;
CALL idempotency_sweep(NULL, NULL);
SELECT count(*) FROM idempotency_key;
SELECT add_records('old', 3);
UPDATE idempotency_key SET expires_at = created_at;
DO $$
BEGIN
    CALL idempotency_sweep(2, interval '1 day');
    RAISE NOTICE 'swept %', (SELECT * FROM swept);
    CALL idempotency_sweep(max_duration => NULL);
    RAISE NOTICE 'swept %', (SELECT * FROM swept);
END $$;
CREATE PROCEDURE tidy_up() LANGUAGE plpgsql AS $$
BEGIN
    CALL idempotency_sweep();
END $$;
CREATE PROCEDURE tidy_up_more() LANGUAGE plpgsql AS $$
BEGIN
    CALL tidy_up();
END $$;
SELECT add_records('old', 3);
UPDATE idempotency_key SET expires_at = created_at;
CALL tidy_up();
SELECT count(*) FROM idempotency_key;
SELECT add_records('old', 3);
UPDATE idempotency_key SET expires_at = created_at;
CALL tidy_up_more();
SELECT count(*) FROM idempotency_key;

--
-- Errors
--
CALL idempotency_sweep(0);
\echo :SQLSTATE
CALL idempotency_sweep(-1);
\echo :SQLSTATE
CALL idempotency_sweep(1000001);
\echo :SQLSTATE
CALL idempotency_sweep(max_duration => '0');
\echo :SQLSTATE
CALL idempotency_sweep(max_duration => '-1 s');
\echo :SQLSTATE
CALL idempotency_sweep(max_duration => '-178000000 years');
\echo :SQLSTATE
CALL idempotency_sweep(max_duration => '178000000 years');
-- it commits, so it cannot be part of a transaction
BEGIN;
CALL idempotency_sweep();
\echo :SQLSTATE
ROLLBACK;
BEGIN;
CALL tidy_up_more();
\echo :SQLSTATE
ROLLBACK;
BEGIN;
DO $$
BEGIN
    CALL idempotency_sweep();
END $$;
\echo :SQLSTATE
ROLLBACK;
-- of a function
CREATE FUNCTION sweep_in_function() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    CALL idempotency_sweep();
END $$;
SELECT sweep_in_function();
\echo :SQLSTATE
DROP FUNCTION sweep_in_function;
-- of a block that catches errors
DO $$
BEGIN
    CALL idempotency_sweep();
EXCEPTION WHEN OTHERS THEN
    RAISE NOTICE '%', SQLSTATE;
END $$;
-- or of a procedure that cannot commit either, whoever calls that
ALTER PROCEDURE tidy_up() SET work_mem = '10MB';
CALL tidy_up();
\echo :SQLSTATE
CALL tidy_up_more();
\echo :SQLSTATE
ALTER PROCEDURE tidy_up() RESET work_mem;
ALTER PROCEDURE tidy_up() SECURITY DEFINER;
CALL tidy_up();
\echo :SQLSTATE
ALTER PROCEDURE tidy_up() SECURITY INVOKER;
ALTER PROCEDURE tidy_up_more() SECURITY DEFINER;
CALL tidy_up_more();
\echo :SQLSTATE
-- nor can a procedure in SQL
CREATE PROCEDURE sweep_in_sql() LANGUAGE sql AS 'CALL idempotency_sweep()';
CALL sweep_in_sql();
\echo :SQLSTATE
DROP PROCEDURE tidy_up, tidy_up_more, sweep_in_sql;
-- so it cannot leave a claim unfinished, either
DO $$
BEGIN
    PERFORM idempotency_begin('t', 'claim', 'k');
    CALL idempotency_sweep();
END $$;
\echo :SQLSTATE

--
-- What a sweep passes over, without waiting
--
-- an expired record whose scope is claimed
SELECT add_records('old', 5);
UPDATE idempotency_key SET expires_at = created_at;
SET idempotency.commit_guard = off;
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'old', 'k3');
PREPARE TRANSACTION 'claimed';
RESET idempotency.commit_guard;
CALL idempotency_sweep();
SELECT * FROM swept;
SELECT key FROM idempotency_key;
ROLLBACK PREPARED 'claimed';
CALL idempotency_sweep();
SELECT * FROM swept;
-- one that finish has replaced, with the commit still to come
SELECT add_records('old', 5);
UPDATE idempotency_key SET expires_at = created_at;
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'old', 'k3');
SELECT idempotency_finish('t', 'old', 'k3', 200, '"new"');
PREPARE TRANSACTION 'finished';
CALL idempotency_sweep(1);
SELECT * FROM swept;
SELECT key, response FROM idempotency_key;
COMMIT PREPARED 'finished';
SELECT key, response FROM idempotency_key;
SELECT outcome, response FROM idempotency_begin('t', 'old', 'k3');
CALL idempotency_sweep();
SELECT * FROM swept;
TRUNCATE idempotency_key;
-- one that somebody has locked
SELECT add_records('old', 5);
UPDATE idempotency_key SET expires_at = created_at;
BEGIN;
SELECT key FROM idempotency_key WHERE key IN ('k1', 'k5') ORDER BY key FOR UPDATE;
PREPARE TRANSACTION 'locked';
CALL idempotency_sweep(1);
SELECT * FROM swept;
SELECT key FROM idempotency_key ORDER BY key;
COMMIT PREPARED 'locked';
CALL idempotency_sweep();
SELECT * FROM swept;
SELECT count(*) FROM idempotency_key;
-- and among those that expire at once
SELECT add_records('old', 5);
UPDATE idempotency_key SET expires_at = '2020-01-01';
BEGIN;
SELECT key FROM idempotency_key WHERE key IN ('k1', 'k3') ORDER BY key FOR UPDATE;
PREPARE TRANSACTION 'locked';
CALL idempotency_sweep(1);
SELECT * FROM swept;
SELECT key FROM idempotency_key ORDER BY key;
COMMIT PREPARED 'locked';
CALL idempotency_sweep(1);
SELECT * FROM swept;
-- what is pending goes like the rest when its time is over, and not before,
-- however long nobody has finished it
SELECT add_records('old', 3);
UPDATE idempotency_key SET expires_at = created_at;
INSERT INTO idempotency_key (tenant, action, key, actor, state, attempt, lease_expires_at, created_at, expires_at, ttl)
VALUES ('t', 'old', 'stalled-expired', '', 'pending', 1, now() - interval '3 days', now() - interval '4 days', now() - interval '1 day', '2 days'),
       ('t', 'old', 'released-expired', '', 'pending', 1, NULL, now() - interval '4 days', now() - interval '1 day', '2 days'),
       ('t', 'old', 'stalled', '', 'pending', 1, now() - interval '3 days', now() - interval '4 days', now() + interval '1 h', '3 days'),
       ('t', 'old', 'released', '', 'pending', 1, NULL, now() - interval '4 days', now() + interval '1 h', '3 days'),
       ('t', 'old', 'leased', '', 'pending', 1, now() + interval '1 h', now(), now() + interval '4 days', '3 days');
CALL idempotency_sweep();
SELECT * FROM swept;
SELECT key FROM idempotency_key ORDER BY key;
TRUNCATE idempotency_key;

-- a claim on another scope is no hindrance
SELECT add_records('old', 5);
UPDATE idempotency_key SET expires_at = created_at;
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'other', 'k1');
SELECT idempotency_finish('t', 'other', 'k1');
PREPARE TRANSACTION 'other';
CALL idempotency_sweep();
SELECT * FROM swept;
ROLLBACK PREPARED 'other';

-- a sweep changes no setting of its session
SHOW synchronous_commit;

-- large answers are swept with all that belongs to them
SELECT outcome, idempotency_finish('t', 'large', 'k' || left(outcome, 0), 200,
                                   body => (SELECT string_agg(sha256(i::text::bytea), '') FROM generate_series(1, 5000) i))
FROM idempotency_begin('t', 'large', 'k');
SELECT chunks() > 50 AS out_of_line;
UPDATE idempotency_key SET expires_at = created_at;
CALL idempotency_sweep();
SELECT * FROM swept;
SELECT chunks();

-- a row that these functions did not write, for a scope that cannot be
INSERT INTO idempotency_key (tenant, action, key, actor, state, attempt, created_at, expires_at)
SELECT repeat('t', n), 'long', 'k', '', 'completed', 1, now(), now() - interval '1 day'
FROM unnest('{300,255}'::int[]) n;
CALL idempotency_sweep();
SELECT * FROM swept;

-- a sweep does not evaluate what the owner of the table put into a partial index,
-- also when it comes before the index that the sweep uses
CREATE FUNCTION tell(text) RETURNS boolean IMMUTABLE LANGUAGE plpgsql AS $$
BEGIN
    RAISE NOTICE 'evaluated for %', $1;
    RETURN true;
END $$;
INSERT INTO idempotency_key (tenant, action, key, actor, state, attempt, created_at, expires_at)
VALUES ('t', 'partial', 'k', '', 'completed', 1, now(), now() - interval '1 day');
SET client_min_messages = warning;
CREATE INDEX partial ON idempotency_key (expires_at) WHERE tell('an index');
REINDEX INDEX CONCURRENTLY idempotency_key_expires_at_idx;
SELECT 'partial'::regclass::oid < 'idempotency_key_expires_at_idx'::regclass::oid AS comes_first;
\c -
CALL idempotency_sweep();
SELECT * FROM swept;
DROP INDEX partial;

-- nor does it use one that has more columns, and another order of records that
-- expire at once
CREATE INDEX wide ON idempotency_key (expires_at, key);
REINDEX INDEX CONCURRENTLY idempotency_key_expires_at_idx;
SELECT 'wide'::regclass::oid < 'idempotency_key_expires_at_idx'::regclass::oid AS comes_first;
INSERT INTO idempotency_key (tenant, action, key, actor, state, attempt, created_at, expires_at)
SELECT 't', 'wide', 'k' || 9 - i, '', 'completed', 1, '2020-01-01', '2020-01-02'
FROM generate_series(1, 5) i;
CALL idempotency_sweep(1);
SELECT * FROM swept;
DROP INDEX wide;

DROP VIEW swept;
DROP FUNCTION add_records, tell;
DROP EXTENSION idempotency;
