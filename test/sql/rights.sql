--
-- Rights: none for anybody, until the administrator hands them out
--
CREATE SCHEMA idem;
CREATE EXTENSION idempotency SCHEMA idem;
CREATE ROLE regress_idempotency_app;
CREATE ROLE regress_idempotency_monitor;
GRANT USAGE ON SCHEMA idem TO regress_idempotency_app, regress_idempotency_monitor;
SET search_path = idem;

CREATE VIEW public.member AS
    SELECT classid, objid, pg_describe_object(classid, objid, 0) AS object
    FROM pg_depend
    WHERE refclassid = 'pg_extension'::regclass AND deptype = 'e'
      AND refobjid = (SELECT oid FROM pg_extension WHERE extname = 'idempotency');

-- every function, relation and type of the extension
SELECT count(*) AS functions,
       count(*) FILTER (WHERE has_function_privilege('regress_idempotency_app', objid, 'EXECUTE')) AS may_execute,
       count(*) FILTER (WHERE has_function_privilege('public', objid, 'EXECUTE')) AS anybody_may
FROM public.member WHERE classid = 'pg_proc'::regclass;
SELECT count(*) AS relations,
       count(*) FILTER (WHERE has_table_privilege('regress_idempotency_app', objid, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER')) AS may_use,
       count(*) FILTER (WHERE has_table_privilege('public', objid, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER')) AS anybody_may
FROM public.member JOIN pg_class c ON c.oid = objid
WHERE classid = 'pg_class'::regclass AND relkind IN ('r', 'v');
-- nothing runs with the rights of its owner
SELECT object FROM public.member JOIN pg_proc p ON p.oid = objid
WHERE classid = 'pg_proc'::regclass AND (prosecdef OR proconfig IS NOT NULL);

SET ROLE regress_idempotency_app;
SELECT idempotency_begin('t', 'a', 'k');
\echo :SQLSTATE
SELECT idempotency_try_begin('t', 'a', 'k');
SELECT idempotency_finish('t', 'a', 'k');
SELECT idempotency_replay('t', 'a', 'k');
SELECT idempotency_release('t', 'a', 'k');
SELECT idempotency_checkpoint('t', 'a', 'k', NULL, 'p');
SELECT idempotency_run('t', 'a', 'k', '{}', 'jsonb_typeof(jsonb)');
SELECT idempotency_try_run('t', 'a', 'k', '{}', 'jsonb_typeof(jsonb)');
SELECT idempotency_store('t', 'a', 'k', '{}', 404);
SELECT idempotency_forget('t', 'a', 'k');
SELECT idempotency_first_seen('t', 'a', '{k}');
SELECT idempotency_request_hash('{}');
SELECT idempotency_event_key('a', 'b', 1);
CALL idempotency_sweep();
SELECT idempotency_schedule();
SELECT idempotency_unschedule();
SELECT * FROM idempotency_in_flight;
SELECT * FROM idempotency_in_flight();
SELECT * FROM idempotency_stalled;
SELECT * FROM idempotency_tracking();
SELECT * FROM idempotency_worker_status();
SELECT * FROM idempotency_key;
RESET ROLE;

--
-- An application: EXECUTE on the calls that it makes, and no right on the table
--
GRANT EXECUTE ON FUNCTION idempotency_begin, idempotency_try_begin, idempotency_finish,
    idempotency_replay, idempotency_release TO regress_idempotency_app;
SET ROLE regress_idempotency_app;
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k', '{"a": 1}');
SELECT idempotency_finish('t', 'a', 'k', 200, '"stored"');
SELECT (idempotency_try_begin('t', 'a', 'k2')).outcome;
SELECT idempotency_release('t', 'a', 'k2');
COMMIT;
SELECT outcome, response FROM idempotency_begin('t', 'a', 'k', '{"a": 1}');
SELECT outcome, response FROM idempotency_replay('t', 'a', 'k');
SELECT outcome FROM idempotency_try_begin('t', 'a', 'k', '{"a": 2}');
-- what was not granted stays closed
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'leased', lease => '1 h', claim => '00000000-0000-0000-0000-000000000001');
SELECT idempotency_checkpoint('t', 'a', 'leased', '00000000-0000-0000-0000-000000000001', 'p');
\echo :SQLSTATE
SELECT idempotency_store('t', 'a', 'k', '{"a": 1}', 404);
\echo :SQLSTATE
SELECT idempotency_forget('t', 'a', 'k');
\echo :SQLSTATE
SELECT idempotency_run('t', 'a', 'k', '{"a": 1}', 'jsonb_typeof(jsonb)');
\echo :SQLSTATE
SELECT idempotency_first_seen('t', 'a', '{k}');
\echo :SQLSTATE
RESET ROLE;
GRANT EXECUTE ON FUNCTION idempotency_checkpoint, idempotency_run, idempotency_try_run, idempotency_store,
    idempotency_first_seen TO regress_idempotency_app;
SET ROLE regress_idempotency_app;
-- a leased claim, from its begin to its end
SELECT idempotency_checkpoint('t', 'a', 'leased', '00000000-0000-0000-0000-000000000001', 'charged', '{"charge": "ch_1"}', '1 ms') IS NOT NULL AS renewed;
SELECT pg_sleep(0.01);
SELECT outcome, attempt, recovery_point, recovery_state
FROM idempotency_begin('t', 'a', 'leased', lease => '1 h', claim => '00000000-0000-0000-0000-000000000002');
SELECT outcome FROM idempotency_try_begin('t', 'a', 'leased', lease => '1 h');
SELECT outcome FROM idempotency_replay('t', 'a', 'leased');
SELECT idempotency_release('t', 'a', 'leased', claim => '00000000-0000-0000-0000-000000000001');
\echo :SQLSTATE
SELECT idempotency_release('t', 'a', 'leased', claim => '00000000-0000-0000-0000-000000000002');
SELECT outcome, attempt, recovery_point
FROM idempotency_try_begin('t', 'a', 'leased', lease => '1 h', claim => '00000000-0000-0000-0000-000000000003');
SELECT idempotency_finish('t', 'a', 'leased', 200, '"done"', claim => '00000000-0000-0000-0000-000000000003');
SELECT idempotency_finish('t', 'a', 'leased', 200, '"done"', claim => '00000000-0000-0000-0000-000000000003');
SELECT outcome, response FROM idempotency_begin('t', 'a', 'leased', lease => '1 h');
-- an answer that is known already
SELECT outcome FROM idempotency_store('t', 'a', 'known', '{"a": 1}', 404);
SELECT outcome FROM idempotency_try_begin('t', 'a', 'known', '{"a": 1}');
-- taken over by a transaction claim
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'leased2', lease => '1 ms');
SELECT pg_sleep(0.01);
BEGIN;
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'leased2');
SELECT idempotency_finish('t', 'a', 'leased2', 402);
COMMIT;
-- run, with a handler of its own, and nothing else of the extension
CREATE FUNCTION pg_temp.handler(request jsonb) RETURNS json LANGUAGE sql AS $$ SELECT to_json(current_user) $$;
SELECT outcome, response FROM idempotency_run('t', 'a', 'run', '{"a": 1}', 'pg_temp.handler(jsonb)');
SELECT outcome, response FROM idempotency_run('t', 'a', 'run', '{"a": 1}', 'pg_temp.handler(jsonb)');
SELECT outcome, response FROM idempotency_try_run('t', 'a', 'run', '{"a": 2}', 'pg_temp.handler(jsonb)');
CREATE FUNCTION pg_temp.snoop(request jsonb) RETURNS json LANGUAGE plpgsql AS $$ BEGIN RETURN (SELECT to_json(k) FROM idempotency_key k LIMIT 1); END $$;
\set SHOW_CONTEXT never
SELECT outcome, response FROM idempotency_run('t', 'a', 'snoop', '{"a": 1}', 'pg_temp.snoop(jsonb)');
\echo :SQLSTATE
\set SHOW_CONTEXT errors
DROP FUNCTION pg_temp.snoop, pg_temp.handler;
-- first_seen, also of what is there and of what counts as absent
SELECT * FROM idempotency_first_seen('t', 'a', '{m1,k,m2,leased,m1}');
RESET ROLE;
UPDATE idempotency_key SET expires_at = created_at WHERE key IN ('m1', 'leased');
SET ROLE regress_idempotency_app;
SELECT * FROM idempotency_first_seen('t', 'a', '{m1,k,m2,leased,m1}');
-- an expired record is replaced by a leased claim
RESET ROLE;
UPDATE idempotency_key SET expires_at = created_at WHERE key = 'm1';
SET ROLE regress_idempotency_app;
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'm1', lease => '1 h');
RESET ROLE;
DELETE FROM idempotency_key WHERE key <> 'k';
SET ROLE regress_idempotency_app;
-- the table stays closed, also the keys of it
SELECT key FROM idempotency_key;
\echo :SQLSTATE
INSERT INTO idempotency_key (tenant, action, key, actor, state, attempt, created_at, expires_at)
VALUES ('t', 'a', 'forged', '', 'completed', 1, now(), now() + interval '1 h');
UPDATE idempotency_key SET response = '"forged"';
DELETE FROM idempotency_key;
TRUNCATE idempotency_key;
BEGIN;
LOCK idempotency_key;
ROLLBACK;
CREATE TRIGGER t AFTER INSERT ON idempotency_key EXECUTE FUNCTION suppress_redundant_updates_trigger();
CREATE INDEX ON idempotency_key (state);
ALTER TABLE idempotency_key ADD COLUMN x int;
DROP EXTENSION idempotency;
-- and so does the rest
CALL idempotency_sweep();
SELECT * FROM idempotency_in_flight;
SELECT * FROM idempotency_stalled;
SELECT idempotency_event_key('a', 'b', 1);
SELECT idempotency_forget('t', 'a', 'k');
RESET ROLE;

-- support may forget a request, also without a right on the table
GRANT EXECUTE ON FUNCTION idempotency_forget TO regress_idempotency_app;
SET ROLE regress_idempotency_app;
SELECT outcome FROM idempotency_store('t', 'a', 'forgotten', '{"a": 1}', 404);
SELECT idempotency_forget('t', 'a', 'forgotten');
SELECT outcome FROM idempotency_replay('t', 'a', 'forgotten');
RESET ROLE;

-- a role of its own may do the sweeping, also without a right on the table
GRANT EXECUTE ON PROCEDURE idempotency_sweep TO regress_idempotency_app;
UPDATE idempotency_key SET expires_at = created_at;
SET ROLE regress_idempotency_app;
CALL idempotency_sweep();
-- also when it may not read the expired record that it replaces
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k');
SELECT idempotency_finish('t', 'a', 'k');
COMMIT;
RESET ROLE;
UPDATE idempotency_key SET expires_at = created_at;
SET ROLE regress_idempotency_app;
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k');
SELECT idempotency_finish('t', 'a', 'k');
COMMIT;
RESET ROLE;
SELECT count(*) FROM idempotency_key;

-- an index that an administrator added runs its function as the caller
CREATE FUNCTION public.who(key text) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    IF current_user = 'regress_idempotency_app' THEN
        RAISE NOTICE 'index on % for %', key, current_user;
    END IF;
    RETURN key;
END $$;
CREATE INDEX who_idx ON idempotency_key (public.who(key));
SET ROLE regress_idempotency_app;
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k3');
SELECT idempotency_finish('t', 'a', 'k3');
COMMIT;
RESET ROLE;
DROP INDEX who_idx;
DROP FUNCTION public.who;
-- an error of a constraint does not show a row that the caller may not read
ALTER TABLE idempotency_key ADD CONSTRAINT no_errors CHECK (state <> 'errored');
SET ROLE regress_idempotency_app;
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k4');
SELECT idempotency_finish('t', 'a', 'k4', 404);
\echo :SQLSTATE
ROLLBACK;
RESET ROLE;
ALTER TABLE idempotency_key DROP CONSTRAINT no_errors;

--
-- A member of pg_monitor sees what is in flight and what is stalled, and not the
-- records
--
GRANT pg_monitor TO regress_idempotency_monitor;
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'leased', lease => '1 h');
SELECT outcome, attempt
FROM idempotency_begin('t', 'a', 'stalled', '{"a": 1}', 'user 1', lease => '1 h', claim => '00000000-0000-0000-0000-000000000001');
SELECT idempotency_checkpoint('t', 'a', 'stalled', '00000000-0000-0000-0000-000000000001', 'charged', '{"charge": "ch_1"}', '1 ms', 'user 1') IS NOT NULL AS renewed;
SELECT pg_sleep(0.01);
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k5', actor => 'user 1');
SET LOCAL ROLE regress_idempotency_monitor;
SELECT pid = pg_backend_pid() AS mine, tenant, actor, action, key, attempt,
       started_at <= clock_timestamp() AS started, lease_expires_at > clock_timestamp() AS lease
FROM idempotency_in_flight ORDER BY key;
SELECT tenant, actor, action, key, attempt, recovery_point,
       started_at < lease_expires_at AS started, lease_expires_at <= clock_timestamp() AS lease_is_over
FROM idempotency_stalled;
SELECT capacity > 0 AS capacity, used > 0 AS used, untracked >= 0 AS untracked
FROM idempotency_tracking();
SELECT state FROM idempotency_worker_status();
SELECT started > 0 AS started, held, run_time_p50 = idempotency_percentile(run_time_histogram, 0.5) IS NOT FALSE AS same
FROM idempotency_stats WHERE action = 'a';
SELECT capacity > 0 AS capacity, used > 0 AS used, lost FROM idempotency_metrics_room();
SELECT sum(started) > 0 AS started, idempotency_histogram_sum(run_time_histogram) IS NOT NULL AS histogram
FROM idempotency_metric;
SELECT count(*) > 0 AS days FROM idempotency_replay_ratio;
SELECT version, preloaded, worker, pending, in_flight, stalled FROM idempotency_health;
SELECT count(*) FROM idempotency_key;
ROLLBACK;
SET ROLE regress_idempotency_monitor;
SELECT idempotency_begin('t', 'a', 'k');
SELECT idempotency_replay('t', 'a', 'k');
SELECT idempotency_checkpoint('t', 'a', 'leased', NULL, 'p');
SELECT idempotency_first_seen('t', 'a', '{k}');
SELECT idempotency_forget('t', 'a', 'k');
RESET ROLE;

-- rights that were granted go with the extension, and do not come back with it
DROP EXTENSION idempotency;
CREATE EXTENSION idempotency SCHEMA idem;
SELECT count(*) AS may_execute FROM public.member
WHERE classid = 'pg_proc'::regclass
  AND has_function_privilege('regress_idempotency_app', objid, 'EXECUTE');

RESET search_path;
DROP VIEW member;
DROP EXTENSION idempotency;
DROP SCHEMA idem;
DROP ROLE regress_idempotency_app, regress_idempotency_monitor;
