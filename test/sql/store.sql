--
-- The table, and what an administrator may do to it
--
CREATE EXTENSION idempotency;
\set SHOW_CONTEXT never

-- begins and finishes a request
CREATE FUNCTION run(key text, status int DEFAULT 200, response json DEFAULT '"answer"') RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    result idempotency_result := idempotency_begin('t', 'a', key);
BEGIN
    IF result.outcome = 'replayed' THEN
        RETURN 'replayed ' || result.response;
    END IF;
    RETURN idempotency_finish('t', 'a', key, status, response);
END $$;
SELECT run('k1');

--
-- Whatever becomes of the lock, two records for one scope cannot be: the
-- unique index decides
--
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'stolen');
INSERT INTO idempotency_key (tenant, action, key, actor, state, status_code, response, attempt, created_at, expires_at)
VALUES ('t', 'a', 'stolen', '', 'completed', 200, '"of another"', 1, now(), now() + interval '1 hour');
SAVEPOINT s;
SELECT idempotency_finish('t', 'a', 'stolen', 200, '"own"');
\echo :SQLSTATE
-- who catches the error still cannot commit the work
ROLLBACK TO s;
COMMIT;
\echo :SQLSTATE
SELECT count(*) FROM idempotency_key WHERE key = 'stolen';
-- the same where an expired record was to be replaced
INSERT INTO idempotency_key (tenant, action, key, actor, state, status_code, response, attempt, created_at, expires_at)
VALUES ('t', 'a', 'stolen', '', 'completed', 200, '"old"', 1, '2020-01-01', '2020-01-02');
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'stolen');
UPDATE idempotency_key SET expires_at = now() + interval '1 hour', response = '"of another"' WHERE key = 'stolen';
SAVEPOINT s;
SELECT idempotency_finish('t', 'a', 'stolen', 200, '"own"');
\echo :SQLSTATE
ROLLBACK TO s;
SELECT idempotency_release('t', 'a', 'stolen');
COMMIT;
SELECT run('stolen');

-- a record that is pending is held by somebody, until its lease is over
INSERT INTO idempotency_key (tenant, action, key, actor, state, attempt, lease_expires_at, created_at, expires_at, ttl)
VALUES ('t', 'a', 'pending', '', 'pending', 1, now() + interval '1 hour', now(), now() + interval '2 hours', '1 hour');
SELECT outcome, retry_after > 3540 AND retry_after <= 3600 AS rest_of_lease
FROM idempotency_try_begin('t', 'a', 'pending');
SELECT outcome, retry_after > 3540 AND retry_after <= 3600 AS rest_of_lease
FROM idempotency_try_begin('t', 'a', 'pending', '{}');
SELECT outcome, retry_after > 3540 AND retry_after <= 3600 AS rest_of_lease
FROM idempotency_replay('t', 'a', 'pending');
\set VERBOSITY terse
SELECT idempotency_begin('t', 'a', 'pending');
\echo :SQLSTATE
\set VERBOSITY default
-- or when it has none
UPDATE idempotency_key SET lease_expires_at = NULL WHERE key = 'pending';
SELECT r IS NULL AS nothing FROM idempotency_replay('t', 'a', 'pending') r;
BEGIN;
SELECT outcome, attempt, retry_after FROM idempotency_try_begin('t', 'a', 'pending');
ROLLBACK;
SELECT run('pending');
SELECT state, attempt FROM idempotency_key WHERE key = 'pending';
DELETE FROM idempotency_key WHERE key = 'pending';

--
-- Triggers, rules and foreign keys would be passed over: refused
--
CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
CREATE TRIGGER t BEFORE INSERT ON idempotency_key FOR EACH ROW EXECUTE FUNCTION nothing();
SELECT run('k2');
\echo :SQLSTATE
SELECT idempotency_try_begin('t', 'a', 'k1');
\echo :SQLSTATE
CALL idempotency_sweep();
\echo :SQLSTATE
-- a replay changes nothing, and works
SELECT outcome, response FROM idempotency_replay('t', 'a', 'k1');
ALTER TABLE idempotency_key DISABLE TRIGGER t;
SELECT run('k2');
\echo :SQLSTATE
DROP TRIGGER t ON idempotency_key;
CREATE TRIGGER t AFTER DELETE ON idempotency_key FOR EACH STATEMENT EXECUTE FUNCTION nothing();
SELECT run('k2');
\echo :SQLSTATE
DROP TRIGGER t ON idempotency_key;
DROP FUNCTION nothing;
SELECT run('k2');
CREATE RULE r AS ON INSERT TO idempotency_key DO ALSO NOTIFY stored;
SELECT run('k3');
\echo :SQLSTATE
DROP RULE r ON idempotency_key;
SELECT run('k3');
CREATE TABLE payment (
    tenant text, action text, key text, actor text,
    FOREIGN KEY (tenant, action, key, actor) REFERENCES idempotency_key (tenant, action, key, actor)
);
SELECT run('k4');
\echo :SQLSTATE
DROP TABLE payment;
SELECT run('k4');
-- a constraint that is checked at the end of the transaction is a trigger
ALTER TABLE idempotency_key ADD CONSTRAINT late UNIQUE (created_at) DEFERRABLE;
SELECT run('k5');
\echo :SQLSTATE
ALTER TABLE idempotency_key DROP CONSTRAINT late;
SELECT run('k5');
-- between begin and finish
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k6');
CREATE RULE r AS ON INSERT TO idempotency_key DO ALSO NOTIFY stored;
SELECT idempotency_finish('t', 'a', 'k6');
\echo :SQLSTATE
ROLLBACK;
TRUNCATE idempotency_key;

--
-- Indexes that an administrator added are kept right
--
CREATE INDEX plain_idx ON idempotency_key (created_at);
CREATE INDEX partial_idx ON idempotency_key (key) WHERE state = 'errored';
CREATE INDEX expression_idx ON idempotency_key (upper(key), (response ->> 'id'));
CREATE INDEX covering_idx ON idempotency_key (status_code) INCLUDE (action);
CREATE INDEX hash_idx ON idempotency_key USING hash (request_hash);
CREATE INDEX brin_idx ON idempotency_key USING brin (finished_at);
CREATE INDEX gin_idx ON idempotency_key USING gin (headers);
CREATE UNIQUE INDEX unique_idx ON idempotency_key ((response ->> 'id')) WHERE status_code = 201;
BEGIN;
SELECT count(*) FROM generate_series(1, 300) i,
    idempotency_begin('t', 'a', 'k' || i, to_jsonb(i));
SELECT count(*) FROM generate_series(1, 300) i,
    idempotency_finish('t', 'a', 'k' || i, CASE WHEN i % 3 = 0 THEN 404 ELSE 201 END,
                       json_build_object('id', i), jsonb_build_object('h', i));
COMMIT;
-- a third of them expire; some are swept, some replaced, some rolled back
UPDATE idempotency_key SET expires_at = '2020-01-01' WHERE (response ->> 'id')::int % 3 = 1;
BEGIN;
SELECT count(*) FROM generate_series(1, 150, 3) i, idempotency_begin('t', 'a', 'k' || i, to_jsonb(i));
SAVEPOINT s;
SELECT count(*) FROM generate_series(1, 150, 3) i,
    idempotency_finish('t', 'a', 'k' || i, 404, json_build_object('id', i), jsonb_build_object('h', i));
ROLLBACK TO s;
SELECT count(*) FROM generate_series(1, 150, 3) i,
    idempotency_finish('t', 'a', 'k' || i, 404, json_build_object('id', i + 1000), jsonb_build_object('h', i));
COMMIT;
CALL idempotency_sweep(7);
-- what each index says is what the table says
SET enable_indexscan = off;
SET enable_indexonlyscan = off;
SET enable_bitmapscan = off;
SELECT count(*), count(*) FILTER (WHERE state = 'errored') AS errored, count(*) FILTER (WHERE status_code = 201) AS created
FROM idempotency_key;
RESET enable_indexscan;
RESET enable_indexonlyscan;
RESET enable_bitmapscan;
SET enable_seqscan = off;
SELECT count(*) FROM idempotency_key WHERE created_at > '2021-01-01';
SELECT count(*) FROM idempotency_key WHERE state = 'errored' AND key > '';
SELECT count(*) FROM generate_series(1, 300) i, idempotency_key WHERE upper(key) = 'K' || i;
SELECT count(*) FROM idempotency_key WHERE status_code = 201;
SELECT count(*) FROM generate_series(1, 300) i, idempotency_key WHERE request_hash = idempotency_request_hash(to_jsonb(i));
SELECT count(*) FROM idempotency_key WHERE finished_at > '2021-01-01';
SELECT count(*) FROM generate_series(1, 300) i, idempotency_key WHERE headers @> jsonb_build_object('h', i);
SELECT count(*) FROM idempotency_key WHERE status_code = 201 AND response ->> 'id' > '';
SELECT count(*) FROM idempotency_key WHERE expires_at > '2021-01-01';
RESET enable_seqscan;
-- where amcheck can be had, it finds nothing
SET client_min_messages = warning;
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_available_extensions WHERE name = 'amcheck') THEN
        CREATE EXTENSION amcheck;
        PERFORM bt_index_parent_check(i.indexrelid, true)
        FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am a ON a.oid = c.relam
        WHERE i.indrelid = 'idempotency_key'::regclass AND a.amname = 'btree';
        DROP EXTENSION amcheck;
    END IF;
END $$;
RESET client_min_messages;
-- a unique index of the administrator keeps its own error
SELECT run('other', 201, '{"id": 5}');
\echo :SQLSTATE
SELECT run('other', 201, '{"id": 5000}');
DROP INDEX plain_idx, partial_idx, expression_idx, covering_idx, hash_idx, brin_idx, gin_idx, unique_idx;

-- an exclusion constraint is an index, too
ALTER TABLE idempotency_key ADD CONSTRAINT one_id EXCLUDE ((response ->> 'id') WITH =);
SELECT run('other2', 200, '{"id": 5}');
\echo :SQLSTATE
ALTER TABLE idempotency_key DROP CONSTRAINT one_id;

-- an error that is raised by the function of an index, and only looks like that
-- of the primary key
CREATE FUNCTION raises(key text) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    IF key = 'bare' THEN
        RAISE unique_violation USING MESSAGE = 'of mine, bare';
    ELSIF key = 'constraint' THEN
        RAISE unique_violation USING MESSAGE = 'of mine, with a constraint', CONSTRAINT = 'idempotency_key_pkey';
    ELSIF key = 'table' THEN
        RAISE unique_violation USING MESSAGE = 'of mine, with a table', TABLE = 'idempotency_key';
    ELSIF key = 'other' THEN
        RAISE unique_violation USING MESSAGE = 'of mine, with another constraint',
            TABLE = 'idempotency_key', CONSTRAINT = 'other_idx';
    ELSIF key = 'elsewhere' THEN
        RAISE unique_violation USING MESSAGE = 'of mine, with another table',
            TABLE = 'other', CONSTRAINT = 'idempotency_key_pkey';
    END IF;
    RETURN key;
END $$;
TRUNCATE idempotency_key;
CREATE INDEX raises_idx ON idempotency_key (raises(key));
\set VERBOSITY terse
SELECT run('bare');
\echo :SQLSTATE
SELECT outcome FROM idempotency_begin('t', 'a', 'bare', lease => '1 h');
\echo :SQLSTATE
SELECT * FROM idempotency_first_seen('t', 'a', '{bare}');
\echo :SQLSTATE
SELECT run('constraint');
\echo :SQLSTATE
SELECT run('table');
\echo :SQLSTATE
SELECT run('other');
\echo :SQLSTATE
SELECT run('elsewhere');
\echo :SQLSTATE
\set VERBOSITY default
SELECT run('none');
DROP INDEX raises_idx;
DROP FUNCTION raises;
SELECT run('bare');

-- check constraints hold
ALTER TABLE idempotency_key ADD CONSTRAINT short_key CHECK (length(key) < 10);
\set VERBOSITY terse
SELECT run('a-key-too-long');
\set VERBOSITY default
\echo :SQLSTATE
SELECT run('short');
ALTER TABLE idempotency_key DROP CONSTRAINT short_key;
SELECT run('a-key-too-long');
-- also of system columns
ALTER TABLE idempotency_key ADD CONSTRAINT this_table CHECK (tableoid = 'idempotency_key'::regclass);
SELECT run('in-this');
ALTER TABLE idempotency_key DROP CONSTRAINT this_table;
TRUNCATE idempotency_key;

-- a record is not deleted behind the back of a subscriber
SET client_min_messages = error;
CREATE PUBLICATION records FOR TABLE idempotency_key;
RESET client_min_messages;
CREATE FUNCTION published_warnings() RETURNS SETOF text LANGUAGE sql AS $$
    SELECT w FROM idempotency_health, unnest(warnings) AS w WHERE w LIKE '%publish%'
$$;
SELECT run('published');
SELECT outcome FROM idempotency_begin('t', 'a', 'leased', lease => '1 h', claim => '00000000-0000-0000-0000-000000000001');
SELECT outcome FROM idempotency_begin('t', 'a', 'stalled', lease => '1 h', claim => '00000000-0000-0000-0000-000000000002');
UPDATE idempotency_key SET lease_expires_at = created_at WHERE key = 'stalled';
UPDATE idempotency_key SET expires_at = created_at WHERE key = 'published';
SELECT published_warnings();
ALTER TABLE idempotency_key REPLICA IDENTITY NOTHING;
SELECT published_warnings();
CALL idempotency_sweep();
\echo :SQLSTATE
-- which is known before the work is done
SELECT outcome FROM idempotency_begin('t', 'a', 'published');
\echo :SQLSTATE
SELECT outcome FROM idempotency_try_begin('t', 'a', 'published', lease => '1 h');
\echo :SQLSTATE
SELECT outcome FROM idempotency_begin('t', 'a', 'unheard-of', lease => '1 h');
\echo :SQLSTATE
SELECT outcome FROM idempotency_begin('t', 'a', 'stalled');
\echo :SQLSTATE
SELECT outcome FROM idempotency_store('t', 'a', 'published', NULL, 404);
\echo :SQLSTATE
SELECT * FROM idempotency_first_seen('t', 'a', '{published}');
\echo :SQLSTATE
SELECT idempotency_forget('t', 'a', 'published');
\echo :SQLSTATE
SELECT idempotency_checkpoint('t', 'a', 'leased', '00000000-0000-0000-0000-000000000001', 'p');
\echo :SQLSTATE
-- what needs no more than an insert works, and so does a look
SELECT run('new');
SELECT outcome FROM idempotency_replay('t', 'a', 'new');
-- it matters only where changes are published
ALTER PUBLICATION records SET (publish = 'insert, truncate');
SELECT published_warnings();
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'published');
ROLLBACK;
ALTER PUBLICATION records SET (publish = 'insert, delete');
SELECT published_warnings();
DROP PUBLICATION records;
SELECT published_warnings();
SET client_min_messages = error;
CREATE PUBLICATION records FOR ALL TABLES;
SELECT published_warnings();
DROP PUBLICATION records;
CREATE PUBLICATION records FOR TABLES IN SCHEMA public;
RESET client_min_messages;
SELECT published_warnings();
ALTER TABLE idempotency_key REPLICA IDENTITY DEFAULT;
SELECT published_warnings();
SELECT run('published');
DROP PUBLICATION records;
-- the same where a row filter has columns that are not in the replica identity
UPDATE idempotency_key SET expires_at = created_at WHERE key = 'published';
SET client_min_messages = error;
CREATE PUBLICATION records FOR TABLE idempotency_key WHERE (status_code = 200);
RESET client_min_messages;
SELECT outcome FROM idempotency_begin('t', 'a', 'published');
\echo :SQLSTATE
SELECT outcome FROM idempotency_begin('t', 'a', 'published', lease => '1 h');
\echo :SQLSTATE
SELECT outcome FROM idempotency_begin('t', 'a', 'unheard-of', lease => '1 h');
\echo :SQLSTATE
SELECT outcome FROM idempotency_begin('t', 'a', 'stalled');
\echo :SQLSTATE
CALL idempotency_sweep();
\echo :SQLSTATE
SELECT run('newer');
ALTER PUBLICATION records SET TABLE idempotency_key WHERE (tenant <> 'u');
SELECT run('published');
SELECT idempotency_finish('t', 'a', 'leased', claim => '00000000-0000-0000-0000-000000000001');
DROP PUBLICATION records;
DROP FUNCTION published_warnings;
TRUNCATE idempotency_key;

--
-- A partition would be passed over, too: its bounds are those of the executor
--
SELECT run('k1');
SELECT run('k2');
UPDATE idempotency_key SET expires_at = created_at WHERE key = 'k2';
CREATE TABLE all_records (LIKE idempotency_key) PARTITION BY LIST (tenant);
ALTER TABLE all_records ATTACH PARTITION idempotency_key FOR VALUES IN ('t');
SELECT run('k3');
\echo :SQLSTATE
SELECT outcome FROM idempotency_try_begin('u', 'a', 'k1', lease => '1 h');
\echo :SQLSTATE
SELECT outcome FROM idempotency_store('u', 'a', 'k1', NULL, 404);
\echo :SQLSTATE
SELECT * FROM idempotency_first_seen('u', 'a', '{k1}');
\echo :SQLSTATE
SELECT idempotency_forget('t', 'a', 'k1');
\echo :SQLSTATE
CALL idempotency_sweep();
\echo :SQLSTATE
SELECT outcome, response FROM idempotency_replay('t', 'a', 'k1');
ALTER TABLE all_records DETACH PARTITION idempotency_key;
-- also between begin and finish
BEGIN;
SELECT outcome FROM idempotency_begin('u', 'a', 'k1');
ALTER TABLE all_records ATTACH PARTITION idempotency_key FOR VALUES IN ('t');
SELECT idempotency_finish('u', 'a', 'k1');
\echo :SQLSTATE
ROLLBACK;
DROP TABLE all_records;
SELECT run('k2');
SELECT run('k3');
TRUNCATE idempotency_key;

--
-- Changes that leave the table of use
--
ALTER TABLE idempotency_key SET (fillfactor = 90, autovacuum_vacuum_scale_factor = 0.01);
ALTER TABLE idempotency_key ALTER COLUMN response SET STORAGE EXTERNAL;
ALTER TABLE idempotency_key ALTER COLUMN key SET STATISTICS 1000;
SELECT run('k1');
VACUUM FULL idempotency_key;
CLUSTER idempotency_key USING idempotency_key_expires_at_idx;
REINDEX TABLE idempotency_key;
REINDEX TABLE CONCURRENTLY idempotency_key;
SELECT run('k1');
SELECT run('k2');
SELECT run('k3');
ALTER TABLE idempotency_key SET UNLOGGED;
SELECT run('k4');
ALTER TABLE idempotency_key SET LOGGED;
SELECT run('k4');
TRUNCATE idempotency_key;

--
-- Changes that do not: a clear error, in a session that used the table before
--
SELECT run('k1');
ALTER TABLE idempotency_key ALTER COLUMN status_code TYPE bigint;
SELECT run('k2');
\echo :SQLSTATE
SELECT idempotency_replay('t', 'a', 'k1');
\echo :SQLSTATE
CALL idempotency_sweep();
\echo :SQLSTATE
ALTER TABLE idempotency_key ALTER COLUMN status_code TYPE int;
SELECT run('k2');
ALTER TABLE idempotency_key RENAME COLUMN action TO operation;
SELECT run('k3');
\echo :SQLSTATE
ALTER TABLE idempotency_key RENAME COLUMN operation TO action;
SELECT run('k3');
-- between begin and finish
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k5');
ALTER TABLE idempotency_key ADD COLUMN note text;
SELECT idempotency_finish('t', 'a', 'k5');
\echo :SQLSTATE
ROLLBACK;
SELECT run('k5');

-- without its indexes
ALTER TABLE idempotency_key DROP CONSTRAINT idempotency_key_pkey;
SELECT run('k6');
\echo :SQLSTATE
SELECT idempotency_replay('t', 'a', 'k1');
\echo :SQLSTATE
ALTER TABLE idempotency_key ADD PRIMARY KEY (key, tenant, action);
SELECT run('k6');
\echo :SQLSTATE
ALTER TABLE idempotency_key DROP CONSTRAINT idempotency_key_pkey;
ALTER TABLE idempotency_key ADD PRIMARY KEY (key, tenant, action, actor) DEFERRABLE;
SELECT run('k6');
\echo :SQLSTATE
ALTER TABLE idempotency_key DROP CONSTRAINT idempotency_key_pkey;
ALTER TABLE idempotency_key ADD PRIMARY KEY (key, tenant, action, actor);
SELECT run('k6');
SELECT run('k6');
-- the index of the sweep is needed by the sweep alone
DROP INDEX idempotency_key_expires_at_idx;
SELECT run('k7');
CALL idempotency_sweep();
\echo :SQLSTATE
CREATE INDEX not_this_one ON idempotency_key (expires_at) WHERE state = 'errored';
CALL idempotency_sweep();
\echo :SQLSTATE
CREATE INDEX this_one ON idempotency_key (expires_at);
UPDATE idempotency_key SET expires_at = created_at WHERE key = 'k7';
CALL idempotency_sweep();

-- a column more; as the hint says, undoing the change is enough
ALTER TABLE idempotency_key ADD COLUMN note text;
SELECT run('k8');
\echo :SQLSTATE
SELECT idempotency_replay('t', 'a', 'k1');
\echo :SQLSTATE
ALTER TABLE idempotency_key DROP COLUMN note;
SELECT run('k8');
SELECT run('k8');
CREATE TABLE copy AS SELECT * FROM idempotency_key WHERE key = 'k8';
SELECT state, status_code, response FROM copy;


-- another order of the text: it would be searched for by bytes; the views are
-- in the way of that, and are back after the rollback
BEGIN;
ALTER EXTENSION idempotency DROP VIEW idempotency_in_flight;
ALTER EXTENSION idempotency DROP VIEW idempotency_stalled;
DROP VIEW idempotency_in_flight, idempotency_stalled;
ALTER TABLE idempotency_key ALTER COLUMN key TYPE text COLLATE "POSIX";
SAVEPOINT s;
SELECT run('k8');
\echo :SQLSTATE
ROLLBACK TO s;
SELECT idempotency_replay('t', 'a', 'k1');
\echo :SQLSTATE
ROLLBACK TO s;
ALTER TABLE idempotency_key ALTER COLUMN key TYPE text COLLATE "C";
SELECT run('k8');
ROLLBACK;
SELECT run('k8');

-- a state less, as a session sees it that starts now
ALTER TYPE idempotency_state RENAME VALUE 'completed' TO 'done';
\c
\set SHOW_CONTEXT never
SELECT run('k9');
\echo :SQLSTATE
ALTER TYPE idempotency_state RENAME VALUE 'done' TO 'completed';
SELECT run('k9');

-- another result
ALTER TYPE idempotency_result ADD ATTRIBUTE note text;
SELECT idempotency_begin('t', 'a', 'k8');
\echo :SQLSTATE
SELECT idempotency_replay('t', 'a', 'k8');
\echo :SQLSTATE

-- another table in the place of the one that this session knows
DROP TABLE copy;
DROP EXTENSION idempotency;
CREATE EXTENSION idempotency;
SELECT run('k8');
SELECT run('k8');

-- and another one between begin and finish: the record has a state of the new
-- one, and can be read
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k10', '{"a": 1}');
SELECT outcome FROM idempotency_begin('t', 'a', 'k11', lease => '1 h', claim => '00000000-0000-0000-0000-000000000001');
DROP EXTENSION idempotency;
CREATE EXTENSION idempotency;
SELECT idempotency_finish('t', 'a', 'k10', 200, '"answer"');
SAVEPOINT s;
-- a lease is a row of the old one
SELECT idempotency_finish('t', 'a', 'k11', claim => '00000000-0000-0000-0000-000000000001');
\echo :SQLSTATE
ROLLBACK TO s;
SELECT outcome, response FROM idempotency_begin('t', 'a', 'k10', '{"a": 1}');
COMMIT;
SELECT key, state, status_code, response FROM idempotency_key;
SELECT idempotency_key::text LIKE '(t,a,k10,"",completed,%' AS as_text FROM idempotency_key;
SELECT outcome, response FROM idempotency_replay('t', 'a', 'k10', '{"a": 1}');
SELECT outcome FROM idempotency_try_begin('t', 'a', 'k10', '{"a": 2}');
-- the same for a final error, for an answer that is not kept, and for none
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'errored');
SELECT outcome FROM idempotency_begin('t', 'a', 'retryable');
SELECT outcome FROM idempotency_begin('t', 'a', 'released');
DROP EXTENSION idempotency;
CREATE EXTENSION idempotency;
SELECT idempotency_finish('t', 'a', 'errored', 404);
SELECT idempotency_finish('t', 'a', 'retryable', 503);
SELECT idempotency_release('t', 'a', 'released');
COMMIT;
SELECT key, state, status_code, response FROM idempotency_key;
SELECT idempotency_key::text LIKE '(t,a,errored,"",errored,%' AS as_text FROM idempotency_key;
SELECT outcome, status_code FROM idempotency_replay('t', 'a', 'errored');
-- where an expired record was to be replaced, or a lease was taken over, that has
-- gone with the old one
UPDATE idempotency_key SET expires_at = created_at;
SELECT outcome FROM idempotency_begin('t', 'a', 'stalled', lease => '1 h');
UPDATE idempotency_key SET lease_expires_at = created_at WHERE key = 'stalled';
BEGIN;
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'errored');
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'stalled');
DROP EXTENSION idempotency;
CREATE EXTENSION idempotency;
SELECT idempotency_finish('t', 'a', 'errored', 200, '"now"');
SELECT idempotency_finish('t', 'a', 'stalled', 200, '"now"');
COMMIT;
SELECT key, state, status_code, response FROM idempotency_key ORDER BY key;
SELECT key, outcome, r.response FROM idempotency_key, idempotency_replay('t', 'a', key) AS r ORDER BY key;
SELECT run('k8');

-- nobody alters the table under a transaction that has looked into it
BEGIN;
SELECT outcome FROM idempotency_replay('t', 'a', 'k8');
SELECT relation::regclass, mode FROM pg_locks
WHERE pid = pg_backend_pid() AND relation::regclass::text LIKE 'idempotency_key%'
ORDER BY relation::regclass::text;
COMMIT;

DROP FUNCTION run;
DROP EXTENSION idempotency;
