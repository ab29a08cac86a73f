--
-- A hostile search_path: objects with our names and operators of our types
--
\set SHOW_CONTEXT never

CREATE SCHEMA evil;
CREATE SCHEMA idem;
CREATE ROLE regress_idempotency_app;
GRANT USAGE ON SCHEMA evil, idem TO regress_idempotency_app;

CREATE FUNCTION evil.trap(text, text) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS
$$ BEGIN RAISE EXCEPTION 'trapped: text'; END $$;
CREATE FUNCTION evil.trap(timestamptz, timestamptz) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS
$$ BEGIN RAISE EXCEPTION 'trapped: timestamptz'; END $$;
CREATE FUNCTION evil.trap(int, int) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS
$$ BEGIN RAISE EXCEPTION 'trapped: int'; END $$;
CREATE FUNCTION evil.trap(bytea, bytea) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS
$$ BEGIN RAISE EXCEPTION 'trapped: bytea'; END $$;
DO $$
DECLARE
    operator text;
    type text;
BEGIN
    FOREACH operator IN ARRAY '{=,<>,<,<=,>,>=}'::text[] LOOP
        FOREACH type IN ARRAY '{text,timestamptz,int,bytea}'::text[] LOOP
            EXECUTE format('CREATE OPERATOR evil.%s (FUNCTION = evil.trap, LEFTARG = %s, RIGHTARG = %2$s)', operator, type);
        END LOOP;
    END LOOP;
END $$;
CREATE FUNCTION evil.clock_timestamp() RETURNS timestamptz LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'trapped: clock_timestamp'; END $$;
CREATE FUNCTION evil.sha256(bytea) RETURNS bytea LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'trapped: sha256'; END $$;
CREATE FUNCTION evil.texteq(text, text) RETURNS boolean LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'trapped: texteq'; END $$;
CREATE FUNCTION evil.idempotency_in_flight() RETURNS int LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'trapped: idempotency_in_flight'; END $$;
CREATE FUNCTION evil.idempotency_request_hash(jsonb) RETURNS bytea LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'trapped: idempotency_request_hash'; END $$;
CREATE TYPE evil.idempotency_state AS ENUM ('completed', 'evil');
CREATE TYPE evil.idempotency_result AS (evil int);
CREATE TYPE evil.idempotency_response AS (status_code int, headers pg_catalog.jsonb, response json, body bytea, ttl interval);
CREATE FUNCTION evil.gen_random_uuid() RETURNS uuid LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'trapped: gen_random_uuid'; END $$;
CREATE FUNCTION evil.sha1(bytea) RETURNS bytea LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'trapped: sha1'; END $$;
CREATE VIEW evil.idempotency_stalled AS SELECT 'evil' AS key;
CREATE TABLE evil.idempotency_key (tenant text PRIMARY KEY, evil int);
CREATE DOMAIN evil.timestamptz AS int;
CREATE DOMAIN evil.jsonb AS int;
CREATE DOMAIN evil.uuid AS int;
GRANT ALL ON ALL TABLES IN SCHEMA evil TO PUBLIC;

-- the traps work
SET search_path = evil, pg_catalog, idem;
SELECT 'a'::text = 'a'::text;
SELECT 1 < 2;

-- the extension is made of what it means, also when it is created like this
CREATE EXTENSION idempotency SCHEMA idem;
RESET search_path;
SELECT pg_describe_object(classid, objid, objsubid) AS object,
       pg_describe_object(refclassid, refobjid, refobjsubid) AS depends_on
FROM pg_depend d
WHERE pg_describe_object(d.refclassid, d.refobjid, d.refobjsubid) LIKE '%evil%'
  AND pg_describe_object(classid, objid, objsubid) LIKE '%idem.%';
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA idem TO regress_idempotency_app;
GRANT EXECUTE ON ALL PROCEDURES IN SCHEMA idem TO regress_idempotency_app;
GRANT SELECT ON idem.idempotency_in_flight, idem.idempotency_stalled TO regress_idempotency_app;
CREATE FUNCTION idem.handler(pg_catalog.jsonb) RETURNS idem.idempotency_response LANGUAGE sql AS
$$ SELECT 201, '{"h": "1"}'::pg_catalog.jsonb, '{"y":2}'::json, NULL::bytea, NULL::interval $$;
CREATE FUNCTION evil.handler(pg_catalog.jsonb) RETURNS evil.idempotency_response LANGUAGE sql AS
$$ SELECT 201, '{"h": "1"}'::pg_catalog.jsonb, '"evil"'::json, NULL::bytea, NULL::interval $$;

-- and does what it means, for a role without rights
SET ROLE regress_idempotency_app;
CREATE TEMP TABLE idempotency_key (tenant text PRIMARY KEY, evil int);
CREATE TYPE pg_temp.idempotency_result AS (evil int);
SET search_path = pg_temp, evil, pg_catalog, idem;
BEGIN;
SELECT outcome, attempt FROM idem.idempotency_begin('t', 'a', 'k', '{"b": 1, "a": [2, "x"]}', 'user', '10 min', '1 s');
SELECT outcome FROM idem.idempotency_try_begin('t', 'a', 'k2', request_hash => '\x00112233445566778899aabbccddeeff');
SELECT key, attempt FROM idem.idempotency_in_flight ORDER BY key;
SELECT idem.idempotency_finish('t', 'a', 'k', 201, '{"x":1}', '{"h": "1"}', 'user');
SELECT idem.idempotency_finish('t', 'a', 'k2', 404, body => '\x00ff');
SELECT outcome, response FROM idem.idempotency_begin('t', 'a', 'k', '{"a": [2, "x"], "b": 1.0}', 'user');
COMMIT;
SELECT outcome, status_code, response, headers FROM idem.idempotency_begin('t', 'a', 'k', '{"a": [2, "x"], "b": 1.0}', 'user');
SELECT outcome, status_code, body FROM idem.idempotency_replay('t', 'a', 'k2', request_hash => '\x00112233445566778899aabbccddeeff');
SELECT outcome FROM idem.idempotency_try_begin('t', 'a', 'k', '{}', 'user');
BEGIN;
SELECT outcome FROM idem.idempotency_begin('t', 'a', 'k3');
SELECT idem.idempotency_release('t', 'a', 'k3');
COMMIT;
SELECT pg_catalog.octet_length(idem.idempotency_request_hash('{"z": 1, "a": "b"}'));
SELECT idem.idempotency_event_key('order.paid', '42', 1);
-- a leased claim
SELECT outcome, attempt FROM idem.idempotency_begin('t', 'a', 'k4', '{"a": 1}', lease => '1 h', claim => '00000000-0000-0000-0000-000000000001');
SELECT key, attempt FROM idem.idempotency_in_flight;
SELECT idem.idempotency_checkpoint('t', 'a', 'k4', '00000000-0000-0000-0000-000000000001', 'charged', '{"c": 1}', '1 ms') IS NOT NULL AS renewed;
SELECT pg_sleep(0.01);
SELECT key, attempt, recovery_point FROM idem.idempotency_stalled;
SELECT outcome, attempt, recovery_point, recovery_state FROM idem.idempotency_begin('t', 'a', 'k4', '{"a": 1}', lease => '1 h', claim => '00000000-0000-0000-0000-000000000002');
SELECT outcome, attempt, recovery_point FROM idem.idempotency_replay('t', 'a', 'k4', '{"a": 1}');
SELECT idem.idempotency_finish('t', 'a', 'k4', 200, '{"x":1}', claim => '00000000-0000-0000-0000-000000000001');
\echo :SQLSTATE
SELECT idem.idempotency_finish('t', 'a', 'k4', 200, '{"x":1}', claim => '00000000-0000-0000-0000-000000000002');
SELECT idem.idempotency_finish('t', 'a', 'k4', 200, '{"x":1}', claim => '00000000-0000-0000-0000-000000000002');
SELECT outcome, attempt FROM idem.idempotency_begin('t', 'a', 'k5', lease => '1 h', claim => '00000000-0000-0000-0000-000000000003');
SELECT idem.idempotency_release('t', 'a', 'k5', claim => '00000000-0000-0000-0000-000000000003');
-- one whose id is made up by begin
SELECT outcome, attempt, claim IS NOT NULL AS claim FROM idem.idempotency_begin('t', 'a', 'k10', lease => '1 h');
-- run, with a handler that is meant, and one that is not
SELECT outcome, status_code, response, headers FROM idem.idempotency_run('t', 'a', 'k6', '{"a": 1}', 'idem.handler(pg_catalog.jsonb)');
SELECT outcome, status_code, response, headers FROM idem.idempotency_run('t', 'a', 'k6', '{"a": 1}', 'idem.handler(pg_catalog.jsonb)');
SELECT idem.idempotency_run('t', 'a', 'k7', '{"a": 1}', 'handler(pg_catalog.jsonb)');
\echo :SQLSTATE
-- first_seen
SELECT * FROM idem.idempotency_first_seen('t', 'a', '{m2,k4,m1,k5,m2}');
-- store and forget
SELECT outcome, status_code FROM idem.idempotency_store('t', 'a', 'k11', '{"a": 1}', 404);
SELECT outcome, status_code FROM idem.idempotency_store('t', 'a', 'k11', '{"a": 1.0}', 402);
SELECT idem.idempotency_forget('t', 'a', 'k11');
CALL idem.idempotency_sweep();
-- a search_path with nothing in it
SET search_path = '';
SELECT outcome, status_code FROM idem.idempotency_begin('t', 'a', 'k', '{"a": [2, "x"], "b": 1.0}', 'user');
SELECT outcome, attempt FROM idem.idempotency_begin('t', 'a', 'k8', lease => '1 h', claim => '00000000-0000-0000-0000-000000000004');
SELECT idem.idempotency_checkpoint('t', 'a', 'k8', '00000000-0000-0000-0000-000000000004', 'charged') IS NOT NULL AS renewed;
SELECT outcome FROM idem.idempotency_run('t', 'a', 'k9', '{}', 'idem.handler(jsonb)');
SELECT * FROM idem.idempotency_first_seen('t', 'a', '{m1,m3}');
SELECT idem.idempotency_event_key('order.paid', '42', 1);
RESET ROLE;
RESET search_path;

-- it was all written where it belongs
SELECT tenant, action, key, actor, state, status_code FROM idem.idempotency_key ORDER BY key;
SELECT count(*) FROM evil.idempotency_key;
UPDATE idem.idempotency_key SET expires_at = created_at;
SET ROLE regress_idempotency_app;
SET search_path = pg_temp, evil, pg_catalog, idem;
BEGIN;
SELECT outcome FROM idem.idempotency_begin('t', 'a', 'k', '{"a": 3}', 'user');
SELECT idem.idempotency_finish('t', 'a', 'k', actor => 'user');
COMMIT;
CALL idem.idempotency_sweep();
RESET ROLE;
RESET search_path;
SELECT key FROM idem.idempotency_key;

-- the temporary ones would go some time after the connection
DISCARD TEMP;
\c -
SET client_min_messages = warning;
DROP FUNCTION idem.handler;
DROP EXTENSION idempotency;
DROP SCHEMA evil CASCADE;
DROP SCHEMA idem;
DROP ROLE regress_idempotency_app;
