--
-- forget: delete the record of one request, or of one message
--
CREATE EXTENSION idempotency;
\set SHOW_CONTEXT never
SET idempotency.retry_after = '90s';

--
-- An answer
--
-- there is none
SELECT idempotency_forget('t', 'a', 'never-begun');
SELECT locks();
-- completed
SELECT outcome FROM idempotency_store('t', 'a', 'k', '{"amount": 1}', 200, '"answer"');
SELECT idempotency_forget('t', 'a', 'k');
SELECT count(*) FROM idempotency_key;
SELECT idempotency_forget('t', 'a', 'k');
SELECT r IS NULL AS nothing FROM idempotency_replay('t', 'a', 'k') r;
-- a repeat is the first one again, whatever its request
BEGIN;
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'k', '{"amount": 2}');
SELECT idempotency_finish('t', 'a', 'k', 404, '"not found"');
COMMIT;
-- errored
SELECT idempotency_forget('t', 'a', 'k');
SELECT count(*) FROM idempotency_key;
-- one that had expired is gone too, but was none
SELECT outcome FROM idempotency_store('t', 'a', 'k', NULL, 200, '"answer"');
UPDATE idempotency_key SET expires_at = clock_timestamp();
SELECT idempotency_forget('t', 'a', 'k');
SELECT count(*) FROM idempotency_key;
-- of one scope, to the last part
SELECT outcome FROM idempotency_store('t', 'a', 'k', NULL, 200, actor => 'user 1');
SELECT idempotency_forget('t', 'a', 'k') AS no_actor, idempotency_forget('t', 'a', 'k', 'user 2') AS actor,
       idempotency_forget('t', 'b', 'k', 'user 1') AS action, idempotency_forget('u', 'a', 'k', 'user 1') AS tenant,
       idempotency_forget(NULL, 'a', 'k', 'user 1') AS no_tenant, idempotency_forget('t', 'a', 'K', 'user 1') AS key;
SELECT tenant, action, key, actor FROM idempotency_key;
SELECT idempotency_forget(actor => 'user 1', key => 'k', action => 'a', tenant => 't');
SELECT count(*) FROM idempotency_key;
SELECT outcome FROM idempotency_store(NULL, 'a', 'k', NULL, 200);
SELECT idempotency_forget('', 'a', 'k');
-- twice in one statement, and many
SELECT outcome FROM idempotency_store('t', 'a', 'k', NULL, 200);
SELECT idempotency_forget('t', 'a', 'k') FROM generate_series(1, 2);
SELECT outcome, count(*) FROM generate_series(1, 50) i, idempotency_store('t', 'many', 'k' || i, NULL, 200) GROUP BY outcome;
SELECT f, count(*) FROM generate_series(1, 60) i, idempotency_forget('t', 'many', 'k' || i) f GROUP BY f ORDER BY f;
SELECT count(*) FROM idempotency_key;

--
-- A message
--
SELECT * FROM idempotency_first_seen('t', 'mailer', '{m1,m2}');
SELECT idempotency_forget('t', 'mailer', 'm1'), idempotency_forget('t', 'other', 'm2');
SELECT * FROM idempotency_first_seen('t', 'mailer', '{m1,m2}');
SELECT idempotency_forget('t', 'mailer', 'm3');
-- one that this transaction has recorded
BEGIN;
SELECT * FROM idempotency_first_seen('t', 'mailer', '{m3}');
SELECT idempotency_forget('t', 'mailer', 'm3');
SELECT * FROM idempotency_first_seen('t', 'mailer', '{m3}');
COMMIT;
SELECT key FROM idempotency_key ORDER BY key;
TRUNCATE idempotency_key;

--
-- A request in flight is not forgotten
--
-- by the claim of this transaction
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k');
SELECT error_of($$ SELECT idempotency_forget('t', 'a', 'k') $$);
SELECT outcome FROM idempotency_begin('t', 'a', 'leased', lease => '1 h', claim => claim_of(1));
SELECT error_of($$ SELECT idempotency_forget('t', 'a', 'leased') $$);
-- which is still there
SELECT idempotency_finish('t', 'a', 'k');
SELECT idempotency_finish('t', 'a', 'leased', claim => claim_of(1));
-- and when it has ended, it can be
SELECT idempotency_forget('t', 'a', 'k'), idempotency_forget('t', 'a', 'leased');
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'k');
SELECT idempotency_release('t', 'a', 'k');
SELECT idempotency_forget('t', 'a', 'k');
COMMIT;
SELECT count(*) FROM idempotency_key;
-- by that of another one
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}');
SELECT idempotency_finish('t', 'a', 'k');
PREPARE TRANSACTION 'held';
SELECT error_of($$ SELECT idempotency_forget('t', 'a', 'k') $$);
SELECT locks();
COMMIT PREPARED 'held';
SELECT idempotency_forget('t', 'a', 'k');
-- by one that replaces an expired record
SELECT outcome FROM idempotency_store('t', 'a', 'k', NULL, 200, '"old"');
UPDATE idempotency_key SET expires_at = clock_timestamp();
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k');
SELECT idempotency_finish('t', 'a', 'k', 200, '"new"');
PREPARE TRANSACTION 'held';
SELECT error_of($$ SELECT idempotency_forget('t', 'a', 'k') $$) LIKE 'ID003%' AS in_flight;
COMMIT PREPARED 'held';
SELECT idempotency_forget('t', 'a', 'k');

-- by a lease
SELECT outcome FROM idempotency_begin('t', 'a', 'k', '{"amount": 1}', lease => '1 h', claim => claim_of(1));
SELECT idempotency_checkpoint('t', 'a', 'k', claim_of(1), 'charged') IS NOT NULL AS renewed;
SELECT error_of($$ SELECT idempotency_forget('t', 'a', 'k') $$);
-- also when that has run out: somebody may still work under it
CALL run_out();
SELECT error_of($$ SELECT idempotency_forget('t', 'a', 'k') $$);
SELECT locks();
SELECT state, claim, attempt, recovery_point FROM idempotency_key;
-- released, nobody does
SELECT idempotency_release('t', 'a', 'k', claim => claim_of(1));
SELECT idempotency_forget('t', 'a', 'k');
SELECT count(*) FROM idempotency_key;
SELECT outcome, attempt, recovery_point FROM idempotency_begin('t', 'a', 'k', '{"amount": 2}', lease => '1 h', claim => claim_of(2));
-- nor when it is finished, or its time is over
SELECT idempotency_finish('t', 'a', 'k', claim => claim_of(2));
SELECT idempotency_forget('t', 'a', 'k');
SELECT error_of($$ SELECT idempotency_finish('t', 'a', 'k', claim => claim_of(2)) $$);
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'k', lease => '1 h', claim => claim_of(3));
UPDATE idempotency_key SET lease_expires_at = now() - interval '2 h', expires_at = now() - interval '1 h';
SELECT idempotency_forget('t', 'a', 'k');
SELECT count(*) FROM idempotency_key;

--
-- Until its transaction is over, nobody else begins what it forgets
--
SELECT outcome FROM idempotency_store('t', 'a', 'k', NULL, 200, '"answer"');
BEGIN;
SELECT idempotency_forget('t', 'a', 'k');
SELECT locks();
PREPARE TRANSACTION 'forget';
-- what was there is still replayed
SELECT outcome, response FROM idempotency_try_begin('t', 'a', 'k');
ROLLBACK PREPARED 'forget';
SELECT outcome, response FROM idempotency_try_begin('t', 'a', 'k');
BEGIN;
SELECT idempotency_forget('t', 'a', 'other');
PREPARE TRANSACTION 'forget';
SELECT outcome, retry_after FROM idempotency_try_begin('t', 'a', 'other');
SELECT error_of($$ SELECT idempotency_forget('t', 'a', 'other') $$);
COMMIT PREPARED 'forget';
-- it may do so itself
BEGIN;
SELECT idempotency_forget('t', 'a', 'k');
SELECT outcome, attempt FROM idempotency_begin('t', 'a', 'k');
SELECT idempotency_finish('t', 'a', 'k', 200, '"anew"');
COMMIT;
SELECT outcome, response FROM idempotency_begin('t', 'a', 'k');
-- savepoints: it comes back
BEGIN;
SAVEPOINT s;
SELECT idempotency_forget('t', 'a', 'k');
SELECT count(*) FROM idempotency_key;
ROLLBACK TO s;
SELECT locks();
SELECT outcome, response FROM idempotency_begin('t', 'a', 'k');
COMMIT;

--
-- At each isolation level
--
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT idempotency_forget('t', 'a', 'k'), idempotency_forget('t', 'a', 'k');
COMMIT;
SELECT outcome FROM idempotency_store('t', 'a', 'k', NULL, 200, '"answer"');
BEGIN ISOLATION LEVEL SERIALIZABLE;
SELECT idempotency_forget('t', 'a', 'k'), idempotency_forget('t', 'a', 'k');
COMMIT;
SELECT count(*) FROM idempotency_key;

--
-- Arguments
--
SELECT error_of($$ SELECT idempotency_forget('t', 'a', NULL) $$);
SELECT error_of($$ SELECT idempotency_forget('t', 'a', 'a key') $$);
SELECT error_of($$ SELECT idempotency_forget('t', NULL, 'k') $$);
SELECT error_of($$ SELECT idempotency_forget(E't\n', 'a', 'k') $$);
BEGIN READ ONLY;
SELECT error_of($$ SELECT idempotency_forget('t', 'a', 'k') $$);
COMMIT;

DROP EXTENSION idempotency;
