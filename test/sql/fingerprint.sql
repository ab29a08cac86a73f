--
-- Fingerprints of requests
--
CREATE EXTENSION idempotency;

--
-- The form, in bytes: what src/request/fingerprint.c says, computed here without it
--
CREATE FUNCTION n4(n int) RETURNS bytea LANGUAGE sql IMMUTABLE AS
$$ SELECT int4send(n) $$;
CREATE FUNCTION text_form(s text) RETURNS bytea LANGUAGE sql IMMUTABLE AS
$$ SELECT n4(octet_length(convert_to(s, 'UTF8'))) || convert_to(s, 'UTF8') $$;

CREATE FUNCTION form(value jsonb) RETURNS bytea LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    result bytea;
    n numeric;
    whole text;
    fraction text;
BEGIN
    CASE jsonb_typeof(value)
    WHEN 'null' THEN
        RETURN 'n'::bytea;
    WHEN 'boolean' THEN
        RETURN CASE value WHEN 'true' THEN 't'::bytea ELSE 'f'::bytea END;
    WHEN 'number' THEN
        n := value::numeric;
        IF n = 0 THEN
            RETURN '#'::bytea || text_form('0e0');
        END IF;
        whole := split_part(abs(n)::text, '.', 1);
        fraction := split_part(abs(n)::text, '.', 2);
        RETURN '#'::bytea || text_form(
            CASE WHEN n < 0 THEN '-' ELSE '' END || trim('0' FROM whole || fraction) || 'e' ||
            CASE WHEN whole <> '0' THEN length(whole) - 1
                 ELSE length(ltrim(fraction, '0')) - length(fraction) - 1 END);
    WHEN 'string' THEN
        RETURN '"'::bytea || text_form(value #>> '{}');
    WHEN 'array' THEN
        SELECT '['::bytea || n4(count(*)::int) ||
               coalesce(string_agg(form(e), '' ORDER BY i), '')
        INTO result FROM jsonb_array_elements(value) WITH ORDINALITY AS a (e, i);
        RETURN result;
    WHEN 'object' THEN
        SELECT '{'::bytea || n4(count(*)::int) ||
               coalesce(string_agg(text_form(k) || form(v), ''
                                   ORDER BY octet_length(k), convert_to(k, 'UTF8')), '')
        INTO result FROM jsonb_each(value) AS o (k, v);
        RETURN result;
    END CASE;
END $$;

-- a few by hand
SELECT request, idempotency_request_hash(request::jsonb) = sha256(decode(form, 'hex')) AS as_documented
FROM (VALUES
    ('null', '01 6e'),
    ('true', '01 74'),
    ('false', '01 66'),
    ('0', '01 23 00000003 306530'),
    ('-1.50', '01 23 00000005 2d31356530'),
    ('1e3', '01 23 00000003 316533'),
    ('""', '01 22 00000000'),
    ('"ab"', '01 22 00000002 6162'),
    ('"é"', '01 22 00000002 c3a9'),
    ('[]', '01 5b 00000000'),
    ('{}', '01 7b 00000000'),
    ('[1, [null]]', '01 5b 00000002 23 00000003 316530 5b 00000001 6e'),
    ('{"bb": 1, "a": true, "c": "x"}',
     '01 7b 00000003 00000001 61 74 00000001 63 22 00000001 78 00000002 6262 23 00000003 316530')
) v (request, form);

-- hashes that were stored must stay valid: these do not change
SELECT idempotency_request_hash('null');
SELECT idempotency_request_hash('{}');
SELECT idempotency_request_hash('{"amount": 100.00, "currency": "EUR", "items": [{"sku": "a-1", "n": 2}], "note": null}');

--
-- Documents that are equal as jsonb have equal hashes, and no others have
--
CREATE TABLE document (id serial, request jsonb);
INSERT INTO document (request) SELECT d::jsonb FROM unnest(ARRAY[
    'null', 'true', 'false', '""', '"null"', '"true"', '" "', '[]', '{}', '[[]]', '[{}]', '[null]', '{"": null}',
    '0', '-0', '0.0', '0e10', '1', '1.0', '1e0', '10e-1', '0.1e1', '1.000', '-1', '"1"', '[1]', '["1"]', '[[1]]',
    '10', '1e1', '100', '1.0e2', '0.1', '0.10', '1e-1', '0.01', '1e20', '100000000000000000000',
    '12345678901234567890.123456789', '12345678901234567890.1234567890', '12345678901234567890.12345678901',
    '1e-20', '0.00000000000000000001', '12000', '1.2e4', '120000', '0.00012', '1.2e-4', '-0.00012', '1e4', '1e-4', '1e8',
    '1e1000', '-25e-1000', '1e131071', '9007199254740993', '9007199254740992',
    '"a"', '"\u0061"', '"A"', '"é"', '"\u00e9"', '"e\u0301"', '"\ud83d\udd11"', '"🔑"', '"\n"', '"\u000a"', '"\\n"', '"/"', '"\/"',
    '[1, 2]', '[2, 1]', '[ 1 , 2 ]', '[12]', '[1, 2, null]', '[[1], 2]', '[[1, 2]]', '[1.0, 2e0]',
    '{"a": 1}', '{"a": 1.0}', '{"a": "1"}', '{"A": 1}', '{"a": null}', '{"a": [1]}', '{"a": {"b": 1}}', '{"b": 1}', '{"ab": 1}',
    '{"a": 1, "b": 2}', '{"b": 2, "a": 1}', '{"a": 2, "b": 1}', '{"b":2,"a":1.0}', '{"a": 1, "b": 2, "c": null}',
    '{"a": 9, "b": 2, "a": 1}', '["a", 1, "b", 2]', '[["a", 1], ["b", 2]]', '{"a": {"b": 2, "c": 3}}', '{"a": {"c": 3, "b": 2}}',
    '{"a": {"b": 2}, "c": 3}', '{"aa": 1, "b": 2}', '{"b": 2, "aa": 1}', '{"é": 1, "z": 2, "aa": 3}', '{"aa": 3, "z": 2, "é": 1}',
    '{"a": []}', '{"a": {}}', '{"a": ""}', '{"a": false}', '{"a": 0}', '[false]', '[0]', '[""]'
]) d;
SELECT count(*) AS documents, count(DISTINCT request) AS different,
       count(DISTINCT idempotency_request_hash(request)) AS hashes
FROM document;
SELECT a.request, b.request AS other
FROM document a JOIN document b ON a.id < b.id
WHERE (a.request = b.request) <>
      (idempotency_request_hash(a.request) = idempotency_request_hash(b.request));
SELECT count(*) AS as_documented FROM document
WHERE idempotency_request_hash(request) = sha256('\x01'::bytea || form(request));

-- documents of all sizes, also beyond the 8 kB that are hashed at a time, and
-- stored out of line
INSERT INTO document (request)
SELECT jsonb_build_object('n', n, 'text', repeat('é', n), 'list', (SELECT jsonb_agg(i) FROM generate_series(1, n) i))
FROM unnest('{1,100,1000,4090,4091,4096,8000,8191,8192,8193,100000}'::int[]) n;
INSERT INTO document (request)
SELECT jsonb_build_array(string_agg(md5(i::text), '')) FROM generate_series(1, 3000) i;
INSERT INTO document (request)
SELECT jsonb_object_agg('key ' || i, i) FROM generate_series(1, 2000) i;
-- the longest number that there can be
INSERT INTO document (request) VALUES ((repeat('1', 131072) || '.' || repeat('1', 16383))::jsonb);
SELECT count(*) AS large FROM document WHERE octet_length(request::text) > 8192;
SELECT count(*) AS different FROM document
WHERE idempotency_request_hash(request) <> sha256('\x01'::bytea || form(request));

-- and of some depth
SELECT idempotency_request_hash((repeat('[', 1000) || repeat(']', 1000))::jsonb) =
       sha256(decode('01' || repeat('5b00000001', 999) || '5b00000000', 'hex')) AS as_documented;

-- what is left out on both sides does not count
SELECT idempotency_request_hash('{"a": 1, "sent_at": "now"}'::jsonb - 'sent_at') =
       idempotency_request_hash('{"sent_at": "later", "a": 1}'::jsonb - 'sent_at') AS same;

-- the hash is a function of the request alone
SELECT idempotency_request_hash(NULL) IS NULL AS none;
SELECT octet_length(idempotency_request_hash('{}'));
CREATE INDEX ON document (idempotency_request_hash(request));

--
-- The same, seen from begin
--
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', 'k', '{"amount": 1, "items": [1, 2]}');
SELECT idempotency_finish('t', 'a', 'k');
COMMIT;
SELECT request, outcome FROM (VALUES
    (1, '{"amount": 1, "items": [1, 2]}'), (2, ' { "items":[1,2.0] , "amount" : 1.00 } '),
    (3, '{"amount": 7, "amount": 1, "items": [1, 2]}'),
    (4, '{"amount": 1, "items": [2, 1]}'), (5, '{"amount": "1", "items": [1, 2]}'),
    (6, '{"amount": 1}'), (7, '{}'), (8, 'null'), (9, NULL)
) v (n, request), idempotency_try_begin('t', 'a', 'k', request::jsonb) ORDER BY n;
SELECT request_hash = idempotency_request_hash('{"items": [1, 2], "amount": 1}') AS stored
FROM idempotency_key;

DROP TABLE document;
DROP FUNCTION form, text_form, n4;
DROP EXTENSION idempotency;
