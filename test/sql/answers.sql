--
-- An answer is replayed as it was stored
--
CREATE EXTENSION idempotency;

CREATE TABLE answer (n int PRIMARY KEY, response json);
INSERT INTO answer VALUES
    (1, '{"b":1,"a":2}'),
    (2, E' { "b" : 1 ,  "a" :\t2 } '),
    (3, E'{\n  "b": 1,\n  "a": 2\n}'),
    (4, '{"a": 1, "a": 2, "a": 1}'),
    (5, '{"e": "\u00e9", "E": "é", "slash": "\/", "key": "🔑"}'),
    (6, '{"n": [1, 1.0, 1.00, 1e0, 1E+0, -0, 10000000000000000000000.10]}'),
    (7, '[]'), (8, '{}'), (9, '""'), (10, 'null'), (11, '  null  '), (12, 'false'), (13, '0'),
    (14, '"\u0000 is no character of a text, but may be in a json"');
BEGIN;
SELECT count(*) FROM answer, idempotency_begin('t', 'exact', 'k' || n);
SELECT count(*) FROM answer, idempotency_finish('t', 'exact', 'k' || n, 200, response);
COMMIT;
SELECT a.n, r.outcome, r.response::text = a.response::text AS same, r.response
FROM answer a, idempotency_begin('t', 'exact', 'k' || n) r ORDER BY n;
SELECT count(*) AS same
FROM answer a, idempotency_replay('t', 'exact', 'k' || n) r WHERE r.response::text = a.response::text;
-- headers are jsonb: equal, not the same text
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'headers', 'k');
SELECT idempotency_finish('t', 'headers', 'k', 201, '{}', '{"b": 1, "Location":"/orders/7",  "b": [2]}');
COMMIT;
SELECT headers FROM idempotency_begin('t', 'headers', 'k');
-- every byte
SELECT string_agg(set_byte('\x00', 0, b), '' ORDER BY b) AS bytes FROM generate_series(0, 255) b \gset
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'body', 'k');
SELECT idempotency_finish('t', 'body', 'k', 200, body => :'bytes');
COMMIT;
SELECT octet_length(body), body = :'bytes' AS same, response FROM idempotency_begin('t', 'body', 'k');

--
-- Large answers, compressed or out of line or both, in all of their columns
--
CREATE TABLE large (n int PRIMARY KEY, response json, headers jsonb, body bytea);
-- compresses well
INSERT INTO large SELECT 1, to_json(repeat('abc ', 200000)), NULL, NULL;
-- does not compress
INSERT INTO large SELECT 2, to_json(string_agg(md5(i::text), '')), NULL, NULL FROM generate_series(1, 20000) i;
INSERT INTO large SELECT 3, NULL, NULL, string_agg(sha256(i::text::bytea), '') FROM generate_series(1, 20000) i;
INSERT INTO large SELECT 4, '"small"', jsonb_object_agg('h' || i, md5(i::text)), NULL FROM generate_series(1, 10000) i;
-- around the size where a row is toasted
INSERT INTO large SELECT n, to_json(substr(string_agg(md5(i::text), ''), 1, n)), NULL, NULL
FROM generate_series(1900, 2100, 10) n, generate_series(1, 70) i GROUP BY n;
BEGIN;
SELECT count(*) FROM large, idempotency_begin('t', 'large', 'k' || n);
SELECT count(*) FROM large, idempotency_finish('t', 'large', 'k' || n, 200, response, headers, body => body);
COMMIT;
SELECT count(*) AS answers,
       count(*) FILTER (WHERE r.response::text IS NOT DISTINCT FROM l.response::text) AS responses,
       count(*) FILTER (WHERE r.headers IS NOT DISTINCT FROM l.headers) AS headers,
       count(*) FILTER (WHERE r.body IS NOT DISTINCT FROM l.body) AS bodies
FROM large l, idempotency_begin('t', 'large', 'k' || n) r WHERE outcome = 'replayed';
-- a replay can be kept when the record is gone
CREATE TABLE kept AS SELECT n, r.* FROM large, idempotency_replay('t', 'large', 'k' || n) r;
UPDATE idempotency_key SET expires_at = created_at;
CALL idempotency_sweep();
SELECT count(*) FROM idempotency_key;
VACUUM idempotency_key;
SELECT count(*) AS same
FROM kept k JOIN large l USING (n)
WHERE k.response::text IS NOT DISTINCT FROM l.response::text
  AND k.headers IS NOT DISTINCT FROM l.headers AND k.body IS NOT DISTINCT FROM l.body;
-- the source of an answer may go before the commit
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'gone', 'k');
SELECT idempotency_finish('t', 'gone', 'k', 200, response) FROM large WHERE n = 2;
DROP TABLE large;
COMMIT;
SELECT r.response::text = k.response::text AS same
FROM kept k, idempotency_begin('t', 'gone', 'k') r WHERE n = 2;
-- large answers in a row that replaces an expired one
UPDATE idempotency_key SET expires_at = created_at;
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'gone', 'k');
SELECT idempotency_finish('t', 'gone', 'k', 200, body => body) FROM kept WHERE n = 3;
COMMIT;
SELECT r.response, r.body = k.body AS same
FROM kept k, idempotency_begin('t', 'gone', 'k') r WHERE n = 3;
SELECT count(*) FROM idempotency_key;

DROP TABLE answer, kept;
DROP EXTENSION idempotency;
