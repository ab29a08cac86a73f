--
-- Giving a claim back without an answer
--
CREATE EXTENSION idempotency;

-- the SQLSTATE of a statement that fails, which is undone alone
CREATE FUNCTION sqlstate_of(statement text) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE statement;
    RETURN 'no error';
EXCEPTION WHEN OTHERS THEN
    RETURN SQLSTATE;
END $$;

-- no claim: out of order
SELECT idempotency_release('t', 'a', 'k');
\echo :SQLSTATE
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k');
SELECT locks();
-- another scope
SELECT sqlstate_of($$ SELECT idempotency_release('t', 'a', 'k', 'user 1') $$);
SELECT sqlstate_of($$ SELECT idempotency_release('t', 'a', 'k2') $$);
SELECT sqlstate_of($$ SELECT idempotency_release('t', 'b', 'k') $$);
SELECT sqlstate_of($$ SELECT idempotency_release('u', 'a', 'k') $$);
SELECT locks();
-- the claim, whose lock goes at once, and only once
SELECT idempotency_release('t', 'a', 'k');
SELECT locks();
SELECT sqlstate_of($$ SELECT idempotency_release('t', 'a', 'k') $$);
SELECT idempotency_finish('t', 'a', 'k');
\echo :SQLSTATE
COMMIT;

-- nothing was written, and the guard has nothing to say
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k');
SELECT idempotency_release('t', 'a', 'k');
COMMIT;
SELECT count(*) FROM idempotency_key;

-- it can be begun again in the same transaction
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k');
SELECT idempotency_release('t', 'a', 'k');
SELECT outcome FROM idempotency_begin('t', 'a', 'k', '{"a": 2}');
SELECT idempotency_finish('t', 'a', 'k', 200, '"second"');
-- what was finished cannot be released
SELECT sqlstate_of($$ SELECT idempotency_release('t', 'a', 'k') $$);
COMMIT;
SELECT outcome, response FROM idempotency_begin('t', 'a', 'k', '{"a": 2}');
-- nor can what was replayed
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k');
SELECT sqlstate_of($$ SELECT idempotency_release('t', 'a', 'k') $$);
COMMIT;
SELECT outcome, response FROM idempotency_begin('t', 'a', 'k', '{"a": 2}');
TRUNCATE idempotency_key;

-- with an actor
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k', actor => 'user 1');
SELECT sqlstate_of($$ SELECT idempotency_release('t', 'a', 'k') $$);
SELECT idempotency_release('t', 'a', 'k', 'user 1');
COMMIT;

-- an expired record is left as it was
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'old');
SELECT idempotency_finish('t', 'a', 'old', 200, '"old"');
COMMIT;
UPDATE idempotency_key SET expires_at = created_at;
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'old');
SELECT idempotency_release('t', 'a', 'old');
COMMIT;
SELECT key, response FROM idempotency_key;

-- in a savepoint that is rolled back: the claim is held again
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k');
SAVEPOINT s;
SELECT idempotency_release('t', 'a', 'k');
-- its lock is kept as long as that can happen
SELECT locks();
SELECT sqlstate_of($$ SELECT idempotency_release('t', 'a', 'k') $$);
ROLLBACK TO s;
SELECT idempotency_begin('t', 'a', 'k');
\echo :SQLSTATE
ROLLBACK TO s;
SELECT idempotency_release('t', 'a', 'k');
RELEASE s;
COMMIT;
-- begun and released in a savepoint
BEGIN;
SAVEPOINT s;
SELECT outcome FROM idempotency_begin('t', 'a', 'k');
SELECT idempotency_release('t', 'a', 'k');
SELECT locks();
ROLLBACK TO s;
SELECT sqlstate_of($$ SELECT idempotency_release('t', 'a', 'k') $$);
COMMIT;
-- begun in a savepoint, released after it
BEGIN;
SAVEPOINT s;
SELECT outcome FROM idempotency_begin('t', 'a', 'k');
RELEASE s;
SELECT idempotency_release('t', 'a', 'k');
SELECT locks();
COMMIT;

-- a leased claim needs its id, also in the transaction that began it
SELECT '00000000-0000-0000-0000-000000000001' AS claim \gset
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k', lease => '1 h', claim => :'claim');
SELECT locks();
SAVEPOINT s;
SELECT idempotency_release('t', 'a', 'k');
\echo :SQLSTATE
ROLLBACK TO s;
SELECT locks();
COMMIT;
SELECT idempotency_release('t', 'a', 'k');
\echo :SQLSTATE
SELECT idempotency_release('t', 'a', 'k', claim => :'claim');
-- only this one may be released again, and that is told
SELECT idempotency_release('t', 'a', 'k', claim => :'claim');
SELECT idempotency_release('t', 'a', 'k');
\echo :SQLSTATE

DROP FUNCTION sqlstate_of;
DROP EXTENSION idempotency;
