-- The tables of the payment service that all programs here share.  Amounts are
-- numeric and invoices bigint, so that neither is ever rounded.

CREATE TABLE accounts (
    id text PRIMARY KEY,
    balance numeric NOT NULL CHECK (balance >= 0)
);

-- An invoice is paid once.  The constraint is deferred, so that it is COMMIT that
-- fails where two requests with different keys pay the same one.
CREATE TABLE payments (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    account text NOT NULL REFERENCES accounts,
    amount numeric NOT NULL,
    invoice bigint NOT NULL UNIQUE DEFERRABLE INITIALLY DEFERRED
);

INSERT INTO accounts VALUES (U&'zo\00eb', 100);

-- Two invoices are made for tests.  Who pays invoice 13 first loses the connection in
-- COMMIT, as if the network had broken; a sequence counts, for what it gives is not
-- rolled back.  Who pays invoice 14 has an answer that is too large, so finish fails.
CREATE SEQUENCE cuts;

CREATE FUNCTION cut_connection() RETURNS trigger
LANGUAGE plpgsql
AS $$
BEGIN
    IF nextval('cuts') = 1 THEN
        PERFORM pg_terminate_backend(pg_backend_pid());
    END IF;
    RETURN NULL;
END
$$;

CREATE CONSTRAINT TRIGGER cut_connection
AFTER INSERT ON payments DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW WHEN (new.invoice = 13) EXECUTE FUNCTION cut_connection();

CREATE FUNCTION forbid_answers() RETURNS trigger
LANGUAGE plpgsql
AS $$
BEGIN
    PERFORM set_config('idempotency.max_response_size', '1', true);
    RETURN NULL;
END
$$;

CREATE TRIGGER forbid_answers
AFTER INSERT ON payments
FOR EACH ROW WHEN (new.invoice = 14) EXECUTE FUNCTION forbid_answers();
