--
-- The shape of the schema: what the extension creates, with which types,
-- properties, rights and comments.
--
-- psql -v schema=... gives the schema that the extension is in.
--

\set ON_ERROR_STOP on
SET search_path = :"schema", public;

-- what belongs to the extension
CREATE TEMPORARY VIEW member AS
    SELECT classid, objid, pg_describe_object(classid, objid, 0) AS name
    FROM pg_depend
    WHERE refclassid = 'pg_extension'::regclass AND deptype = 'e' AND
          refobjid = (SELECT oid FROM pg_extension WHERE extname = 'idempotency');

CREATE TEMPORARY VIEW member_function AS
    SELECT pg_proc.*
    FROM pg_proc JOIN member ON classid = 'pg_proc'::regclass AND objid = pg_proc.oid;

CREATE TEMPORARY VIEW member_relation AS
    SELECT pg_class.*
    FROM pg_class JOIN member ON classid = 'pg_class'::regclass AND objid = pg_class.oid;

-- Types of their own, not those of arrays and of the rows of a relation.  (USAGE
-- on a row type gives no access to the rows, and pg_dump cannot keep its rights
-- in mind.)
CREATE TEMPORARY VIEW member_type AS
    SELECT pg_type.*
    FROM pg_type JOIN member ON classid = 'pg_type'::regclass AND objid = pg_type.oid
    WHERE typelem = 0 AND
          pg_type.typrelid NOT IN (SELECT oid FROM member_relation);

-- columns of tables, views and composite types
CREATE TEMPORARY VIEW member_column AS
    SELECT relname, attrelid, attnum, attname, atttypid, atttypmod, attnotnull,
           attcollation, atthasdef, attisdropped, attidentity, attacl
    FROM pg_attribute JOIN pg_class ON attrelid = pg_class.oid
    WHERE attnum > 0 AND
          (pg_class.oid IN (SELECT oid FROM member_relation) OR
           pg_class.oid IN (SELECT typrelid FROM member_type));

-- who has which right on what; grantee 0 is PUBLIC
CREATE TEMPORARY VIEW member_right AS
    SELECT 'function ' || proname AS object, proowner AS owner, acl.*
    FROM member_function,
         aclexplode(coalesce(proacl, acldefault('f', proowner))) AS acl
    UNION ALL
    SELECT 'type ' || typname, typowner, acl.*
    FROM member_type,
         aclexplode(coalesce(typacl, acldefault('T', typowner))) AS acl
    UNION ALL
    SELECT 'relation ' || relname, relowner, acl.*
    FROM member_relation,
         aclexplode(coalesce(relacl, acldefault('r', relowner))) AS acl
    UNION ALL
    SELECT 'column ' || relname || '.' || attname, NULL, acl.*
    FROM member_column, aclexplode(attacl) AS acl;

SELECT no_plan();

--
-- What there is, and nothing else
--

SELECT set_eq(
    'SELECT proname::text FROM member_function',
    ARRAY['idempotency_begin', 'idempotency_try_begin', 'idempotency_finish',
          'idempotency_replay', 'idempotency_release',
          'idempotency_store', 'idempotency_forget',
          'idempotency_checkpoint', 'idempotency_run', 'idempotency_try_run',
          'idempotency_first_seen', 'idempotency_request_hash',
          'idempotency_event_key', 'idempotency_sweep',
          'idempotency_schedule', 'idempotency_unschedule',
          'idempotency_in_flight', 'idempotency_tracking',
          'idempotency_worker_status', 'idempotency_stats',
          'idempotency_metrics_room', 'idempotency_percentile',
          'idempotency_histogram_add', 'idempotency_histogram_sum',
          'idempotency_support', 'idempotency_distribute',
          'idempotency_at_owner', 'idempotency_leases',
          'idempotency_record_counts', 'idempotency_storage'],
    'functions');
SELECT is((SELECT count(*) FROM member_function),
          (SELECT count(DISTINCT proname) FROM member_function),
          'no function is overloaded');
SELECT set_eq(
    'SELECT relname::text, relkind::text, relpersistence::text FROM member_relation',
    $$VALUES ('idempotency_key', 'r', 'p'), ('idempotency_in_flight', 'v', 'p'),
             ('idempotency_stalled', 'v', 'p'), ('idempotency_stats', 'v', 'p'),
             ('idempotency_metric', 'r', 'p'),
             ('idempotency_two_phase', 'r', 'p'),
             ('idempotency_replay_ratio', 'v', 'p'),
             ('idempotency_health', 'v', 'p')$$,
    'tables and views');
SELECT set_eq(
    'SELECT typname::text, typtype::text FROM member_type',
    $$VALUES ('idempotency_state', 'e'), ('idempotency_result', 'c'),
             ('idempotency_response', 'c')$$,
    'types');
SELECT is_empty(
    $$SELECT name FROM member
      WHERE classid NOT IN ('pg_proc'::regclass, 'pg_type'::regclass,
                            'pg_class'::regclass)$$,
    'no other kind of object');
SELECT is_empty(
    $$SELECT pg_describe_object(classid, objid, 0)
      FROM (SELECT classid, objid FROM member
            WHERE classid <> 'pg_type'::regclass) AS other
      WHERE (pg_identify_object(classid, objid, 0)).schema <> quote_ident(current_schema())$$,
    'everything is in the schema of the extension');

--
-- The table
--

SELECT results_eq(
    $$SELECT attname::text COLLATE "default", format_type(atttypid, atttypmod), attnotnull,
             (SELECT collname::text COLLATE "default" FROM pg_collation
              WHERE oid = attcollation AND collname <> 'default')
      FROM member_column WHERE relname = 'idempotency_key' ORDER BY attnum$$,
    $$VALUES ('tenant', 'text', true, 'C'),
             ('action', 'text', true, 'C'),
             ('key', 'text', true, 'C'),
             ('actor', 'text', true, 'C'),
             ('state', 'idempotency_state', true, NULL),
             ('request_hash', 'bytea', false, NULL),
             ('status_code', 'integer', false, NULL),
             ('headers', 'jsonb', false, NULL),
             ('response', 'json', false, NULL),
             ('body', 'bytea', false, NULL),
             ('claim', 'uuid', false, NULL),
             ('attempt', 'integer', true, NULL),
             ('recovery_point', 'text', false, NULL),
             ('recovery_state', 'jsonb', false, NULL),
             ('lease_expires_at', 'timestamp with time zone', false, NULL),
             ('created_at', 'timestamp with time zone', true, NULL),
             ('finished_at', 'timestamp with time zone', false, NULL),
             ('expires_at', 'timestamp with time zone', true, NULL),
             ('ttl', 'interval', false, NULL)$$,
    'columns of idempotency_key');
SELECT results_eq(
    $$SELECT option_name, option_value
      FROM pg_class, pg_options_to_table(reloptions)
      WHERE pg_class.oid = 'idempotency_key'::regclass ORDER BY option_name$$,
    $$VALUES ('autovacuum_analyze_scale_factor', '0.5'),
             ('autovacuum_vacuum_scale_factor', '0.05'),
             ('fillfactor', '95')$$,
    'storage parameters of idempotency_key');
SELECT is_empty(
    $$SELECT attname FROM member_column
      WHERE relname = 'idempotency_key' AND (atthasdef OR attisdropped OR attidentity <> '')$$,
    'no column of idempotency_key has a default or was dropped');
SELECT enum_has_labels(
    :'schema', 'idempotency_state', ARRAY['pending', 'completed', 'errored'],
    'states of a record');
SELECT set_eq(
    $$SELECT pg_get_indexdef(indexrelid)
      FROM pg_index WHERE indrelid = 'idempotency_key'::regclass AND indisvalid$$,
    format($$VALUES ('CREATE UNIQUE INDEX idempotency_key_pkey ON %1$I.idempotency_key USING btree (key, tenant, action, actor)'),
                    ('CREATE INDEX idempotency_key_expires_at_idx ON %1$I.idempotency_key USING btree (expires_at)')$$,
           :'schema'),
    'indexes of idempotency_key');
SELECT col_is_pk(
    :'schema', 'idempotency_key', ARRAY['key', 'tenant', 'action', 'actor'],
    'primary key of idempotency_key');
SELECT results_eq(
    $$SELECT conname::text COLLATE "default", conkey::int[], condeferrable
      FROM pg_constraint
      WHERE conrelid = 'idempotency_key'::regclass AND contype <> 'n'$$,
    $$VALUES ('idempotency_key_pkey', '{3,1,2,4}'::int[], false)$$,
    'the primary key is checked at once, and there is no other constraint');
SELECT is_empty(
    $$SELECT collname
      FROM pg_index, unnest(indcollation) AS used JOIN pg_collation ON oid = used
      WHERE indrelid = 'idempotency_key'::regclass AND collname <> 'C'$$,
    'indexes of idempotency_key compare text by bytes');
SELECT is_empty(
    $$SELECT tgname FROM pg_trigger WHERE tgrelid = 'idempotency_key'::regclass
      UNION ALL
      SELECT rulename FROM pg_rewrite WHERE ev_class = 'idempotency_key'::regclass
      UNION ALL
      SELECT polname FROM pg_policy WHERE polrelid = 'idempotency_key'::regclass$$,
    'idempotency_key has no triggers, rules or policies');
SELECT set_eq(
    $$SELECT extconfig, extcondition, extrelocatable
      FROM pg_extension WHERE extname = 'idempotency'$$,
    $$SELECT ARRAY['idempotency_key'::regclass::oid,
                   'idempotency_metric'::regclass::oid] AS config,
             ARRAY['', ''] AS condition, false AS relocatable$$,
    'all of the two tables is dumped');

--
-- The table of metrics
--

SELECT is_empty(
    $$SELECT attname FROM member_column
      WHERE relname = 'idempotency_metric' AND
            (NOT attnotnull OR atthasdef OR attisdropped OR attidentity <> '')$$,
    'no column of idempotency_metric can be null, has a default or was dropped');
SELECT col_is_pk(
    :'schema', 'idempotency_metric', ARRAY['bucket', 'action', 'node'],
    'primary key of idempotency_metric');
SELECT is_empty(
    $$SELECT conname FROM pg_constraint
      WHERE conrelid = 'idempotency_metric'::regclass AND contype NOT IN ('n', 'p')
      UNION ALL
      SELECT tgname FROM pg_trigger WHERE tgrelid = 'idempotency_metric'::regclass$$,
    'idempotency_metric has no other constraint, and no trigger');

--
-- The other rows
--

SELECT results_eq(
    $$SELECT attname::text COLLATE "default", format_type(atttypid, atttypmod)
      FROM member_column WHERE relname = 'idempotency_result' ORDER BY attnum$$,
    $$VALUES ('outcome', 'text'),
             ('status_code', 'integer'),
             ('response', 'json'),
             ('headers', 'jsonb'),
             ('body', 'bytea'),
             ('claim', 'uuid'),
             ('attempt', 'integer'),
             ('recovery_point', 'text'),
             ('recovery_state', 'jsonb'),
             ('retry_after', 'integer'),
             ('created_at', 'timestamp with time zone'),
             ('finished_at', 'timestamp with time zone'),
             ('expires_at', 'timestamp with time zone')$$,
    'columns of idempotency_result');
SELECT results_eq(
    $$SELECT attname::text COLLATE "default", format_type(atttypid, atttypmod)
      FROM member_column WHERE relname = 'idempotency_response' ORDER BY attnum$$,
    $$VALUES ('status_code', 'integer'),
             ('headers', 'jsonb'),
             ('response', 'json'),
             ('body', 'bytea'),
             ('ttl', 'interval')$$,
    'columns of idempotency_response');
SELECT results_eq(
    $$SELECT attname::text COLLATE "default", format_type(atttypid, atttypmod)
      FROM member_column WHERE relname = 'idempotency_in_flight' ORDER BY attnum$$,
    $$VALUES ('pid', 'integer'),
             ('tenant', 'text'),
             ('actor', 'text'),
             ('action', 'text'),
             ('key', 'text'),
             ('attempt', 'integer'),
             ('started_at', 'timestamp with time zone'),
             ('lease_expires_at', 'timestamp with time zone')$$,
    'columns of idempotency_in_flight');
SELECT results_eq(
    $$SELECT attname::text COLLATE "default", format_type(atttypid, atttypmod)
      FROM member_column WHERE relname = 'idempotency_stalled' ORDER BY attnum$$,
    $$VALUES ('tenant', 'text'),
             ('actor', 'text'),
             ('action', 'text'),
             ('key', 'text'),
             ('attempt', 'integer'),
             ('recovery_point', 'text'),
             ('started_at', 'timestamp with time zone'),
             ('lease_expires_at', 'timestamp with time zone')$$,
    'columns of idempotency_stalled');

SELECT results_eq(
    $$SELECT attname::text COLLATE "default", format_type(atttypid, atttypmod)
      FROM member_column WHERE relname = 'idempotency_stats' ORDER BY attnum$$,
    $$VALUES ('action', 'text'),
             ('started', 'bigint'),
             ('replayed', 'bigint'),
             ('in_flight', 'bigint'),
             ('mismatched', 'bigint'),
             ('expired', 'bigint'),
             ('stalled', 'bigint'),
             ('taken_over', 'bigint'),
             ('completed', 'bigint'),
             ('errored', 'bigint'),
             ('released', 'bigint'),
             ('swept', 'bigint'),
             ('held', 'integer'),
             ('leases', 'integer'),
             ('stalled_leases', 'integer'),
             ('run_time', 'double precision'),
             ('run_time_p50', 'double precision'),
             ('run_time_p95', 'double precision'),
             ('run_time_p99', 'double precision'),
             ('run_time_histogram', 'bigint[]'),
             ('lookup_time', 'double precision'),
             ('lookup_time_p50', 'double precision'),
             ('lookup_time_p95', 'double precision'),
             ('lookup_time_p99', 'double precision'),
             ('lookup_time_histogram', 'bigint[]'),
             ('since', 'timestamp with time zone')$$,
    'columns of idempotency_stats');
SELECT results_eq(
    $$SELECT attname::text COLLATE "default", format_type(atttypid, atttypmod)
      FROM member_column WHERE relname = 'idempotency_metric' ORDER BY attnum$$,
    $$VALUES ('bucket', 'timestamp with time zone'),
             ('action', 'text'),
             ('node', 'text'),
             ('started', 'bigint'),
             ('replayed', 'bigint'),
             ('in_flight', 'bigint'),
             ('mismatched', 'bigint'),
             ('expired', 'bigint'),
             ('stalled', 'bigint'),
             ('taken_over', 'bigint'),
             ('completed', 'bigint'),
             ('errored', 'bigint'),
             ('released', 'bigint'),
             ('swept', 'bigint'),
             ('run_time', 'double precision'),
             ('lookup_time', 'double precision'),
             ('run_time_histogram', 'bigint[]'),
             ('lookup_time_histogram', 'bigint[]')$$,
    'columns of idempotency_metric');
SELECT results_eq(
    $$SELECT attname::text COLLATE "default", format_type(atttypid, atttypmod)
      FROM member_column WHERE relname = 'idempotency_replay_ratio' ORDER BY attnum$$,
    $$VALUES ('day', 'date'),
             ('action', 'text'),
             ('requests', 'numeric'),
             ('duplicates', 'numeric'),
             ('ratio', 'numeric'),
             ('on_target', 'boolean')$$,
    'columns of idempotency_replay_ratio');
SELECT results_eq(
    $$SELECT attname::text COLLATE "default", format_type(atttypid, atttypmod)
      FROM member_column WHERE relname = 'idempotency_health' ORDER BY attnum$$,
    $$VALUES ('version', 'text'),
             ('preloaded', 'boolean'),
             ('worker', 'text'),
             ('last_sweep_at', 'timestamp with time zone'),
             ('last_swept', 'bigint'),
             ('last_duration', 'interval'),
             ('last_error', 'text'),
             ('last_error_at', 'timestamp with time zone'),
             ('pending', 'bigint'),
             ('completed', 'bigint'),
             ('errored', 'bigint'),
             ('oldest_expired_at', 'timestamp with time zone'),
             ('in_flight', 'bigint'),
             ('stalled', 'bigint'),
             ('table_size', 'bigint'),
             ('index_size', 'bigint'),
             ('warnings', 'text[]')$$,
    'columns of idempotency_health');

--
-- Functions: arguments with their defaults, result, and what may be done with
-- a call
--

SELECT set_eq(
    $$SELECT proname::text, pg_get_function_arguments(oid),
             coalesce(pg_get_function_result(oid), 'none'),
             prokind::text, provolatile::text, proisstrict, proparallel::text
      FROM member_function$$,
    $$VALUES
      ('idempotency_begin',
       'tenant text, action text, key text, request jsonb DEFAULT NULL::jsonb, actor text DEFAULT NULL::text, ttl interval DEFAULT NULL::interval, wait interval DEFAULT NULL::interval, lease interval DEFAULT NULL::interval, request_hash bytea DEFAULT NULL::bytea, claim uuid DEFAULT NULL::uuid',
       'idempotency_result', 'f', 'v', false, 'u'),
      ('idempotency_try_begin',
       'tenant text, action text, key text, request jsonb DEFAULT NULL::jsonb, actor text DEFAULT NULL::text, ttl interval DEFAULT NULL::interval, wait interval DEFAULT NULL::interval, lease interval DEFAULT NULL::interval, request_hash bytea DEFAULT NULL::bytea, claim uuid DEFAULT NULL::uuid',
       'idempotency_result', 'f', 'v', false, 'u'),
      ('idempotency_finish',
       'tenant text, action text, key text, status_code integer DEFAULT 200, response json DEFAULT NULL::json, headers jsonb DEFAULT NULL::jsonb, actor text DEFAULT NULL::text, claim uuid DEFAULT NULL::uuid, body bytea DEFAULT NULL::bytea, ttl interval DEFAULT NULL::interval',
       'text', 'f', 'v', false, 'u'),
      ('idempotency_replay',
       'tenant text, action text, key text, request jsonb DEFAULT NULL::jsonb, actor text DEFAULT NULL::text, request_hash bytea DEFAULT NULL::bytea',
       'idempotency_result', 'f', 'v', false, 'u'),
      ('idempotency_release',
       'tenant text, action text, key text, actor text DEFAULT NULL::text, claim uuid DEFAULT NULL::uuid',
       'boolean', 'f', 'v', false, 'u'),
      ('idempotency_store',
       'tenant text, action text, key text, request jsonb, status_code integer, response json DEFAULT NULL::json, headers jsonb DEFAULT NULL::jsonb, actor text DEFAULT NULL::text, body bytea DEFAULT NULL::bytea, ttl interval DEFAULT NULL::interval, request_hash bytea DEFAULT NULL::bytea',
       'idempotency_result', 'f', 'v', false, 'u'),
      ('idempotency_forget',
       'tenant text, action text, key text, actor text DEFAULT NULL::text',
       'boolean', 'f', 'v', false, 'u'),
      ('idempotency_checkpoint',
       'tenant text, action text, key text, claim uuid, recovery_point text, recovery_state jsonb DEFAULT NULL::jsonb, lease interval DEFAULT NULL::interval, actor text DEFAULT NULL::text',
       'timestamp with time zone', 'f', 'v', false, 'u'),
      ('idempotency_run',
       'tenant text, action text, key text, request jsonb, handler regprocedure, actor text DEFAULT NULL::text, ttl interval DEFAULT NULL::interval, wait interval DEFAULT NULL::interval',
       'idempotency_result', 'f', 'v', false, 'u'),
      ('idempotency_try_run',
       'tenant text, action text, key text, request jsonb, handler regprocedure, actor text DEFAULT NULL::text, ttl interval DEFAULT NULL::interval, wait interval DEFAULT NULL::interval',
       'idempotency_result', 'f', 'v', false, 'u'),
      ('idempotency_first_seen',
       'tenant text, consumer text, message_ids text[], ttl interval DEFAULT NULL::interval',
       'SETOF text', 'f', 'v', false, 'u'),
      ('idempotency_request_hash',
       'request jsonb',
       'bytea', 'f', 'i', true, 's'),
      ('idempotency_event_key',
       'event_type text, aggregate_id text, sequence bigint, namespace uuid DEFAULT ''ce796568-8e76-4f6e-b458-7e151e9ab823''::uuid',
       'uuid', 'f', 'i', true, 's'),
      ('idempotency_sweep',
       'IN batch_size integer DEFAULT NULL::integer, IN max_duration interval DEFAULT NULL::interval',
       'none', 'p', 'v', false, 'u'),
      ('idempotency_schedule',
       'schedule text DEFAULT ''* * * * *''::text',
       'bigint', 'f', 'v', false, 'u'),
      ('idempotency_unschedule', '', 'boolean', 'f', 'v', false, 'u'),
      ('idempotency_distribute',
       'colocate_with regclass DEFAULT NULL::regclass',
       'void', 'f', 'v', false, 'u'),
      ('idempotency_at_owner',
       'tenant text, call text, arguments text[], settings text[]',
       'text', 'f', 'v', true, 'u'),
      ('idempotency_leases',
       'OUT tenant text, OUT actor text, OUT action text, OUT key text, OUT attempt integer, OUT recovery_point text, OUT created_at timestamp with time zone, OUT lease_expires_at timestamp with time zone',
       'SETOF record', 'f', 'v', false, 'u'),
      ('idempotency_record_counts',
       'OUT pending bigint, OUT completed bigint, OUT errored bigint, OUT leased bigint, OUT stalled bigint',
       'record', 'f', 'v', false, 'u'),
      ('idempotency_storage',
       'OUT distributed boolean, OUT nodes integer, OUT problem text, OUT table_size bigint, OUT index_size bigint, OUT oldest_expired_at timestamp with time zone',
       'record', 'f', 'v', false, 'u'),
      ('idempotency_in_flight',
       'OUT pid integer, OUT tenant text, OUT actor text, OUT action text, OUT key text, OUT attempt integer, OUT started_at timestamp with time zone, OUT lease_expires_at timestamp with time zone',
       'SETOF record', 'f', 'v', false, 's'),
      ('idempotency_tracking',
       'OUT capacity integer, OUT used integer, OUT untracked bigint',
       'record', 'f', 'v', false, 's'),
      ('idempotency_worker_status',
       'OUT state text, OUT last_sweep_at timestamp with time zone, OUT swept bigint, OUT duration interval, OUT behind boolean, OUT last_error text, OUT last_error_at timestamp with time zone, OUT failures integer',
       'record', 'f', 'v', false, 's'),
      ('idempotency_stats',
       'OUT action text, OUT started bigint, OUT replayed bigint, OUT in_flight bigint, OUT mismatched bigint, OUT expired bigint, OUT stalled bigint, OUT taken_over bigint, OUT completed bigint, OUT errored bigint, OUT released bigint, OUT swept bigint, OUT held integer, OUT leases integer, OUT stalled_leases integer, OUT run_time double precision, OUT run_time_p50 double precision, OUT run_time_p95 double precision, OUT run_time_p99 double precision, OUT run_time_histogram bigint[], OUT lookup_time double precision, OUT lookup_time_p50 double precision, OUT lookup_time_p95 double precision, OUT lookup_time_p99 double precision, OUT lookup_time_histogram bigint[], OUT since timestamp with time zone',
       'SETOF record', 'f', 'v', false, 's'),
      ('idempotency_metrics_room',
       'OUT capacity integer, OUT used integer, OUT lost bigint',
       'record', 'f', 'v', false, 's'),
      ('idempotency_percentile',
       'histogram bigint[], fraction double precision',
       'double precision', 'f', 'i', true, 's'),
      ('idempotency_histogram_add',
       'bigint[], bigint[]', 'bigint[]', 'f', 'i', true, 's'),
      ('idempotency_histogram_sum',
       'bigint[]', 'bigint[]', 'a', 'i', false, 's'),
      ('idempotency_support',
       'internal', 'internal', 'f', 'i', true, 'u')$$,
    'arguments, results, volatility, strictness and parallel safety');
SELECT is_empty(
    $$SELECT proname FROM member_function
      WHERE prokind <> 'a' AND
            (prolang <> (SELECT oid FROM pg_language WHERE lanname = 'c') OR
             probin <> '$libdir/idempotency' OR prosrc <> proname)$$,
    'functions are in C, in the library of the extension');
SELECT is_empty(
    $$SELECT proname FROM member_function WHERE prosecdef OR proleakproof$$,
    'no function runs with the rights of its owner or is called leakproof');
SELECT is_empty(
    $$SELECT proname FROM member_function WHERE proconfig IS NOT NULL$$,
    'no function changes settings');
SELECT set_eq(
    $$SELECT proname::text, prosupport::regproc::text FROM member_function
      WHERE prosupport <> 0$$,
    $$SELECT name, (SELECT oid::regproc::text FROM member_function
                    WHERE proname = 'idempotency_support')
      FROM unnest(ARRAY['idempotency_begin', 'idempotency_try_begin',
                        'idempotency_replay', 'idempotency_store',
                        'idempotency_run', 'idempotency_try_run']) AS name$$,
    'the calls that return a row have a plan of their own');

--
-- Rights
--

SELECT is_empty(
    $$SELECT object, privilege_type FROM member_right WHERE grantee = 0$$,
    'nothing is granted to PUBLIC');
SELECT set_eq(
    $$SELECT object, grantee::regrole::text, privilege_type, is_grantable
      FROM member_right WHERE grantee IS DISTINCT FROM owner AND grantee <> 0$$,
    $$VALUES ('relation idempotency_in_flight', 'pg_monitor', 'SELECT', false),
             ('relation idempotency_stalled', 'pg_monitor', 'SELECT', false),
             ('relation idempotency_stats', 'pg_monitor', 'SELECT', false),
             ('relation idempotency_metric', 'pg_monitor', 'SELECT', false),
             ('relation idempotency_replay_ratio', 'pg_monitor', 'SELECT', false),
             ('relation idempotency_health', 'pg_monitor', 'SELECT', false),
             ('function idempotency_in_flight', 'pg_monitor', 'EXECUTE', false),
             ('function idempotency_tracking', 'pg_monitor', 'EXECUTE', false),
             ('function idempotency_worker_status', 'pg_monitor', 'EXECUTE', false),
             ('function idempotency_leases', 'pg_monitor', 'EXECUTE', false),
             ('function idempotency_record_counts', 'pg_monitor', 'EXECUTE', false),
             ('function idempotency_storage', 'pg_monitor', 'EXECUTE', false),
             ('function idempotency_stats', 'pg_monitor', 'EXECUTE', false),
             ('function idempotency_metrics_room', 'pg_monitor', 'EXECUTE', false),
             ('function idempotency_percentile', 'pg_monitor', 'EXECUTE', false),
             ('function idempotency_histogram_add', 'pg_monitor', 'EXECUTE', false),
             ('function idempotency_histogram_sum', 'pg_monitor', 'EXECUTE', false)$$,
    'pg_monitor sees the views and metrics, and nobody else has any right');
SELECT is(
    (SELECT count(DISTINCT owner) FROM member_right WHERE owner IS NOT NULL), 1::bigint,
    'all belongs to one role');

--
-- Comments: what is new must have one
--

SELECT cmp_ok((SELECT count(*) FROM member_column)::int, '>', 45,
              'there are columns to look at');
SELECT is_empty(
    $$SELECT name FROM member
      WHERE (classid <> 'pg_type'::regclass OR
             objid IN (SELECT oid FROM member_type)) AND
            coalesce(obj_description(objid, classid::regclass::name), '') = ''$$,
    'every object has a comment');
SELECT is_empty(
    $$SELECT relname, attname FROM member_column
      WHERE coalesce(col_description(attrelid, attnum), '') = ''$$,
    'every column has a comment');
SELECT is_empty(
    $$SELECT indexrelid::regclass
      FROM pg_index JOIN member_relation ON indrelid = oid
      WHERE NOT indisprimary AND
            coalesce(obj_description(indexrelid, 'pg_class'), '') = ''$$,
    'every index but that of a primary key has a comment');

SELECT * FROM finish();
