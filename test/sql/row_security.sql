--
-- Row security policies: the right to call a function is enough.  (The owner
-- of the table and a superuser would not be subject to them anyway.)
--
CREATE EXTENSION idempotency;
CREATE ROLE regress_idempotency_app;
GRANT EXECUTE ON FUNCTION idempotency_begin, idempotency_try_begin, idempotency_finish,
    idempotency_replay, idempotency_release TO regress_idempotency_app;
GRANT EXECUTE ON PROCEDURE idempotency_sweep TO regress_idempotency_app;
GRANT SELECT, INSERT, DELETE ON idempotency_key TO regress_idempotency_app;
ALTER TABLE idempotency_key ENABLE ROW LEVEL SECURITY;
ALTER TABLE idempotency_key FORCE ROW LEVEL SECURITY;

SET ROLE regress_idempotency_app;
-- the policies, of which there is none, keep the role from every row
INSERT INTO idempotency_key (tenant, action, key, actor, state, attempt, created_at, expires_at)
VALUES ('t', 'a', 'by hand', '', 'completed', 1, now(), now() + interval '1 hour');
\echo :SQLSTATE
-- and the functions from none
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k', '{"a": 1}');
SELECT idempotency_finish('t', 'a', 'k', 201, '"stored"');
COMMIT;
SELECT outcome, response FROM idempotency_begin('t', 'a', 'k', '{"a": 1}');
SELECT outcome, response FROM idempotency_replay('t', 'a', 'k');
SELECT outcome FROM idempotency_try_begin('t', 'a', 'k', '{"a": 2}');
SELECT count(*) FROM idempotency_key;
RESET ROLE;
-- an expired record is replaced, and swept
UPDATE idempotency_key SET expires_at = created_at;
SET ROLE regress_idempotency_app;
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k', '{"a": 2}');
SELECT idempotency_finish('t', 'a', 'k', 404);
COMMIT;
RESET ROLE;
SELECT key, state FROM idempotency_key;
UPDATE idempotency_key SET expires_at = created_at;
SET ROLE regress_idempotency_app;
CALL idempotency_sweep();
RESET ROLE;
SELECT count(*) FROM idempotency_key;

DROP EXTENSION idempotency;
DROP ROLE regress_idempotency_app;
