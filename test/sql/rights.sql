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
SELECT idempotency_request_hash('{}');
CALL idempotency_sweep();
SELECT * FROM idempotency_in_flight;
SELECT * FROM idempotency_in_flight();
SELECT * FROM idempotency_tracking();
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
-- what was not granted stays closed
CALL idempotency_sweep();
SELECT * FROM idempotency_in_flight;
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
-- A member of pg_monitor sees what is in flight, and not the records
--
GRANT pg_monitor TO regress_idempotency_monitor;
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k5', actor => 'user 1');
SET LOCAL ROLE regress_idempotency_monitor;
SELECT pid = pg_backend_pid() AS mine, tenant, actor, action, key, attempt,
       started_at <= clock_timestamp() AS started, lease_expires_at
FROM idempotency_in_flight;
SELECT capacity > 0 AS capacity, used > 0 AS used, untracked >= 0 AS untracked
FROM idempotency_tracking();
SELECT count(*) FROM idempotency_key;
ROLLBACK;
SET ROLE regress_idempotency_monitor;
SELECT idempotency_begin('t', 'a', 'k');
SELECT idempotency_replay('t', 'a', 'k');
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
