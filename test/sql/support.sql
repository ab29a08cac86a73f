--
-- Arguments that are left out of a plan
--
CREATE EXTENSION idempotency;
SET plan_cache_mode = force_generic_plan;

-- the last ones, when they are null constants
EXPLAIN (VERBOSE, COSTS OFF)
SELECT outcome FROM idempotency_begin('acme', 'pay', 'a');
EXPLAIN (VERBOSE, COSTS OFF)
SELECT outcome FROM idempotency_begin('acme', 'pay', 'a', '{"amount": 1}', wait => NULL);
EXPLAIN (VERBOSE, COSTS OFF)
SELECT outcome FROM idempotency_begin('acme', 'pay', 'a', lease => '1min');
EXPLAIN (VERBOSE, COSTS OFF)
SELECT outcome FROM idempotency_try_begin('acme', 'pay', 'a');
EXPLAIN (VERBOSE, COSTS OFF)
SELECT outcome FROM idempotency_replay('acme', 'pay', 'a', actor => 'me');
EXPLAIN (VERBOSE, COSTS OFF)
SELECT outcome FROM idempotency_run('acme', 'pay', 'a', '{"amount": 1}', 'to_json(anyelement)');

-- but not parameters, which may be null in one execution and not in the next
PREPARE begin_for(text, text, jsonb) AS
SELECT outcome FROM idempotency_begin('acme', 'pay', $1, $3, $2);
EXPLAIN (VERBOSE, COSTS OFF) EXECUTE begin_for('a', NULL, NULL);
BEGIN;
EXECUTE begin_for('a', NULL, NULL);
SELECT idempotency_finish('acme', 'pay', 'a');
EXECUTE begin_for('a', 'me', '{"amount": 1}');
SELECT idempotency_finish('acme', 'pay', 'a', actor => 'me');
EXECUTE begin_for('a', NULL, NULL);
COMMIT;
SELECT key, actor, request_hash IS NOT NULL AS fingerprint FROM idempotency_key ORDER BY actor;
BEGIN;
SET LOCAL plan_cache_mode = force_custom_plan;
EXECUTE begin_for('a', NULL, NULL);
EXECUTE begin_for('a', 'me', '{"amount": 1}');
EXECUTE begin_for('a', 'me', '{"amount": 2}');
ROLLBACK;

-- a view has what was written
CREATE VIEW answer AS SELECT r.status_code FROM idempotency_replay('acme', 'pay', 'a', NULL, NULL, NULL) AS r;
SELECT pg_get_viewdef('answer') LIKE '%NULL::jsonb, NULL::text, NULL::bytea%' AS all_there;
SELECT * FROM answer;

-- what must not be missing is missed
SELECT idempotency_begin(NULL, NULL, NULL);
SELECT idempotency_replay('acme', NULL, NULL);
SELECT idempotency_run('acme', 'pay', 'b', NULL, NULL);

-- also in a list of results, and in PL/pgSQL
SELECT (idempotency_replay('acme', 'pay', 'a')).outcome;
DO $$
DECLARE
    answer idempotency_result;
BEGIN
    answer := idempotency_begin('acme', 'pay', 'a');
    RAISE NOTICE '% %', answer.outcome, answer.status_code;
    answer := idempotency_try_begin('acme', 'pay', 'a', actor => 'me', request_hash => '\x00112233445566778899aabbccddeeff');
    RAISE NOTICE '%', answer.outcome;
END $$;

-- the right to call is asked for as before
CREATE ROLE regress_support;
GRANT EXECUTE ON FUNCTION idempotency_replay TO regress_support;
SET ROLE regress_support;
SELECT outcome FROM idempotency_replay('acme', 'pay', 'a');
SELECT outcome FROM idempotency_begin('acme', 'pay', 'a');
RESET ROLE;
DROP OWNED BY regress_support;
DROP ROLE regress_support;

DROP VIEW answer;
DROP EXTENSION idempotency;
