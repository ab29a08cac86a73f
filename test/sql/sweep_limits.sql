--
-- What ends a sweep before it is through
--
CREATE EXTENSION idempotency;

--
-- max_duration: no batch starts after it.  A thousand transactions do not fit
-- into a microsecond; how many do is left open.
--
INSERT INTO idempotency_key (tenant, action, key, actor, state, attempt, created_at, expires_at)
SELECT 't', 'old', 'k' || i, '', 'completed', 1, '2020-01-01', '2020-01-02'
FROM generate_series(1, 1000) i;
CALL idempotency_sweep(1, '1 us');
SELECT count(*) > 0 AS stopped,
       count(*) + (SELECT swept FROM idempotency_worker_status()) AS of_all
FROM idempotency_key;
-- the next one takes the rest
SELECT count(*) AS rest FROM idempotency_key \gset
CALL idempotency_sweep();
SELECT swept = :rest AS swept FROM idempotency_worker_status();
SELECT count(*) FROM idempotency_key;

DROP EXTENSION idempotency;
