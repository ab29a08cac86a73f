--
-- What the other tests share
--
-- This one comes first, whichever others are run, and leaves all of it behind, in
-- public.  None of it belongs to the extension or depends on it, for each test
-- creates and drops an extension of its own.
--
-- so that a failure cannot become a wait without end
ALTER DATABASE contrib_regression SET statement_timeout = '2min';

-- the id of a claim, by a number
CREATE FUNCTION claim_of(number int) RETURNS uuid LANGUAGE sql IMMUTABLE AS
$$ SELECT lpad(number::text, 32, '0')::uuid $$;

-- Errors as text, without how long a claim was held, and how long its lease will
-- last.  What is told when no lease is known is a setting, and stays.
CREATE FUNCTION error_of(statement text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    message text;
    detail text;
    hint text;
BEGIN
    EXECUTE statement;
    RETURN 'no error';
EXCEPTION WHEN OTHERS THEN
    GET STACKED DIAGNOSTICS message = MESSAGE_TEXT,
        detail = PG_EXCEPTION_DETAIL, hint = PG_EXCEPTION_HINT;
    RETURN concat_ws(E'\n', SQLSTATE, message,
                     nullif(regexp_replace(detail, '\d+\.\d{3} s', 'N s'), ''),
                     nullif(regexp_replace(hint, 'Retry after \d{3,} s', 'Retry after N s'), ''));
END $$;

-- how many claims hold their lock, in this session
CREATE FUNCTION locks() RETURNS bigint LANGUAGE sql VOLATILE AS
$$ SELECT count(*) FROM pg_locks WHERE locktype = 'userlock' AND pid = pg_backend_pid() $$;

-- a handler that anybody may use
CREATE FUNCTION echo(request jsonb) RETURNS jsonb LANGUAGE sql AS 'SELECT request';

-- the table of records is looked for when these are called
SET check_function_bodies = off;
-- lets every lease run out
CREATE PROCEDURE run_out() LANGUAGE sql AS
$$ UPDATE idempotency_key SET lease_expires_at = clock_timestamp() WHERE lease_expires_at IS NOT NULL $$;
-- how many pieces of answers and states are stored out of line
CREATE FUNCTION chunks() RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    result bigint;
BEGIN
    EXECUTE (SELECT format('SELECT count(*) FROM %s', reltoastrelid::regclass)
             FROM pg_class WHERE oid = 'idempotency_key'::regclass) INTO result;
    RETURN result;
END $$;
