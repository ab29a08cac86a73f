--
-- Scheduling the sweep where pg_cron is not loaded, whether or not it is
-- installed; test/t/022_cron.pl is about one that is loaded
--
CREATE SCHEMA idem;
CREATE EXTENSION idempotency SCHEMA idem;
SET search_path = idem;

SELECT idempotency_schedule();
\echo :SQLSTATE
SELECT idempotency_schedule(schedule => '*/5 * * * *');
\echo :SQLSTATE
SELECT idempotency_unschedule();
\echo :SQLSTATE
SELECT idempotency_schedule(NULL);
\echo :SQLSTATE

-- a setting that nobody reads says nothing of where pg_cron is
SELECT set_config('cron.database_name', current_database(), false) = current_database() AS set;
SELECT idempotency_schedule();
\echo :SQLSTATE
SET cron.database_name = 'elsewhere';
SELECT idempotency_unschedule();
\echo :SQLSTATE

-- nor does a schema with the name of its schema
CREATE SCHEMA cron;
CREATE TABLE cron.job (jobid bigint, jobname text, username text, database text, active boolean);
INSERT INTO cron.job VALUES (1, 'idempotency sweep', current_user, current_database(), true);
CREATE FUNCTION cron.schedule(text, text, text) RETURNS bigint LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'trapped: schedule'; END $$;
CREATE FUNCTION cron.unschedule(bigint) RETURNS boolean LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'trapped: unschedule'; END $$;
SET search_path = cron, idem;
SELECT idempotency_schedule();
\echo :SQLSTATE
SELECT idempotency_unschedule();
\echo :SQLSTATE
SELECT count(*) FROM cron.job;
RESET search_path;
RESET cron.database_name;

-- a role with the right to schedule is told the same
CREATE ROLE regress_idempotency_sweeper;
GRANT USAGE ON SCHEMA idem TO regress_idempotency_sweeper;
SET ROLE regress_idempotency_sweeper;
SELECT idem.idempotency_schedule();
\echo :SQLSTATE
SELECT idem.idempotency_unschedule();
\echo :SQLSTATE
RESET ROLE;
GRANT EXECUTE ON FUNCTION idem.idempotency_schedule, idem.idempotency_unschedule TO regress_idempotency_sweeper;
SET ROLE regress_idempotency_sweeper;
SELECT idem.idempotency_schedule();
\echo :SQLSTATE
SELECT idem.idempotency_unschedule();
\echo :SQLSTATE
RESET ROLE;

\c -
SET client_min_messages = warning;
DROP SCHEMA cron CASCADE;
DROP EXTENSION idempotency;
DROP SCHEMA idem;
DROP ROLE regress_idempotency_sweeper;
