--
-- retry_after grows with the time that the claim was held
--
CREATE EXTENSION idempotency;
SHOW idempotency.retry_after;

BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k', '{"a": 1}');
SELECT idempotency_finish('t', 'a', 'k');
PREPARE TRANSACTION 'held';
-- held for more than two seconds: three at least, in whole seconds, and never
-- more than a minute
SELECT pg_sleep(2.1);
SELECT outcome, retry_after BETWEEN interval '3 s' AND interval '60 s' AS as_long_as_held,
       retry_after = date_trunc('second', retry_after) AS whole
FROM idempotency_try_begin('t', 'a', 'k', '{"a": 1}');
-- the hint of the error says the same
DO $$
DECLARE
    hint text;
BEGIN
    PERFORM idempotency_begin('t', 'a', 'k', '{"a": 1}');
EXCEPTION WHEN SQLSTATE 'ID003' THEN
    GET STACKED DIAGNOSTICS hint = PG_EXCEPTION_HINT;
    RAISE NOTICE '%', substring(hint FROM '\d+')::int BETWEEN 3 AND 60;
END $$;
-- it is the setting when that is longer, also beyond a minute
SET idempotency.retry_after = '2min';
SELECT outcome, retry_after FROM idempotency_try_begin('t', 'a', 'k', '{"a": 1}');
ROLLBACK PREPARED 'held';

DROP EXTENSION idempotency;
