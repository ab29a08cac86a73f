--
-- Forms and lengths of a key
--
CREATE EXTENSION idempotency;

-- whether a key is accepted; a claim that it got is given back
CREATE FUNCTION accepts(key text) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM idempotency_begin('t', 'a', key);
    RETURN idempotency_release('t', 'a', key);
EXCEPTION WHEN SQLSTATE 'ID002' THEN
    RETURN false;
END $$;

-- visible ASCII, which is the default
SHOW idempotency.key_format;
SELECT string_agg(chr(c), '' ORDER BY c) AS accepted
FROM generate_series(1, 1023) c WHERE accepts(chr(c));
SELECT key, accepts(key) FROM (VALUES
    ('a b'), (' a'), ('a '), (E'a\n'), (E'\ta'), (E'a\u007f'), ('clé'), ('ключ'), ('🔑'),
    ('a'), ('"quoted"'), ('''; DROP TABLE x'), ('550e8400-e29b-41d4-a716-446655440000')
) v (key);

-- letters, digits, hyphens and underscores
SET idempotency.key_format = 'slug';
SELECT string_agg(chr(c), '' ORDER BY c) AS accepted
FROM generate_series(1, 1023) c WHERE accepts(chr(c));
SELECT key, accepts(key) FROM (VALUES
    ('order-7_A'), ('order.7'), ('order 7'), ('order/7'), ('clé'),
    ('550e8400-e29b-41d4-a716-446655440000')
) v (key);
SELECT idempotency_begin('t', 'a', 'order.7');
\echo :SQLSTATE

-- a UUID in its standard form
SET idempotency.key_format = 'uuid';
SELECT key, accepts(key) FROM (VALUES
    ('550e8400-e29b-41d4-a716-446655440000'), ('550E8400-E29B-41D4-A716-446655440000'),
    ('00000000-0000-0000-0000-000000000000'), ('ffffffff-ffff-ffff-ffff-ffffffffffff'),
    ('550e8400e29b41d4a716446655440000'), ('{550e8400-e29b-41d4-a716-446655440000}'),
    ('550e8400-e29b-41d4-a716-44665544000'), ('550e8400-e29b-41d4-a716-4466554400000'),
    ('550e8400-e29b-41d4-a716-44665544000g'), ('550e8400-e29b-41d4-a716_446655440000'),
    ('550e8400-e29b-41d4a-716-446655440000'), ('-50e8400-e29b-41d4-a716-446655440000'),
    ('urn:uuid:550e8400-e29b-41d4-a716-446655440000'), ('order-7')
) v (key);
SELECT idempotency_begin('t', 'a', 'order-7');
\echo :SQLSTATE
-- two spellings of one UUID are two keys: a key is compared as it is
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'a', '550e8400-e29b-41d4-a716-446655440000');
SELECT idempotency_finish('t', 'a', '550e8400-e29b-41d4-a716-446655440000');
SELECT outcome FROM idempotency_begin('t', 'a', '550E8400-E29B-41D4-A716-446655440000');
ROLLBACK;
RESET idempotency.key_format;
SELECT idempotency_begin('t', 'a', 'order 7');
\echo :SQLSTATE

-- lengths
SET idempotency.key_min_length = 16;
SET idempotency.key_max_length = 20;
SELECT length, accepts(repeat('k', length)) FROM unnest('{1,15,16,17,20,21,255}'::int[]) length;
SELECT idempotency_begin('t', 'a', repeat('k', 15));
\echo :SQLSTATE
SELECT idempotency_begin('t', 'a', repeat('k', 21));
\echo :SQLSTATE
-- a missing key is missing, not too short
SELECT idempotency_begin('t', 'a', '');
\echo :SQLSTATE
SET idempotency.key_max_length = 16;
SELECT length, accepts(repeat('k', length)) FROM unnest('{15,16,17}'::int[]) length;
RESET idempotency.key_min_length;
RESET idempotency.key_max_length;
SELECT length, accepts(repeat('k', length)) FROM unnest('{1,255,256}'::int[]) length;

-- the error does not repeat what a client sent
SELECT idempotency_begin('t', 'a', E'forged\nLOG:  line');
\echo :SQLSTATE

DROP FUNCTION accepts;
DROP EXTENSION idempotency;
