--
-- A role that the administrator pinned to one tenant
--
CREATE EXTENSION idempotency;
CREATE ROLE regress_idempotency_pinned LOGIN;
GRANT EXECUTE ON FUNCTION idempotency_begin, idempotency_try_begin, idempotency_finish,
    idempotency_replay, idempotency_release, idempotency_checkpoint, idempotency_run,
    idempotency_try_run, idempotency_store, idempotency_forget, idempotency_first_seen TO regress_idempotency_pinned;
ALTER ROLE regress_idempotency_pinned SET idempotency.tenant = 'acme';

-- an answer of another tenant, and one of none
BEGIN;
SELECT outcome FROM idempotency_begin('other', 'a', 'k');
SELECT idempotency_finish('other', 'a', 'k', 200, '"of another tenant"');
SELECT outcome FROM idempotency_begin(NULL, 'a', 'k');
SELECT idempotency_finish(NULL, 'a', 'k', 200, '"of no tenant"');
SELECT outcome FROM idempotency_begin('other', 'a', 'leased', lease => '1 h', claim => '00000000-0000-0000-0000-000000000001');
COMMIT;

SELECT current_user AS administrator \gset
\c - regress_idempotency_pinned
SHOW idempotency.tenant;
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'a', 'k');
SELECT idempotency_finish('acme', 'a', 'k', 200, '"own"');
COMMIT;
SELECT outcome, response FROM idempotency_begin('acme', 'a', 'k');

-- no call reaches another tenant
SELECT idempotency_begin('other', 'a', 'k');
\echo :SQLSTATE
SELECT idempotency_try_begin('other', 'a', 'k');
\echo :SQLSTATE
SELECT idempotency_finish('other', 'a', 'k');
\echo :SQLSTATE
SELECT idempotency_replay('other', 'a', 'k');
\echo :SQLSTATE
SELECT idempotency_release('other', 'a', 'k');
\echo :SQLSTATE
SELECT idempotency_begin('other', 'a', 'k2', lease => '1 h');
\echo :SQLSTATE
SELECT idempotency_begin('other', 'a', 'leased', lease => '1 h', claim => '00000000-0000-0000-0000-000000000001');
\echo :SQLSTATE
SELECT idempotency_checkpoint('other', 'a', 'leased', '00000000-0000-0000-0000-000000000001', 'p');
\echo :SQLSTATE
SELECT idempotency_finish('other', 'a', 'leased', claim => '00000000-0000-0000-0000-000000000001');
\echo :SQLSTATE
SELECT idempotency_release('other', 'a', 'leased', claim => '00000000-0000-0000-0000-000000000001');
\echo :SQLSTATE
SELECT idempotency_run('other', 'a', 'k', '{}', 'echo(jsonb)');
\echo :SQLSTATE
SELECT idempotency_try_run('other', 'a', 'k', '{}', 'echo(jsonb)');
\echo :SQLSTATE
SELECT idempotency_store('other', 'a', 'k', '{}', 404);
\echo :SQLSTATE
SELECT idempotency_forget('other', 'a', 'k');
\echo :SQLSTATE
SELECT idempotency_first_seen('other', 'a', '{k}');
\echo :SQLSTATE
-- what it reaches is its own
SELECT outcome, attempt FROM idempotency_begin('acme', 'a', 'leased', lease => '1 h', claim => '00000000-0000-0000-0000-000000000002');
SELECT idempotency_checkpoint('acme', 'a', 'leased', '00000000-0000-0000-0000-000000000002', 'p') IS NOT NULL AS renewed;
SELECT idempotency_finish('acme', 'a', 'leased', claim => '00000000-0000-0000-0000-000000000002');
SELECT outcome FROM idempotency_run('acme', 'a', 'run', '{}', 'echo(jsonb)');
SELECT outcome FROM idempotency_try_run('acme', 'a', 'run', '{}', 'echo(jsonb)');
SELECT outcome FROM idempotency_store('acme', 'a', 'known', '{}', 404);
SELECT idempotency_forget('acme', 'a', 'known');
SELECT * FROM idempotency_first_seen('acme', 'a', '{k,m1}');
-- it reaches neither the global tenant nor one with a name that is nearly the same
SELECT idempotency_begin(NULL, 'a', 'k');
\echo :SQLSTATE
SELECT idempotency_begin('', 'a', 'k');
\echo :SQLSTATE
SELECT idempotency_begin('acm', 'a', 'k');
\echo :SQLSTATE
SELECT idempotency_begin('acme2', 'a', 'k');
\echo :SQLSTATE
SELECT idempotency_begin('ACME', 'a', 'k');
\echo :SQLSTATE

-- the role cannot pull the pin
SET idempotency.tenant = 'other';
\echo :SQLSTATE
SET SESSION idempotency.tenant = '';
\echo :SQLSTATE
SELECT set_config('idempotency.tenant', 'other', false);
\echo :SQLSTATE
RESET idempotency.tenant;
\echo :SQLSTATE
ALTER ROLE regress_idempotency_pinned SET idempotency.tenant = 'other';
\echo :SQLSTATE
ALTER ROLE regress_idempotency_pinned RESET idempotency.tenant;
\echo :SQLSTATE
UPDATE pg_settings SET setting = 'other' WHERE name = 'idempotency.tenant';
\echo :SQLSTATE
CREATE FUNCTION pg_temp.unpinned() RETURNS text LANGUAGE sql SET idempotency.tenant = 'other' AS
$$ SELECT response::text FROM idempotency_replay('other', 'a', 'k') $$;
\echo :SQLSTATE
-- these are allowed, and change nothing
ALTER ROLE regress_idempotency_pinned RESET ALL;
RESET ALL;
DISCARD ALL;
SHOW idempotency.tenant;
SELECT idempotency_replay('other', 'a', 'k');
\echo :SQLSTATE
\c - regress_idempotency_pinned
SHOW idempotency.tenant;
SELECT idempotency_replay('other', 'a', 'k');
\echo :SQLSTATE

-- the administrator is not pinned, and can pin a session
\c - :administrator
SELECT outcome, response FROM idempotency_replay('other', 'a', 'k');
SET idempotency.tenant = 'other';
SELECT outcome, response FROM idempotency_replay('other', 'a', 'k');
SELECT idempotency_replay('acme', 'a', 'k');
\echo :SQLSTATE
-- a pin is compared as it is
SET idempotency.tenant = '%';
SELECT idempotency_replay('other', 'a', 'k');
\echo :SQLSTATE
RESET idempotency.tenant;

-- nothing of another tenant was changed
SELECT tenant, key, state, attempt, recovery_point FROM idempotency_key WHERE tenant <> 'acme' ORDER BY tenant, key;

DROP EXTENSION idempotency;
DROP ROLE regress_idempotency_pinned;
