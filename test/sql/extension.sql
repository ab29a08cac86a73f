--
-- Creating, using and dropping the extension
--
\set SHOW_CONTEXT never

-- needs a schema that is there, and no objects in the way
CREATE EXTENSION idempotency SCHEMA no_such_schema;
\echo :SQLSTATE
CREATE TABLE idempotency_key (mine int);
CREATE EXTENSION idempotency;
\echo :SQLSTATE
DROP TABLE idempotency_key;
SELECT count(*) FROM pg_extension WHERE extname = 'idempotency';
-- an object of somebody else is never taken over
CREATE FUNCTION idempotency_request_hash(request jsonb) RETURNS bytea LANGUAGE sql AS 'SELECT NULL::bytea';
CREATE EXTENSION idempotency;
\echo :SQLSTATE
DROP FUNCTION idempotency_request_hash;

-- a schema with a strange name, which is not in the search_path
CREATE SCHEMA "we ird";
CREATE EXTENSION idempotency SCHEMA "we ird";
SELECT extname, extversion, extrelocatable, nspname
FROM pg_extension JOIN pg_namespace n ON n.oid = extnamespace WHERE extname = 'idempotency';
BEGIN;
SELECT outcome FROM "we ird".idempotency_begin('t', 'a', 'k');
SELECT "we ird".idempotency_finish('t', 'a', 'k', 200, '"weird"');
COMMIT;
SELECT outcome, response FROM "we ird".idempotency_begin('t', 'a', 'k');
SELECT count(*) FROM "we ird".idempotency_key;
SELECT count(*) FROM "we ird".idempotency_in_flight;
CALL "we ird".idempotency_sweep();
-- its schema can be renamed, but the extension cannot be moved
ALTER SCHEMA "we ird" RENAME TO "weirder;";
SELECT outcome, response FROM "weirder;".idempotency_begin('t', 'a', 'k');
ALTER EXTENSION idempotency SET SCHEMA public;
\echo :SQLSTATE
-- no object of it can be taken away alone
DROP TABLE "weirder;".idempotency_key;
\echo :SQLSTATE
DROP TYPE "weirder;".idempotency_result;
DROP SCHEMA "weirder;";
\echo :SQLSTATE

-- the records are data that is dumped, all of them
SELECT c.oid::regclass AS dumped, condition
FROM pg_extension e, unnest(e.extconfig, e.extcondition) AS c (oid, condition)
WHERE extname = 'idempotency';

-- dropped, in a session that used it, and created elsewhere
DROP EXTENSION idempotency;
DROP SCHEMA "weirder;";
CREATE EXTENSION idempotency;
SELECT idempotency_replay('t', 'a', 'k') IS NULL AS nothing;
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k');
SELECT idempotency_finish('t', 'a', 'k', 200, '"in public"');
COMMIT;
SELECT outcome, response FROM idempotency_begin('t', 'a', 'k');

-- dropped and created in one transaction, and used in it
PREPARE replay AS SELECT outcome, response FROM idempotency_replay('t', 'a', 'k');
EXECUTE replay;
CREATE SCHEMA idem;
BEGIN;
SELECT outcome FROM idempotency_try_begin('t', 'a', 'k');
DROP EXTENSION idempotency;
CREATE EXTENSION idempotency SCHEMA idem;
SET LOCAL search_path = idem;
SELECT outcome FROM idempotency_begin('t', 'a', 'k');
SELECT idempotency_finish('t', 'a', 'k', 200, '"in idem"');
SELECT outcome, response FROM idempotency_begin('t', 'a', 'k');
COMMIT;
SELECT outcome, response FROM idem.idempotency_begin('t', 'a', 'k');
-- a statement that was prepared before finds it where it is now
SET search_path = idem;
EXECUTE replay;
RESET search_path;
DEALLOCATE replay;
-- rolled back, it is all as before
BEGIN;
DROP EXTENSION idempotency;
CREATE EXTENSION idempotency;
SELECT outcome FROM idempotency_begin('t', 'a', 'k');
SELECT idempotency_finish('t', 'a', 'k', 200, '"rolled back"');
SELECT outcome, response FROM idempotency_begin('t', 'a', 'k');
ROLLBACK;
SELECT outcome, response FROM idem.idempotency_begin('t', 'a', 'k');
BEGIN;
SAVEPOINT s;
DROP EXTENSION idempotency;
ROLLBACK TO s;
SELECT outcome, response FROM idem.idempotency_begin('t', 'a', 'k');
COMMIT;
DROP EXTENSION idempotency;
DROP SCHEMA idem;

-- created and used in one transaction, in a session that never saw it
\c -
BEGIN;
CREATE EXTENSION idempotency;
SELECT outcome FROM idempotency_begin('t', 'a', 'k');
SELECT idempotency_finish('t', 'a', 'k', 200, '"first"');
SELECT outcome, response FROM idempotency_begin('t', 'a', 'k');
SELECT outcome, response FROM idempotency_replay('t', 'a', 'k');
COMMIT;
SELECT outcome, response FROM idempotency_begin('t', 'a', 'k');

-- dropped under a claim: its transaction cannot commit
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k2');
DROP EXTENSION idempotency;
COMMIT;
\echo :SQLSTATE
SELECT outcome, response FROM idempotency_begin('t', 'a', 'k');
-- dropped after its answer was stored: that is nobody's any more
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k2');
SELECT idempotency_finish('t', 'a', 'k2');
DROP EXTENSION idempotency;
COMMIT;
\set VERBOSITY sqlstate
SELECT idempotency_replay('t', 'a', 'k');
\set VERBOSITY default
-- nothing is left of it
SELECT count(*) FROM pg_depend d JOIN pg_proc p ON p.oid = d.objid
WHERE d.classid = 'pg_proc'::regclass AND p.proname LIKE 'idempotency%';
SELECT relname FROM pg_class WHERE relname LIKE 'idempotency%';
SELECT typname FROM pg_type WHERE typname LIKE '%idempotency%';

-- settings are there without the extension, where the library is preloaded
SHOW idempotency.ttl;
