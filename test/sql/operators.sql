--
-- Views do what their script says, whatever else is in the schema of the extension
--
-- An operator or function there that fits the arguments better than the server's
-- would be taken for it, and run with the rights of everybody who reads the view.
-- So whoever may create objects in that schema plants all of them that could fit,
-- and the extension is created there after that.
--
\set SHOW_CONTEXT never
CREATE SCHEMA idem;
CREATE ROLE regress_planter;
GRANT CREATE, USAGE ON SCHEMA idem TO regress_planter;

CREATE FUNCTION view_names() RETURNS SETOF regclass LANGUAGE sql SET search_path = pg_catalog AS $$
    SELECT oid::regclass FROM pg_class
    WHERE relnamespace = 'idem'::regnamespace AND relkind = 'v' ORDER BY relname
$$;

--
-- What the views are made of, where nothing is in the way
--
CREATE EXTENSION idempotency SCHEMA idem;
CREATE TABLE clean AS
SELECT v::text AS name, pg_get_viewdef(v) AS definition FROM view_names() AS v;
-- operators and functions of the server, with the types that they take
CREATE TABLE part AS
SELECT DISTINCT kind, oid FROM (
    SELECT 'operator' AS kind, m[2]::oid AS oid
    FROM pg_rewrite, regexp_matches(ev_action::text, ':(opno) (\d+)', 'g') AS m
    WHERE ev_class IN (SELECT view_names())
    UNION ALL
    SELECT 'function', m[2]::oid
    FROM pg_rewrite, regexp_matches(ev_action::text, ':(funcid|aggfnoid|winfnoid) (\d+)', 'g') AS m
    WHERE ev_class IN (SELECT view_names())) AS parts;
ALTER TABLE part ADD name text, ADD arguments oid[], ADD result oid, ADD is_aggregate boolean;
UPDATE part SET name = oprname, arguments = ARRAY[oprleft, oprright], result = oprresult, is_aggregate = false
FROM pg_operator AS o WHERE kind = 'operator' AND o.oid = part.oid AND oprnamespace = 'pg_catalog'::regnamespace;
UPDATE part SET name = proname, arguments = proargtypes::oid[], result = prorettype, is_aggregate = prokind = 'a'
FROM pg_proc AS p WHERE kind = 'function' AND p.oid = part.oid AND pronamespace = 'pg_catalog'::regnamespace;
DELETE FROM part WHERE name IS NULL;
-- all sorts of types that a value in a view has
CREATE TABLE type AS
SELECT DISTINCT m[2]::oid AS oid
FROM pg_rewrite, regexp_matches(ev_action::text, ':(vartype|consttype|opresulttype|funcresulttype|resulttype|array_typeid) (\d+)', 'g') AS m
WHERE ev_class IN (SELECT view_names());
DELETE FROM type
WHERE oid NOT IN (SELECT oid FROM pg_type WHERE typnamespace = 'pg_catalog'::regnamespace AND typtype = 'b');
DROP EXTENSION idempotency;
SELECT oid::regoperator AS operator FROM part WHERE kind = 'operator' ORDER BY oid::regoperator::text;
SELECT oid::regprocedure AS function, is_aggregate FROM part WHERE kind = 'function' ORDER BY oid::regprocedure::text;
SELECT count(*) > 10 AS types FROM type;

--
-- The traps: under each of the names, for all arguments that could be turned into
-- those that it takes, or be literals
--
CREATE FUNCTION could_be(type oid) RETURNS SETOF oid LANGUAGE sql AS $$
    SELECT could_be.type WHERE could_be.type <> '"any"'::regtype
    UNION
    SELECT castsource FROM pg_cast WHERE casttarget = could_be.type AND castcontext = 'i'
    UNION
    SELECT 'text'::regtype
    UNION
    SELECT t.oid FROM type AS t, pg_type AS p WHERE p.oid = could_be.type AND p.typtype = 'p'
$$;
CREATE TABLE trap AS
SELECT DISTINCT ON (name, a, b) kind, name, ARRAY[a, b]::oid[] AS arguments, result, is_aggregate
FROM part, could_be(arguments[1]) AS a, could_be(arguments[2]) AS b
WHERE kind = 'operator'
UNION ALL
SELECT DISTINCT ON (name, a) kind, name, ARRAY[a]::oid[], result, is_aggregate
FROM part, could_be(arguments[0]) AS a
WHERE kind = 'function' AND cardinality(arguments) = 1
UNION ALL
SELECT DISTINCT ON (name, a, b) kind, name, ARRAY[a, b]::oid[], result, is_aggregate
FROM part, could_be(arguments[0]) AS a, could_be(arguments[1]) AS b
WHERE kind = 'function' AND cardinality(arguments) = 2;
-- what the server has itself is found there first
DELETE FROM trap USING pg_operator
WHERE kind = 'operator' AND oprname = name AND oprnamespace = 'pg_catalog'::regnamespace
  AND ARRAY[oprleft, oprright] = arguments;
DELETE FROM trap USING pg_proc
WHERE kind = 'function' AND proname = name AND pronamespace = 'pg_catalog'::regnamespace
  AND proargtypes::oid[] = ('[0:' || cardinality(arguments) - 1 || ']=' || arguments::text)::oid[];
UPDATE trap SET result = 'text[]'::regtype WHERE result = 'anycompatiblearray'::regtype;
SELECT count(*) > 300 AS many FROM trap;
GRANT SELECT ON trap TO regress_planter;

SET ROLE regress_planter;
DO $$
DECLARE
    t record;
    arguments text[];
    function text;
BEGIN
    FOR t IN SELECT * FROM trap ORDER BY kind, name LOOP
        arguments := ARRAY(SELECT format_type(oid, NULL) FROM unnest(t.arguments) WITH ORDINALITY AS a (oid, n) ORDER BY n);
        function := CASE WHEN t.kind = 'operator' OR t.is_aggregate THEN 'trap ' || t.name ELSE t.name END;
        EXECUTE format('CREATE FUNCTION idem.%I(%s) RETURNS %s LANGUAGE plpgsql AS %L',
                       function,
                       array_to_string(CASE WHEN t.is_aggregate THEN ARRAY['text'] ELSE '{}' END || arguments, ', '),
                       CASE WHEN t.is_aggregate THEN 'text' ELSE t.result::regtype::text END,
                       format('BEGIN RAISE EXCEPTION %L; END',
                              'trapped: ' || t.name || '(' || array_to_string(arguments, ', ') || ')'));
        IF t.kind = 'operator' THEN
            EXECUTE format('CREATE OPERATOR idem.%s (FUNCTION = idem.%I, LEFTARG = %s, RIGHTARG = %s)',
                           t.name, function, arguments[1], arguments[2]);
        ELSIF t.is_aggregate THEN
            EXECUTE format('CREATE AGGREGATE idem.%I(%s) (SFUNC = idem.%I, STYPE = text)',
                           t.name, arguments[1], function);
        END IF;
    END LOOP;
END $$;
RESET ROLE;
-- they work, for whoever looks there too
SET search_path = idem;
SELECT 1::numeric = 1;
SELECT 1::numeric < 1::bigint;
SELECT 'a'::text || 1;
SELECT 'a'::text || 1::bigint;
SELECT 'a'::text || interval '1 s';
SELECT nullif(1::numeric, 0);
SELECT array_remove(ARRAY['a'], NULL);
SELECT 'pg_class'::regclass = 1::oid;
RESET search_path;

--
-- The extension, created there
--
CREATE EXTENSION idempotency SCHEMA idem;
-- its views are the same as where nothing was in the way
SELECT name, definition IS DISTINCT FROM pg_get_viewdef(v) AS differs
FROM clean FULL JOIN view_names() AS v ON v::text = name ORDER BY name;
-- and nothing of it depends on what is not the server's, or its own
CREATE VIEW member AS
    SELECT classid, objid FROM pg_depend
    WHERE refclassid = 'pg_extension'::regclass AND deptype = 'e'
      AND refobjid = (SELECT oid FROM pg_extension WHERE extname = 'idempotency');
CREATE FUNCTION strangers() RETURNS SETOF text LANGUAGE sql AS $$
    SELECT pg_describe_object(d.classid, d.objid, d.objsubid) || ' depends on '
           || pg_describe_object(d.refclassid, d.refobjid, d.refobjsubid)
    FROM pg_depend AS d
    WHERE ((d.classid, d.objid) IN (SELECT classid, objid FROM member)
           OR d.classid = 'pg_rewrite'::regclass AND d.objid IN (
               SELECT oid FROM pg_rewrite WHERE ev_class IN (SELECT objid FROM member))
           OR d.classid = 'pg_attrdef'::regclass AND d.objid IN (
               SELECT oid FROM pg_attrdef WHERE adrelid IN (SELECT objid FROM member)))
      AND d.refclassid IN ('pg_operator'::regclass, 'pg_proc'::regclass, 'pg_type'::regclass, 'pg_class'::regclass,
                           'pg_cast'::regclass, 'pg_collation'::regclass, 'pg_opclass'::regclass)
      AND (d.refclassid, d.refobjid) NOT IN (SELECT classid, objid FROM member)
$$;
SELECT strangers();
-- there is something to see
CREATE VIEW idem.idempotency_bad AS SELECT 1::numeric OPERATOR(idem.=) 1 AS bad;
ALTER EXTENSION idempotency ADD VIEW idem.idempotency_bad;
SELECT strangers();
ALTER EXTENSION idempotency DROP VIEW idem.idempotency_bad;
DROP VIEW idem.idempotency_bad;

--
-- Whoever reads the views gets into no trap
--
-- a claim of each kind, records that were swept too late, and requests of two days
SELECT outcome FROM idem.idempotency_begin('t', 'a', 'leased', lease => '1 h');
SELECT outcome FROM idem.idempotency_begin('t', 'a', 'stalled', lease => '1 h');
UPDATE idem.idempotency_key SET lease_expires_at = created_at WHERE key = 'stalled';
BEGIN;
SELECT outcome FROM idem.idempotency_begin('t', 'a', 'old');
SELECT idem.idempotency_finish('t', 'a', 'old');
SELECT outcome FROM idem.idempotency_begin('t', 'a', 'errored');
SELECT idem.idempotency_finish('t', 'a', 'errored', 404);
COMMIT;
UPDATE idem.idempotency_key SET expires_at = '2020-01-01' WHERE key = 'old';
INSERT INTO idem.idempotency_metric
SELECT bucket, action, 'here', started, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, '{}', '{}'
FROM (VALUES ('2026-01-01 12:00'::timestamptz, 'a', 60), ('2026-01-01 12:00', 'b', 0), ('2026-01-02 12:00', 'b', 0))
         AS v (bucket, action, started);
ALTER TABLE idem.idempotency_key REPLICA IDENTITY NOTHING;
SET client_min_messages = error;
CREATE PUBLICATION records FOR TABLE idem.idempotency_key;
RESET client_min_messages;
CREATE FUNCTION read_all(OUT name text, OUT has_rows boolean) RETURNS SETOF record LANGUAGE plpgsql AS $$
DECLARE
    v regclass;
    whole text[];
BEGIN
    FOR v IN SELECT view_names() LOOP
        EXECUTE format('SELECT array_agg(v::text) FROM %s AS v', v) INTO whole;
        name := v::text;
        has_rows := whole IS NOT NULL;
        RETURN NEXT;
    END LOOP;
END $$;
BEGIN;
SELECT outcome FROM idem.idempotency_begin('t', 'a', 'held');
SELECT * FROM read_all();
SELECT pid = pg_backend_pid() AS mine, key, lease_expires_at > now() AS leased FROM idem.idempotency_in_flight ORDER BY key;
SELECT key FROM idem.idempotency_stalled;
SELECT day, action, requests, duplicates, ratio, on_target FROM idem.idempotency_replay_ratio ORDER BY day, action NULLS FIRST;
SELECT pending, completed, errored, oldest_expired_at IS NOT NULL AS expired, in_flight, table_size > 0 AS table_size, index_size > 0 AS index_size
FROM idem.idempotency_health;
SELECT regexp_replace(warning, 'expired .* ago', 'expired ... ago') AS warning
FROM idem.idempotency_health, unnest(warnings) AS warning WHERE warning LIKE 'sweep%' OR warning LIKE 'records%' ORDER BY 1;
-- also when they come before everything else
SET LOCAL search_path = idem, pg_catalog, public;
SELECT * FROM read_all();
ROLLBACK;

DROP PUBLICATION records;
SET client_min_messages = warning;
DROP EXTENSION idempotency;
DROP SCHEMA idem CASCADE;
RESET client_min_messages;
DROP FUNCTION read_all, strangers, could_be, view_names;
DROP VIEW member;
DROP TABLE clean, part, type, trap;
DROP ROLE regress_planter;
