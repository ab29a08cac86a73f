--
-- Numbers as long as a jsonb can have them
--
CREATE EXTENSION idempotency;

-- the form of a number of n digits 1 before the point and m after it
CREATE FUNCTION ones_form(n int, m int) RETURNS bytea LANGUAGE sql IMMUTABLE AS $$
    SELECT '\x0123'::bytea || int4send(length(digits)) || convert_to(digits, 'UTF8')
    FROM (SELECT repeat('1', n + m) || 'e' || n - 1) AS f (digits)
$$;
CREATE FUNCTION ones(n int, m int) RETURNS jsonb LANGUAGE sql IMMUTABLE AS $$
    SELECT (repeat('1', n) || CASE WHEN m > 0 THEN '.' || repeat('1', m) ELSE '' END)::jsonb
$$;

-- around 32767 digits to base 10000, and the most that there can be
SELECT n, m, idempotency_request_hash(ones(n, m)) = sha256(ones_form(n, m)) AS as_documented
FROM (VALUES (1, 0), (5, 5), (131065, 0), (131068, 0), (131069, 0), (131072, 0),
             (131072, 16383)) v (n, m);
-- the smallest and the largest power of ten
SELECT idempotency_request_hash('1e131071') = sha256('\x0123'::bytea || int4send(8) || '1e131071') AS large,
       idempotency_request_hash('-1e-16383') = sha256('\x0123'::bytea || int4send(9) || '-1e-16383') AS small;

DROP FUNCTION ones, ones_form;
DROP EXTENSION idempotency;
