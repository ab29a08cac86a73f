--
-- scenarios.sql
--    What the tests need beside the API: a handler that does what it is asked for,
--    functions that are wrong in one way each, and roles with settings.
--

CREATE ROLE serializable_user NOLOGIN IN ROLE web_user;
ALTER ROLE serializable_user SET default_transaction_isolation = 'serializable';

CREATE ROLE impatient_user NOLOGIN IN ROLE web_user;
ALTER ROLE impatient_user SET idempotency.wait = '1min';
ALTER ROLE impatient_user SET lock_timeout = '50ms';

CREATE ROLE patient_user NOLOGIN IN ROLE web_user;
ALTER ROLE patient_user SET idempotency.retry_after = '90s';

CREATE ROLE acme_user NOLOGIN IN ROLE web_user;
ALTER ROLE acme_user SET idempotency.tenant = 'acme';

GRANT serializable_user, impatient_user, patient_user, acme_user TO authenticator;

-- An authenticator whose requests are all of one tenant
CREATE ROLE acme_authenticator LOGIN NOINHERIT;
ALTER ROLE acme_authenticator SET idempotency.tenant = 'acme';
GRANT anon, web_user TO acme_authenticator;

GRANT EXECUTE ON FUNCTION idempotency.idempotency_begin TO api_owner;

SET ROLE api_owner;

-- One row for each time that a handler ran and was committed
CREATE TABLE private.runs (key text NOT NULL);

CREATE FUNCTION private.scenario(request jsonb) RETURNS idempotency.idempotency_response
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    answer idempotency.idempotency_response;
BEGIN
    INSERT INTO private.runs VALUES (private.sent_key());
    answer.status_code := coalesce((request->>'status')::int, 200);
    answer.response := '{"done":true}';

    CASE request->>'do'
    WHEN 'answer' THEN
        NULL;
    WHEN 'answer with a text as it is' THEN
        answer.response := E'{"b" :  1,"a":[ ], "big":9007199254740993, "text":"\\u00e4 ä"}';
    WHEN 'answer nothing' THEN
        answer.response := NULL;
    WHEN 'answer bytes' THEN
        answer.response := NULL;
        answer.headers := '{"content-type": "image/png"}';
        answer.body := '\x89504e470d0a1a0a00ff';
    WHEN 'answer with a type of JSON' THEN
        answer.headers := '{"content-type": "application/problem+json"}';
    WHEN 'answer with headers' THEN
        answer.headers := '{"Location": "/1", "X-Count": 3, "Link": ["</1>", "</2>"], "X-None": null}';
        PERFORM set_config('response.headers', '[{"Set-Cookie": "a=1"}]', true);
    WHEN 'return null' THEN
        RETURN NULL;
    WHEN 'answer too much' THEN
        answer.response := to_json(repeat('x', 1024 * 1024));
    WHEN 'answer for too short a time' THEN
        answer.ttl := '1 second';
    WHEN 'raise' THEN
        RAISE EXCEPTION USING ERRCODE = request->>'state', MESSAGE = 'raised', DETAIL = 'on request', HINT = 'ask for less';
    WHEN 'call what is not there' THEN
        EXECUTE 'SELECT private.there_is_no_such_function()';
    WHEN 'begin this request' THEN
        PERFORM idempotency.idempotency_begin(private.login('tenant'), 'test.scenario', private.sent_key(),
                                              actor => private.login('sub'));
    WHEN 'begin another request' THEN
        PERFORM idempotency.idempotency_begin(private.login('tenant'), 'test.other', private.sent_key());
    WHEN 'lock two accounts' THEN
        PERFORM FROM private.accounts WHERE id = request->>'first' FOR UPDATE;
        PERFORM pg_advisory_xact_lock(14, hashtext(request->>'first'));
        PERFORM FROM private.accounts WHERE id = request->>'second' FOR UPDATE;
    WHEN 'lock without waiting' THEN
        PERFORM FROM private.accounts WHERE id = request->>'account' FOR UPDATE NOWAIT;
    END CASE;
    RETURN answer;
END
$$;

CREATE FUNCTION api.scenario(json) RETURNS json
LANGUAGE sql SECURITY DEFINER
RETURN private.protect('test.scenario', 'private.scenario(jsonb)', $1);

CREATE FUNCTION api.scenario_bytes(json) RETURNS api."*/*"
LANGUAGE sql SECURITY DEFINER
RETURN private.protect_bytes('test.scenario', 'private.scenario(jsonb)', $1);

CREATE FUNCTION api.scenario_that_is_stable(json) RETURNS json
LANGUAGE sql STABLE SECURITY DEFINER
RETURN private.protect('test.scenario', 'private.scenario(jsonb)', $1);

CREATE FUNCTION api.scenario_without_action(json) RETURNS json
LANGUAGE sql SECURITY DEFINER
RETURN private.protect(NULL, 'private.scenario(jsonb)', $1);

CREATE FUNCTION api.scenario_of_another_shape(json) RETURNS json
LANGUAGE sql SECURITY DEFINER
RETURN private.protect('test.scenario', 'pg_catalog.lower(text)', $1);

-- The same error without a wrapper
CREATE FUNCTION api.raise(json) RETURNS json
LANGUAGE plpgsql SECURITY DEFINER
AS $$
BEGIN
    RAISE EXCEPTION USING ERRCODE = $1->>'state', MESSAGE = 'raised';
END
$$;

GRANT EXECUTE ON FUNCTION api.scenario, api.scenario_bytes, api.scenario_that_is_stable,
    api.scenario_without_action, api.scenario_of_another_shape, api.raise TO web_user;

RESET ROLE;
