--
-- A request that is nested deeper than the stack allows: an error, not a crash
--
CREATE EXTENSION idempotency;
\set VERBOSITY sqlstate
CREATE TABLE deep (request jsonb);
INSERT INTO deep SELECT (repeat('[', 2000) || repeat(']', 2000))::jsonb;
INSERT INTO deep SELECT (repeat('{"a":', 2000) || '1' || repeat('}', 2000))::jsonb;
SELECT octet_length(idempotency_request_hash(request)) FROM deep;

SET max_stack_depth = '100kB';
SELECT idempotency_request_hash(request) FROM deep WHERE jsonb_typeof(request) = 'array';
SELECT idempotency_request_hash(request) FROM deep WHERE jsonb_typeof(request) = 'object';
-- nothing is left of the call that failed
BEGIN;
SAVEPOINT s;
SELECT idempotency_begin('t', 'a', 'k', request) FROM deep;
ROLLBACK TO s;
SELECT count(*) FROM pg_locks WHERE locktype = 'userlock' AND pid = pg_backend_pid();
SELECT outcome FROM idempotency_begin('t', 'a', 'k', '[[1]]');
ROLLBACK;
RESET max_stack_depth;

DROP TABLE deep;
DROP EXTENSION idempotency;
