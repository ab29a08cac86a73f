--
-- payments.sql
--    An API whose functions are protected: payments, refunds and statements.
--
-- A handler does the work and returns the answer.  It runs as api_owner, whoever
-- sent the request, so what a user may see and do is up to the row-level security
-- of the tables, which is forced on their owner as well.
--
-- Run it as a superuser, after protect.sql.
--

SET ROLE api_owner;

--
-- Tables
--

CREATE TABLE private.accounts (
    tenant text NOT NULL,
    id text NOT NULL,
    balance numeric NOT NULL CONSTRAINT enough_money CHECK (balance >= 0),
    PRIMARY KEY (tenant, id)
);

CREATE TABLE private.payments (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant text NOT NULL,
    account text NOT NULL,
    amount numeric NOT NULL CONSTRAINT amount_is_positive CHECK (amount > 0),
    refunded boolean NOT NULL DEFAULT false,
    FOREIGN KEY (tenant, account) REFERENCES private.accounts
);

CREATE TABLE private.statements (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant text NOT NULL,
    account text NOT NULL,
    FOREIGN KEY (tenant, account) REFERENCES private.accounts
);

-- A tenant has its own rows and no others.  The policies name no role, for in the
-- functions current_user is api_owner, and not the role of the token.  They call no
-- function of ours: behind a view, functions are called with the user's own rights.
ALTER TABLE private.accounts ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE private.payments ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE private.statements ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;

CREATE POLICY own_tenant ON private.accounts
    USING (tenant = (SELECT nullif(current_setting('request.jwt.claims', true), '')::json ->> 'tenant'));
CREATE POLICY own_tenant ON private.payments
    USING (tenant = (SELECT nullif(current_setting('request.jwt.claims', true), '')::json ->> 'tenant'));
CREATE POLICY own_tenant ON private.statements
    USING (tenant = (SELECT nullif(current_setting('request.jwt.claims', true), '')::json ->> 'tenant'));

-- GET /accounts, GET /payments
CREATE VIEW api.accounts AS SELECT id, balance FROM private.accounts;
CREATE VIEW api.payments AS SELECT id, account, amount, refunded FROM private.payments;
GRANT SELECT ON api.accounts, api.payments TO web_user;

-- GET /health
CREATE VIEW api.health AS SELECT 'ok' AS status;
GRANT SELECT ON api.health TO anon, web_user;

--
-- Handlers
--

-- Pays {"account", "amount"}.  201 with Location; 402 if there is not enough money,
-- which is kept for half an hour, while the payment that was written is undone.  An
-- account that does not exist is 404, and that is not kept: the error undoes all.
CREATE FUNCTION private.create_payment(request jsonb) RETURNS idempotency.idempotency_response
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    payment private.payments;
    answer idempotency.idempotency_response;
    violated text;
BEGIN
    IF NOT EXISTS (SELECT FROM private.accounts WHERE id = request->>'account') THEN
        RAISE SQLSTATE 'PT404' USING MESSAGE = 'there is no such account';
    END IF;

    INSERT INTO private.payments (tenant, account, amount)
    VALUES (private.login('tenant'), request->>'account', (request->>'amount')::numeric)
    RETURNING * INTO payment;

    UPDATE private.accounts SET balance = balance - payment.amount WHERE id = payment.account;

    answer.status_code := 201;
    answer.headers := jsonb_build_object('Location', format('/payments?id=eq.%s', payment.id));
    answer.response := json_build_object('id', payment.id, 'amount', payment.amount);
    RETURN answer;
EXCEPTION WHEN check_violation THEN
    GET STACKED DIAGNOSTICS violated = CONSTRAINT_NAME;
    IF violated <> 'enough_money' THEN
        RAISE;
    END IF;
    answer.status_code := 402;
    answer.response := '{"error": "not enough money"}';
    answer.ttl := '30 minutes';
    RETURN answer;
END
$$;

-- Gives {"payment"} back.  200; 422 if that was done by another request before.
CREATE FUNCTION private.refund(request jsonb) RETURNS idempotency.idempotency_response
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    payment private.payments;
    answer idempotency.idempotency_response;
BEGIN
    SELECT * INTO payment FROM private.payments WHERE id = (request->>'payment')::bigint FOR UPDATE;
    IF NOT FOUND THEN
        RAISE SQLSTATE 'PT404' USING MESSAGE = 'there is no such payment';
    END IF;

    IF payment.refunded THEN
        answer.status_code := 422;
        answer.response := '{"error": "refunded before"}';
    ELSE
        UPDATE private.payments SET refunded = true WHERE id = payment.id;
        UPDATE private.accounts SET balance = balance + payment.amount WHERE id = payment.account;
        answer.status_code := 200;
        answer.response := json_build_object('refunded', payment.amount);
    END IF;
    RETURN answer;
END
$$;

-- Makes a statement of {"account"}: 201 with its payments as CSV.
CREATE FUNCTION private.create_statement(request jsonb) RETURNS idempotency.idempotency_response
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    statement private.statements;
    csv text;
    answer idempotency.idempotency_response;
BEGIN
    INSERT INTO private.statements (tenant, account)
    VALUES (private.login('tenant'), request->>'account')
    RETURNING * INTO statement;

    SELECT coalesce(string_agg(format(E'%s,%s\n', id, amount), '' ORDER BY id), '') INTO csv
    FROM private.payments WHERE account = statement.account;

    answer.status_code := 201;
    answer.headers := jsonb_build_object(
        'Content-Type', 'text/csv; charset=utf-8',
        'Content-Disposition', format('attachment; filename="statement-%s.csv"', statement.id));
    answer.body := convert_to(E'payment,amount\n' || csv, 'UTF8');
    RETURN answer;
END
$$;

--
-- What is exposed.  The name of the handler is resolved here, once, and a handler
-- that is in use cannot be dropped.
--

CREATE FUNCTION api.create_payment(json) RETURNS json
LANGUAGE sql SECURITY DEFINER
RETURN private.protect('payments.create', 'private.create_payment(jsonb)', $1);
COMMENT ON FUNCTION api.create_payment IS 'Pays {"account", "amount"}. Needs the header Idempotency-Key.';

CREATE FUNCTION api.refund(json) RETURNS json
LANGUAGE sql SECURITY DEFINER
RETURN private.protect('payments.refund', 'private.refund(jsonb)', $1);
COMMENT ON FUNCTION api.refund IS 'Gives {"payment"} back. Needs the header Idempotency-Key.';

CREATE FUNCTION api.create_statement(json) RETURNS api."*/*"
LANGUAGE sql SECURITY DEFINER
RETURN private.protect_bytes('statements.create', 'private.create_statement(jsonb)', $1);
COMMENT ON FUNCTION api.create_statement IS 'A statement of {"account"}, as CSV. Needs the header Idempotency-Key.';

GRANT EXECUTE ON FUNCTION api.create_payment, api.refund, api.create_statement TO web_user;

RESET ROLE;
