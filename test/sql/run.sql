--
-- The whole exchange in one call
--
CREATE EXTENSION idempotency;
\set SHOW_CONTEXT never

-- what handlers have done
CREATE TABLE payment (n int GENERATED ALWAYS AS IDENTITY, request jsonb);

CREATE FUNCTION pay(request jsonb) RETURNS json LANGUAGE plpgsql AS $$
DECLARE
    payment payment;
BEGIN
    INSERT INTO payment (request) VALUES (pay.request) RETURNING * INTO payment;
    RETURN json_build_object('paid', payment.request -> 'amount');
END $$;

--
-- Once, and the answer from then on
--
SELECT clock_timestamp() AS before \gset
\x on
SELECT outcome, status_code, response, headers, body, attempt, recovery_point, recovery_state, retry_after,
       created_at BETWEEN :'before' AND clock_timestamp() AS created_now,
       finished_at BETWEEN created_at AND clock_timestamp() AS finished_later,
       expires_at - finished_at AS kept_for
FROM idempotency_run('acme', 'pay', 'k1', '{"amount": 1}', 'pay(jsonb)', 'user 1');
SELECT tenant, action, key, actor, state, request_hash = idempotency_request_hash('{"amount": 1}') AS hash_of_request,
       status_code, headers, response, body, attempt, recovery_point, recovery_state, lease_expires_at, ttl
FROM idempotency_key;
SELECT r.outcome, r.status_code, r.response, r.headers, r.body, r.attempt, r.recovery_point, r.recovery_state, r.retry_after,
       r.created_at = k.created_at AS created, r.finished_at = k.finished_at AS finished, r.expires_at = k.expires_at AS expires
FROM idempotency_run('acme', 'pay', 'k1', '{"amount": 1}', 'pay(jsonb)', 'user 1') r, idempotency_key k;
\x off
SELECT locks();
SELECT request FROM payment;
-- it is the same record as that of begin and finish
SELECT outcome, response FROM idempotency_begin('acme', 'pay', 'k1', '{"amount": 1}', 'user 1');
SELECT outcome, response FROM idempotency_replay('acme', 'pay', 'k1', '{"amount": 1}', 'user 1');
BEGIN;
SELECT outcome FROM idempotency_begin('acme', 'pay', 'k2', '{"amount": 2}');
SELECT idempotency_finish('acme', 'pay', 'k2', 201, '"by hand"');
COMMIT;
SELECT outcome, status_code, response FROM idempotency_run('acme', 'pay', 'k2', '{"amount": 2}', 'pay(jsonb)');
-- a different request
SELECT error_of($$ SELECT idempotency_run('acme', 'pay', 'k2', '{"amount": 3}', 'pay(jsonb)') $$);
-- another scope
SELECT outcome FROM idempotency_run('acme', 'pay', 'k1', '{"amount": 1}', 'pay(jsonb)');
SELECT outcome FROM idempotency_run(NULL, 'pay', 'k1', '{"amount": 1}', 'pay(jsonb)', 'user 1');
-- by name, and many in one statement
SELECT outcome, response FROM idempotency_run(handler => 'pay(jsonb)', request => '{"amount": 4}', key => 'k4', action => 'pay', tenant => 'acme');
SELECT i, outcome, response
FROM generate_series(1, 3) i, idempotency_run('acme', 'pay', 'many' || i % 2, to_jsonb(0), 'pay(jsonb)') ORDER BY i;
SELECT count(*) FROM payment;
TRUNCATE payment, idempotency_key;

--
-- Handlers of each shape
--
CREATE SCHEMA h;
CREATE FUNCTION h.sql_json(jsonb) RETURNS json LANGUAGE sql AS $$ SELECT '{"b":  1, "a": 2}'::json $$;
CREATE FUNCTION h.sql_jsonb(jsonb) RETURNS jsonb LANGUAGE sql AS $$ SELECT '{"b":  1, "a": 2}'::jsonb $$;
CREATE FUNCTION h.sql_response(jsonb) RETURNS idempotency_response LANGUAGE sql AS
$$ SELECT 201, '{"Location": "/1"}'::jsonb, '{"b":  1, "a": 2}'::json, NULL::bytea, NULL::interval $$;
CREATE FUNCTION h.sql_row(jsonb) RETURNS idempotency_response LANGUAGE sql AS
$$ SELECT (201, '{"Location": "/1"}', '{"b":  1, "a": 2}', NULL, NULL)::idempotency_response $$;
CREATE FUNCTION h.sql_atomic(request jsonb) RETURNS jsonb LANGUAGE sql IMMUTABLE BEGIN ATOMIC
    SELECT request || '{"done": true}';
END;
CREATE FUNCTION h.plpgsql_json(request jsonb) RETURNS json LANGUAGE plpgsql AS $$ BEGIN RETURN '{"b":  1, "a": 2}'; END $$;
CREATE FUNCTION h.plpgsql_jsonb(request jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$ BEGIN RETURN request; END $$;
CREATE FUNCTION h.plpgsql_response(request jsonb) RETURNS idempotency_response LANGUAGE plpgsql AS $$
DECLARE
    result idempotency_response;
BEGIN
    result.status_code := 202;
    result.response := to_json(request);
    RETURN result;
END $$;
CREATE FUNCTION h.plpgsql_row(request jsonb) RETURNS idempotency_response LANGUAGE plpgsql AS
$$ BEGIN RETURN (200, NULL::jsonb, NULL::json, NULL::bytea, NULL::interval); END $$;
CREATE FUNCTION h.with_body(jsonb) RETURNS idempotency_response LANGUAGE sql AS
$$ SELECT 203, '{"Content-Type": "image/png"}'::jsonb, NULL::json, '\x89504e47'::bytea, NULL::interval $$;
CREATE FUNCTION h.out_parameter(request jsonb, OUT json) LANGUAGE sql AS $$ SELECT '"out"'::json $$;
CREATE FUNCTION h.c_function(jsonb) RETURNS jsonb LANGUAGE internal IMMUTABLE STRICT AS 'jsonb_strip_nulls';
CREATE FUNCTION h.stable_function(jsonb) RETURNS jsonb LANGUAGE sql STABLE AS $$ SELECT to_jsonb(count(*)) FROM payment $$;
CREATE FUNCTION h.with_setting(jsonb) RETURNS jsonb LANGUAGE sql SET work_mem = '123kB' AS
$$ SELECT to_jsonb(current_setting('work_mem')) $$;
CREATE FUNCTION h.json_null(jsonb) RETURNS json LANGUAGE sql AS $$ SELECT 'null'::json $$;
CREATE FUNCTION h.jsonb_null(jsonb) RETURNS jsonb LANGUAGE sql AS $$ SELECT 'null'::jsonb $$;
SELECT handler, r.outcome, r.status_code, r.headers, r.response, r.body
FROM unnest('{sql_json,sql_jsonb,sql_response,sql_row,sql_atomic,plpgsql_json,plpgsql_jsonb,plpgsql_response,plpgsql_row,with_body,c_function,stable_function,with_setting,json_null,jsonb_null,out_parameter}'::text[])
         WITH ORDINALITY h (handler, n),
     idempotency_run('t', handler, 'k', '{"x": 1, "y": null}', format('h.%I(jsonb)', handler)::regprocedure) r
ORDER BY n;
-- replayed with the same text
SELECT handler, r.outcome, r.status_code, r.headers, r.response, r.body
FROM unnest('{sql_json,sql_jsonb,sql_response,sql_row,sql_atomic,plpgsql_json,plpgsql_jsonb,plpgsql_response,plpgsql_row,with_body,c_function,stable_function,with_setting,json_null,jsonb_null,out_parameter}'::text[])
         WITH ORDINALITY h (handler, n),
     idempotency_run('t', handler, 'k', '{"x": 1, "y": null}', format('h.%I(jsonb)', handler)::regprocedure) r
ORDER BY n;
-- a request that is null: passed on as it is, and without a fingerprint
SELECT outcome, response FROM idempotency_run('t', 'a', 'null', NULL, 'pay(jsonb)');
SELECT request IS NULL AS nothing FROM payment;
SELECT request_hash FROM idempotency_key WHERE key = 'null';
SELECT outcome, response FROM idempotency_run('t', 'a', 'null', '{"amount": 1}', 'pay(jsonb)');
TRUNCATE payment, idempotency_key;

--
-- What a handler cannot be; found before anything else is done
--
CREATE FUNCTION h.no_arguments() RETURNS json LANGUAGE sql AS $$ SELECT '1'::json $$;
CREATE FUNCTION h.two_arguments(jsonb, jsonb) RETURNS json LANGUAGE sql AS $$ SELECT '1'::json $$;
CREATE FUNCTION h.with_default(jsonb, int DEFAULT 1) RETURNS json LANGUAGE sql AS $$ SELECT '1'::json $$;
CREATE FUNCTION h.of_json(json) RETURNS json LANGUAGE sql AS $$ SELECT '1'::json $$;
CREATE FUNCTION h.of_anything(anyelement) RETURNS json LANGUAGE sql AS $$ SELECT '1'::json $$;
CREATE FUNCTION h.of_many(VARIADIC jsonb[]) RETURNS json LANGUAGE sql AS $$ SELECT '1'::json $$;
CREATE FUNCTION h.to_text(jsonb) RETURNS text LANGUAGE sql AS $$ SELECT '1' $$;
CREATE FUNCTION h.to_nothing(jsonb) RETURNS void LANGUAGE sql AS $$ SELECT $$;
CREATE FUNCTION h.to_result(jsonb) RETURNS idempotency_result LANGUAGE sql AS $$ SELECT NULL::idempotency_result $$;
CREATE FUNCTION h.to_record(jsonb, OUT status_code int, OUT headers jsonb, OUT response json) LANGUAGE sql AS $$ SELECT 200, NULL::jsonb, '1'::json $$;
CREATE TYPE h.idempotency_response AS (status_code int, headers jsonb, response json, body bytea, ttl interval);
CREATE FUNCTION h.to_other_response(jsonb) RETURNS h.idempotency_response LANGUAGE sql AS $$ SELECT 200, NULL::jsonb, '1'::json, NULL::bytea, NULL::interval $$;
CREATE FUNCTION h.to_set(jsonb) RETURNS SETOF json LANGUAGE sql AS $$ SELECT '1'::json $$;
CREATE FUNCTION h.to_trigger() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
CREATE PROCEDURE h.procedure(INOUT jsonb) LANGUAGE sql AS $$ SELECT $1 $$;
CREATE AGGREGATE h.aggregate(jsonb) (SFUNC = jsonb_concat, STYPE = jsonb);
SELECT handler, error_of(format('SELECT idempotency_run(%L, %L, %L, %L, %L::regprocedure)', 't', 'a', 'k', '{"amount": 1}', handler))
FROM unnest(ARRAY['h.no_arguments()', 'h.two_arguments(jsonb,jsonb)', 'h.with_default(jsonb,int)', 'h.of_json(json)',
                  'h.of_anything(anyelement)', 'h.of_many(jsonb[])', 'h.to_text(jsonb)', 'h.to_nothing(jsonb)', 'h.to_result(jsonb)',
                  'h.to_record(jsonb)', 'h.to_other_response(jsonb)', 'h.to_set(jsonb)', 'h.to_trigger()', 'h.procedure(jsonb)',
                  'h.aggregate(jsonb)', 'jsonb_array_elements(jsonb)', 'row_number()']) handler;
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k', '{}', NULL) $$);
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k', '{}', 0) $$);
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k', '{}', 4294967295) $$);
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k', '{}', 'h.no_such_function(jsonb)') $$);
-- also when the answer is there already
SELECT outcome FROM idempotency_run('t', 'a', 'k', '{}', 'pay(jsonb)');
SELECT left(error_of($$ SELECT idempotency_run('t', 'a', 'k', '{}', NULL) $$), 5),
       left(error_of($$ SELECT idempotency_run('t', 'a', 'k', '{}', 0) $$), 5),
       left(error_of($$ SELECT idempotency_run('t', 'a', 'k', '{}', 'h.to_text(jsonb)') $$), 5);
TRUNCATE payment, idempotency_key;

--
-- What a handler cannot answer; nothing is left of it
--
CREATE FUNCTION h.answer(request jsonb) RETURNS idempotency_response LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO payment (request) VALUES (answer.request);
    IF request ->> 'status' = 'row' THEN
        RETURN NULL;
    END IF;
    RETURN ((request ->> 'status')::int, request -> 'headers', (request -> 'response')::json,
            (request ->> 'body')::bytea, (request ->> 'ttl')::interval);
END $$;
CREATE FUNCTION h.strict_function(request jsonb) RETURNS json LANGUAGE sql STRICT AS $$ SELECT '"not null"'::json $$;
CREATE FUNCTION h.null_json(request jsonb) RETURNS json LANGUAGE sql AS $$ SELECT NULL::json $$;
CREATE FUNCTION h.null_jsonb(request jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
CREATE FUNCTION h.no_row(request jsonb) RETURNS idempotency_response LANGUAGE sql AS
$$ SELECT 200, NULL::jsonb, '1'::json, NULL::bytea, NULL::interval WHERE false $$;
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k', '{}', 'h.null_json(jsonb)') $$);
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k', '{}', 'h.null_jsonb(jsonb)') $$);
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k', '{}', 'h.no_row(jsonb)') $$);
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k', '{"status": "row"}', 'h.answer(jsonb)') $$);
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k', NULL, 'h.strict_function(jsonb)') $$);
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k', '{}', 'h.answer(jsonb)') $$);
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k', '{"status": 99}', 'h.answer(jsonb)') $$);
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k', '{"status": 600}', 'h.answer(jsonb)') $$);
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k', '{"status": 200, "response": null, "body": ""}', 'h.answer(jsonb)') $$);
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k', '{"status": 503, "response": 1, "body": "x"}', 'h.answer(jsonb)') $$);
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k', '{"status": 200, "ttl": "299 s"}', 'h.answer(jsonb)') $$);
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k', '{"status": 200, "ttl": "73 h"}', 'h.answer(jsonb)') $$);
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k', '{"status": 404, "ttl": "0.999 s"}', 'h.answer(jsonb)') $$);
SET idempotency.max_response_size = '10B';
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k', '{"status": 200, "response": "0123456789"}', 'h.answer(jsonb)') $$);
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k', '{"status": 200, "body": "0123456789a"}', 'h.answer(jsonb)') $$);
RESET idempotency.max_response_size;
SELECT count(*) FROM payment;
SELECT count(*) FROM idempotency_key;
SELECT locks();
SELECT response FROM idempotency_run('t', 'a', 'k', '{}', 'h.strict_function(jsonb)');
TRUNCATE idempotency_key;

--
-- The status decides as it does in finish
--
SELECT status, r.outcome, r.status_code, r.response, r.headers, r.attempt, r.created_at IS NOT NULL AS created,
       r.finished_at IS NOT NULL AS finished, r.expires_at - r.finished_at AS kept_for
FROM unnest('{100,201,302,402,404,409,429,500,503,599}'::int[]) status,
     idempotency_run('t', 'status', 'k' || status,
                     jsonb_build_object('status', status, 'response', 'text', 'headers', jsonb_build_object('h', status)), 'h.answer(jsonb)') r
ORDER BY status;
SELECT status_code, state, response FROM idempotency_key ORDER BY status_code;
SELECT count(*) FROM payment;
-- what was released runs again, the rest is replayed
SELECT r.outcome, count(*), array_agg(status ORDER BY status) AS statuses
FROM unnest('{100,201,302,402,404,409,429,500,503,599}'::int[]) status,
     idempotency_run('t', 'status', 'k' || status,
                     jsonb_build_object('status', status, 'response', 'text', 'headers', jsonb_build_object('h', status)), 'h.answer(jsonb)') r
GROUP BY r.outcome ORDER BY r.outcome;
SELECT count(*) FROM payment;
-- a request may be corrected after that
SELECT outcome FROM idempotency_run('t', 'status', 'k503', '{"status": 200, "response": 1}', 'h.answer(jsonb)');
-- what is not kept may have any size
SET idempotency.max_response_size = '10B';
SELECT outcome, response FROM idempotency_run('t', 'status', 'large', '{"status": 503, "response": "0123456789"}', 'h.answer(jsonb)');
RESET idempotency.max_response_size;
SET idempotency.retryable_status = '402';
SELECT outcome FROM idempotency_run('t', 'status', 'setting1', '{"status": 402}', 'h.answer(jsonb)');
SELECT outcome FROM idempotency_run('t', 'status', 'setting2', '{"status": 503}', 'h.answer(jsonb)');
RESET idempotency.retryable_status;
TRUNCATE payment, idempotency_key;
-- ttl of the call, or of the setting
SELECT ttl, r.expires_at - r.finished_at AS kept_for
FROM unnest('{5 min,72 h,NULL}'::interval[]) WITH ORDINALITY v (ttl, n),
     idempotency_run('t', 'ttl', 'k' || n, '{}', 'pay(jsonb)', ttl => v.ttl) r ORDER BY n;
-- or of the handler, which knows the status; the call means an answer that is no error
SELECT request, r.outcome, r.expires_at - r.finished_at AS kept_for
FROM unnest(ARRAY['{"status": 200, "ttl": "10 min"}', '{"status": 200}', '{"status": 404, "ttl": "10 s"}',
                  '{"status": 402, "ttl": "30 min"}', '{"status": 404}', '{"status": 503, "ttl": "10 s"}']::jsonb[])
         WITH ORDINALITY v (request, n),
     idempotency_run('t', 'ttl', 'h' || n, request, 'h.answer(jsonb)', ttl => '2 h') r ORDER BY n;
-- what depends on the status is read when that is known
CREATE FUNCTION h.sets(request jsonb) RETURNS idempotency_response LANGUAGE plpgsql AS $$
BEGIN
    PERFORM set_config('idempotency.' || key, value, true) FROM jsonb_each_text(request -> 'set');
    RETURN h.answer(request);
END $$;
SELECT outcome, expires_at - finished_at AS kept_for
FROM idempotency_run('t', 'ttl', 's1', '{"status": 404, "set": {"error_ttl": "17s"}}', 'h.sets(jsonb)');
SELECT outcome FROM idempotency_run('t', 'ttl', 's2', '{"status": 402, "set": {"retryable_status": "402"}}', 'h.sets(jsonb)');
-- that of an answer which is no error, when it was begun
SELECT outcome, expires_at - finished_at AS kept_for
FROM idempotency_run('t', 'ttl', 's3', '{"status": 200, "set": {"ttl": "10min", "error_ttl": "17s"}}', 'h.sets(jsonb)');
SHOW idempotency.error_ttl;
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k', '{}', 'pay(jsonb)', ttl => '1 min') $$);
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k', '{}', 'pay(jsonb)', wait => '-1 s') $$);
-- the scope is checked as always
SELECT left(error_of($$ SELECT idempotency_run('t', 'a', NULL, '{}', 'pay(jsonb)') $$), 5),
       left(error_of($$ SELECT idempotency_run('t', 'a', 'a key', '{}', 'pay(jsonb)') $$), 5),
       left(error_of($$ SELECT idempotency_run('t', '', 'k', '{}', 'pay(jsonb)') $$), 5),
       left(error_of($$ SELECT idempotency_run('t', 'a', 'k', '{}', 'pay(jsonb)', actor => E'\n') $$), 5);
BEGIN READ ONLY;
SELECT idempotency_run('t', 'a', 'k', '{}', 'pay(jsonb)');
\echo :SQLSTATE
ROLLBACK;
TRUNCATE payment, idempotency_key;

--
-- An error in the handler leaves nothing behind
--
CREATE FUNCTION h.fails(request jsonb) RETURNS json LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO payment (request) VALUES (fails.request);
    RETURN to_json(1 / (request ->> 'amount')::int);
END $$;
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k', '{"amount": 0}', 'h.fails(jsonb)') $$);
SELECT idempotency_run('t', 'a', 'k', '{"amount": 0}', 'h.fails(jsonb)');
\echo :SQLSTATE
SELECT count(*) FROM payment;
SELECT count(*) FROM idempotency_key;
SELECT locks();
-- in a savepoint: the transaction goes on
BEGIN;
SAVEPOINT s;
SELECT idempotency_run('t', 'a', 'k', '{"amount": 0}', 'h.fails(jsonb)');
\echo :SQLSTATE
ROLLBACK TO s;
SELECT locks();
SELECT outcome, response FROM idempotency_run('t', 'a', 'k', '{"amount": 1}', 'h.fails(jsonb)');
SAVEPOINT s2;
SELECT outcome, response FROM idempotency_run('t', 'a', 'k2', '{"amount": 1}', 'h.fails(jsonb)');
SELECT outcome, response FROM idempotency_run('t', 'a', 'k2', '{"amount": 1}', 'h.fails(jsonb)');
ROLLBACK TO s2;
SELECT outcome, response FROM idempotency_run('t', 'a', 'k2', '{"amount": 2}', 'h.fails(jsonb)');
COMMIT;
SELECT outcome, response FROM idempotency_run('t', 'a', 'k', '{"amount": 1}', 'h.fails(jsonb)');
SELECT outcome, response FROM idempotency_run('t', 'a', 'k2', '{"amount": 2}', 'h.fails(jsonb)');
SELECT request FROM payment ORDER BY n;
BEGIN;
SELECT outcome FROM idempotency_run('t', 'a', 'k3', '{"amount": 3}', 'h.fails(jsonb)');
ROLLBACK;
SELECT outcome FROM idempotency_run('t', 'a', 'k3', '{"amount": 4}', 'h.fails(jsonb)');
TRUNCATE payment, idempotency_key;

--
-- Calls of the extension inside a handler
--
CREATE FUNCTION h.calls(request jsonb) RETURNS json LANGUAGE plpgsql AS $$
DECLARE
    result text;
BEGIN
    EXECUTE request ->> 'call' INTO result;
    RETURN to_json(result);
END $$;
-- the claim is the handler's to do the work, and run's to finish
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k', '{"call": "SELECT idempotency_finish(''t'', ''a'', ''k'')"}', 'h.calls(jsonb)') $$);
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k', '{"call": "SELECT idempotency_release(''t'', ''a'', ''k'')"}', 'h.calls(jsonb)') $$);
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k', '{"call": "SELECT idempotency_begin(''t'', ''a'', ''k'')"}', 'h.calls(jsonb)') $$);
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k', '{"call": "SELECT idempotency_run(''t'', ''a'', ''k'', NULL, ''pay(jsonb)'')"}', 'h.calls(jsonb)') $$);
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k', '{"call": "SELECT idempotency_try_run(''t'', ''a'', ''k'', NULL, ''pay(jsonb)'')"}', 'h.calls(jsonb)') $$);
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k', '{"call": "SELECT idempotency_store(''t'', ''a'', ''k'', NULL, 404)"}', 'h.calls(jsonb)') $$);
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k', '{"call": "SELECT idempotency_forget(''t'', ''a'', ''k'')"}', 'h.calls(jsonb)') $$);
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k', '{"call": "SELECT idempotency_checkpoint(''t'', ''a'', ''k'', NULL, ''p'')"}', 'h.calls(jsonb)') $$);
SELECT count(*) FROM idempotency_key;
-- it is in flight meanwhile
SELECT outcome, response FROM idempotency_run('t', 'a', 'k', '{"call": "SELECT key FROM idempotency_in_flight WHERE pid = pg_backend_pid()"}', 'h.calls(jsonb)');
-- another request within it
SELECT outcome, response FROM idempotency_run('t', 'a', 'outer', '{"call": "SELECT outcome FROM idempotency_run(''t'', ''a'', ''inner'', ''{\"amount\": 5}'', ''pay(jsonb)'')"}', 'h.calls(jsonb)');
SELECT outcome, response FROM idempotency_run('t', 'a', 'inner', '{"amount": 5}', 'pay(jsonb)');
SELECT outcome, response FROM idempotency_run('t', 'a', 'outer2', '{"call": "SELECT outcome FROM idempotency_run(''t'', ''a'', ''inner'', ''{\"amount\": 5}'', ''pay(jsonb)'')"}', 'h.calls(jsonb)');
SELECT count(*) FROM payment;
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'outer3', '{"call": "SELECT outcome FROM idempotency_run(''t'', ''a'', ''inner'', ''{\"amount\": 6}'', ''pay(jsonb)'')"}', 'h.calls(jsonb)') $$);
-- a leased claim is begun, a transaction claim that is left open is not
SELECT outcome, response FROM idempotency_run('t', 'a', 'outer4', '{"call": "SELECT attempt FROM idempotency_begin(''t'', ''a'', ''leased'', lease => ''1 h'')"}', 'h.calls(jsonb)');
SELECT key FROM idempotency_in_flight;
SELECT outcome FROM idempotency_run('t', 'a', 'outer5', '{"call": "SELECT attempt FROM idempotency_begin(''t'', ''a'', ''open'')"}', 'h.calls(jsonb)');
\echo :SQLSTATE
SELECT key, state FROM idempotency_key ORDER BY key;
TRUNCATE payment, idempotency_key;

--
-- In flight, and leased claims
--
SET idempotency.retry_after = '90s';
BEGIN;
SELECT outcome FROM idempotency_run('t', 'a', 'k', '{"amount": 1}', 'pay(jsonb)');
PREPARE TRANSACTION 'run';
SELECT regexp_replace(error_of($$ SELECT idempotency_run('t', 'a', 'k', '{"amount": 1}', 'pay(jsonb)') $$), '\d+\.\d+ s', 'N s');
SELECT left(error_of($$ SELECT idempotency_run('t', 'a', 'k', '{"amount": 1}', 'pay(jsonb)', wait => '20 ms') $$), 5);
SELECT left(error_of($$ SELECT idempotency_run('t', 'a', 'k', '{"amount": 2}', 'pay(jsonb)') $$), 5);
COMMIT PREPARED 'run';
SELECT outcome, response FROM idempotency_run('t', 'a', 'k', '{"amount": 1}', 'pay(jsonb)', wait => '20 ms');
RESET idempotency.retry_after;
SELECT attempt FROM idempotency_begin('t', 'a', 'leased', '{"amount": 2}', lease => '1 h', claim => '00000000-0000-0000-0000-000000000001');
SELECT left(error_of($$ SELECT idempotency_run('t', 'a', 'leased', '{"amount": 2}', 'pay(jsonb)') $$), 5);
SELECT left(error_of($$ SELECT idempotency_run('t', 'a', 'leased', '{"amount": 3}', 'pay(jsonb)') $$), 5);
-- one that ran out is taken over
SELECT idempotency_checkpoint('t', 'a', 'leased', '00000000-0000-0000-0000-000000000001', 'half-way', lease => '1 ms') IS NOT NULL AS renewed;
SELECT outcome, response, attempt FROM idempotency_run('t', 'a', 'leased', '{"amount": 2}', 'pay(jsonb)', wait => '1 min');
SELECT state, claim, attempt, response, lease_expires_at, recovery_point FROM idempotency_key WHERE key = 'leased';
SELECT left(error_of($$ SELECT idempotency_finish('t', 'a', 'leased', claim => '00000000-0000-0000-0000-000000000001') $$), 5);
TRUNCATE payment, idempotency_key;

--
-- try_run: the same, but a different request is an outcome
--
\x on
SELECT outcome, status_code, response, headers, body, claim, attempt, recovery_point, recovery_state, retry_after,
       created_at IS NOT NULL AS created, finished_at IS NOT NULL AS finished, expires_at - finished_at AS kept_for
FROM idempotency_try_run('t', 'try', 'k', '{"amount": 1}', 'pay(jsonb)', 'user 1', '2 h', '1 s');
SELECT r::text = idempotency_replay('t', 'try', 'k', '{"amount": 1}', 'user 1')::text AS replayed
FROM idempotency_try_run('t', 'try', 'k', '{"amount": 1.0}', 'pay(jsonb)', 'user 1') r;
SELECT * FROM idempotency_try_run('t', 'try', 'k', '{"amount": 2}', 'pay(jsonb)', 'user 1');
\x off
SELECT request FROM payment;
SELECT outcome, status_code FROM idempotency_try_run('t', 'try', 'errored', '{"status": 404}', 'h.answer(jsonb)');
SELECT outcome, status_code FROM idempotency_try_run('t', 'try', 'released', '{"status": 503}', 'h.answer(jsonb)');
SELECT outcome, status_code FROM idempotency_try_run('t', 'try', 'errored', '{"status": 404}', 'h.answer(jsonb)');
SELECT outcome, status_code FROM idempotency_try_run('t', 'try', 'released', '{"status": 200}', 'h.answer(jsonb)');
-- one in flight, too
BEGIN;
SELECT outcome FROM idempotency_try_run('t', 'try', 'k2', '{"amount": 1}', 'pay(jsonb)');
PREPARE TRANSACTION 'try_run';
SELECT outcome, status_code, attempt, retry_after, created_at IS NOT NULL AS created
FROM idempotency_try_run('t', 'try', 'k2', '{"amount": 1}', 'pay(jsonb)', wait => '20 ms');
SELECT outcome, status_code, attempt, retry_after, created_at IS NOT NULL AS created
FROM idempotency_try_run('t', 'try', 'k2', '{"amount": 2}', 'pay(jsonb)');
ROLLBACK PREPARED 'try_run';
-- the errors of the handler, and of the call, are errors
SELECT error_of($$ SELECT idempotency_try_run('t', 'try', 'k2', '{"amount": 0}', 'h.fails(jsonb)') $$);
SELECT error_of($$ SELECT idempotency_try_run('t', 'try', 'k2', '{"amount": 0}', 'h.to_text(jsonb)') $$);
SELECT error_of($$ SELECT idempotency_try_run('t', 'try', 'k2', '{"status": 99}', 'h.answer(jsonb)') $$);
SELECT error_of($$ SELECT idempotency_try_run('t', 'try', 'k2', '{"call": "SELECT idempotency_finish(''t'', ''try'', ''k2'')"}', 'h.calls(jsonb)') $$);
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'try', 'k2');
SELECT error_of($$ SELECT idempotency_try_run('t', 'try', 'k2', '{"amount": 1}', 'pay(jsonb)') $$);
ROLLBACK;
SELECT key, state FROM idempotency_key ORDER BY key;
TRUNCATE payment, idempotency_key;

-- at the other isolation levels
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT outcome FROM idempotency_run('t', 'a', 'k', '{"amount": 1}', 'pay(jsonb)');
COMMIT;
BEGIN ISOLATION LEVEL SERIALIZABLE;
SELECT outcome FROM idempotency_run('t', 'a', 'k', '{"amount": 1}', 'pay(jsonb)');
SELECT outcome FROM idempotency_run('t', 'a', 'k2', '{"amount": 1}', 'pay(jsonb)');
SELECT outcome FROM idempotency_run('t', 'a', 'k2', '{"amount": 1}', 'pay(jsonb)');
COMMIT;
TRUNCATE payment, idempotency_key;

--
-- With the rights of the caller
--
CREATE ROLE regress_idempotency_app;
CREATE FUNCTION h.who(request jsonb) RETURNS jsonb LANGUAGE sql AS $$ SELECT to_jsonb(current_user) $$;
CREATE FUNCTION h.who_defines(request jsonb) RETURNS jsonb LANGUAGE sql SECURITY DEFINER AS
$$ SELECT to_jsonb(current_user = session_user) $$;
CREATE FUNCTION h.reads_records(request jsonb) RETURNS jsonb LANGUAGE sql AS $$ SELECT to_jsonb(count(*)) FROM idempotency_key $$;
CREATE FUNCTION h.not_for_you(request jsonb) RETURNS jsonb LANGUAGE sql AS $$ SELECT '1'::jsonb $$;
REVOKE ALL ON FUNCTION h.not_for_you FROM PUBLIC;
GRANT USAGE ON SCHEMA h TO regress_idempotency_app;
GRANT EXECUTE ON FUNCTION idempotency_run TO regress_idempotency_app;
SET ROLE regress_idempotency_app;
SELECT outcome, response FROM idempotency_run('t', 'a', 'who', '{}', 'h.who(jsonb)');
SELECT outcome, response FROM idempotency_run('t', 'a', 'who_defines', '{}', 'h.who_defines(jsonb)');
-- the handler may do no more than its caller
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k', '{}', 'h.reads_records(jsonb)') $$);
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k', '{}', 'pay(jsonb)') $$);
-- and the caller must be allowed to call it, also where the answer is there
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k', '{}', 'h.not_for_you(jsonb)') $$);
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'who', '{}', 'h.not_for_you(jsonb)') $$);
-- by its name or by its OID, in a schema that the caller may use
RESET ROLE;
SELECT 'h.who(jsonb)'::regprocedure::oid AS who \gset
REVOKE USAGE ON SCHEMA h FROM regress_idempotency_app;
SET ROLE regress_idempotency_app;
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k', '{}', 'h.who(jsonb)') $$);
SELECT error_of(format('SELECT idempotency_run(%L, %L, %L, %L, %s::oid)', 't', 'a', 'k', '{}', :who));
RESET ROLE;
SELECT key, response FROM idempotency_key ORDER BY key;

SET client_min_messages = warning;
DROP SCHEMA h CASCADE;
RESET client_min_messages;
TRUNCATE idempotency_key;

--
-- A handler that puts another extension in the place of the one that called it:
-- its answer is a record of the new one, and can be read
--
CREATE FUNCTION recreate(request jsonb) RETURNS json LANGUAGE plpgsql AS $$
BEGIN
    DROP EXTENSION idempotency;
    CREATE EXTENSION idempotency;
    RETURN request;
END $$;
SELECT outcome, status_code, response FROM idempotency_run('t', 'a', 'k', '{"amount": 1}', 'recreate(jsonb)');
SELECT key, state, status_code, response FROM idempotency_key;
SELECT idempotency_key::text LIKE '(t,a,k,"",completed,%' AS as_text FROM idempotency_key;
SELECT outcome, status_code, response FROM idempotency_replay('t', 'a', 'k', '{"amount": 1}');
SELECT (idempotency_run('t', 'a', 'k2', '{"amount": 1}', 'recreate(jsonb)')).outcome;
SELECT key, state, status_code, response FROM idempotency_key;
SELECT outcome, status_code, response FROM idempotency_replay('t', 'a', 'k2', '{"amount": 1}');
-- one that puts nothing in its place
CREATE FUNCTION drop_it(request jsonb) RETURNS json LANGUAGE plpgsql AS $$
BEGIN
    DROP EXTENSION idempotency;
    RETURN request;
END $$;
SELECT error_of($$ SELECT idempotency_run('t', 'a', 'k3', '{"amount": 1}', 'drop_it(jsonb)') $$);
SELECT key, state FROM idempotency_key;

DROP FUNCTION pay, recreate, drop_it;
DROP TABLE payment;
DROP EXTENSION idempotency;
DROP ROLE regress_idempotency_app;
