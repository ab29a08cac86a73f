--
-- retry_after, in whole seconds: the rest of a lease, rounded up, and otherwise
-- it grows with the time that the claim was held
--
CREATE EXTENSION idempotency;
SHOW idempotency.retry_after;

BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k', '{"a": 1}');
SELECT idempotency_finish('t', 'a', 'k');
PREPARE TRANSACTION 'held';
-- held for more than two seconds: three at least, and never more than a minute
SELECT pg_sleep(2.1);
SELECT outcome, retry_after BETWEEN 3 AND 60 AS as_long_as_held
FROM idempotency_try_begin('t', 'a', 'k', '{"a": 1}');
SELECT outcome, retry_after BETWEEN 3 AND 60 AS as_long_as_held
FROM idempotency_replay('t', 'a', 'k', '{"a": 1}');
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
SELECT outcome, retry_after FROM idempotency_replay('t', 'a', 'k', '{"a": 1}');
ROLLBACK PREPARED 'held';

-- of a lease it is the rest, rounded up, whatever the setting
SELECT outcome FROM idempotency_begin('t', 'a', 'leased', lease => '1 h');
CREATE FUNCTION rest_of(lease interval, OUT outcome text, OUT rounded_up boolean, OUT replayed boolean, OUT hinted boolean)
LANGUAGE plpgsql AS $$
DECLARE
    ends timestamptz := clock_timestamp() + lease;
    at_most int := ceil(extract(epoch FROM lease));
    at_least int;
    told int;
    told_by_replay int;
    hint text;
BEGIN
    UPDATE idempotency_key SET lease_expires_at = ends;
    SELECT r.outcome, r.retry_after INTO outcome, told FROM idempotency_try_begin('t', 'a', 'leased') r;
    SELECT r.retry_after INTO told_by_replay FROM idempotency_replay('t', 'a', 'leased') r;
    BEGIN
        PERFORM idempotency_begin('t', 'a', 'leased');
    EXCEPTION WHEN SQLSTATE 'ID003' THEN
        GET STACKED DIAGNOSTICS hint = PG_EXCEPTION_HINT;
    END;
    at_least := ceil(extract(epoch FROM ends - clock_timestamp()));
    rounded_up := told BETWEEN at_least AND at_most;
    replayed := told_by_replay BETWEEN at_least AND at_most;
    hinted := substring(hint FROM '\d+')::int BETWEEN at_least AND at_most;
END $$;
SELECT lease, r.* FROM unnest('{59.1 s,1 h,1 h 0.9 s,71 h}'::interval[]) lease, rest_of(lease) r;
DROP FUNCTION rest_of;

DROP EXTENSION idempotency;
