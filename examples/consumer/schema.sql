-- The tables of the example, for psql, as a superuser, in a database that has the
-- extension in schema idempotency:
--
--     psql "$DATABASE_URL" -f schema.sql
--
-- Schema queue stands for any queue that delivers at least once.  Its tables are
-- touched by consumer/queue.py alone, and never in the transaction of the work, so
-- that SQS, RabbitMQ or Kafka can take its place.  The other tables are those of
-- the application.

-- Roles belong to the whole server
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'consumer') THEN
        CREATE ROLE consumer LOGIN;
    END IF;
END
$$;

--
-- The queue
--
CREATE SCHEMA queue;

CREATE TABLE queue.consumers (
    name text PRIMARY KEY
);
COMMENT ON TABLE queue.consumers IS
'who gets the messages: each message is delivered to each of them. A name is also an action of the extension, and no request may have that action';

INSERT INTO queue.consumers VALUES ('accounting'), ('shipping');

CREATE TABLE queue.deliveries (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    consumer text NOT NULL REFERENCES queue.consumers,
    message_id text NOT NULL,
    payload jsonb NOT NULL,
    attempts int NOT NULL DEFAULT 0,
    visible_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    reason text
);
COMMENT ON TABLE queue.deliveries IS
'deliveries that nobody has acknowledged, of which a message may have several';
COMMENT ON COLUMN queue.deliveries.attempts IS
'how many times it was handed out';
COMMENT ON COLUMN queue.deliveries.visible_at IS
'when it may be handed out again, as whoever had it last is taken for dead then';
COMMENT ON COLUMN queue.deliveries.reason IS
'why it was rejected the last time, null when it was not: a worker that dies gives no reason';

-- Those that come in batches, and those that come alone
CREATE INDEX ON queue.deliveries (consumer, visible_at) WHERE attempts = 0;
CREATE INDEX ON queue.deliveries (consumer, visible_at) WHERE attempts > 0;

CREATE TABLE queue.dead_letters (
    id bigint PRIMARY KEY,
    consumer text NOT NULL REFERENCES queue.consumers,
    message_id text NOT NULL,
    payload jsonb NOT NULL,
    attempts int NOT NULL,
    reason text,
    buried_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE queue.dead_letters IS
'deliveries that were handed out as often as is allowed, for people to look at';

--
-- The application.  No unique constraint speaks of messages: here it would hide
-- what the tests count.  Elsewhere it is a good second line.
--
CREATE TABLE accounts (
    name text PRIMARY KEY
);
COMMENT ON TABLE accounts IS
'accounts that can be paid from';

CREATE TABLE ledger (
    message_id text NOT NULL,
    account text NOT NULL REFERENCES accounts,
    amount numeric NOT NULL CHECK (amount > 0),
    posted_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE ledger IS
'what accounting does about a message: a row for each time that it did so';

CREATE TABLE parcels (
    message_id text NOT NULL,
    order_no text NOT NULL,
    packed_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE parcels IS
'what shipping does about a message: a row for each time that it did so';

--
-- Rights
--

-- Whoever may forget any record can have any payment made twice.  So the worker's
-- role may not, but it may call this, which forgets ids of messages and nothing else.
CREATE FUNCTION queue.forget(consumer text, message_id text) RETURNS boolean
LANGUAGE sql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT idempotency.idempotency_forget(NULL, name, forget.message_id)
    FROM queue.consumers
    WHERE name = forget.consumer
$$;
COMMENT ON FUNCTION queue.forget IS
'makes the id of a message new again, for the transaction that recorded it and could not do the work; true if it was recorded. Raises what idempotency_forget does: ID003 while somebody else is forgetting it';
REVOKE ALL ON FUNCTION queue.forget FROM PUBLIC;

GRANT USAGE ON SCHEMA idempotency, queue TO consumer;
GRANT EXECUTE ON FUNCTION idempotency.idempotency_first_seen, queue.forget TO consumer;
GRANT SELECT, UPDATE, DELETE ON queue.deliveries TO consumer;
GRANT INSERT ON queue.dead_letters TO consumer;
GRANT INSERT ON ledger, parcels TO consumer;
