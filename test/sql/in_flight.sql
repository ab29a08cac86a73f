--
-- Claims in flight, as everybody may know them
--
CREATE EXTENSION idempotency;
SET idempotency.retry_after = '90s';

-- the view, without what differs from run to run
CREATE VIEW in_flight AS
    SELECT pid = pg_backend_pid() AS mine, tenant, actor, action, key, attempt,
           started_at BETWEEN now() AND clock_timestamp() AS started_here, lease_expires_at
    FROM idempotency_in_flight;
SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute
WHERE attrelid = 'idempotency_in_flight'::regclass AND attnum > 0 ORDER BY attnum;
SELECT * FROM idempotency_in_flight;

BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'orders.create', 'k1', actor => 'user 1');
SELECT outcome FROM idempotency_begin(NULL, 'orders.cancel', 'k2', '{"a": 1}');
SELECT * FROM in_flight ORDER BY key;
-- a claim is in flight for others until the end of the transaction
SELECT idempotency_finish('acme', 'orders.create', 'k1', actor => 'user 1');
SELECT key FROM in_flight ORDER BY key;
-- unless it is released
SELECT idempotency_release(NULL, 'orders.cancel', 'k2');
SELECT key FROM in_flight ORDER BY key;
-- or goes with its savepoint
SAVEPOINT s;
SELECT outcome FROM idempotency_begin('acme', 'orders.create', 'k3');
SELECT key FROM in_flight ORDER BY key;
ROLLBACK TO s;
SELECT key FROM in_flight ORDER BY key;
-- a replay is not in flight
SELECT outcome FROM idempotency_begin('acme', 'orders.create', 'k1', actor => 'user 1');
COMMIT;
SELECT * FROM in_flight;
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'orders.create', 'k1', actor => 'user 1');
SELECT * FROM in_flight;
COMMIT;
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'orders.create', 'k3');
ROLLBACK;
SELECT * FROM in_flight;
-- a commit that is refused
SELECT outcome FROM idempotency_begin('acme', 'orders.create', 'k3');
\echo :SQLSTATE
SELECT * FROM in_flight;

-- begun twice in one transaction, once more in a savepoint
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'orders.create', 'k4', '{"a": 1}');
SAVEPOINT s;
SELECT idempotency_finish('acme', 'orders.create', 'k4', 503);
SELECT outcome FROM idempotency_begin('acme', 'orders.create', 'k4', '{"a": 2}');
SELECT key FROM in_flight;
SELECT idempotency_release('acme', 'orders.create', 'k4');
SELECT key FROM in_flight;
ROLLBACK TO s;
SELECT key FROM in_flight;
SELECT idempotency_finish('acme', 'orders.create', 'k4');
PREPARE TRANSACTION 'k4';
-- it is the first request that is in flight
SELECT outcome FROM idempotency_try_begin('acme', 'orders.create', 'k4', '{"a": 1}');
SELECT outcome FROM idempotency_try_begin('acme', 'orders.create', 'k4', '{"a": 2}');
ROLLBACK PREPARED 'k4';

--
-- A prepared transaction is no process
--
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'orders.create', 'k5', '{"a": 1}', 'user 1');
SELECT idempotency_finish('acme', 'orders.create', 'k5', actor => 'user 1');
PREPARE TRANSACTION 'k5';
SELECT pid, tenant, actor, action, key, attempt, lease_expires_at FROM idempotency_in_flight;
-- a repeat is told since when
SELECT r.outcome, r.attempt, r.created_at = i.started_at AS created
FROM idempotency_in_flight i,
     idempotency_try_begin('acme', 'orders.create', 'k5', '{"a": 1}', 'user 1') r;
COMMIT PREPARED 'k5';
SELECT * FROM idempotency_in_flight;
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'orders.create', 'k6', '{"a": 1}');
SELECT idempotency_finish('acme', 'orders.create', 'k6');
PREPARE TRANSACTION 'k6';
SELECT pid, key FROM idempotency_in_flight;
ROLLBACK PREPARED 'k6';
SELECT * FROM idempotency_in_flight;
SELECT used FROM idempotency_tracking();
-- what is left of it is not taken for the request of the next claim
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'orders.create', 'k6', '{"a": 1}');
SELECT idempotency_finish('acme', 'orders.create', 'k6');
PREPARE TRANSACTION 'k6';
ROLLBACK PREPARED 'k6';
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'orders.create', 'k6', '{"a": 2}');
SELECT mine, key FROM in_flight;
SELECT idempotency_finish('acme', 'orders.create', 'k6');
PREPARE TRANSACTION 'k6';
SELECT outcome FROM idempotency_try_begin('acme', 'orders.create', 'k6', '{"a": 2}');
SELECT outcome FROM idempotency_try_begin('acme', 'orders.create', 'k6', '{"a": 1}');
ROLLBACK PREPARED 'k6';

--
-- More claims than there is room for: they go on, and are counted
--
SELECT capacity, untracked FROM idempotency_tracking() \gset
SELECT :capacity;
BEGIN;
SELECT count(*) FILTER (WHERE outcome = 'started') AS started
FROM generate_series(1, 100) i, idempotency_begin('acme', 'many', 'k' || i, to_jsonb(i));
SELECT capacity, used, untracked - :untracked AS untracked FROM idempotency_tracking();
SELECT count(*) FROM in_flight;
SELECT count(*) FILTER (WHERE f = 'completed') AS completed
FROM generate_series(1, 100) i, idempotency_finish('acme', 'many', 'k' || i) f;
PREPARE TRANSACTION 'many';
-- all of them are in flight
SELECT outcome, retry_after, count(*), count(created_at) AS since_when_is_known
FROM generate_series(1, 100) i, idempotency_try_begin('acme', 'many', 'k' || i, to_jsonb(i))
GROUP BY outcome, retry_after;
-- a mismatch is told where the request is known
SELECT outcome, retry_after, count(*)
FROM generate_series(1, 100) i, idempotency_try_begin('acme', 'many', 'k' || i, '"different"')
GROUP BY outcome, retry_after ORDER BY outcome;
-- replay does not know of those that found no room
SELECT outcome, retry_after, count(*), count(created_at) AS since_when_is_known
FROM generate_series(1, 100) i, idempotency_replay('acme', 'many', 'k' || i, to_jsonb(i))
GROUP BY outcome, retry_after ORDER BY outcome;
-- an error without knowledge of the holder has no detail
SELECT key AS untracked_key FROM (SELECT 'k' || i FROM generate_series(1, 100) i) k (key)
WHERE key NOT IN (SELECT key FROM idempotency_in_flight) ORDER BY key LIMIT 1 \gset
SELECT idempotency_begin('acme', 'many', :'untracked_key');
\echo :SQLSTATE
SELECT untracked FROM idempotency_tracking() \gset
COMMIT PREPARED 'many';
SELECT outcome, count(*)
FROM generate_series(1, 100) i, idempotency_try_begin('acme', 'many', 'k' || i, '"different"')
GROUP BY outcome;
-- what a prepared transaction left behind makes room when it is needed
BEGIN;
SELECT count(*) FILTER (WHERE outcome = 'started') AS started
FROM generate_series(1, :capacity) i, idempotency_begin('acme', 'again', 'k' || i);
SELECT capacity, used, untracked - :untracked AS untracked FROM idempotency_tracking();
ROLLBACK;
SELECT used FROM idempotency_tracking();

DROP VIEW in_flight;
DROP EXTENSION idempotency;
