--
-- roles.sql
--    The roles that PostgREST uses, and the role that owns the API.
--
-- Run it as a superuser.  Roles belong to the whole server, so those that are
-- there already are taken as they are.
--
-- PostgREST logs in as authenticator and becomes web_user for a request with a
-- log-in, anon for one without.  Neither has any right on the extension or on a
-- table: whoever may call the functions of the extension can get any answer whose
-- scope he can name.  What web_user may call is in the schema api.  Those
-- functions are SECURITY DEFINER and belong to api_owner, which has the rights
-- that they need and cannot log in.
--

DO $$
BEGIN
    IF to_regrole('authenticator') IS NULL THEN
        CREATE ROLE authenticator LOGIN NOINHERIT;
    END IF;
    IF to_regrole('anon') IS NULL THEN
        CREATE ROLE anon NOLOGIN;
    END IF;
    IF to_regrole('web_user') IS NULL THEN
        CREATE ROLE web_user NOLOGIN;
    END IF;
    IF to_regrole('api_owner') IS NULL THEN
        CREATE ROLE api_owner NOLOGIN;
    END IF;
END
$$;
GRANT anon, web_user TO authenticator;

-- What is exposed, which is all that db-schemas of PostgREST names
CREATE SCHEMA api AUTHORIZATION api_owner;
GRANT USAGE ON SCHEMA api TO anon, web_user;

-- What is not: the wrapper, the handlers and the tables
CREATE SCHEMA private AUTHORIZATION api_owner;

-- Otherwise everybody may execute each new function
ALTER DEFAULT PRIVILEGES FOR ROLE api_owner REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC;

GRANT USAGE ON SCHEMA idempotency TO api_owner;
GRANT EXECUTE ON FUNCTION idempotency.idempotency_try_run, idempotency.idempotency_replay TO api_owner;
GRANT USAGE ON TYPE idempotency.idempotency_result, idempotency.idempotency_response TO api_owner;
