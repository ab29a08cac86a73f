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
CREATE TABLE swept (n bigint);
DO $$
DECLARE
    swept bigint;
BEGIN
    CALL idempotency_sweep(1, interval '1 us', swept);
    INSERT INTO swept VALUES (swept);
END $$;
SELECT n < 1000 AS stopped, n + (SELECT count(*) FROM idempotency_key) AS of_all FROM swept;
-- the next one takes the rest
DO $$
DECLARE
    swept bigint;
BEGIN
    CALL idempotency_sweep(NULL, NULL, swept);
    INSERT INTO swept VALUES (swept);
END $$;
SELECT sum(n) FROM swept;
SELECT count(*) FROM idempotency_key;

DROP TABLE swept;
DROP EXTENSION idempotency;
