--
-- Metrics: what is counted, and when
--
CREATE EXTENSION idempotency;

-- What there is to see for an action
CREATE FUNCTION counts(name text) RETURNS text LANGUAGE sql AS $$
    SELECT string_agg(key || ' ' || value, ', ' ORDER BY n)
    FROM idempotency_stats AS s,
         jsonb_each_text(to_jsonb(s)) AS c (key, value),
         unnest('{started,replayed,in_flight,mismatched,expired,stalled,taken_over,completed,errored,released,swept,held}'::text[])
             WITH ORDINALITY AS o (name, n)
    WHERE s.action = counts.name AND o.name = c.key AND value <> '0'
$$;

-- nothing was counted yet
SELECT counts('metrics.claim');

-- What a request is told counts at once, what it comes to when it commits
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'metrics.claim', 'a', '{"n": 1}');
SELECT counts('metrics.claim') AS "in the transaction";
SELECT idempotency_finish('t', 'metrics.claim', 'a', 201);
SELECT counts('metrics.claim') AS "before the commit";
COMMIT;
SELECT counts('metrics.claim') AS "after it";

SELECT outcome FROM idempotency_begin('t', 'metrics.claim', 'a', '{"n": 1}');
SELECT outcome FROM idempotency_replay('t', 'metrics.claim', 'a', '{"n": 1}');
SELECT outcome FROM idempotency_replay('t', 'metrics.claim', 'none');
SELECT outcome FROM idempotency_try_begin('t', 'metrics.claim', 'a', '{"n": 2}');
SELECT counts('metrics.claim');
-- a look at a request in flight is not a repeat of it
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'metrics.look', 'a');
SELECT outcome FROM idempotency_replay('t', 'metrics.look', 'a');
SELECT counts('metrics.look');
ROLLBACK;

-- errors count too, though they undo the transaction
SELECT outcome FROM idempotency_begin('t', 'metrics.claim', 'a', '{"n": 2}');
SELECT outcome FROM idempotency_replay('t', 'metrics.claim', 'a', '{"n": 2}');
SELECT counts('metrics.claim');

-- and so does what is rolled back afterwards, except for what it would have
-- come to
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'metrics.rollback', 'a');
SELECT idempotency_finish('t', 'metrics.rollback', 'a');
SELECT outcome FROM idempotency_begin('t', 'metrics.rollback', 'a');
SELECT counts('metrics.rollback');
ROLLBACK;
SELECT counts('metrics.rollback');
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'metrics.guard', 'a');
COMMIT;
SELECT counts('metrics.guard');

-- Ends of all kinds
BEGIN;
SELECT idempotency_begin('t', 'metrics.end', k) IS NULL
FROM unnest('{errored,released,given back,lost}'::text[]) AS k WHERE k <> 'given back';
SELECT outcome FROM idempotency_begin('t', 'metrics.end', 'given');
SELECT counts('metrics.end');
SELECT idempotency_finish('t', 'metrics.end', 'errored', 404);
SELECT idempotency_finish('t', 'metrics.end', 'released', 503);
SELECT idempotency_release('t', 'metrics.end', 'given');
SAVEPOINT s;
SELECT idempotency_release('t', 'metrics.end', 'given');
ROLLBACK TO s;
SELECT counts('metrics.end');
SELECT idempotency_release('t', 'metrics.end', 'lost');
COMMIT;
SELECT counts('metrics.end');

-- Savepoints take with them what happened in them
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'metrics.savepoint', 'a');
SAVEPOINT one;
SELECT idempotency_finish('t', 'metrics.savepoint', 'a', 500);
SAVEPOINT two;
SELECT outcome FROM idempotency_begin('t', 'metrics.savepoint', 'b');
SELECT idempotency_finish('t', 'metrics.savepoint', 'b', 404);
RELEASE two;
SELECT counts('metrics.savepoint');
ROLLBACK TO one;
SELECT counts('metrics.savepoint') AS "held again";
SELECT idempotency_finish('t', 'metrics.savepoint', 'a', 200);
SAVEPOINT three;
SELECT outcome FROM idempotency_begin('t', 'metrics.savepoint', 'c');
SELECT idempotency_finish('t', 'metrics.savepoint', 'c', 404);
RELEASE three;
COMMIT;
SELECT counts('metrics.savepoint');

-- What is prepared counts as if it were committed, because nobody is there
-- when it is
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'metrics.prepared', 'a');
SELECT idempotency_finish('t', 'metrics.prepared', 'a');
PREPARE TRANSACTION 'metrics';
SELECT counts('metrics.prepared');
SELECT outcome FROM idempotency_try_begin('t', 'metrics.prepared', 'a');
COMMIT PREPARED 'metrics';
SELECT counts('metrics.prepared');

-- Leased claims
SELECT outcome, attempt FROM idempotency_begin('t', 'metrics.lease', 'a', lease => '1 hour', claim => claim_of(1));
-- who asks for a claim again has not started anything
SELECT outcome, attempt FROM idempotency_begin('t', 'metrics.lease', 'a', lease => '1 hour', claim => claim_of(1));
SELECT counts('metrics.lease');
SELECT outcome FROM idempotency_try_begin('t', 'metrics.lease', 'a');
SELECT outcome FROM idempotency_replay('t', 'metrics.lease', 'a');
UPDATE idempotency_key SET lease_expires_at = clock_timestamp() WHERE action = 'metrics.lease';
SELECT outcome FROM idempotency_replay('t', 'metrics.lease', 'a');
SELECT counts('metrics.lease');
SELECT outcome, attempt FROM idempotency_begin('t', 'metrics.lease', 'a', lease => '1 hour', claim => claim_of(2));
SELECT counts('metrics.lease');
BEGIN;
SELECT idempotency_finish('t', 'metrics.lease', 'a', 200, claim => claim_of(2));
ROLLBACK;
SELECT counts('metrics.lease');
SELECT idempotency_finish('t', 'metrics.lease', 'a', 200, claim => claim_of(2));
-- which a caller may ask for again
SELECT idempotency_finish('t', 'metrics.lease', 'a', 200, claim => claim_of(2));
SELECT counts('metrics.lease');
SELECT outcome FROM idempotency_begin('t', 'metrics.lease', 'b', lease => '1 hour', claim => claim_of(3));
SELECT idempotency_release('t', 'metrics.lease', 'b', claim => claim_of(3));
SELECT idempotency_release('t', 'metrics.lease', 'b', claim => claim_of(3));
-- a claim that was released was not taken over
SELECT outcome, attempt FROM idempotency_begin('t', 'metrics.lease', 'b', lease => '1 hour');
SELECT counts('metrics.lease');

-- run, store, and first_seen
CREATE FUNCTION work(request jsonb) RETURNS jsonb LANGUAGE sql AS 'SELECT request';
CREATE FUNCTION fail(request jsonb) RETURNS jsonb LANGUAGE plpgsql AS 'BEGIN RAISE ''no''; END';
SELECT outcome FROM idempotency_run('t', 'metrics.run', 'a', '1', 'work(jsonb)');
SELECT outcome FROM idempotency_run('t', 'metrics.run', 'a', '1', 'work(jsonb)');
SELECT outcome FROM idempotency_run('t', 'metrics.run', 'b', '1', 'fail(jsonb)');
SELECT outcome FROM idempotency_try_run('t', 'metrics.run', 'a', '2', 'work(jsonb)');
SELECT counts('metrics.run');
SELECT outcome FROM idempotency_store('t', 'metrics.store', 'a', '1', 404);
SELECT outcome FROM idempotency_store('t', 'metrics.store', 'a', '1', 404);
SELECT outcome FROM idempotency_store('t', 'metrics.store', 'a', '2', 404);
SELECT outcome FROM idempotency_store('t', 'metrics.store', 'b', '1', 503);
SELECT counts('metrics.store');
-- what is forgotten was counted, and is not swept
SELECT idempotency_forget('t', 'metrics.store', 'a');
SELECT counts('metrics.store');
SELECT * FROM idempotency_first_seen('t', 'metrics.first_seen', '{a,b,a,c}');
SELECT * FROM idempotency_first_seen('t', 'metrics.first_seen', '{}');
SELECT * FROM idempotency_first_seen('t', 'metrics.first_seen', '{c,d}');
BEGIN;
SELECT * FROM idempotency_first_seen('t', 'metrics.first_seen', '{d,e}');
ROLLBACK;
SELECT counts('metrics.first_seen');

-- Records whose time is over
UPDATE idempotency_key SET expires_at = now() WHERE action IN ('metrics.end', 'metrics.first_seen');
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'metrics.end', 'errored');
SELECT idempotency_finish('t', 'metrics.end', 'errored');
COMMIT;
UPDATE idempotency_key SET expires_at = now() WHERE action = 'metrics.end';
CALL idempotency_sweep();
SELECT counts('metrics.end');
SELECT counts('metrics.first_seen');

-- Times: one run for each claim that was ended, one lookup for each look
SELECT action,
       (SELECT sum(n) FROM unnest(run_time_histogram) AS n) = completed + errored + released AS runs,
       (SELECT sum(n) FROM unnest(lookup_time_histogram) AS n) >= started + replayed AS lookups,
       run_time > 0 AND lookup_time > 0 AS sums,
       run_time_p50 <= run_time_p95 AND run_time_p95 <= run_time_p99 AND
       lookup_time_p50 <= lookup_time_p95 AND lookup_time_p95 <= lookup_time_p99 AS percentiles,
       run_time_p50 = idempotency_percentile(run_time_histogram, 0.5) AND
       lookup_time_p99 = idempotency_percentile(lookup_time_histogram, 0.99) AS same,
       since < now() AS since
FROM idempotency_stats
WHERE action IN ('metrics.claim', 'metrics.end', 'metrics.lease', 'metrics.run')
ORDER BY action;
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'metrics.time', 'a');
SELECT pg_sleep(0.1);
SELECT idempotency_finish('t', 'metrics.time', 'a');
COMMIT;
SELECT run_time >= 100 AS run_time, run_time_p50 >= 98 AS p50, lookup_time < run_time AS lookup_time
FROM idempotency_stats WHERE action = 'metrics.time';

-- Sweeping flushed them
SELECT action, started, replayed, mismatched, completed, swept,
       run_time > 0 AS run_time, lookup_time > 0 AS lookup_time
FROM idempotency_metric
WHERE action IN ('metrics.claim', 'metrics.first_seen') ORDER BY action;

-- What a flush writes is the difference to the last one
CREATE FUNCTION flushed_all() RETURNS TABLE (flushed bigint, differing bigint) LANGUAGE sql AS $$
    SELECT count(*),
           count(*) FILTER (WHERE (s.started, s.replayed, s.in_flight, s.mismatched, s.expired, s.taken_over,
                                   s.completed, s.errored, s.released, s.swept,
                                   s.run_time::numeric(20, 3), s.lookup_time::numeric(20, 3),
                                   s.run_time_histogram, s.lookup_time_histogram)
                                  IS DISTINCT FROM
                                  (m.started, m.replayed, m.in_flight, m.mismatched, m.expired, m.taken_over,
                                   m.completed, m.errored, m.released, m.swept,
                                   m.run_time::numeric(20, 3), m.lookup_time::numeric(20, 3),
                                   m.run_time_histogram, m.lookup_time_histogram))
    FROM idempotency_stats AS s LEFT JOIN (
        SELECT action, sum(started) AS started, sum(replayed) AS replayed, sum(in_flight) AS in_flight,
               sum(mismatched) AS mismatched, sum(expired) AS expired, sum(taken_over) AS taken_over,
               sum(completed) AS completed, sum(errored) AS errored, sum(released) AS released,
               sum(swept) AS swept, sum(run_time) AS run_time, sum(lookup_time) AS lookup_time,
               idempotency_histogram_sum(run_time_histogram) AS run_time_histogram,
               idempotency_histogram_sum(lookup_time_histogram) AS lookup_time_histogram
        FROM idempotency_metric GROUP BY action) AS m USING (action)
    WHERE action LIKE 'metrics.%'
$$;
CALL idempotency_sweep();
SELECT flushed >= 9 AS many, differing FROM flushed_all();
SELECT outcome FROM idempotency_begin('t', 'metrics.claim', 'a', '{"n": 1}');
SELECT flushed >= 9 AS many, differing FROM flushed_all();
CALL idempotency_sweep();
CALL idempotency_sweep();
SELECT flushed >= 9 AS many, differing FROM flushed_all();

-- all of them under one name, that of this server and this database
SELECT count(DISTINCT node), bool_and(node = concat_ws('/', s.system_identifier, started_at, d.oid)) AS this_one
FROM idempotency_metric, pg_control_system() AS s, pg_database AS d,
    CAST(extract(epoch FROM pg_postmaster_start_time() - timestamptz '2000-01-01 00:00:00+00') * 1000000 AS bigint) AS started_at
WHERE d.datname = current_database();

-- as it does when the row of this minute is there already
SELECT idempotency_begin('t', 'metrics.claim', 'a', '{"n": 1}') IS NULL FROM generate_series(1, 5);
CALL idempotency_sweep();
SELECT flushed >= 9 AS many, differing FROM flushed_all();

-- A flush in a transaction that fails is none
SELECT idempotency_begin('t', 'metrics.claim', 'a', '{"n": 1}') IS NULL FROM generate_series(1, 5);
ALTER TABLE idempotency_metric ADD CONSTRAINT never CHECK (replayed < 0) NOT VALID;
\set VERBOSITY sqlstate
CALL idempotency_sweep();
\set VERBOSITY default
SELECT flushed >= 9 AS many, differing FROM flushed_all();
ALTER TABLE idempotency_metric DROP CONSTRAINT never;
CALL idempotency_sweep();
SELECT flushed >= 9 AS many, differing FROM flushed_all();

-- Old rows go
INSERT INTO idempotency_metric
SELECT now() - age, 'metrics.old', 'here', 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, '{}', '{}'
FROM unnest('{6 days 23 hours,7 days 1 hour,1 year}'::interval[]) AS age;
CALL idempotency_sweep();
SELECT now() - bucket < '7 days' AS young FROM idempotency_metric WHERE action = 'metrics.old';

-- no more of them at a time than takes a moment
INSERT INTO idempotency_metric
SELECT now() - '8 days'::interval - n * '1 min'::interval, 'metrics.old', 'here', 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, '{}', '{}'
FROM generate_series(1, 100010) AS n;
CALL idempotency_sweep();
SELECT count(*) FROM idempotency_metric WHERE action = 'metrics.old' AND bucket < now() - '7 days'::interval;
CALL idempotency_sweep();
SELECT count(*) FROM idempotency_metric WHERE action = 'metrics.old' AND bucket < now() - '7 days'::interval;

-- Duplicates against unique requests
TRUNCATE idempotency_metric;
SET timezone = 'UTC';
INSERT INTO idempotency_metric
SELECT bucket, action, node, started, replayed, in_flight, 1000, 0, 0, 0, 0, 0, 0, 0, 0, 0, '{}', '{}'
FROM (VALUES
    ('2026-01-01 00:00 UTC'::timestamptz, 'a', 'here', 60, 1, 1),
    ('2026-01-01 23:59 UTC', 'a', 'here', 30, 1, 0),
    ('2026-01-01 23:59 UTC', 'a', 'there', 10, 0, 1),
    ('2026-01-01 12:00 UTC', 'b', 'here', 100, 5, 0),
    ('2026-01-02 00:00 UTC', 'a', 'here', 0, 1, 0),
    ('2026-01-02 00:00 UTC', 'c', 'here', 0, 0, 0)) AS v (bucket, action, node, started, replayed, in_flight);
SELECT * FROM idempotency_replay_ratio ORDER BY day, action NULLS FIRST;
RESET timezone;

-- Who may sweep needs no right on the table, and nobody's search_path matters
CREATE ROLE regress_sweeper;
GRANT EXECUTE ON PROCEDURE idempotency_sweep TO regress_sweeper;
SELECT outcome FROM idempotency_begin('t', 'metrics.claim', 'a', '{"n": 1}');
CREATE SCHEMA regress_hostile;
GRANT ALL ON SCHEMA regress_hostile TO regress_sweeper;
SET ROLE regress_sweeper;
CREATE FUNCTION regress_hostile.plus(bigint, bigint) RETURNS bigint LANGUAGE plpgsql
    AS 'BEGIN RAISE ''called as %'', current_user; END';
CREATE OPERATOR regress_hostile.+ (LEFTARG = bigint, RIGHTARG = bigint, FUNCTION = regress_hostile.plus);
CREATE OPERATOR regress_hostile.< (LEFTARG = timestamptz, RIGHTARG = timestamptz, FUNCTION = timestamptz_lt);
SET search_path = regress_hostile, pg_catalog, public;
CALL idempotency_sweep();
SHOW search_path;
SELECT current_user = 'regress_sweeper' AS still_the_sweeper;
RESET ROLE;
RESET search_path;
SELECT outcome FROM idempotency_begin('t', 'metrics.claim', 'a', '{"n": 1}');
SET search_path = regress_hostile, pg_catalog, public;
CALL idempotency_sweep();
RESET search_path;
SELECT sum(replayed) AS flushed FROM idempotency_metric WHERE action = 'metrics.claim';

-- Histograms
SELECT idempotency_histogram_add('{}', '{}'),
       idempotency_histogram_add('[3:4]={1,2}', '[3:4]={10,0}'),
       idempotency_histogram_add('[0:0]={1}', '[127:127]={1}') = ('[0:127]={1' || repeat(',0', 126) || ',1}')::bigint[] AS wide,
       idempotency_histogram_add('[3:6]={0,0,1,0}', '{}'),
       idempotency_histogram_add(NULL, '{}') IS NULL AS strict;
SELECT idempotency_histogram_sum(h) FROM (VALUES ('[1:2]={1,1}'::bigint[]), ('[2:3]={1,1}'), (NULL), ('{}')) AS v (h);
SELECT fraction, idempotency_percentile('[40:41]={50,50}', fraction)
FROM unnest('{0,0.25,0.5,0.75,1}'::float8[]) AS fraction;
SELECT idempotency_percentile('{}', 0.5) IS NULL AS empty,
       idempotency_percentile('[9:9]={0}', 0.5) IS NULL AS zero,
       idempotency_percentile('[0:0]={1}', 1) AS first,
       idempotency_percentile('[127:127]={1}', 1) / 3600000 AS hours;
SELECT idempotency_histogram_add('{{1},{2}}', '{}');
SELECT idempotency_histogram_add('{1,NULL}', '{}');
SELECT idempotency_histogram_add('[-1:0]={1,1}', '{}');
SELECT idempotency_histogram_add('{}', '[127:128]={1,1}');
SELECT idempotency_histogram_add('{}', '[2147483646:2147483646]={1}');
SELECT idempotency_histogram_add('{-1}', '{}');
SELECT idempotency_histogram_add('{9223372036854775807}', '{1}');
SELECT idempotency_percentile('{1}', 1.1);
SELECT idempotency_percentile('{1}', -0.1);
SELECT idempotency_percentile('{1}', 'NaN');

DROP OWNED BY regress_sweeper;
DROP SCHEMA regress_hostile CASCADE;
DROP ROLE regress_sweeper;
DROP FUNCTION counts, work, fail, flushed_all;
DROP EXTENSION idempotency;
