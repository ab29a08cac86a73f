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
SELECT outcome, retry_after > '59 min' AND retry_after <= '1 h' AS rest_of_lease
FROM idempotency_try_begin('t', 'a', 'pending');
SELECT outcome, retry_after > '59 min' AND retry_after <= '1 h' AS rest_of_lease
FROM idempotency_try_begin('t', 'a', 'pending', '{}');
SELECT r IS NULL AS nothing FROM idempotency_replay('t', 'a', 'pending') r;
\set VERBOSITY terse
SELECT idempotency_begin('t', 'a', 'pending');
\echo :SQLSTATE
\set VERBOSITY default
-- or when it has none
UPDATE idempotency_key SET lease_expires_at = NULL WHERE key = 'pending';
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
SELECT run('published');
UPDATE idempotency_key SET expires_at = created_at;
ALTER TABLE idempotency_key REPLICA IDENTITY NOTHING;
CALL idempotency_sweep();
\echo :SQLSTATE
SELECT run('published');
\echo :SQLSTATE
ALTER TABLE idempotency_key REPLICA IDENTITY DEFAULT;
SELECT run('published');
DROP PUBLICATION records;
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

-- nobody alters the table under a transaction that has looked into it
BEGIN;
SELECT outcome FROM idempotency_replay('t', 'a', 'k8');
SELECT relation::regclass, mode FROM pg_locks
WHERE pid = pg_backend_pid() AND relation::regclass::text LIKE 'idempotency_key%'
ORDER BY relation::regclass::text;
COMMIT;

DROP FUNCTION run;
DROP EXTENSION idempotency;
