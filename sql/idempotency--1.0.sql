/* sql/idempotency--1.0.sql */

-- complain if script is sourced in psql, rather than via CREATE EXTENSION
\echo Use "CREATE EXTENSION idempotency" to load this file. \quit

--
-- Types
--

CREATE TYPE idempotency_state AS ENUM ('pending', 'completed', 'errored');

COMMENT ON TYPE idempotency_state IS
'state of a record: work under a leased claim, an answer to replay, or a final client error to replay';

CREATE TYPE idempotency_result AS (
    outcome text,
    status_code int,
    response json,
    headers jsonb,
    body bytea,
    claim uuid,
    attempt int,
    recovery_point text,
    recovery_state jsonb,
    retry_after int,
    created_at timestamptz,
    finished_at timestamptz,
    expires_at timestamptz
);

COMMENT ON TYPE idempotency_result IS
'what a request is told: its outcome and, where there is one, the stored answer';
COMMENT ON COLUMN idempotency_result.outcome IS
'started, replayed, mismatched or in_flight; from idempotency_run and idempotency_store, what idempotency_finish would say instead of started; from idempotency_replay also stalled, or null';
COMMENT ON COLUMN idempotency_result.status_code IS
'HTTP status of the stored answer';
COMMENT ON COLUMN idempotency_result.response IS
'stored answer, byte for byte';
COMMENT ON COLUMN idempotency_result.headers IS
'stored headers';
COMMENT ON COLUMN idempotency_result.body IS
'stored answer that is not JSON';
COMMENT ON COLUMN idempotency_result.claim IS
'id of a leased claim that was started, which finish, checkpoint and release need';
COMMENT ON COLUMN idempotency_result.attempt IS
'how many times the work was begun, this time included; for a request in flight, by who works on it';
COMMENT ON COLUMN idempotency_result.recovery_point IS
'how far an earlier attempt got';
COMMENT ON COLUMN idempotency_result.recovery_state IS
'what an earlier attempt saved to go on from there';
COMMENT ON COLUMN idempotency_result.retry_after IS
'after how many seconds a repeat of a request in flight should come again';
COMMENT ON COLUMN idempotency_result.created_at IS
'when the request was begun';
COMMENT ON COLUMN idempotency_result.finished_at IS
'when the answer was stored';
COMMENT ON COLUMN idempotency_result.expires_at IS
'when the answer will be forgotten';

CREATE TYPE idempotency_response AS (
    status_code int,
    headers jsonb,
    response json,
    body bytea,
    ttl interval
);

COMMENT ON TYPE idempotency_response IS
'what a handler may return: an answer with its HTTP status and headers, and how long to keep it';
COMMENT ON COLUMN idempotency_response.status_code IS
'HTTP status of the answer';
COMMENT ON COLUMN idempotency_response.headers IS
'headers of the answer';
COMMENT ON COLUMN idempotency_response.response IS
'the answer, when it is JSON';
COMMENT ON COLUMN idempotency_response.body IS
'the answer, when it is not JSON';
COMMENT ON COLUMN idempotency_response.ttl IS
'how long to keep the answer, null for what the call or the settings say';

--
-- Table
--
-- The columns are known by number to the library (src/store/catalog.h).  Text columns
-- are compared by bytes, whatever the collation of the database.
--
-- The primary key begins with the key because that is what tells records apart:
-- a comparison of two index entries seldom gets to the next column, which saves
-- a sixth of the instructions of a request.
--
-- A little room is left on each page for checkpoint and finish to update the
-- row of a leased claim in place.  With one lease in ten requests this makes
-- nine in ten of the updates HOT, instead of seven, and the table 5 % larger.
-- With more room, inserts would leave a page before it is so full that it is
-- pruned, and the table would grow severalfold between two vacuums.
--
-- Every day as many rows die as there are.  Vacuum after a twentieth of them,
-- not a fifth as by default, keeps table and indexes 13 % larger than fresh ones
-- instead of 29 %, with 16 passes a day over the indexes instead of 7; still more
-- of them gain little.  By default, analyze would take ten times the CPU time
-- of vacuum, for statistics that change little and that only the views need, so
-- it is done after half of the rows instead of a tenth.  (See bench/day.)
--

CREATE TABLE idempotency_key (
    tenant text COLLATE "C" NOT NULL,
    action text COLLATE "C" NOT NULL,
    key text COLLATE "C" NOT NULL,
    actor text COLLATE "C" NOT NULL,
    state idempotency_state NOT NULL,
    request_hash bytea,
    status_code int,
    headers jsonb,
    response json,
    body bytea,
    claim uuid,
    attempt int NOT NULL,
    recovery_point text,
    recovery_state jsonb,
    lease_expires_at timestamptz,
    created_at timestamptz NOT NULL,
    finished_at timestamptz,
    expires_at timestamptz NOT NULL,
    ttl interval,
    PRIMARY KEY (key, tenant, action, actor)
) WITH (
    fillfactor = 95,
    autovacuum_vacuum_scale_factor = 0.05,
    autovacuum_analyze_scale_factor = 0.5
);

CREATE INDEX idempotency_key_expires_at_idx ON idempotency_key (expires_at);

COMMENT ON TABLE idempotency_key IS
'records of requests; written by nothing but the functions of the extension';
COMMENT ON COLUMN idempotency_key.tenant IS
'whose data the request is about, or '''' for the global tenant';
COMMENT ON COLUMN idempotency_key.action IS
'the operation, such as orders.create';
COMMENT ON COLUMN idempotency_key.key IS
'idempotency key that the client sent';
COMMENT ON COLUMN idempotency_key.actor IS
'user or client inside the tenant, or '''' when not used';
COMMENT ON COLUMN idempotency_key.state IS
'pending, completed or errored';
COMMENT ON COLUMN idempotency_key.request_hash IS
'fingerprint of the request, or null when the caller gave none';
COMMENT ON COLUMN idempotency_key.status_code IS
'HTTP status of the answer';
COMMENT ON COLUMN idempotency_key.headers IS
'headers of the answer';
COMMENT ON COLUMN idempotency_key.response IS
'the answer, when it is JSON';
COMMENT ON COLUMN idempotency_key.body IS
'the answer, when it is not JSON';
COMMENT ON COLUMN idempotency_key.claim IS
'id of the leased claim that the record is of; null for any other claim';
COMMENT ON COLUMN idempotency_key.attempt IS
'how many times the work was begun since the record is kept';
COMMENT ON COLUMN idempotency_key.recovery_point IS
'how far the work under a leased claim got';
COMMENT ON COLUMN idempotency_key.recovery_state IS
'what is needed to go on from the recovery point';
COMMENT ON COLUMN idempotency_key.lease_expires_at IS
'when another caller may take over a leased claim; null when it was released';
COMMENT ON COLUMN idempotency_key.created_at IS
'when the request was begun';
COMMENT ON COLUMN idempotency_key.finished_at IS
'when the answer was stored';
COMMENT ON COLUMN idempotency_key.expires_at IS
'when the record is forgotten, and may be swept';
COMMENT ON COLUMN idempotency_key.ttl IS
'how long the answer to a pending request will be kept';
COMMENT ON INDEX idempotency_key_expires_at_idx IS
'finds the records to sweep';

-- answers must survive a dump and restore
SELECT pg_catalog.pg_extension_config_dump('idempotency_key', '');

-- On a cluster of Citus, a statement on its two shards has a transaction that
-- changes other nodes and this one committed in two phases (src/call/forward.c).
CREATE TABLE idempotency_two_phase (
    part int PRIMARY KEY
);

COMMENT ON TABLE idempotency_two_phase IS
'always empty; has Citus commit in two phases, and is for nothing else';
COMMENT ON COLUMN idempotency_two_phase.part IS
'by which the table is distributed';

--
-- Calls of an application
--

CREATE FUNCTION idempotency_support(internal) RETURNS internal
AS 'MODULE_PATHNAME'
LANGUAGE C IMMUTABLE STRICT;

COMMENT ON FUNCTION idempotency_support(internal) IS
'marks the functions whose calls in FROM have a plan of their own, and loads the library for it';

CREATE FUNCTION idempotency_begin(
    tenant text,
    action text,
    key text,
    request jsonb DEFAULT NULL,
    actor text DEFAULT NULL,
    ttl interval DEFAULT NULL,
    wait interval DEFAULT NULL,
    lease interval DEFAULT NULL,
    request_hash bytea DEFAULT NULL,
    claim uuid DEFAULT NULL
) RETURNS idempotency_result
AS 'MODULE_PATHNAME'
LANGUAGE C VOLATILE PARALLEL UNSAFE SUPPORT idempotency_support;

COMMENT ON FUNCTION idempotency_begin(text, text, text, jsonb, text, interval, interval, interval, bytea, uuid) IS
'claim a request, or get its stored answer; raises an error when it is in flight or mismatched';

CREATE FUNCTION idempotency_try_begin(
    tenant text,
    action text,
    key text,
    request jsonb DEFAULT NULL,
    actor text DEFAULT NULL,
    ttl interval DEFAULT NULL,
    wait interval DEFAULT NULL,
    lease interval DEFAULT NULL,
    request_hash bytea DEFAULT NULL,
    claim uuid DEFAULT NULL
) RETURNS idempotency_result
AS 'MODULE_PATHNAME'
LANGUAGE C VOLATILE PARALLEL UNSAFE SUPPORT idempotency_support;

COMMENT ON FUNCTION idempotency_try_begin(text, text, text, jsonb, text, interval, interval, interval, bytea, uuid) IS
'claim a request, or get its stored answer; tells by the outcome when it is in flight or mismatched';

CREATE FUNCTION idempotency_finish(
    tenant text,
    action text,
    key text,
    status_code int DEFAULT 200,
    response json DEFAULT NULL,
    headers jsonb DEFAULT NULL,
    actor text DEFAULT NULL,
    claim uuid DEFAULT NULL,
    body bytea DEFAULT NULL,
    ttl interval DEFAULT NULL
) RETURNS text
AS 'MODULE_PATHNAME'
LANGUAGE C VOLATILE PARALLEL UNSAFE;

COMMENT ON FUNCTION idempotency_finish(text, text, text, int, json, jsonb, text, uuid, bytea, interval) IS
'store the answer of a claimed request and end the claim';

CREATE FUNCTION idempotency_replay(
    tenant text,
    action text,
    key text,
    request jsonb DEFAULT NULL,
    actor text DEFAULT NULL,
    request_hash bytea DEFAULT NULL
) RETURNS idempotency_result
AS 'MODULE_PATHNAME'
LANGUAGE C VOLATILE PARALLEL UNSAFE SUPPORT idempotency_support;

COMMENT ON FUNCTION idempotency_replay(text, text, text, jsonb, text, bytea) IS
'look what became of a request without claiming it, also on a standby';

CREATE FUNCTION idempotency_release(
    tenant text,
    action text,
    key text,
    actor text DEFAULT NULL,
    claim uuid DEFAULT NULL
) RETURNS boolean
AS 'MODULE_PATHNAME'
LANGUAGE C VOLATILE PARALLEL UNSAFE;

COMMENT ON FUNCTION idempotency_release(text, text, text, text, uuid) IS
'give back a claim without an answer; returns false if that was done before';

CREATE FUNCTION idempotency_store(
    tenant text,
    action text,
    key text,
    request jsonb,
    status_code int,
    response json DEFAULT NULL,
    headers jsonb DEFAULT NULL,
    actor text DEFAULT NULL,
    body bytea DEFAULT NULL,
    ttl interval DEFAULT NULL,
    request_hash bytea DEFAULT NULL
) RETURNS idempotency_result
AS 'MODULE_PATHNAME'
LANGUAGE C VOLATILE PARALLEL UNSAFE SUPPORT idempotency_support;

COMMENT ON FUNCTION idempotency_store(text, text, text, jsonb, int, json, jsonb, text, bytea, interval, bytea) IS
'keep an answer that is known already, unless there is one or the request is in flight';

CREATE FUNCTION idempotency_checkpoint(
    tenant text,
    action text,
    key text,
    claim uuid,
    recovery_point text,
    recovery_state jsonb DEFAULT NULL,
    lease interval DEFAULT NULL,
    actor text DEFAULT NULL
) RETURNS timestamptz
AS 'MODULE_PATHNAME'
LANGUAGE C VOLATILE PARALLEL UNSAFE;

COMMENT ON FUNCTION idempotency_checkpoint(text, text, text, uuid, text, jsonb, interval, text) IS
'save how far the work under a leased claim got, and renew its lease; returns the new end of it';

CREATE FUNCTION idempotency_run(
    tenant text,
    action text,
    key text,
    request jsonb,
    handler regprocedure,
    actor text DEFAULT NULL,
    ttl interval DEFAULT NULL,
    wait interval DEFAULT NULL
) RETURNS idempotency_result
AS 'MODULE_PATHNAME'
LANGUAGE C VOLATILE PARALLEL UNSAFE SUPPORT idempotency_support;

COMMENT ON FUNCTION idempotency_run(text, text, text, jsonb, regprocedure, text, interval, interval) IS
'get the stored answer of a request, or have a function make one and store it; raises an error when it is in flight or mismatched';

CREATE FUNCTION idempotency_try_run(
    tenant text,
    action text,
    key text,
    request jsonb,
    handler regprocedure,
    actor text DEFAULT NULL,
    ttl interval DEFAULT NULL,
    wait interval DEFAULT NULL
) RETURNS idempotency_result
AS 'MODULE_PATHNAME'
LANGUAGE C VOLATILE PARALLEL UNSAFE SUPPORT idempotency_support;

COMMENT ON FUNCTION idempotency_try_run(text, text, text, jsonb, regprocedure, text, interval, interval) IS
'get the stored answer of a request, or have a function make one and store it; tells by the outcome when it is in flight or mismatched';

CREATE FUNCTION idempotency_first_seen(
    tenant text,
    consumer text,
    message_ids text[],
    ttl interval DEFAULT NULL
) RETURNS SETOF text
AS 'MODULE_PATHNAME'
LANGUAGE C VOLATILE PARALLEL UNSAFE;

COMMENT ON FUNCTION idempotency_first_seen(text, text, text[], interval) IS
'record the ids of messages; returns those that this consumer never saw before';

CREATE FUNCTION idempotency_request_hash(request jsonb) RETURNS bytea
AS 'MODULE_PATHNAME'
LANGUAGE C IMMUTABLE STRICT PARALLEL SAFE;

COMMENT ON FUNCTION idempotency_request_hash(jsonb) IS
'fingerprint of a request: SHA-256 of its canonical form';

-- The namespace is part of what every producer and consumer must agree on, and
-- never changes.
CREATE FUNCTION idempotency_event_key(
    event_type text,
    aggregate_id text,
    sequence bigint,
    namespace uuid DEFAULT 'ce796568-8e76-4f6e-b458-7e151e9ab823'
) RETURNS uuid
AS 'MODULE_PATHNAME'
LANGUAGE C IMMUTABLE STRICT PARALLEL SAFE;

COMMENT ON FUNCTION idempotency_event_key(text, text, bigint, uuid) IS
'key of an event: version 5 UUID of the name event_type:aggregate_id:sequence';

--
-- Calls of an administrator
--

CREATE FUNCTION idempotency_forget(
    tenant text,
    action text,
    key text,
    actor text DEFAULT NULL
) RETURNS boolean
AS 'MODULE_PATHNAME'
LANGUAGE C VOLATILE PARALLEL UNSAFE;

COMMENT ON FUNCTION idempotency_forget(text, text, text, text) IS
'delete the record of a request that is not in flight, or of a message that was seen; returns whether there was one';

CREATE PROCEDURE idempotency_sweep(
    batch_size int DEFAULT NULL,
    max_duration interval DEFAULT NULL
)
AS 'MODULE_PATHNAME'
LANGUAGE C;

COMMENT ON PROCEDURE idempotency_sweep(int, interval) IS
'delete expired records, in batches of a transaction each';

CREATE FUNCTION idempotency_schedule(
    schedule text DEFAULT '* * * * *'
) RETURNS bigint
AS 'MODULE_PATHNAME'
LANGUAGE C VOLATILE PARALLEL UNSAFE;

COMMENT ON FUNCTION idempotency_schedule(text) IS
'have pg_cron sweep this database; returns the id of its job';

CREATE FUNCTION idempotency_unschedule() RETURNS boolean
AS 'MODULE_PATHNAME'
LANGUAGE C VOLATILE PARALLEL UNSAFE;

COMMENT ON FUNCTION idempotency_unschedule() IS
'drop the job of pg_cron that sweeps this database; returns whether there was one';

CREATE FUNCTION idempotency_distribute(
    colocate_with regclass DEFAULT NULL
) RETURNS void
AS 'MODULE_PATHNAME'
LANGUAGE C VOLATILE PARALLEL UNSAFE;

COMMENT ON FUNCTION idempotency_distribute(regclass) IS
'have Citus keep the records of a tenant on one node, together with its rows in a table of the application; call it again for new nodes and new rights';

-- Citus sends a call of this to the node of the tenant, which must not be null.
CREATE FUNCTION idempotency_at_owner(
    tenant text,
    call text,
    arguments text[],
    settings text[]
) RETURNS text
AS 'MODULE_PATHNAME'
LANGUAGE C VOLATILE STRICT PARALLEL UNSAFE;

COMMENT ON FUNCTION idempotency_at_owner(text, text, text[], text[]) IS
'carries a call to the node of a tenant; nobody but the other functions calls it';

CREATE FUNCTION idempotency_in_flight(
    OUT pid int,
    OUT tenant text,
    OUT actor text,
    OUT action text,
    OUT key text,
    OUT attempt int,
    OUT started_at timestamptz,
    OUT lease_expires_at timestamptz
) RETURNS SETOF record
AS 'MODULE_PATHNAME'
LANGUAGE C VOLATILE PARALLEL SAFE;

COMMENT ON FUNCTION idempotency_in_flight() IS
'claims of transactions in this database, as known in shared memory';

CREATE FUNCTION idempotency_tracking(
    OUT capacity int,
    OUT used int,
    OUT untracked bigint
)
AS 'MODULE_PATHNAME'
LANGUAGE C VOLATILE PARALLEL SAFE;

COMMENT ON FUNCTION idempotency_tracking() IS
'room for claims in shared memory, how much is used, and how many claims found none; nulls unless the library is preloaded';

CREATE FUNCTION idempotency_worker_status(
    OUT state text,
    OUT last_sweep_at timestamptz,
    OUT swept bigint,
    OUT duration interval,
    OUT behind boolean,
    OUT last_error text,
    OUT last_error_at timestamptz,
    OUT failures int
)
AS 'MODULE_PATHNAME'
LANGUAGE C VOLATILE PARALLEL SAFE;

COMMENT ON FUNCTION idempotency_worker_status() IS
'what sweeps this database in the background, what the last sweep did, and why the last worker that failed did';

CREATE FUNCTION idempotency_leases(
    OUT tenant text,
    OUT actor text,
    OUT action text,
    OUT key text,
    OUT attempt int,
    OUT recovery_point text,
    OUT created_at timestamptz,
    OUT lease_expires_at timestamptz
) RETURNS SETOF record
AS 'MODULE_PATHNAME'
LANGUAGE C VOLATILE PARALLEL UNSAFE;

COMMENT ON FUNCTION idempotency_leases() IS
'leases on this node that are in flight or ran out';

CREATE FUNCTION idempotency_record_counts(
    OUT pending bigint,
    OUT completed bigint,
    OUT errored bigint,
    OUT leased bigint,
    OUT stalled bigint
)
AS 'MODULE_PATHNAME'
LANGUAGE C VOLATILE PARALLEL UNSAFE;

COMMENT ON FUNCTION idempotency_record_counts() IS
'records on this node by state, and how many of those that are pending have a lease in flight, or one that ran out';

CREATE FUNCTION idempotency_storage(
    OUT distributed boolean,
    OUT nodes int,
    OUT problem text,
    OUT table_size bigint,
    OUT index_size bigint,
    OUT oldest_expired_at timestamptz
)
AS 'MODULE_PATHNAME'
LANGUAGE C VOLATILE PARALLEL UNSAFE;

COMMENT ON FUNCTION idempotency_storage() IS
'whether records are distributed over a cluster, over how many nodes, why calls are refused if they are, bytes on this node, and when the oldest record expired that is not swept';

--
-- Metrics
--
-- Times are in milliseconds.  A histogram has the counts of buckets that are
-- spaced by their logarithm, and the numbers of the buckets as its subscripts
-- (src/observe/histogram.c).
--

CREATE FUNCTION idempotency_histogram_add(bigint[], bigint[]) RETURNS bigint[]
AS 'MODULE_PATHNAME'
LANGUAGE C IMMUTABLE STRICT PARALLEL SAFE;

COMMENT ON FUNCTION idempotency_histogram_add(bigint[], bigint[]) IS
'add two histograms';

CREATE AGGREGATE idempotency_histogram_sum(bigint[]) (
    SFUNC = idempotency_histogram_add,
    STYPE = bigint[],
    COMBINEFUNC = idempotency_histogram_add,
    PARALLEL = SAFE
);

COMMENT ON AGGREGATE idempotency_histogram_sum(bigint[]) IS
'sum of histograms';

CREATE FUNCTION idempotency_percentile(
    histogram bigint[],
    fraction double precision
) RETURNS double precision
AS 'MODULE_PATHNAME'
LANGUAGE C IMMUTABLE STRICT PARALLEL SAFE;

COMMENT ON FUNCTION idempotency_percentile(bigint[], double precision) IS
'time in milliseconds that a fraction of those in a histogram do not exceed; null for an empty one';

CREATE FUNCTION idempotency_stats(
    OUT action text,
    OUT started bigint,
    OUT replayed bigint,
    OUT in_flight bigint,
    OUT mismatched bigint,
    OUT expired bigint,
    OUT stalled bigint,
    OUT taken_over bigint,
    OUT completed bigint,
    OUT errored bigint,
    OUT released bigint,
    OUT swept bigint,
    OUT held int,
    OUT leases int,
    OUT stalled_leases int,
    OUT run_time double precision,
    OUT run_time_p50 double precision,
    OUT run_time_p95 double precision,
    OUT run_time_p99 double precision,
    OUT run_time_histogram bigint[],
    OUT lookup_time double precision,
    OUT lookup_time_p50 double precision,
    OUT lookup_time_p95 double precision,
    OUT lookup_time_p99 double precision,
    OUT lookup_time_histogram bigint[],
    OUT since timestamptz
) RETURNS SETOF record
AS 'MODULE_PATHNAME'
LANGUAGE C VOLATILE PARALLEL SAFE;

COMMENT ON FUNCTION idempotency_stats() IS
'what became of requests in this database, by action, as counted in shared memory';

CREATE FUNCTION idempotency_metrics_room(
    OUT capacity int,
    OUT used int,
    OUT lost bigint
)
AS 'MODULE_PATHNAME'
LANGUAGE C VOLATILE PARALLEL SAFE;

COMMENT ON FUNCTION idempotency_metrics_room() IS
'room for actions in shared memory, how much is used on this server, and how many events could not be counted; nulls unless the library is preloaded';

CREATE TABLE idempotency_metric (
    bucket timestamptz NOT NULL,
    action text COLLATE "C" NOT NULL,
    node text COLLATE "C" NOT NULL,
    started bigint NOT NULL,
    replayed bigint NOT NULL,
    in_flight bigint NOT NULL,
    mismatched bigint NOT NULL,
    expired bigint NOT NULL,
    stalled bigint NOT NULL,
    taken_over bigint NOT NULL,
    completed bigint NOT NULL,
    errored bigint NOT NULL,
    released bigint NOT NULL,
    swept bigint NOT NULL,
    run_time double precision NOT NULL,
    lookup_time double precision NOT NULL,
    run_time_histogram bigint[] NOT NULL,
    lookup_time_histogram bigint[] NOT NULL,
    PRIMARY KEY (bucket, action, node)
);

COMMENT ON TABLE idempotency_metric IS
'what became of requests, by minute, action and node; flushed from shared memory';
COMMENT ON COLUMN idempotency_metric.bucket IS
'start of the minute in which it was flushed';
COMMENT ON COLUMN idempotency_metric.action IS
'the operation, or '''' for all those that found no room of their own';
COMMENT ON COLUMN idempotency_metric.node IS
'who has counted: identifier of the cluster, start of its server in microseconds, and OID of the database';
COMMENT ON COLUMN idempotency_metric.started IS
'requests whose work was begun';
COMMENT ON COLUMN idempotency_metric.replayed IS
'repeats that got the stored answer';
COMMENT ON COLUMN idempotency_metric.in_flight IS
'repeats that were told that the request is in flight';
COMMENT ON COLUMN idempotency_metric.mismatched IS
'different requests under a key that was used';
COMMENT ON COLUMN idempotency_metric.expired IS
'requests started that found a record whose time was over';
COMMENT ON COLUMN idempotency_metric.stalled IS
'leases that ran out, as far as a background worker saw them';
COMMENT ON COLUMN idempotency_metric.taken_over IS
'requests started that took over a lease that had run out';
COMMENT ON COLUMN idempotency_metric.completed IS
'answers stored';
COMMENT ON COLUMN idempotency_metric.errored IS
'final errors stored';
COMMENT ON COLUMN idempotency_metric.released IS
'claims given back without an answer';
COMMENT ON COLUMN idempotency_metric.swept IS
'records deleted after their time';
COMMENT ON COLUMN idempotency_metric.run_time IS
'time from begin to the end of claims, in all, in milliseconds';
COMMENT ON COLUMN idempotency_metric.lookup_time IS
'time to look up records, in all, in milliseconds';
COMMENT ON COLUMN idempotency_metric.run_time_histogram IS
'histogram of the time from begin to the end of claims';
COMMENT ON COLUMN idempotency_metric.lookup_time_histogram IS
'histogram of the time to look up records';

-- kept for a week, so they should survive a dump and restore too
SELECT pg_catalog.pg_extension_config_dump('idempotency_metric', '');

--
-- Views
--
-- A view runs with the operators, functions and types that its script was read
-- with, for everybody who reads it.  Those of the server are taken from
-- pg_catalog, and from nowhere else: an operator in the schema of the extension,
-- which may be one that others can create in, could be a better match.
--

SET LOCAL search_path TO pg_catalog, pg_temp;

-- A lease that was begun in a transaction that still runs is known twice to that
-- transaction.
CREATE VIEW @extschema@.idempotency_in_flight AS
    WITH held AS MATERIALIZED (
        SELECT * FROM @extschema@.idempotency_in_flight()
    )
    SELECT pid, tenant, actor, action, key, attempt, started_at, lease_expires_at
    FROM held
    UNION ALL
    SELECT NULL, tenant, actor, action, key, attempt, created_at, lease_expires_at
    FROM @extschema@.idempotency_leases() AS k
    WHERE lease_expires_at > clock_timestamp()
      AND NOT EXISTS (
          SELECT FROM held AS h
          WHERE h.tenant = k.tenant AND h.action = k.action
            AND h.key = k.key AND h.actor = k.actor);

COMMENT ON VIEW @extschema@.idempotency_in_flight IS
'claims in flight in this database: leases, and claims of transactions if the library is preloaded';
COMMENT ON COLUMN @extschema@.idempotency_in_flight.pid IS
'process that holds the claim, null when no process does';
COMMENT ON COLUMN @extschema@.idempotency_in_flight.tenant IS
'tenant of the request';
COMMENT ON COLUMN @extschema@.idempotency_in_flight.actor IS
'actor of the request';
COMMENT ON COLUMN @extschema@.idempotency_in_flight.action IS
'action of the request';
COMMENT ON COLUMN @extschema@.idempotency_in_flight.key IS
'key of the request';
COMMENT ON COLUMN @extschema@.idempotency_in_flight.attempt IS
'how many times the work was begun';
COMMENT ON COLUMN @extschema@.idempotency_in_flight.started_at IS
'when the claim was begun; for a lease, when the request was begun first';
COMMENT ON COLUMN @extschema@.idempotency_in_flight.lease_expires_at IS
'when another caller may take over a leased claim';

CREATE VIEW @extschema@.idempotency_stalled AS
    SELECT tenant, actor, action, key, attempt, recovery_point,
           created_at AS started_at, lease_expires_at
    FROM @extschema@.idempotency_leases()
    WHERE lease_expires_at <= clock_timestamp();

COMMENT ON VIEW @extschema@.idempotency_stalled IS
'leases that ran out and wait for the next repeat to take them over';
COMMENT ON COLUMN @extschema@.idempotency_stalled.tenant IS
'tenant of the request';
COMMENT ON COLUMN @extschema@.idempotency_stalled.actor IS
'actor of the request';
COMMENT ON COLUMN @extschema@.idempotency_stalled.action IS
'action of the request';
COMMENT ON COLUMN @extschema@.idempotency_stalled.key IS
'key of the request';
COMMENT ON COLUMN @extschema@.idempotency_stalled.attempt IS
'how many times the work was begun';
COMMENT ON COLUMN @extschema@.idempotency_stalled.recovery_point IS
'how far the work got';
COMMENT ON COLUMN @extschema@.idempotency_stalled.started_at IS
'when the request was begun first';
COMMENT ON COLUMN @extschema@.idempotency_stalled.lease_expires_at IS
'when the lease ran out';

CREATE VIEW @extschema@.idempotency_stats AS
    SELECT * FROM @extschema@.idempotency_stats();

COMMENT ON VIEW @extschema@.idempotency_stats IS
'what became of requests in this database, by action, since counting began; empty unless the library is preloaded';
COMMENT ON COLUMN @extschema@.idempotency_stats.action IS
'the operation, or '''' for all those that found no room of their own';
COMMENT ON COLUMN @extschema@.idempotency_stats.started IS
'requests whose work was begun';
COMMENT ON COLUMN @extschema@.idempotency_stats.replayed IS
'repeats that got the stored answer';
COMMENT ON COLUMN @extschema@.idempotency_stats.in_flight IS
'repeats that were told that the request is in flight';
COMMENT ON COLUMN @extschema@.idempotency_stats.mismatched IS
'different requests under a key that was used';
COMMENT ON COLUMN @extschema@.idempotency_stats.expired IS
'requests started that found a record whose time was over';
COMMENT ON COLUMN @extschema@.idempotency_stats.stalled IS
'leases that ran out, as far as a background worker saw them';
COMMENT ON COLUMN @extschema@.idempotency_stats.taken_over IS
'requests started that took over a lease that had run out';
COMMENT ON COLUMN @extschema@.idempotency_stats.completed IS
'answers stored';
COMMENT ON COLUMN @extschema@.idempotency_stats.errored IS
'final errors stored';
COMMENT ON COLUMN @extschema@.idempotency_stats.released IS
'claims given back without an answer';
COMMENT ON COLUMN @extschema@.idempotency_stats.swept IS
'records deleted after their time';
COMMENT ON COLUMN @extschema@.idempotency_stats.held IS
'claims that transactions hold at this moment';
COMMENT ON COLUMN @extschema@.idempotency_stats.leases IS
'leases in flight, null where no background worker has counted them';
COMMENT ON COLUMN @extschema@.idempotency_stats.stalled_leases IS
'leases that ran out and wait for the next repeat, counted at the same time';
COMMENT ON COLUMN @extschema@.idempotency_stats.run_time IS
'time from begin to the end of claims, in all, in milliseconds';
COMMENT ON COLUMN @extschema@.idempotency_stats.run_time_p50 IS
'time from begin to the end of a claim that half of them do not exceed';
COMMENT ON COLUMN @extschema@.idempotency_stats.run_time_p95 IS
'the same for 95 in a hundred';
COMMENT ON COLUMN @extschema@.idempotency_stats.run_time_p99 IS
'the same for 99 in a hundred';
COMMENT ON COLUMN @extschema@.idempotency_stats.run_time_histogram IS
'histogram of the time from begin to the end of claims';
COMMENT ON COLUMN @extschema@.idempotency_stats.lookup_time IS
'time to look up records, in all, in milliseconds';
COMMENT ON COLUMN @extschema@.idempotency_stats.lookup_time_p50 IS
'time to look up a record that half of the lookups do not exceed';
COMMENT ON COLUMN @extschema@.idempotency_stats.lookup_time_p95 IS
'the same for 95 in a hundred';
COMMENT ON COLUMN @extschema@.idempotency_stats.lookup_time_p99 IS
'the same for 99 in a hundred';
COMMENT ON COLUMN @extschema@.idempotency_stats.lookup_time_histogram IS
'histogram of the time to look up records';
COMMENT ON COLUMN @extschema@.idempotency_stats.since IS
'when counting began';

-- A repeat is a duplicate whether it got the answer or came too early for it.
CREATE VIEW @extschema@.idempotency_replay_ratio AS
    SELECT day, action, requests, duplicates,
           round(duplicates / nullif(requests, 0), 4) AS ratio,
           duplicates = 0 OR duplicates < 0.05 * requests AS on_target
    FROM (
        SELECT bucket::date AS day, action,
               sum(started) AS requests,
               sum(replayed + in_flight) AS duplicates
        FROM @extschema@.idempotency_metric
        GROUP BY GROUPING SETS ((1, 2), (1))
    ) AS days;

COMMENT ON VIEW @extschema@.idempotency_replay_ratio IS
'duplicates against unique requests, by day and action, and for all actions together';
COMMENT ON COLUMN @extschema@.idempotency_replay_ratio.day IS
'day in the time zone of the session';
COMMENT ON COLUMN @extschema@.idempotency_replay_ratio.action IS
'the operation, or null for all of them together';
COMMENT ON COLUMN @extschema@.idempotency_replay_ratio.requests IS
'unique requests: those whose work was begun';
COMMENT ON COLUMN @extschema@.idempotency_replay_ratio.duplicates IS
'repeats that got the stored answer, or were told that the request is in flight';
COMMENT ON COLUMN @extschema@.idempotency_replay_ratio.ratio IS
'duplicates for each unique request';
COMMENT ON COLUMN @extschema@.idempotency_replay_ratio.on_target IS
'whether that is less than 5 in a hundred';

CREATE VIEW @extschema@.idempotency_health AS
    SELECT e.extversion AS version,
           w.state <> 'not preloaded' AS preloaded,
           w.state AS worker,
           w.last_sweep_at,
           w.swept AS last_swept,
           w.duration AS last_duration,
           w.last_error,
           w.last_error_at,
           r.pending,
           r.completed,
           r.errored,
           o.oldest_expired_at,
           r.leased + c.held AS in_flight,
           r.stalled,
           o.table_size,
           o.index_size,
           array_remove(ARRAY[
               'calls are refused: ' || o.problem,
               CASE WHEN o.nodes > 1 AND NOT o.distributed AND o.problem IS NULL THEN
                   'records are not distributed over the nodes of the cluster: each node has its own, and runs a request again; see idempotency_distribute'
               END,
               CASE w.state
                   WHEN 'not preloaded' THEN
                       'library is not preloaded: nothing is swept or counted in the background'
                   WHEN 'not running' THEN
                       'launcher does not run: see the log of the server'
                   WHEN 'waiting for a slot' THEN
                       'there is no slot for a background worker: raise max_worker_processes'
               END,
               CASE WHEN w.state = 'off' AND (w.last_sweep_at > statement_timestamp() - INTERVAL '10 minutes') IS NOT TRUE THEN
                   'background worker is off, and nobody else has swept for 10 minutes'
               END,
               CASE WHEN (w.last_error_at <= w.last_sweep_at) IS NOT TRUE THEN
                   'background worker failed: ' || w.last_error
               END,
               CASE WHEN o.oldest_expired_at < statement_timestamp() - INTERVAL '10 minutes'
                       - coalesce(current_setting('idempotency.sweep_interval', true), '0')::interval THEN
                   'sweep is behind: records that expired '
                   || date_trunc('second', statement_timestamp() - o.oldest_expired_at)
                   || ' ago are still there'
               END,
               CASE WHEN t.untracked > 0 THEN
                   'claims that found no room in shared memory: ' || t.untracked
                   || '; raise idempotency.max_tracked_claims'
               END,
               CASE WHEN m.used >= m.capacity THEN
                   'all ' || m.capacity
                   || ' places for metrics of an action are taken: raise idempotency.max_actions'
               END,
               CASE WHEN l.stalled > 0 THEN
                   'leases that ran out and wait for a repeat: ' || l.stalled
                   || '; see idempotency_stalled'
               END,
               CASE WHEN EXISTS (
                       SELECT FROM pg_class AS k, pg_publication AS p
                       WHERE k.oid IN ('@extschema@.idempotency_key'::regclass,
                                       '@extschema@.idempotency_metric'::regclass)
                         AND k.relreplident = 'n'
                         AND (p.pubupdate OR p.pubdelete)
                         AND (p.puballtables
                              OR EXISTS (
                                  SELECT FROM pg_publication_rel
                                  WHERE prpubid = p.oid AND prrelid = k.oid)
                              OR EXISTS (
                                  SELECT FROM pg_publication_namespace
                                  WHERE pnpubid = p.oid AND pnnspid = k.relnamespace))) THEN
                   'records or metrics are published without a replica identity: they cannot be updated, replaced or deleted'
               END
           ], NULL) AS warnings
    FROM pg_extension AS e
    CROSS JOIN @extschema@.idempotency_worker_status() AS w
    CROSS JOIN @extschema@.idempotency_tracking() AS t
    CROSS JOIN @extschema@.idempotency_metrics_room() AS m
    CROSS JOIN @extschema@.idempotency_storage() AS o
    LEFT JOIN (
        SELECT sum(stalled_leases) AS stalled
        FROM @extschema@.idempotency_stats()) AS l ON true
    LEFT JOIN (
        SELECT count(*) AS held
        FROM @extschema@.idempotency_in_flight()
        WHERE lease_expires_at IS NULL) AS c ON true
    LEFT JOIN (
        SELECT max(pending) AS pending, max(completed) AS completed,
               max(errored) AS errored, max(leased) AS leased,
               max(stalled) AS stalled
        FROM @extschema@.idempotency_record_counts()) AS r ON true
    WHERE e.extname = 'idempotency';

COMMENT ON VIEW @extschema@.idempotency_health IS
'how the extension fares in this database, in one row; reads all records if asked how many there are';
COMMENT ON COLUMN @extschema@.idempotency_health.version IS
'version of the extension';
COMMENT ON COLUMN @extschema@.idempotency_health.preloaded IS
'whether the library was loaded with the server';
COMMENT ON COLUMN @extschema@.idempotency_health.worker IS
'state of background sweeping, as idempotency_worker_status() has it';
COMMENT ON COLUMN @extschema@.idempotency_health.last_sweep_at IS
'when the last sweep ended, null when none has since the server started';
COMMENT ON COLUMN @extschema@.idempotency_health.last_swept IS
'how many records it deleted';
COMMENT ON COLUMN @extschema@.idempotency_health.last_duration IS
'how long it took';
COMMENT ON COLUMN @extschema@.idempotency_health.last_error IS
'error that the last background worker that failed ended with';
COMMENT ON COLUMN @extschema@.idempotency_health.last_error_at IS
'when that was';
COMMENT ON COLUMN @extschema@.idempotency_health.pending IS
'records of leased claims, whatever became of their leases';
COMMENT ON COLUMN @extschema@.idempotency_health.completed IS
'records with an answer';
COMMENT ON COLUMN @extschema@.idempotency_health.errored IS
'records with a final error';
COMMENT ON COLUMN @extschema@.idempotency_health.oldest_expired_at IS
'when the time of the oldest record was over that is not swept yet';
COMMENT ON COLUMN @extschema@.idempotency_health.in_flight IS
'claims in flight: leases, and claims of transactions if the library is preloaded';
COMMENT ON COLUMN @extschema@.idempotency_health.stalled IS
'leases that ran out and wait for the next repeat';
COMMENT ON COLUMN @extschema@.idempotency_health.table_size IS
'size of the table of records, in bytes';
COMMENT ON COLUMN @extschema@.idempotency_health.index_size IS
'size of its indexes, in bytes';
COMMENT ON COLUMN @extschema@.idempotency_health.warnings IS
'what an administrator should look at, an element for each; docs/operations.md says what to do';

SET LOCAL search_path TO @extschema@, pg_temp;

--
-- Rights: nobody but the owner has any until the administrator hands them out
--

REVOKE ALL ON TYPE idempotency_state FROM PUBLIC;
REVOKE ALL ON TYPE idempotency_result FROM PUBLIC;
REVOKE ALL ON TYPE idempotency_response FROM PUBLIC;
REVOKE ALL ON FUNCTION idempotency_support FROM PUBLIC;
REVOKE ALL ON FUNCTION idempotency_begin FROM PUBLIC;
REVOKE ALL ON FUNCTION idempotency_try_begin FROM PUBLIC;
REVOKE ALL ON FUNCTION idempotency_finish FROM PUBLIC;
REVOKE ALL ON FUNCTION idempotency_replay FROM PUBLIC;
REVOKE ALL ON FUNCTION idempotency_release FROM PUBLIC;
REVOKE ALL ON FUNCTION idempotency_store FROM PUBLIC;
REVOKE ALL ON FUNCTION idempotency_checkpoint FROM PUBLIC;
REVOKE ALL ON FUNCTION idempotency_run FROM PUBLIC;
REVOKE ALL ON FUNCTION idempotency_try_run FROM PUBLIC;
REVOKE ALL ON FUNCTION idempotency_first_seen FROM PUBLIC;
REVOKE ALL ON FUNCTION idempotency_request_hash FROM PUBLIC;
REVOKE ALL ON FUNCTION idempotency_event_key FROM PUBLIC;
REVOKE ALL ON FUNCTION idempotency_forget FROM PUBLIC;
REVOKE ALL ON PROCEDURE idempotency_sweep FROM PUBLIC;
REVOKE ALL ON FUNCTION idempotency_distribute FROM PUBLIC;
REVOKE ALL ON FUNCTION idempotency_at_owner FROM PUBLIC;
REVOKE ALL ON FUNCTION idempotency_schedule FROM PUBLIC;
REVOKE ALL ON FUNCTION idempotency_unschedule FROM PUBLIC;
REVOKE ALL ON FUNCTION idempotency_in_flight FROM PUBLIC;
REVOKE ALL ON FUNCTION idempotency_tracking FROM PUBLIC;
REVOKE ALL ON FUNCTION idempotency_worker_status FROM PUBLIC;
REVOKE ALL ON FUNCTION idempotency_leases FROM PUBLIC;
REVOKE ALL ON FUNCTION idempotency_record_counts FROM PUBLIC;
REVOKE ALL ON FUNCTION idempotency_storage FROM PUBLIC;
REVOKE ALL ON FUNCTION idempotency_histogram_add FROM PUBLIC;
REVOKE ALL ON FUNCTION idempotency_histogram_sum FROM PUBLIC;
REVOKE ALL ON FUNCTION idempotency_percentile FROM PUBLIC;
REVOKE ALL ON FUNCTION idempotency_stats FROM PUBLIC;
REVOKE ALL ON FUNCTION idempotency_metrics_room FROM PUBLIC;

GRANT SELECT ON idempotency_in_flight TO pg_monitor;
GRANT SELECT ON idempotency_stalled TO pg_monitor;
GRANT SELECT ON idempotency_stats TO pg_monitor;
GRANT SELECT ON idempotency_metric TO pg_monitor;
GRANT SELECT ON idempotency_replay_ratio TO pg_monitor;
GRANT SELECT ON idempotency_health TO pg_monitor;
GRANT EXECUTE ON FUNCTION idempotency_in_flight TO pg_monitor;
GRANT EXECUTE ON FUNCTION idempotency_tracking TO pg_monitor;
GRANT EXECUTE ON FUNCTION idempotency_worker_status TO pg_monitor;
GRANT EXECUTE ON FUNCTION idempotency_leases TO pg_monitor;
GRANT EXECUTE ON FUNCTION idempotency_record_counts TO pg_monitor;
GRANT EXECUTE ON FUNCTION idempotency_storage TO pg_monitor;
GRANT EXECUTE ON FUNCTION idempotency_histogram_add TO pg_monitor;
GRANT EXECUTE ON FUNCTION idempotency_histogram_sum TO pg_monitor;
GRANT EXECUTE ON FUNCTION idempotency_percentile TO pg_monitor;
GRANT EXECUTE ON FUNCTION idempotency_stats TO pg_monitor;
GRANT EXECUTE ON FUNCTION idempotency_metrics_room TO pg_monitor;
