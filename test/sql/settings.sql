--
-- Settings: their defaults, their bounds, and who may change them
--
CREATE EXTENSION idempotency;
LOAD 'idempotency';

SELECT name, boot_val, unit, vartype, context, min_val, max_val, enumvals
FROM pg_settings WHERE name LIKE 'idempotency.%' ORDER BY name;
SELECT name FROM pg_settings
WHERE name LIKE 'idempotency.%' AND short_desc !~ '^[A-Z].*\.$';

-- what becomes of a value
CREATE FUNCTION try_setting(name text, value text) RETURNS text
LANGUAGE plpgsql AS $$
BEGIN
    RETURN set_config('idempotency.' || name, value, true);
EXCEPTION WHEN OTHERS THEN
    RETURN SQLSTATE;
END $$;

-- at the bounds and past them: refused, and never made to fit
SELECT name, value, try_setting(name, value) FROM (VALUES
    (1, 'max_ttl', '0'), (2, 'max_ttl', '1s'), (3, 'max_ttl', '366d'), (4, 'max_ttl', '31622401s'),
    (5, 'ttl', '299s'), (6, 'ttl', '300s'), (7, 'ttl', '0'), (8, 'ttl', '-1'), (9, 'ttl', '31622401s'),
    (10, 'error_ttl', '0'), (11, 'error_ttl', '1s'), (12, 'error_ttl', '31622401s'),
    (13, 'wait', '-1'), (14, 'wait', '0'), (15, 'wait', '1h'), (16, 'wait', '3600001ms'),
    (17, 'retry_after', '0'), (18, 'retry_after', '1s'), (19, 'retry_after', '1h'), (20, 'retry_after', '3601s'),
    (21, 'key_format', 'ascii'), (22, 'key_format', 'slug'), (23, 'key_format', 'uuid'), (24, 'key_format', 'any'), (25, 'key_format', ''),
    (26, 'key_min_length', '0'), (27, 'key_min_length', '1'), (28, 'key_min_length', '255'), (29, 'key_min_length', '256'),
    (30, 'key_max_length', '0'), (31, 'key_max_length', '1'), (32, 'key_max_length', '255'), (33, 'key_max_length', '256'),
    (34, 'max_response_size', '-1'), (35, 'max_response_size', '0'), (36, 'max_response_size', '256MB'), (37, 'max_response_size', '268435457B'),
    (38, 'commit_guard', 'maybe'), (39, 'commit_guard', 'off'), (40, 'commit_guard', 'on'),
    (41, 'sweep_batch_size', '0'), (42, 'sweep_batch_size', '1'), (43, 'sweep_batch_size', '1000000'), (44, 'sweep_batch_size', '1000001'),
    (45, 'max_tracked_claims', '100'), (46, 'no_such_setting', '1'),
    (52, 'min_ttl', '0'), (53, 'min_ttl', '-1'), (54, 'min_ttl', '366d'), (55, 'min_ttl', '31622401s'), (56, 'min_ttl', '1s'),
    (57, 'ttl', '0'), (58, 'ttl', '1s'), (59, 'ttl', '999ms'),
    (47, 'lease', '0'), (48, 'lease', '-1'), (49, 'lease', '1ms'), (50, 'lease', '72h'), (51, 'lease', '2147483648ms')
) v (n, name, value) ORDER BY n;

-- those of the configuration file, refused before they get there
\set VERBOSITY sqlstate
ALTER SYSTEM SET idempotency.sweep_interval = '99ms';
ALTER SYSTEM SET idempotency.sweep_interval = '86400001ms';
ALTER SYSTEM SET idempotency.worker = 'maybe';
-- and for no session to choose
SET idempotency.sweep_interval = '1h';
SET idempotency.worker = off;
\set VERBOSITY default

-- a lifetime is not above max_ttl
SHOW idempotency.max_ttl;
SET idempotency.ttl = '72h';
SET idempotency.ttl = '259201s';
\echo :SQLSTATE
SHOW idempotency.ttl;
SET idempotency.error_ttl = '72h';
SET idempotency.error_ttl = '259201s';
\echo :SQLSTATE
SET idempotency.lease = '72h';
SET idempotency.lease = '259200001ms';
\echo :SQLSTATE
SHOW idempotency.lease;
SET idempotency.max_ttl = '4d';
SET idempotency.ttl = '4d';
SET idempotency.ttl = '345601s';
\echo :SQLSTATE
RESET idempotency.ttl;
RESET idempotency.error_ttl;
SET idempotency.lease = '4d';
SET idempotency.lease = '345601s';
\echo :SQLSTATE
RESET idempotency.lease;
RESET idempotency.max_ttl;
-- nor, for an answer that is no error, below min_ttl
SHOW idempotency.min_ttl;
SET idempotency.ttl = '5min';
SET idempotency.ttl = '299s';
\echo :SQLSTATE
SET idempotency.error_ttl = '1s';
SET idempotency.min_ttl = '10s';
SET idempotency.ttl = '10s';
SET idempotency.ttl = '9s';
\echo :SQLSTATE
SHOW idempotency.ttl;
-- a bound that is changed later is known when it matters
SET idempotency.min_ttl = '11s';
SELECT idempotency_begin('t', 'a', 'k');
\echo :SQLSTATE
SET idempotency.min_ttl = '10s';
SET idempotency.max_ttl = '9s';
SELECT idempotency_begin('t', 'a', 'k');
\echo :SQLSTATE
RESET idempotency.max_ttl;
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k');
SELECT idempotency_finish('t', 'a', 'k');
SELECT outcome, expires_at - finished_at AS kept_for FROM idempotency_replay('t', 'a', 'k');
ROLLBACK;
RESET idempotency.ttl;
RESET idempotency.error_ttl;
RESET idempotency.min_ttl;
-- where it is the setting of a role or of the database, the bounds may be others
-- when it is used, so that is only said
ALTER DATABASE contrib_regression SET idempotency.ttl = '73h';
ALTER DATABASE contrib_regression RESET idempotency.ttl;
ALTER DATABASE contrib_regression SET idempotency.ttl = '299s';
ALTER DATABASE contrib_regression RESET idempotency.ttl;
ALTER DATABASE contrib_regression SET idempotency.lease = '73h';
ALTER DATABASE contrib_regression RESET idempotency.lease;
-- and a parallel worker takes settings over that suit each other, in any order
SET idempotency.max_ttl = '30d';
SET idempotency.error_ttl = '10d';
SET idempotency.ttl = '10min';
SET idempotency.min_ttl = '1s';
SET idempotency.ttl = '10s';
SET parallel_setup_cost = 0;
SET parallel_tuple_cost = 0;
SET min_parallel_table_scan_size = 0;
SELECT count(*) > 0 AS some FROM pg_attribute;
RESET min_parallel_table_scan_size;
RESET parallel_tuple_cost;
RESET parallel_setup_cost;
RESET idempotency.error_ttl;
RESET idempotency.ttl;
RESET idempotency.min_ttl;
RESET idempotency.max_ttl;

-- idempotency.retryable_status: good lists and bad ones
SELECT value, try_setting('retryable_status', value) FROM (VALUES
    (1, '408,409,425,429,5xx'), (2, '429'), (3, ''), (4, '  '), (5, ' 429 , 503 '), (6, '5XX'), (7, '4xx,5xx'), (8, '400'), (9, '599'),
    (10, '429,429'),
    (11, '399'), (12, '600'), (13, '200'), (14, '2xx'), (15, '3xx'), (16, '6xx'), (17, 'xxx'), (18, '42x'), (19, '4x9'), (20, '4290'),
    (21, '42'), (22, '-429'), (23, '429;503'), (24, '429 503'), (25, '429,'), (26, ',429'), (27, '429,,503'), (28, 'all'), (29, '4.9'),
    (30, '429,200')
) v (n, value) ORDER BY n;
SET idempotency.retryable_status = '429', '503';
SHOW idempotency.retryable_status;
SET idempotency.retryable_status = '5xx,200';
\echo :SQLSTATE
SET idempotency.retryable_status = '5xx,';
\echo :SQLSTATE
-- what was refused changed nothing
SHOW idempotency.retryable_status;
RESET idempotency.retryable_status;
SHOW idempotency.retryable_status;

-- a name that does not exist is refused
SET idempotency.time_to_live = '1h';
\echo :SQLSTATE

--
-- Who may change what
--
CREATE ROLE regress_idempotency_app;
SET ROLE regress_idempotency_app;
SELECT name, context, try_setting(name, setting || coalesce(unit, '')) AS result
FROM (SELECT substr(name, 13) AS name, setting, unit, context FROM pg_settings
      WHERE name LIKE 'idempotency.%') s
ORDER BY context, name;
SET idempotency.max_ttl = '100h';
\echo :SQLSTATE
SET idempotency.min_ttl = '1s';
\echo :SQLSTATE
SET idempotency.commit_guard = off;
\echo :SQLSTATE
SET idempotency.tenant = 'acme';
\echo :SQLSTATE
RESET idempotency.key_format;
\echo :SQLSTATE
RESET ROLE;
-- unless the administrator lets it
GRANT SET ON PARAMETER idempotency.commit_guard TO regress_idempotency_app;
SET ROLE regress_idempotency_app;
SELECT try_setting('commit_guard', 'off'), try_setting('key_format', 'slug');
RESET ROLE;
REVOKE SET ON PARAMETER idempotency.commit_guard FROM regress_idempotency_app;
DROP ROLE regress_idempotency_app;

-- for a transaction, and for a role that logs in
BEGIN;
SET LOCAL idempotency.ttl = '1h';
SHOW idempotency.ttl;
ROLLBACK;
SHOW idempotency.ttl;
CREATE ROLE regress_idempotency_login LOGIN;
ALTER ROLE regress_idempotency_login SET idempotency.ttl = '2h';
ALTER ROLE regress_idempotency_login SET idempotency.key_format = 'slug';
ALTER ROLE regress_idempotency_login SET idempotency.retryable_status = '4xx', '503';
SELECT current_user AS administrator \gset
\c - regress_idempotency_login
SHOW idempotency.ttl;
SHOW idempotency.key_format;
SHOW idempotency.retryable_status;
\c - :administrator
DROP ROLE regress_idempotency_login;

DROP FUNCTION try_setting;
DROP EXTENSION idempotency;
