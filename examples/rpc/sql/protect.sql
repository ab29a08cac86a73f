--
-- protect.sql
--    Idempotency for functions that PostgREST exposes.  Copy it as it is.
--
-- An exposed function has one parameter without a name, of type json, which
-- PostgREST gives it the body of the request in, as it was sent.  It hands it to
-- private.protect, with the name of the operation and the handler that does it:
--
--     CREATE FUNCTION api.create_payment(json) RETURNS json
--     LANGUAGE sql SECURITY DEFINER
--     RETURN private.protect('payments.create', 'private.create_payment(jsonb)', $1);
--
-- The wrapper finds the rest in the settings that PostgREST makes for each
-- transaction: the key in the header Idempotency-Key, the tenant and the actor in
-- the log-in, as claims of the token.  It has idempotency_try_run begin the
-- request, call the handler and store its answer, and tells PostgREST the status
-- and the headers of the answer, which may be a replay, by settings as well.
--
-- What ends well, and how:
--
-- * PostgREST runs each request in a transaction of its own.  It commits it unless
--   there was an error, whatever the status is.  So an answer of 402 is kept, as
--   the function returns; that what the handler did before is undone is up to the
--   handler, by a block with EXCEPTION around it.
--
-- * A request that must not be answered from its record (no key, in flight, a
--   mismatch) ends with an error, SQLSTATE PGRST, in which PostgREST finds status,
--   headers and body.  So nothing of it is left, nor of a pre-request function.
--
-- * PostgREST knows the SQLSTATEs of PostgreSQL but not those of the extension,
--   which it all answers with 400.  The wrapper catches errors, and raises those
--   again as they are that PostgREST answers well.  To catch an error is a
--   savepoint: when the handler fails, the claim goes with all that it did, and
--   when it succeeds, the record stays, as the savepoint is released.  It costs a
--   request that writes one more transaction id.
--
-- * What fails at COMMIT is too late for every function: deferred constraints, a
--   serialization failure, and ID006, if a handler begins a request by itself and
--   does not finish it.  Nothing is left then, but PostgREST chooses the status.
--
-- All functions say where they look for names, or have a body that was parsed
-- when they were created.  So nobody's search_path makes them run something else.
--
-- Needs PostgREST 12 or later, for errors with headers and for answers that are
-- not JSON.  Run it as a superuser, after roles.sql.
--

SET ROLE api_owner;

--
-- The request
--

-- A setting, or null.  A setting of an earlier transaction is left as ''.
CREATE FUNCTION private.setting(name text) RETURNS text
LANGUAGE sql STABLE
RETURN nullif(current_setting(name, true), '');

-- Ends the request with an answer of PostgREST's own form, and undoes all it did.
--
-- status    the HTTP status
-- code      what a program can tell the errors apart by, such as a SQLSTATE
-- message, details, hint
--           texts for people; the latter two may be null
-- headers   a JSON object, whose values are texts
--
-- Raises PGRST.  The forms of its message and its detail are PostgREST's:
-- https://docs.postgrest.org/en/stable/references/errors.html
CREATE FUNCTION private.refuse(status int, code text, message text, details text = NULL,
                               hint text = NULL, headers json = '{}') RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RAISE SQLSTATE 'PGRST' USING
        MESSAGE = json_build_object('code', code, 'message', message, 'details', details, 'hint', hint),
        DETAIL = json_build_object('status', status, 'headers', headers);
END
$$;

-- What the log-in says, by the name of a claim of the token: tenant, or sub for the
-- user.  Both are never taken from the body, in which anybody can write anything.
-- One that is missing is refused with 403, for without a tenant all would share
-- the global one.
CREATE FUNCTION private.login(name text) RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    value text := private.setting('request.jwt.claims')::json ->> name;
BEGIN
    IF value IS NULL OR value = '' THEN
        PERFORM private.refuse(403, '42501', format('the log-in has no "%s"', name));
    END IF;
    RETURN value;
END
$$;

-- The key of the request, from the header Idempotency-Key.  White space around it
-- does not count, nor do the quotes that the IETF draft asks for.  A key with a
-- comma is refused: servers join a header that is sent twice with one.  PostgREST
-- itself takes the last of the two, and nothing tells.
CREATE FUNCTION private.sent_key() RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    sent text := btrim(private.setting('request.headers')::json ->> 'idempotency-key', E' \t');
    key text := btrim(coalesce(substring(sent FROM '^"(.*)"$'), sent), E' \t');
BEGIN
    IF key IS NULL OR key = '' THEN
        PERFORM private.refuse(400, 'ID001', 'the header Idempotency-Key is missing', hint =>
            'Send a new random key with each operation, and the same one when you repeat it.');
    ELSIF strpos(key, ',') > 0 THEN
        PERFORM private.refuse(400, 'ID002', 'the header Idempotency-Key was sent more than once', hint =>
            'A key must not have a comma.');
    END IF;
    RETURN key;
END
$$;

--
-- The answer
--

-- The headers of an answer in the form of response.headers: an array of objects
-- with one text each.  A header with several values is there several times.
-- PostgREST reads the setting after COMMIT, when it is too late to refuse
-- another form, and would answer each repeat with 500 as well.
CREATE FUNCTION private.header_list(headers jsonb) RETURNS jsonb
LANGUAGE sql IMMUTABLE
RETURN (
    SELECT coalesce(jsonb_agg(jsonb_build_object(name, value)), '[]')
    FROM jsonb_each(headers) AS header (name, sent)
    CROSS JOIN jsonb_array_elements_text(
        CASE jsonb_typeof(sent) WHEN 'array' THEN sent ELSE jsonb_build_array(sent) END) AS value
    WHERE value IS NOT NULL
);

-- Tells PostgREST the status and the headers of an answer, and marks a replay.
-- Headers that are set already stay: those of a pre-request function, and those
-- that a handler sets for the first answer alone, such as a cookie.
CREATE FUNCTION private.tell(answer idempotency.idempotency_result) RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    headers jsonb := coalesce(private.setting('response.headers')::jsonb, '[]')
                     || private.header_list(answer.headers);
BEGIN
    IF answer.response IS NOT NULL
       AND NOT EXISTS (SELECT FROM jsonb_object_keys(answer.headers) AS name WHERE lower(name) = 'content-type') THEN
        headers := headers || '[{"Content-Type": "application/json; charset=utf-8"}]';
    END IF;
    IF answer.outcome = 'replayed' THEN
        headers := headers || '[{"Idempotent-Replayed": "true"}]';
    END IF;
    PERFORM set_config('response.status', answer.status_code::text, true),
            set_config('response.headers', headers::text, true);
END
$$;

-- The bytes of an answer, be it JSON or not.
CREATE FUNCTION private.bytes(answer idempotency.idempotency_result) RETURNS bytea
LANGUAGE sql STABLE
RETURN coalesce(answer.body, convert_to(answer.response::text, 'UTF8'), '');

--
-- Errors
--

-- The HTTP status for an error, where PostgREST by itself would choose a wrong
-- one; else null.  The reasons stand in docs/http.md.  Who raised the error is not
-- known: a handler that wants to say "bad request" returns an answer that says so,
-- or raises PT400, and not, say, 22023.
CREATE FUNCTION private.http_status(state text) RETURNS int
LANGUAGE sql IMMUTABLE
RETURN CASE
    WHEN state IN ('ID003', 'ID005') THEN 409
    WHEN state = 'ID004' THEN 422
    WHEN state IN ('ID007', 'ID008', '22004', '22023', '42809', '42883') THEN 500
    WHEN state IN ('40001', '40P01', '55P03', '57014') THEN 503
END;

-- After how many seconds a repeat may help, as headers: for 409 and 503, with the
-- time of the hint if it has one.
CREATE FUNCTION private.retry_after(status int, hint text) RETURNS json
LANGUAGE sql IMMUTABLE
RETURN CASE
    WHEN status IN (409, 503) THEN json_build_object('Retry-After', coalesce(substring(hint FROM '([0-9]+) s'), '1'))
    ELSE '{}'::json
END;

--
-- The wrapper
--

-- Runs a request once, or gets its answer, and tells PostgREST status and headers.
--
-- action    the operation.  It is a constant, and not request.path, which comes as
--           the client has spelled it: /rpc/create%5Fpayment is the same function,
--           and would be another operation.
-- handler   see docs/handlers.md
-- request   the body; it must be an object, as PostgREST makes [] of a number, a
--           text, or an array of such, and all of these would be the same request
--
-- Returns the answer, with the outcome completed, errored, released or replayed.
-- Raises PGRST with 400 for the key or the body, 403 for the log-in, 409 for a
-- request in flight, 422 for a mismatch, and as http_status says; else what the
-- handler raises.
CREATE FUNCTION private.answer(action text, handler regprocedure, request json)
RETURNS idempotency.idempotency_result
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    tenant text := private.login('tenant');
    actor text := private.login('sub');
    key text := private.sent_key();
    answer idempotency.idempotency_result;
    status int;
    details text;
    hint text;
BEGIN
    IF json_typeof(request) IS DISTINCT FROM 'object' THEN
        PERFORM private.refuse(400, '22P02', 'the body of the request is not a JSON object');
    END IF;

    BEGIN
        answer := idempotency.idempotency_try_run(tenant, action, key, request::jsonb, handler, actor);
    EXCEPTION WHEN OTHERS OR query_canceled THEN
        status := private.http_status(SQLSTATE);
        IF status IS NULL THEN
            RAISE;
        END IF;
        GET STACKED DIAGNOSTICS details = PG_EXCEPTION_DETAIL, hint = PG_EXCEPTION_HINT;
        PERFORM private.refuse(status, SQLSTATE, SQLERRM, nullif(details, ''), nullif(hint, ''),
                               private.retry_after(status, hint));
    END;

    IF answer.outcome = 'in_flight' THEN
        PERFORM private.refuse(409, 'ID003', 'a request with this idempotency key is in flight', NULL,
            format('Send it again in %s s.', answer.retry_after),
            json_build_object('Retry-After', answer.retry_after::text));
    ELSIF answer.outcome = 'mismatched' THEN
        PERFORM private.refuse(422, 'ID004', 'the idempotency key was used with a different request', hint =>
            'Send a new key with each new operation.');
    END IF;

    PERFORM private.tell(answer);
    RETURN answer;
END
$$;

-- For handlers whose answers are JSON; the body is the text of the answer, byte for
-- byte.  Arguments and errors are those of private.answer, and 39000 if the answer
-- is not JSON.
CREATE FUNCTION private.protect(action text, handler regprocedure, request json) RETURNS json
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    answer idempotency.idempotency_result := private.answer(action, handler, request);
BEGIN
    IF answer.body IS NOT NULL THEN
        RAISE external_routine_invocation_exception USING
            MESSAGE = format('the answer of %s is not JSON', handler),
            HINT = 'Protect it with private.protect_bytes.';
    END IF;
    RETURN answer.response;
END
$$;

-- For handlers whose answers are of any type, which their header Content-Type
-- says.  The exposed function returns api."*/*".  Arguments and errors are those
-- of private.answer.
CREATE FUNCTION private.protect_bytes(action text, handler regprocedure, request json) RETURNS bytea
LANGUAGE sql
RETURN private.bytes(private.answer(action, handler, request));

-- What PostgREST takes for an answer of any media type, so it sends it as it is.
CREATE DOMAIN api."*/*" AS bytea;

--
-- Looking at a request
--

-- GET /rpc/request_status?action=...&key=...: what became of a request of this user.
--
-- Its answer, marked as a replay; 202 with Retry-After while it is at work or
-- stalled; 404 where nothing is known.  It claims nothing, so it may be STABLE, and
-- PostgREST runs it in a transaction that is read-only.
CREATE FUNCTION api.request_status(action text, key text) RETURNS api."*/*"
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    answer idempotency.idempotency_result := idempotency.idempotency_replay(
        private.login('tenant'), action, key, actor => private.login('sub'));
BEGIN
    IF answer.outcome IS NULL THEN
        PERFORM private.refuse(404, 'P0002', 'nothing is known of this request');
    ELSIF answer.outcome <> 'replayed' THEN
        answer.status_code := 202;
        answer.headers := jsonb_build_object('Retry-After', answer.retry_after);
        answer.response := json_build_object('outcome', answer.outcome, 'created_at', answer.created_at);
    END IF;
    PERFORM private.tell(answer);
    RETURN private.bytes(answer);
END
$$;
COMMENT ON FUNCTION api.request_status IS 'What became of a request, by its operation and its idempotency key.';
GRANT EXECUTE ON FUNCTION api.request_status TO web_user;

RESET ROLE;
