--
-- Arguments that are missing, malformed or out of range
--
CREATE EXTENSION idempotency;

-- what a call answers, or its error with all that is told of it
CREATE FUNCTION answer_of(call text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    answer text;
    message text;
    detail text;
    hint text;
BEGIN
    EXECUTE 'SELECT ' || call INTO answer;
    RETURN 'accepted';
EXCEPTION WHEN OTHERS THEN
    GET STACKED DIAGNOSTICS message = MESSAGE_TEXT,
        detail = PG_EXCEPTION_DETAIL, hint = PG_EXCEPTION_HINT;
    RETURN concat_ws(E'\n', SQLSTATE, message, nullif(detail, ''), nullif(hint, ''));
END $$;

-- rolled back at the end, so that no claim that was accepted is left unfinished
BEGIN;

--
-- key
--
SELECT answer_of($$ idempotency_begin('t', 'a', NULL) $$);
SELECT answer_of($$ idempotency_begin('t', 'a', '') $$);
SELECT answer_of($$ idempotency_begin('t', 'a', repeat('k', 255)) $$);
SELECT answer_of($$ idempotency_begin('t', 'a', repeat('k', 256)) $$);
SELECT answer_of($$ idempotency_begin('t', 'a', repeat('k', 100000)) $$);

--
-- tenant
--
SELECT answer_of($$ idempotency_begin(NULL, 'a', 'k-null') $$);
SELECT answer_of($$ idempotency_begin('', 'a', 'k-empty') $$);
SELECT answer_of($$ idempotency_begin(repeat('t', 255), 'a', 'k') $$);
SELECT answer_of($$ idempotency_begin(repeat('t', 256), 'a', 'k') $$);
-- bytes count, not characters
SELECT answer_of($$ idempotency_begin('x' || repeat('é', 127), 'a', 'k') $$);
SELECT answer_of($$ idempotency_begin(repeat('é', 128), 'a', 'k') $$);
SELECT answer_of($$ idempotency_begin(E'a\nb', 'a', 'k') $$);
SELECT answer_of($$ idempotency_begin(E'\u007f', 'a', 'k') $$);
SELECT answer_of($$ idempotency_begin('with space, ünd "quote"', 'a', 'k') $$);

--
-- action
--
SELECT answer_of($$ idempotency_begin('t', NULL, 'k') $$);
SELECT answer_of($$ idempotency_begin('t', '', 'k') $$);
SELECT answer_of($$ idempotency_begin('t', repeat('a', 255), 'k') $$);
SELECT answer_of($$ idempotency_begin('t', repeat('a', 256), 'k') $$);
SELECT answer_of($$ idempotency_begin('t', E'a\tb', 'k') $$);
SELECT answer_of($$ idempotency_begin('t', E'\u0001', 'k') $$);
SELECT answer_of($$ idempotency_begin('t', 'POST /orders/ä', 'k') $$);

--
-- actor
--
SELECT answer_of($$ idempotency_begin('t', 'actor', 'null', actor => NULL) $$);
SELECT answer_of($$ idempotency_begin('t', 'actor', 'empty', actor => '') $$);
SELECT answer_of($$ idempotency_begin('t', 'a', 'k', actor => repeat('u', 255)) $$);
SELECT answer_of($$ idempotency_begin('t', 'a', 'k', actor => repeat('u', 256)) $$);
SELECT answer_of($$ idempotency_begin('t', 'a', 'k', actor => E'u\r') $$);
SELECT answer_of($$ idempotency_begin('t', 'a', 'k', actor => 'Zoë') $$);

-- every control character is refused in every part, and nothing else of ASCII
SELECT count(*) FILTER (WHERE answer_of(format('idempotency_begin(%L, ''ascii'', %L)', chr(c), 'key-' || c)) LIKE '22023%control character.') AS tenants,
       count(*) FILTER (WHERE answer_of(format('idempotency_begin(''t'', %L, %L)', chr(c), 'key-' || c)) LIKE '22023%control character.') AS actions,
       count(*) FILTER (WHERE answer_of(format('idempotency_begin(''t'', ''ascii'', %L, actor => %L)', 'key-' || c, chr(c))) LIKE '22023%control character.') AS actors
FROM generate_series(1, 127) c WHERE c < 32 OR c = 127;
SELECT count(*) FILTER (WHERE answer_of(format('idempotency_begin(%L, ''ascii'', %L)', chr(c), 'key-' || c)) = 'accepted') AS tenants,
       count(*) FILTER (WHERE answer_of(format('idempotency_begin(''t'', %L, %L)', chr(c), 'key-' || c)) = 'accepted') AS actions,
       count(*) FILTER (WHERE answer_of(format('idempotency_begin(''t'', ''ascii'', %L, actor => %L)', 'key-' || c, chr(c))) = 'accepted') AS actors
FROM generate_series(32, 126) c;

--
-- request and request_hash
--
SELECT answer_of($$ idempotency_begin('t', 'hash', 'k1', '{}', request_hash => sha256('')) $$);
SELECT answer_of($$ idempotency_begin('t', 'hash', 'k2', request_hash => '') $$);
SELECT answer_of($$ idempotency_begin('t', 'hash', 'k3', request_hash => decode(repeat('00', 15), 'hex')) $$);
SELECT answer_of($$ idempotency_begin('t', 'hash', 'k4', request_hash => decode(repeat('00', 16), 'hex')) $$);
SELECT answer_of($$ idempotency_begin('t', 'hash', 'k5', request_hash => decode(repeat('00', 64), 'hex')) $$);
SELECT answer_of($$ idempotency_begin('t', 'hash', 'k6', request_hash => decode(repeat('00', 65), 'hex')) $$);
-- JSON null is a request, SQL NULL is none
SELECT answer_of($$ idempotency_begin('t', 'hash', 'k7', 'null', request_hash => sha256('')) $$);
SELECT answer_of($$ idempotency_begin('t', 'hash', 'k8', NULL, request_hash => sha256('')) $$);

--
-- ttl: from min_ttl, which is five minutes, to max_ttl
--
SELECT answer_of($$ idempotency_begin('t', 'ttl', 'k1', ttl => '300 s') $$);
SELECT answer_of($$ idempotency_begin('t', 'ttl', 'k2', ttl => '299.999999 s') $$);
SELECT answer_of($$ idempotency_begin('t', 'ttl', 'k3', ttl => '299 s') $$);
SELECT answer_of($$ idempotency_begin('t', 'ttl', 'k4', ttl => '72 h') $$);
SELECT answer_of($$ idempotency_begin('t', 'ttl', 'k5', ttl => '3 days') $$);
SELECT answer_of($$ idempotency_begin('t', 'ttl', 'k6', ttl => '72:00:00.000001') $$);
SELECT answer_of($$ idempotency_begin('t', 'ttl', 'k7', ttl => '72:00:01') $$);
SELECT answer_of($$ idempotency_begin('t', 'ttl', 'k8', ttl => '1 month') $$);
SELECT answer_of($$ idempotency_begin('t', 'ttl', 'k9', ttl => '0') $$);
SELECT answer_of($$ idempotency_begin('t', 'ttl', 'k10', ttl => '-1 day') $$);
SELECT answer_of($$ idempotency_begin('t', 'ttl', 'k11', ttl => '-1 month 31 days') $$);
SELECT answer_of($$ idempotency_begin('t', 'ttl', 'k12', ttl => '178000000 years') $$);
SELECT answer_of($$ idempotency_begin('t', 'ttl', 'k13', ttl => '-178000000 years') $$);
SELECT answer_of($$ idempotency_begin('t', 'ttl', 'k14', ttl => '2147483647 days') $$);
SET LOCAL idempotency.max_ttl = '40d';
SELECT answer_of($$ idempotency_begin('t', 'ttl', 'k15', ttl => '1 month') $$);
SELECT answer_of($$ idempotency_begin('t', 'ttl', 'k16', ttl => '40 days') $$);
SELECT answer_of($$ idempotency_begin('t', 'ttl', 'k17', ttl => '40 days 1 s') $$);
SET LOCAL idempotency.max_ttl = '300s';
SELECT answer_of($$ idempotency_begin('t', 'ttl', 'k18', ttl => '300 s') $$);
SELECT answer_of($$ idempotency_begin('t', 'ttl', 'k19', ttl => '301 s') $$);
RESET idempotency.max_ttl;
SET LOCAL idempotency.min_ttl = '1s';
SELECT answer_of($$ idempotency_begin('t', 'ttl', 'k22', ttl => '1 s') $$);
SELECT answer_of($$ idempotency_begin('t', 'ttl', 'k23', ttl => '0.999999 s') $$);
RESET idempotency.min_ttl;
-- infinite intervals came with PostgreSQL 17
SELECT current_setting('server_version_num')::int >= 170000 AS has_infinity \gset
SELECT CASE WHEN :'has_infinity' THEN 'infinity' ELSE '178000000 years' END AS forever,
       CASE WHEN :'has_infinity' THEN '-infinity' ELSE '-178000000 years' END AS never \gset
SELECT answer_of(format('idempotency_begin(''t'', ''ttl'', ''k20'', ttl => %L)', :'forever'));
SELECT answer_of(format('idempotency_begin(''t'', ''ttl'', ''k21'', ttl => %L)', :'never'));

--
-- wait: from nothing to an hour
--
SELECT answer_of($$ idempotency_begin('t', 'wait', 'k1', wait => '0') $$);
SELECT answer_of($$ idempotency_begin('t', 'wait', 'k2', wait => '-1 us') $$);
SELECT answer_of($$ idempotency_begin('t', 'wait', 'k3', wait => '-1 s') $$);
SELECT answer_of($$ idempotency_begin('t', 'wait', 'k4', wait => '1 hour') $$);
SELECT answer_of($$ idempotency_begin('t', 'wait', 'k5', wait => '01:00:00.000001') $$);
SELECT answer_of($$ idempotency_begin('t', 'wait', 'k6', wait => '1 day') $$);
SELECT answer_of($$ idempotency_begin('t', 'wait', 'k7', wait => '1 month') $$);
SELECT answer_of(format('idempotency_begin(''t'', ''wait'', ''k8'', wait => %L)', :'forever'));
SELECT answer_of(format('idempotency_begin(''t'', ''wait'', ''k9'', wait => %L)', :'never'));

ROLLBACK;

--
-- All calls check the scope
--
SELECT call, part, split_part(answer_of(format(call, arguments)), E'\n', 1) AS sqlstate,
       split_part(answer_of(format(call, arguments)), E'\n', 2) AS message
FROM unnest(ARRAY['idempotency_begin(%s)', 'idempotency_try_begin(%s)', 'idempotency_finish(%s)',
                  'idempotency_replay(%s)', 'idempotency_release(%s)', 'idempotency_forget(%s)',
                  'idempotency_store(%s, request => NULL, status_code => 200)',
                  'idempotency_checkpoint(%s, claim => NULL, recovery_point => NULL)',
                  'idempotency_run(%s, request => NULL, handler => NULL)',
                  'idempotency_try_run(%s, request => NULL, handler => NULL)'])
         WITH ORDINALITY AS c (call, c),
     (VALUES (1, 'no key', $$ 't', 'a', NULL $$),
             (2, 'empty key', $$ 't', 'a', '' $$),
             (3, 'long key', $$ 't', 'a', repeat('k', 256) $$),
             (4, 'key with space', $$ 't', 'a', 'k k' $$),
             (5, 'no action', $$ 't', NULL, 'k' $$),
             (6, 'long action', $$ 't', repeat('a', 256), 'k' $$),
             (7, 'long tenant', $$ repeat('t', 256), 'a', 'k' $$),
             (8, 'line in actor', $$ 't', 'a', 'k', actor => E'\n' $$),
             (9, 'empty action', $$ 't', '', 'k' $$),
             (10, 'long actor', $$ 't', 'a', 'k', actor => repeat('u', 256) $$)) AS v (v, part, arguments)
ORDER BY c, v;

--
-- All other arguments, of the calls that have them
--
CREATE FUNCTION handler(request jsonb) RETURNS jsonb LANGUAGE sql AS 'SELECT request';
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'held');
SELECT outcome FROM idempotency_begin('t', 'a', 'leased', lease => '1 h', claim => '00000000-0000-0000-0000-000000000001');
CREATE TABLE bad_call (n serial, call text, arguments text);
-- what tells a repeat
INSERT INTO bad_call (call, arguments)
SELECT call, arguments
FROM unnest(ARRAY['idempotency_begin(''t'', ''a'', ''k'', %s)', 'idempotency_try_begin(''t'', ''a'', ''k'', %s)',
                  'idempotency_replay(''t'', ''a'', ''k'', %s)',
                  'idempotency_store(''t'', ''a'', ''k'', status_code => 200, %s)']) WITH ORDINALITY AS c (call, c),
     unnest(ARRAY['request => ''{}'', request_hash => sha256('''')',
                  'request => NULL, request_hash => ''\x00''',
                  'request => NULL, request_hash => decode(repeat(''00'', 65), ''hex'')']) WITH ORDINALITY AS a (arguments, a)
ORDER BY c, a;
-- times
INSERT INTO bad_call (call, arguments)
SELECT call, arguments
FROM unnest(ARRAY['idempotency_begin(''t'', ''a'', ''k'', %s)', 'idempotency_try_begin(''t'', ''a'', ''k'', %s)',
                  'idempotency_run(''t'', ''a'', ''k'', ''{}'', ''handler(jsonb)'', %s)',
                  'idempotency_try_run(''t'', ''a'', ''k'', ''{}'', ''handler(jsonb)'', %s)']) WITH ORDINALITY AS c (call, c),
     unnest(ARRAY['ttl => ''299 s''', 'ttl => ''72 h 1 s''', 'wait => ''-1 s''', 'wait => ''1 h 1 s'''])
         WITH ORDINALITY AS a (arguments, a)
ORDER BY c, a;
INSERT INTO bad_call (call, arguments)
SELECT call, arguments
FROM unnest(ARRAY['idempotency_begin(''t'', ''a'', ''k'', %s)', 'idempotency_try_begin(''t'', ''a'', ''k'', %s)',
                  'idempotency_checkpoint(''t'', ''a'', ''leased'', ''00000000-0000-0000-0000-000000000001'', ''p'', %s)'])
         WITH ORDINALITY AS c (call, c),
     unnest(ARRAY['lease => ''0''', 'lease => ''0.999 ms''', 'lease => ''-1 s''', 'lease => ''72 h 1 s'''])
         WITH ORDINALITY AS a (arguments, a)
ORDER BY c, a;
-- an answer
INSERT INTO bad_call (call, arguments)
SELECT call, arguments
FROM unnest(ARRAY['idempotency_finish(''t'', ''a'', ''held'', %s)',
                  'idempotency_finish(''t'', ''a'', ''leased'', claim => ''00000000-0000-0000-0000-000000000001'', %s)',
                  'idempotency_store(''t'', ''a'', ''k'', NULL, %s)']) WITH ORDINALITY AS c (call, c),
     unnest(ARRAY['status_code => NULL', 'status_code => 99', 'status_code => 600', 'status_code => -200',
                  'status_code => 200, response => ''1'', body => ''x''',
                  'status_code => 503, response => ''null'', body => ''''',
                  'status_code => 200, ttl => ''299 s''', 'status_code => 200, ttl => ''72 h 1 s''',
                  'status_code => 404, ttl => ''0.999 s''', 'status_code => 404, ttl => ''72 h 1 s''',
                  'status_code => 503, ttl => ''-1 s'''])
         WITH ORDINALITY AS a (arguments, a)
ORDER BY c, a;
-- and what only one of them has
INSERT INTO bad_call (call, arguments) VALUES
    ('idempotency_begin(''t'', ''a'', ''k'', %s)', 'claim => ''00000000-0000-0000-0000-000000000001'''),
    ('idempotency_try_begin(''t'', ''a'', ''k'', %s)', 'claim => ''00000000-0000-0000-0000-000000000001'''),
    ('idempotency_checkpoint(''t'', ''a'', ''leased'', %s)', 'NULL, ''p'''),
    ('idempotency_checkpoint(''t'', ''a'', ''leased'', ''00000000-0000-0000-0000-000000000001'', %s)', 'E''p\n'''),
    ('idempotency_checkpoint(''t'', ''a'', ''leased'', ''00000000-0000-0000-0000-000000000001'', %s)', 'repeat(''p'', 256)'),
    ('idempotency_checkpoint(''t'', ''a'', ''leased'', ''00000000-0000-0000-0000-000000000001'', %s)', 'NULL, ''{}'''),
    ('idempotency_checkpoint(''t'', ''a'', ''leased'', ''00000000-0000-0000-0000-000000000001'', %s)', ''''', ''{}'''),
    ('idempotency_finish(''t'', ''a'', ''leased'', %s)', 'claim => NULL'),
    ('idempotency_release(''t'', ''a'', ''leased'', %s)', 'claim => NULL'),
    ('idempotency_run(''t'', ''a'', ''k'', ''{}'', %s)', 'NULL'),
    ('idempotency_run(''t'', ''a'', ''k'', ''{}'', %s)', '0'),
    ('idempotency_run(''t'', ''a'', ''k'', ''{}'', %s)', '''lower(text)'''),
    ('idempotency_try_run(''t'', ''a'', ''k'', ''{}'', %s)', 'NULL'),
    ('idempotency_try_run(''t'', ''a'', ''k'', ''{}'', %s)', '0'),
    ('idempotency_try_run(''t'', ''a'', ''k'', ''{}'', %s)', '''lower(text)'''),
    ('idempotency_first_seen(%s)', 'E''\t'', ''c'', ''{m}'''),
    ('idempotency_first_seen(%s)', '''t'', NULL, ''{m}'''),
    ('idempotency_first_seen(%s)', '''t'', '''', ''{m}'''),
    ('idempotency_first_seen(%s)', '''t'', E''c\n'', ''{m}'''),
    ('idempotency_first_seen(%s)', '''t'', ''c'', NULL'),
    ('idempotency_first_seen(%s)', '''t'', ''c'', ''{m,NULL}'''),
    ('idempotency_first_seen(%s)', '''t'', ''c'', ''{m,""}'''),
    ('idempotency_first_seen(%s)', '''t'', ''c'', ''{m,m m}'''),
    ('idempotency_first_seen(%s)', '''t'', ''c'', ''{m}'', ''299 s'''),
    ('idempotency_first_seen(%s)', '''t'', ''c'', ''{m}'', ''72 h 1 s'''),
    ('idempotency_event_key(%s)', ''''', ''1'', 1'),
    ('idempotency_event_key(%s)', '''a:b'', ''1'', 1'),
    ('idempotency_event_key(%s)', '''a'', '''', 1'),
    ('idempotency_schedule(%s)', 'NULL');
SELECT call, arguments, split_part(answer, E'\n', 1) AS sqlstate, split_part(answer, E'\n', 2) AS message
FROM (SELECT n, call, arguments, answer_of(format(call, arguments)) AS answer FROM bad_call) AS bad
ORDER BY n;
-- none of them ended a claim, or left one
SELECT key, state, lease_expires_at > now() AS leased FROM idempotency_key;
SELECT key FROM idempotency_in_flight ORDER BY key;
ROLLBACK;
DROP FUNCTION handler;

-- what is wrong is told before a stored answer is
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k');
SELECT idempotency_finish('t', 'a', 'k');
COMMIT;
SELECT answer_of($$ idempotency_begin('t', 'a', 'k', ttl => '299 s') $$);
SELECT answer_of($$ idempotency_begin('t', 'a', 'k', wait => '-1 s') $$);
SELECT answer_of($$ idempotency_begin('t', 'a', 'k', '{}', request_hash => sha256('')) $$);
-- and a refused call leaves no lock
BEGIN;
SELECT answer_of($$ idempotency_begin('t', 'a', 'k2', wait => '-1 s') $$);
SELECT count(*) FROM pg_locks WHERE locktype = 'userlock' AND pid = pg_backend_pid();
COMMIT;

DROP FUNCTION answer_of;
DROP EXTENSION idempotency;
