--
-- The plan of a call in FROM
--
CREATE EXTENSION idempotency;
SET plan_cache_mode = force_generic_plan;

-- what of a plan is a scan
CREATE FUNCTION scans(query text) RETURNS SETOF text LANGUAGE plpgsql AS $$
DECLARE
    line text;
BEGIN
    FOR line IN EXECUTE 'EXPLAIN (COSTS OFF) ' || query LOOP
        RETURN QUERY SELECT substring(line FROM '\w+ Scan.*') WHERE line LIKE '% Scan %';
    END LOOP;
END $$;

-- each call that returns a row is scanned in its own way
EXPLAIN (VERBOSE, COSTS OFF)
SELECT outcome FROM idempotency_begin('acme', 'pay', 'a');
EXPLAIN (COSTS OFF)
SELECT * FROM idempotency_try_begin('acme', 'pay', 'a', '{"amount": 1}', wait => '1s', lease => '1min');
SELECT * FROM scans($$SELECT * FROM idempotency_replay('acme', 'pay', 'a', actor => 'me')$$);
SELECT * FROM scans($$SELECT * FROM idempotency_run('acme', 'pay', 'a', '{"amount": 1}', 'to_json(anyelement)')$$);
SELECT * FROM scans($$SELECT * FROM idempotency_try_run('acme', 'pay', 'a', '{"amount": 1}', 'to_json(anyelement)')$$);
SELECT * FROM scans($$SELECT * FROM idempotency_store('acme', 'pay', 'a', '{"amount": 1}', 404)$$);
-- by its function, not by a name
BEGIN;
ALTER FUNCTION idempotency_replay RENAME TO answer_of;
SELECT * FROM scans($$SELECT * FROM answer_of('acme', 'pay', 'a')$$);
ROLLBACK;

-- what is scanned
BEGIN;
SELECT outcome, attempt, created_at = now() OR created_at > now() AS created
FROM idempotency_begin('acme', 'pay', 'a', '{"amount": 1}');
SELECT idempotency_finish('acme', 'pay', 'a', 201, '{"paid":  1}', '{"ETag": "x"}');
SELECT outcome FROM idempotency_begin('acme', 'pay', 'b');
SELECT idempotency_finish('acme', 'pay', 'b', body => '\x00ff');
COMMIT;
SELECT r.outcome, r.status_code, r.response, r.headers, r.body, r.claim, r.attempt, r.recovery_point, r.recovery_state, r.retry_after,
       (r.created_at, r.finished_at, r.expires_at) = (k.created_at, k.finished_at, k.expires_at) AS times
FROM idempotency_replay('acme', 'pay', 'a') AS r, idempotency_key AS k WHERE k.key = 'a';
SELECT outcome, status_code, response, headers, body FROM idempotency_replay('acme', 'pay', 'b');
-- columns in another order, twice, in expressions, of no use, or none
SELECT status_code, outcome, status_code + 1 AS next, upper(outcome), headers ->> 'ETag' AS etag
FROM idempotency_replay('acme', 'pay', 'a');
SELECT outcome FROM idempotency_replay('acme', 'pay', 'a') WHERE status_code = 201 AND attempt = 1;
SELECT outcome FROM idempotency_replay('acme', 'pay', 'a') WHERE status_code > 201;
SELECT count(*) FROM idempotency_replay('acme', 'pay', 'a');
SELECT 'x' AS x FROM idempotency_replay('acme', 'pay', 'a');
SELECT count(outcome), sum(status_code) FROM idempotency_replay('acme', 'pay', 'c');
SELECT max(status_code) FROM idempotency_replay('acme', 'pay', 'a') GROUP BY outcome ORDER BY outcome;
SELECT DISTINCT status_code, count(*) OVER (PARTITION BY outcome) FROM idempotency_replay('acme', 'pay', 'a');
SELECT p.status, p.told FROM idempotency_replay('acme', 'pay', 'a') AS p (told, status);
SELECT outcome FROM idempotency_replay('acme', 'pay', 'a')
UNION ALL
SELECT outcome FROM idempotency_replay('acme', 'pay', 'c');
WITH RECURSIVE twice (outcome, n) AS (
    SELECT outcome, 1 FROM idempotency_replay('acme', 'pay', 'a')
    UNION ALL
    SELECT r.outcome, n + 1 FROM twice, idempotency_replay('acme', 'pay', 'c') AS r WHERE n < 2)
SELECT * FROM twice;
SELECT key FROM idempotency_key WHERE key = 'a' AND status_code IN (SELECT status_code FROM idempotency_replay('acme', 'pay', 'a'));
SELECT key FROM idempotency_key WHERE key = 'a' AND EXISTS (SELECT FROM idempotency_replay('acme', 'pay', 'a') AS r WHERE r.created_at = idempotency_key.created_at);
-- a row that is not there has nulls
SELECT outcome, status_code, response, created_at FROM idempotency_replay('acme', 'pay', 'c');
-- all outcomes
SELECT outcome, status_code, retry_after FROM idempotency_try_begin('acme', 'pay', 'a', '{"amount": 2}');
SELECT outcome, claim, attempt
FROM idempotency_begin('acme', 'pay', 'leased', lease => '1h', claim => '00000000-0000-0000-0000-000000000001');
SELECT outcome, claim, retry_after > 3500 AS later FROM idempotency_try_begin('acme', 'pay', 'leased');
SELECT outcome, status_code, response FROM idempotency_run('acme', 'pay', 'run', '{"amount": 1}', 'to_jsonb(anyelement)');
SELECT outcome, status_code, response FROM idempotency_run('acme', 'pay', 'run', '{"amount": 1}', 'echo(jsonb)');
SELECT outcome, status_code, response FROM idempotency_run('acme', 'pay', 'run', '{"amount": 1}', 'echo(jsonb)');
SELECT outcome, status_code, response FROM idempotency_try_run('acme', 'pay', 'run', '{"amount": 2}', 'echo(jsonb)');
SELECT outcome, status_code, response FROM idempotency_store('acme', 'pay', 'stored', '{"amount": 1}', 402, '"no money"');
SELECT outcome, status_code, response FROM idempotency_store('acme', 'pay', 'stored', '{"amount": 1}', 404);
SELECT outcome, claim, attempt, retry_after > 3500 AS later FROM idempotency_replay('acme', 'pay', 'leased');

-- arguments: parameters, which may be null, and functions
PREPARE begin_for(text, text, jsonb) AS
SELECT outcome FROM idempotency_begin('acme', lower('PAY'), $1, $3, $2);
EXPLAIN (VERBOSE, COSTS OFF) EXECUTE begin_for('a', NULL, NULL);
BEGIN;
EXECUTE begin_for('p', NULL, NULL);
SELECT idempotency_finish('acme', 'pay', 'p');
EXECUTE begin_for('p', 'me', '{"amount": 1}');
SELECT idempotency_finish('acme', 'pay', 'p', actor => 'me');
EXECUTE begin_for('p', NULL, NULL);
COMMIT;
SELECT key, actor, request_hash IS NOT NULL AS fingerprint FROM idempotency_key WHERE key = 'p' ORDER BY actor;
BEGIN;
SET LOCAL plan_cache_mode = force_custom_plan;
EXECUTE begin_for('p', NULL, NULL);
EXECUTE begin_for('p', 'me', '{"amount": 1}');
EXECUTE begin_for('p', 'me', '{"amount": 2}');
ROLLBACK;
SELECT outcome FROM idempotency_replay('acme', 'pay', concat('p', current_setting('no.such', true)));
-- one that asks for an answer itself
SELECT response FROM idempotency_replay('acme', 'pay', substr((idempotency_replay('acme', 'pay', 'a')).outcome, 1, 0) || 'run');
-- in PL/pgSQL, also from within the call of another
CREATE FUNCTION outcome_of(key text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    told text;
BEGIN
    SELECT outcome INTO told FROM idempotency_replay('acme', 'pay', key);
    RETURN told;
END $$;
SELECT key, outcome_of(key) FROM unnest('{a,c,p}'::text[]) AS key;
SELECT status_code FROM idempotency_replay('acme', 'pay', CASE outcome_of('a') WHEN 'replayed' THEN 'run' END);
CREATE FUNCTION pay(request jsonb) RETURNS json LANGUAGE plpgsql AS $$
DECLARE
    answer json;
BEGIN
    SELECT r.response INTO answer FROM idempotency_run('acme', 'pay.part', request ->> 'key', request, 'echo(jsonb)') AS r;
    RETURN json_build_object('part', answer);
END $$;
SELECT outcome, response FROM idempotency_run('acme', 'pay.whole', 'w', '{"key": "w"}', 'pay(jsonb)');
SELECT outcome, response FROM idempotency_run('acme', 'pay.whole', 'w', '{"key": "w"}', 'pay(jsonb)');

-- it is called once, however often its row is read
BEGIN;
SET LOCAL enable_material = off;
EXPLAIN (COSTS OFF)
SELECT n, outcome FROM generate_series(1, 3) AS n LEFT JOIN idempotency_begin('acme', 'pay', 'once') ON n <> 2;
SELECT n, outcome FROM generate_series(1, 3) AS n LEFT JOIN idempotency_begin('acme', 'pay', 'once') ON n <> 2;
SELECT n, (SELECT outcome FROM idempotency_begin('acme', 'pay', 'twice') WHERE attempt < n) FROM generate_series(1, 3) AS n;
ROLLBACK;
-- and not if no row is wanted
SELECT * FROM idempotency_begin('acme', 'pay', NULL) LIMIT 0;
SELECT outcome FROM idempotency_begin('acme', 'pay', NULL) WHERE false;

SET constraint_exclusion = on;
SELECT outcome FROM idempotency_begin('acme', 'pay', NULL) WHERE status_code > 300 AND status_code < 200;
RESET constraint_exclusion;
BEGIN;
SELECT count(*), max(outcome)
FROM (SELECT 1 AS part, outcome FROM idempotency_begin('acme', 'pay', 'first')
      UNION ALL
      SELECT 2, outcome FROM idempotency_begin('acme', 'pay', 'second')) AS parts
WHERE part = 1;
SELECT key FROM idempotency_in_flight ORDER BY key;
ROLLBACK;

-- the row outlives the record, also when that is stored out of line
CREATE TABLE large AS
SELECT jsonb_agg(encode(sha256(n::text::bytea), 'hex')) AS request FROM generate_series(1, 2000) AS n;
SELECT outcome FROM idempotency_run('acme', 'pay', 'large', (SELECT request FROM large), 'echo(jsonb)');
SELECT pg_column_size(response) > 100000 AS large FROM idempotency_key WHERE key = 'large';
BEGIN;
SET LOCAL enable_material = off;
DECLARE answer NO SCROLL CURSOR FOR
SELECT n, outcome, response::jsonb = (SELECT request FROM large) AS whole
FROM generate_series(1, 2) AS n LEFT JOIN idempotency_replay('acme', 'pay', 'large') ON n > 0;
FETCH answer;
DELETE FROM idempotency_key WHERE key = 'large';
SELECT outcome FROM idempotency_replay('acme', 'pay', 'large');
FETCH answer;
COMMIT;
-- a cursor goes back and forth, also one that joins
BEGIN;
DECLARE answer CURSOR FOR SELECT outcome FROM idempotency_replay('acme', 'pay', 'a');
FETCH BACKWARD ALL answer;
FETCH ALL answer;
FETCH ALL answer;
FETCH BACKWARD ALL answer;
FETCH BACKWARD ALL answer;
FETCH ALL answer;
DECLARE answers SCROLL CURSOR FOR
SELECT n, outcome FROM generate_series(1, 2) AS n LEFT JOIN idempotency_replay('acme', 'pay', 'a') ON n > 1;
FETCH ALL answers;
FETCH BACKWARD ALL answers;
COMMIT;

-- left to the server: arguments of other tables and subqueries, whole rows, numbered rows, several functions, rows that are locked
CREATE TABLE ask (key text);
INSERT INTO ask VALUES ('a'), ('c'), ('p');
SELECT * FROM scans($$SELECT * FROM ask, idempotency_replay('acme', 'pay', ask.key)$$);
SELECT ask.key, outcome FROM ask, idempotency_replay('acme', 'pay', ask.key) ORDER BY key;
SELECT * FROM scans($$SELECT outcome FROM idempotency_replay('acme', 'pay', (SELECT min(key) FROM ask))$$);
SELECT outcome FROM idempotency_replay('acme', 'pay', (SELECT min(key) FROM ask));
SELECT key, (SELECT outcome FROM idempotency_replay('acme', 'pay', ask.key)) FROM ask ORDER BY key;
SELECT * FROM scans($$SELECT outcome FROM idempotency_replay('acme', 'pay', CASE WHEN 'x' IN (SELECT key FROM ask) THEN 'a' ELSE 'c' END)$$);
SELECT * FROM scans($$SELECT ask.key, r.k, r.outcome FROM ask LEFT JOIN LATERAL (SELECT ask.key AS k, outcome FROM idempotency_replay('acme', 'pay', 'a')) AS r ON true$$);
SELECT ask.key, r.k, r.outcome
FROM ask LEFT JOIN LATERAL (SELECT ask.key AS k, outcome FROM idempotency_replay('acme', 'pay', 'a')) AS r ON true ORDER BY 1;
SELECT ask.key, r.outcome
FROM ask, LATERAL (SELECT outcome FROM idempotency_replay('acme', 'pay', 'a') UNION ALL SELECT outcome FROM idempotency_replay('acme', 'pay', ask.key)) AS r
ORDER BY 1, 2;
SELECT * FROM scans($$SELECT r FROM idempotency_replay('acme', 'pay', 'c') AS r$$);
SELECT r FROM idempotency_replay('acme', 'pay', 'c') AS r;
SELECT * FROM scans($$SELECT outcome FROM idempotency_replay('acme', 'pay', 'a') AS r WHERE r IS NOT NULL$$);
SELECT * FROM scans($$SELECT outcome, n FROM idempotency_replay('acme', 'pay', 'a') WITH ORDINALITY AS r (outcome, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13, n)$$);
SELECT outcome, n FROM idempotency_replay('acme', 'pay', 'a') WITH ORDINALITY AS r (outcome, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13, n);
SELECT * FROM scans($$SELECT outcome FROM ROWS FROM (idempotency_replay('acme', 'pay', 'a'), generate_series(1, 2))$$);
SELECT * FROM scans($$SELECT outcome FROM ask, idempotency_replay('acme', 'pay', 'a') FOR UPDATE OF ask$$);
SELECT outcome FROM ask, idempotency_replay('acme', 'pay', 'a') FOR UPDATE OF ask;
SELECT * FROM scans($$UPDATE ask SET key = outcome FROM idempotency_replay('acme', 'pay', 'a')$$);
SELECT * FROM scans($$DELETE FROM ask USING idempotency_replay('acme', 'pay', 'a') WHERE key = outcome$$);
SELECT * FROM scans($$MERGE INTO ask USING idempotency_replay('acme', 'pay', 'a') ON key = outcome WHEN MATCHED THEN DELETE$$);
-- but not these, which only look alike
SELECT * FROM scans($$INSERT INTO ask SELECT outcome FROM idempotency_replay('acme', 'pay', 'a')$$);
SELECT ask.key, r.told
FROM ask LEFT JOIN (SELECT coalesce(outcome, 'none') AS told FROM idempotency_replay('acme', 'pay', 'c')) AS r ON ask.key <> 'p' ORDER BY 1;
SELECT told, count(*)
FROM (SELECT coalesce(outcome, 'none') AS told FROM idempotency_replay('acme', 'pay', 'c')) AS r, ask GROUP BY GROUPING SETS ((told), ()) ORDER BY 2, 1;

-- the right to call is asked for, at each execution
CREATE ROLE regress_scan;
GRANT EXECUTE ON FUNCTION idempotency_replay TO regress_scan;
SET ROLE regress_scan;
PREPARE answer AS SELECT outcome FROM idempotency_replay('acme', 'pay', 'a');
EXECUTE answer;
SELECT outcome FROM idempotency_begin('acme', 'pay', 'a');
RESET ROLE;
REVOKE EXECUTE ON FUNCTION idempotency_replay FROM regress_scan;
SET ROLE regress_scan;
EXECUTE answer;
RESET ROLE;
DROP ROLE regress_scan;
-- calls are counted
BEGIN;
SET LOCAL track_functions = 'all';
SELECT outcome FROM idempotency_replay('acme', 'pay', 'a');
SELECT calls FROM pg_stat_xact_user_functions WHERE funcname = 'idempotency_replay';
ROLLBACK;

-- a strict function is not called with a null
PREPARE strict(text) AS SELECT outcome, status_code FROM idempotency_replay('acme', 'pay', 'a', '{"amount": 1}', $1, '\x00');
BEGIN;
ALTER FUNCTION idempotency_replay STRICT;
EXECUTE strict(NULL);
ROLLBACK;
DEALLOCATE strict;

-- a plan does not outlive its function
BEGIN;
EXECUTE answer;
ALTER FUNCTION idempotency_replay SECURITY DEFINER SET enable_material = off;
EXECUTE answer;
CREATE OR REPLACE FUNCTION idempotency_replay(tenant text, action text, key text, request jsonb DEFAULT NULL,
    actor text DEFAULT NULL, request_hash bytea DEFAULT NULL) RETURNS idempotency_result
LANGUAGE plpgsql AS $$
DECLARE
    answer idempotency_result;
BEGIN
    answer.outcome := key || ' of mine';
    RETURN answer;
END $$;
EXECUTE answer;
SELECT * FROM scans('EXECUTE answer');
ALTER FUNCTION idempotency_replay SUPPORT idempotency_support;
EXECUTE answer;
ROLLBACK;
EXECUTE answer;
BEGIN;
ALTER TYPE idempotency_result ADD ATTRIBUTE more int;
SELECT * FROM scans($$SELECT outcome FROM idempotency_replay('acme', 'pay', 'a')$$);
SELECT outcome FROM idempotency_replay('acme', 'pay', 'a');
ROLLBACK;

-- a view has what was written
CREATE VIEW answer AS SELECT r.status_code FROM idempotency_replay('acme', 'pay', 'a') AS r;
SELECT * FROM scans($$SELECT * FROM answer$$);
SELECT * FROM answer;

DROP VIEW answer;
DROP TABLE ask, large;
DROP FUNCTION scans, pay, outcome_of;
DROP EXTENSION idempotency;
\set VERBOSITY sqlstate
EXECUTE answer;
\set VERBOSITY default
CREATE EXTENSION idempotency;
EXECUTE answer;
DROP EXTENSION idempotency;
