--
-- shard.sql
--    What each shard has: the tenants that live on it, their tables, the work, and
--    the functions that an application calls.
--
-- Run it on each shard, as a superuser, in a database that has the extension in
-- schema idempotency:
--
--     psql "$SHARD" -v ON_ERROR_STOP=1 -f shard.sql
--
-- A request may come to a shard that does not have its tenant: the tenant has moved
-- on, or is just moving, or whoever sent the request has looked into an old
-- directory.  A shard that took it would have no record of what was done before, and
-- would do it again.  So the shard has the last word.  Each function calls
-- tenancy.enter first, which takes a shared lock of the tenant until the end of the
-- transaction, and then looks whether it is at home.
--
-- The order matters, and so does that the look is a statement of its own, with a
-- snapshot of its own.  To move a tenant away (move-tenant says the rest), leaving_by
-- is set and committed, and after that the lock is taken alone, for a moment.  Whoever
-- got his lock before that moment has ended by then, with whatever he has begun,
-- prepared transactions as well; whoever gets it later sees leaving_by, and is refused.
-- In a transaction with one snapshot for all statements he might not see it.  So only
-- READ COMMITTED is let in.
--
-- It is an advisory lock, not one of the row, for three reasons.  It writes nothing, so
-- a replay stays a mere look.  It is fair: a stream of requests, each of which takes
-- the lock before the last one has ended, would keep an UPDATE of a row that they lock
-- waiting for ever.  And FOR KEY SHARE, which keeps no UPDATE waiting, is granted on
-- the old version of a row, without another look at the new one.
--
-- The application's role may execute these functions and nothing else.  They belong
-- to shop_owner, who cannot log in, and have its rights.
--

-- Roles belong to the whole server
DO $$
BEGIN
    IF to_regrole('shop_owner') IS NULL THEN
        CREATE ROLE shop_owner NOLOGIN;
    END IF;
    IF to_regrole('shop_app') IS NULL THEN
        CREATE ROLE shop_app LOGIN;
    END IF;
END
$$;

-- Otherwise everybody may execute each new function
ALTER DEFAULT PRIVILEGES FOR ROLE shop_owner REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC;

CREATE SCHEMA tenancy AUTHORIZATION shop_owner;
CREATE SCHEMA shop AUTHORIZATION shop_owner;
CREATE SCHEMA api AUTHORIZATION shop_owner;
GRANT USAGE ON SCHEMA api TO shop_app;

GRANT USAGE ON SCHEMA idempotency TO shop_owner;
GRANT USAGE ON TYPE idempotency.idempotency_result, idempotency.idempotency_response TO shop_owner;
GRANT EXECUTE ON FUNCTION
    idempotency.idempotency_run, idempotency.idempotency_try_run, idempotency.idempotency_replay,
    idempotency.idempotency_try_begin, idempotency.idempotency_checkpoint,
    idempotency.idempotency_finish, idempotency.idempotency_first_seen
    TO shop_owner;

SET ROLE shop_owner;

--
-- Who lives here
--

CREATE TABLE tenancy.tenants (
    tenant text COLLATE "C" PRIMARY KEY,
    arrived_by uuid,
    leaving_by uuid
);
COMMENT ON TABLE tenancy.tenants IS
'the tenants of this shard. Each table with rows of tenants references this one: that is how move-tenant knows them';
COMMENT ON COLUMN tenancy.tenants.tenant IS
'the tenant, or '''' for the global one';
COMMENT ON COLUMN tenancy.tenants.arrived_by IS
'the move that has brought it, null if it was created here';
COMMENT ON COLUMN tenancy.tenants.leaving_by IS
'the move that takes it away, null while it is at home. While it is set, no request is taken';

-- Has the transaction work for a tenant, which cannot move away before its end.
-- Raises SHARD if it does not live here: to be asked again, of the shard that has it.
CREATE FUNCTION tenancy.enter(tenant text) RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION USING
            ERRCODE = 'feature_not_supported',
            MESSAGE = 'requests must run at isolation level READ COMMITTED';
    END IF;

    PERFORM tenancy.lock_shared(tenant);
    PERFORM FROM tenancy.tenants AS t
    WHERE t.tenant = coalesce(enter.tenant, '') AND t.leaving_by IS NULL;

    IF NOT FOUND THEN
        RAISE EXCEPTION SQLSTATE 'SHARD' USING
            MESSAGE = 'tenant does not live on this shard',
            HINT = 'Send the request again, with the same key, as for a lost connection.';
    END IF;
END
$$;

-- The lock of a tenant.  Two tenants of the same hash share it, and then wait for each
-- other's moves.
CREATE FUNCTION tenancy.lock_shared(tenant text) RETURNS void
LANGUAGE sql
RETURN pg_advisory_xact_lock_shared('tenancy.tenants'::regclass::int, hashtext(coalesce(tenant, '')));

CREATE FUNCTION tenancy.lock_alone(tenant text) RETURNS void
LANGUAGE sql
RETURN pg_advisory_xact_lock('tenancy.tenants'::regclass::int, hashtext(coalesce(tenant, '')));

-- Lets a new tenant live here; routing.create_tenant calls it, on the proxy.
CREATE FUNCTION tenancy.add_tenant(tenant text) RETURNS void
LANGUAGE sql
BEGIN ATOMIC
    INSERT INTO tenancy.tenants (tenant) VALUES (coalesce(tenant, '')) ON CONFLICT DO NOTHING;
END;

--
-- The tables of the business.  Tenants move, so an id is a uuid: the sequences of two
-- shards would make the same number twice.
--

CREATE TABLE shop.accounts (
    tenant text COLLATE "C" NOT NULL REFERENCES tenancy.tenants,
    id text NOT NULL,
    balance numeric NOT NULL CHECK (balance >= 0),
    PRIMARY KEY (tenant, id)
);
COMMENT ON TABLE shop.accounts IS
'accounts that can be paid from';

CREATE TABLE shop.payments (
    tenant text COLLATE "C" NOT NULL REFERENCES tenancy.tenants,
    id uuid NOT NULL DEFAULT gen_random_uuid(),
    account text NOT NULL,
    amount numeric NOT NULL CHECK (amount > 0),
    refunded boolean NOT NULL DEFAULT false,
    PRIMARY KEY (tenant, id),
    FOREIGN KEY (tenant, account) REFERENCES shop.accounts
);
COMMENT ON TABLE shop.payments IS
'a row for each time that something was paid';

CREATE TABLE shop.charges (
    tenant text COLLATE "C" NOT NULL REFERENCES tenancy.tenants,
    id text NOT NULL,
    amount numeric NOT NULL CHECK (amount > 0),
    PRIMARY KEY (tenant, id)
);
COMMENT ON TABLE shop.charges IS
'charges of cards, by the id that the payment provider gave them';

CREATE TABLE shop.deposits (
    tenant text COLLATE "C" NOT NULL REFERENCES tenancy.tenants,
    message_id text NOT NULL,
    amount numeric NOT NULL CHECK (amount > 0)
);
COMMENT ON TABLE shop.deposits IS
'a row for each time that something was done about a message of the bank';

--
-- Handlers.  They are given the tenant in the request, by the functions below.
--

-- Pays {"account", "amount"}: 201, or 402 if there is not so much.
CREATE FUNCTION shop.pay(request jsonb) RETURNS idempotency.idempotency_response
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    payer shop.accounts;
    payment shop.payments;
    answer idempotency.idempotency_response;
BEGIN
    SELECT * INTO payer FROM shop.accounts
    WHERE tenant = request->>'tenant' AND id = request->>'account'
    FOR UPDATE;

    IF payer.balance >= (request->>'amount')::numeric THEN
        UPDATE shop.accounts SET balance = balance - (request->>'amount')::numeric
        WHERE tenant = payer.tenant AND id = payer.id;

        INSERT INTO shop.payments (tenant, account, amount)
        VALUES (payer.tenant, payer.id, (request->>'amount')::numeric)
        RETURNING * INTO payment;

        answer.status_code := 201;
        answer.response := json_build_object('payment', payment.id, 'amount', payment.amount);
    ELSE
        answer.status_code := 402;
        answer.response := '{"error": "not enough money"}';
    END IF;
    RETURN answer;
END
$$;

-- Gives {"payment"} back: 200, or 422 if there is no such payment to give back.
CREATE FUNCTION shop.refund(request jsonb) RETURNS idempotency.idempotency_response
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    payment shop.payments;
    answer idempotency.idempotency_response;
BEGIN
    UPDATE shop.payments SET refunded = true
    WHERE tenant = request->>'tenant' AND id = (request->>'payment')::uuid AND NOT refunded
    RETURNING * INTO payment;

    IF FOUND THEN
        UPDATE shop.accounts SET balance = balance + payment.amount
        WHERE tenant = payment.tenant AND id = payment.account;

        answer.status_code := 200;
        answer.response := json_build_object('refunded', payment.amount);
    ELSE
        answer.status_code := 422;
        answer.response := '{"error": "no such payment, or it was refunded before"}';
    END IF;
    RETURN answer;
END
$$;

-- A request as the handlers get it.  A tenant that the client wrote into it does not count.
CREATE FUNCTION shop.with_tenant(request jsonb, tenant text) RETURNS jsonb
LANGUAGE sql IMMUTABLE
RETURN request || jsonb_build_object('tenant', coalesce(tenant, ''));

--
-- What an application calls, through the proxy
--

-- A mismatch and a request in flight are outcomes here, which a proxy passes on like
-- any answer.
CREATE FUNCTION api.pay(
    tenant text, key text, request jsonb,
    OUT outcome text, OUT status_code int, OUT response json, OUT retry_after int
)
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM tenancy.enter(tenant);
    SELECT result.outcome, result.status_code, result.response, result.retry_after
    INTO outcome, status_code, response, retry_after
    FROM idempotency.idempotency_try_run(
        tenant, 'payments.create', key, shop.with_tenant(request, tenant), 'shop.pay(jsonb)') AS result;
END
$$;
COMMENT ON FUNCTION api.pay IS 'pays {"account", "amount"}; see idempotency_try_run for the outcomes';

-- The same with errors, ID003 and ID004.  Each costs the proxy its connection.
CREATE FUNCTION api.refund(
    tenant text, key text, request jsonb,
    OUT outcome text, OUT status_code int, OUT response json
)
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM tenancy.enter(tenant);
    SELECT result.outcome, result.status_code, result.response
    INTO outcome, status_code, response
    FROM idempotency.idempotency_run(
        tenant, 'payments.refund', key, shop.with_tenant(request, tenant), 'shop.refund(jsonb)') AS result;
END
$$;
COMMENT ON FUNCTION api.refund IS 'gives {"payment"} back; see idempotency_run for the outcomes and errors';

CREATE FUNCTION api.status(
    tenant text, action text, key text,
    OUT outcome text, OUT status_code int, OUT response json, OUT retry_after int
)
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM tenancy.enter(tenant);
    SELECT result.outcome, result.status_code, result.response, result.retry_after
    INTO outcome, status_code, response, retry_after
    FROM idempotency.idempotency_replay(tenant, action, key) AS result;
END
$$;
COMMENT ON FUNCTION api.status IS 'what became of a request; see idempotency_replay for the outcomes';

--
-- Work with an effect outside, under a leased claim: a card is charged between two
-- calls.  Each call is a transaction of its own, so it may go to another shard than
-- the call before.
--

-- The caller brings the id of the claim, a new uuid for each try.
CREATE FUNCTION api.begin_charge(
    tenant text, key text, request jsonb, claim uuid,
    OUT outcome text, OUT status_code int, OUT response json, OUT retry_after int,
    OUT attempt int, OUT recovery_point text, OUT recovery_state jsonb
)
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM tenancy.enter(tenant);
    SELECT result.outcome, result.status_code, result.response, result.retry_after,
           result.attempt, result.recovery_point, result.recovery_state
    INTO outcome, status_code, response, retry_after, attempt, recovery_point, recovery_state
    FROM idempotency.idempotency_try_begin(
        tenant, 'cards.charge', key, request, lease => '5 minutes', claim => claim) AS result;
END
$$;
COMMENT ON FUNCTION api.begin_charge IS 'begins to charge a card; see idempotency_try_begin for the outcomes';

CREATE FUNCTION api.save_charge(
    tenant text, key text, claim uuid, recovery_point text, recovery_state jsonb
) RETURNS timestamptz
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM tenancy.enter(tenant);
    RETURN idempotency.idempotency_checkpoint(
        tenant, 'cards.charge', key, claim, recovery_point, recovery_state, lease => '5 minutes');
END
$$;
COMMENT ON FUNCTION api.save_charge IS
'saves how far the work got, and returns the new end of the lease; ID005 if the claim was lost';

-- May be repeated with the same claim and charge, after a lost connection.
CREATE FUNCTION api.finish_charge(
    tenant text, key text, claim uuid, charge text, amount numeric
) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM tenancy.enter(tenant);
    INSERT INTO shop.charges VALUES (coalesce(tenant, ''), charge, amount) ON CONFLICT DO NOTHING;
    RETURN idempotency.idempotency_finish(
        tenant, 'cards.charge', key, 201, json_build_object('charge', charge), claim => claim);
END
$$;
COMMENT ON FUNCTION api.finish_charge IS
'records a charge and ends the work; ID005 if the claim was lost';

--
-- A consumer of messages that are delivered at least once.  A batch has the messages
-- of one tenant, as a transaction is on one shard.
--

CREATE FUNCTION api.deposit(tenant text, messages jsonb) RETURNS int
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    deposited int;
BEGIN
    PERFORM tenancy.enter(tenant);
    INSERT INTO shop.deposits (tenant, message_id, amount)
    SELECT DISTINCT ON (new.id) coalesce(deposit.tenant, ''), new.id, message.amount
    FROM jsonb_to_recordset(messages) AS message (id text, amount numeric)
    JOIN idempotency.idempotency_first_seen(
        tenant, 'deposits', ARRAY(SELECT value->>'id' FROM jsonb_array_elements(messages))) AS new (id)
        ON new.id = message.id;
    GET DIAGNOSTICS deposited = ROW_COUNT;
    RETURN deposited;
END
$$;
COMMENT ON FUNCTION api.deposit IS
'deposits what was not deposited before of [{"id", "amount"}, ...], and returns how many that were';

GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA api TO shop_app;

RESET ROLE;
