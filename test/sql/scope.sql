--
-- The scope of a request: tenant, action, key and actor
--
CREATE EXTENSION idempotency;

-- each of these is a request of its own; the answer tells which
CREATE TABLE scopes (n int, tenant text, action text, key text, actor text);
INSERT INTO scopes VALUES
    (1, 'acme', 'orders.create', 'k', NULL),
    (2, 'other', 'orders.create', 'k', NULL),
    (3, NULL, 'orders.create', 'k', NULL),
    (4, 'acme', 'orders.cancel', 'k', NULL),
    (5, 'acme', 'orders.create', 'K', NULL),
    (6, 'acme', 'orders.create', 'k', 'user 1'),
    (7, 'acme', 'orders.create', 'k', 'user 2'),
    (8, NULL, 'orders.create', 'k', 'acme'),
    (9, 'Acme', 'orders.create', 'k', NULL),
    (10, 'acme ', 'orders.create', 'k', NULL),
    (11, 'acm', 'eorders.create', 'k', NULL),
    (12, 'acme', 'orders.create', 'ku', 'ser 1'),
    (13, 'acme', 'orders.createk', 'u', 'ser 1'),
    (14, 'café', 'orders.create', 'k', NULL),
    (15, U&'cafe\0301', 'orders.create', 'k', NULL);

BEGIN;
SELECT n, outcome FROM scopes s,
    idempotency_begin(s.tenant, s.action, s.key, actor => s.actor) ORDER BY n;
SELECT count(*) AS locks FROM pg_locks WHERE locktype = 'userlock' AND pid = pg_backend_pid();
SELECT count(*) FILTER (WHERE f = 'completed') AS completed
FROM scopes s, idempotency_finish(s.tenant, s.action, s.key, 200, to_json(s.n), actor => s.actor) f;
COMMIT;
SELECT count(*) FROM idempotency_key;
-- everybody gets the answer to their own request
SELECT n, outcome, response FROM scopes s,
    idempotency_begin(s.tenant, s.action, s.key, actor => s.actor) ORDER BY n;
SELECT count(*) FROM scopes s,
    idempotency_replay(s.tenant, s.action, s.key, actor => s.actor) r
WHERE r.response::text = s.n::text;

-- the lock of a request is its database and SHA-256 of its name, cut to 80 bits
-- that are taken in the byte order of the server
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'orders.create', 'locked', actor => 'user 1');
WITH hash AS (
    SELECT sha256(string_agg(set_byte('\x00', 0, octet_length(part)) || convert_to(part, 'UTF8'), ''
                             ORDER BY n)) AS hash
    FROM unnest(ARRAY['acme', 'orders.create', 'locked', 'user 1']) WITH ORDINALITY p (part, n)
), swapped AS (
    SELECT string_agg(substring(hash, i, 1), '' ORDER BY n) AS hash
    FROM hash, unnest('{4, 3, 2, 1, 8, 7, 6, 5, 10, 9}'::int[]) WITH ORDINALITY p (i, n)
)
SELECT database = (SELECT oid FROM pg_database WHERE datname = current_database()) AS database,
       oidsend(classid) || oidsend(objid) || int2send(objsubid)
       IN ((SELECT hash FROM swapped), (SELECT substring(hash, 1, 10) FROM hash)) AS hash
FROM pg_locks WHERE locktype = 'userlock' AND pid = pg_backend_pid();
ROLLBACK;

-- NULL and '' are one tenant, and stored as ''
SELECT outcome, response FROM idempotency_begin('', 'orders.create', 'k');
SELECT outcome, response FROM idempotency_begin('', 'orders.create', 'k', actor => '');
SELECT outcome, response FROM idempotency_begin(NULL, 'orders.create', 'k', actor => '');
BEGIN;
SELECT outcome FROM idempotency_begin('', 'orders.create', 'null');
SELECT idempotency_finish(NULL, 'orders.create', 'null');
SELECT outcome FROM idempotency_begin(NULL, 'orders.create', 'null', actor => '');
COMMIT;
SELECT tenant = '' AS tenant, actor = '' AS actor FROM idempotency_key WHERE key = 'null';
BEGIN;
SELECT outcome FROM idempotency_begin('', 'orders.create', 'null2');
SELECT outcome FROM idempotency_begin(NULL, 'orders.create', 'null2');
\echo :SQLSTATE
ROLLBACK;

-- the same key of two users is no mismatch: neither learns of the other
SELECT outcome, response
FROM idempotency_try_begin('acme', 'orders.create', 'k', actor => 'user 1');
BEGIN;
SELECT outcome FROM idempotency_try_begin('acme', 'orders.create', 'k', '{"a": 1}', actor => 'user 3');
ROLLBACK;

-- the unique key is exactly these four, compared by bytes
SELECT pg_get_constraintdef(oid) FROM pg_constraint
WHERE conrelid = 'idempotency_key'::regclass AND contype = 'p';
SELECT a.attname, c.collname, a.attnotnull
FROM pg_attribute a JOIN pg_collation c ON c.oid = a.attcollation
WHERE a.attrelid = 'idempotency_key'::regclass AND a.attnum <= 4 ORDER BY a.attnum;

DROP TABLE scopes;
DROP EXTENSION idempotency;
