--
-- Keys of events: UUIDs of version 5, as any other implementation makes them
--
CREATE EXTENSION idempotency;

--
-- Known answers: uuid5(namespace, "event_type:aggregate_id:sequence") of another
-- implementation.  Names with a letter in two spellings of Unicode are two names.
--
CREATE TABLE known (n int, event_type text, aggregate_id text, sequence bigint, event_key uuid);
INSERT INTO known VALUES
    (1, 'order.paid', '42', '1'::bigint, '88fdc32e-0669-54dd-bebd-d7c024675888'::uuid),
    (2, 'order.paid', '42', '2'::bigint, '6f25e970-a8e5-59f7-a504-29f5c3c1a39c'::uuid),
    (3, 'order.paid', '421', '1'::bigint, '838046ec-732d-518e-86ac-b0610fad7772'::uuid),
    (4, 'order.paid', '4', '21'::bigint, '929afa0a-03ef-5e4b-8f4c-51915e9324d2'::uuid),
    (5, 'order.paid', '42', '0'::bigint, 'faf88874-d5cc-59d7-b75f-85add8bbb81e'::uuid),
    (6, 'order.paid', '42', '-1'::bigint, '1fdf4f9b-082f-517f-b762-1e6d215eb1be'::uuid),
    (7, 'order.paid', '42', '9223372036854775807'::bigint, '9a1fa6e5-c293-59ff-a4fa-863b41230c59'::uuid),
    (8, 'order.paid', '42', '-9223372036854775808'::bigint, '3a1303f0-e9f4-543b-a951-df5303ae19bf'::uuid),
    (9, 'order.paid', 'a', '1'::bigint, '6ab97f4b-040e-50b1-ac1b-dceb91d9fbf8'::uuid),
    (10, 'order.paid', 'a:b', '1'::bigint, 'f9490b46-4ed2-5056-853d-99da352dd8ae'::uuid),
    (11, 'order.paid', 'a:1', '1'::bigint, '69bf617e-92c8-5fc3-aca3-7308c285f524'::uuid),
    (12, 'order.paid', ':', '1'::bigint, 'b26d2c60-6168-5049-91dc-0533349f604c'::uuid),
    (13, 'bestellung.bezahlt', 'Größe €100', '7'::bigint, 'af9faa02-0ae6-5751-8ee5-3df31b30d15d'::uuid),
    (14, '注文', '🧾', '7'::bigint, 'fd8e17cd-a894-5842-ad6c-712af16d535e'::uuid),
    (15, U&'e\0301', '1', '1'::bigint, '6680905c-581f-597b-8625-4767066c2fdf'::uuid),
    (16, U&'\00e9', '1', '1'::bigint, '7a77f742-b5a5-5b95-a62a-1e952ef80f57'::uuid),
    (17, ' ', ' ', '0'::bigint, '6fa6c7e9-45c7-5efb-8725-2a8cbcea2d95'::uuid),
    (18, repeat('t', 1000), repeat('a', 1000), '5'::bigint, '8a716f95-e509-5b67-89f2-9c5850189f6b'::uuid);
SELECT n, idempotency_event_key(event_type, aggregate_id, sequence) AS event_key,
       idempotency_event_key(event_type, aggregate_id, sequence) = event_key AS as_known
FROM known ORDER BY n;
-- no two of them are the same, and all are of version 5 and of the RFC's variant
SELECT count(DISTINCT event_key), bool_and(event_key::text ~ '^.{14}5.{4}[89ab]') AS version_5 FROM known;

--
-- The namespace, which is the extension's own when none is given
--
SELECT namespace, idempotency_event_key('order.paid', '42', 1, namespace) AS event_key,
       idempotency_event_key('order.paid', '42', 1, namespace) = event_key AS as_known
FROM (VALUES
    (1, 'ce796568-8e76-4f6e-b458-7e151e9ab823'::uuid, '88fdc32e-0669-54dd-bebd-d7c024675888'::uuid),
    (2, '6ba7b810-9dad-11d1-80b4-00c04fd430c8'::uuid, 'c9e7fa25-3c87-5bc5-8bc4-cea24f27f86b'::uuid),
    (3, '00000000-0000-0000-0000-000000000000'::uuid, '6ae74b97-3cf5-58e3-a1f7-6cb1030b7378'::uuid),
    (4, 'ffffffff-ffff-ffff-ffff-ffffffffffff'::uuid, '2f90ea75-d5da-5859-8253-ec011a1ef0d6'::uuid),
    (5, 'a4391786-6ec1-55e6-aa1a-66da51954a73'::uuid, '4a1ed6e6-98a0-5cd1-9dce-0d5d1fc2578c'::uuid)
) v (n, namespace, event_key) ORDER BY n;
SELECT idempotency_event_key('order.paid', '42', 1) = idempotency_event_key('order.paid', '42', 1, 'ce796568-8e76-4f6e-b458-7e151e9ab823') AS own;
-- by name
SELECT idempotency_event_key(event_type => 'order.paid', aggregate_id => '42', sequence => 1, namespace => '6ba7b810-9dad-11d1-80b4-00c04fd430c8');

--
-- What is no name of an event
--
SELECT error_of($$ SELECT idempotency_event_key('', '42', 1) $$);
SELECT error_of($$ SELECT idempotency_event_key('order:paid', '42', 1) $$);
SELECT error_of($$ SELECT idempotency_event_key(':', '42', 1) $$);
SELECT error_of($$ SELECT idempotency_event_key('order.paid:', '42', 1) $$);
SELECT error_of($$ SELECT idempotency_event_key('order.paid', '', 1) $$);
-- nothing is the key of something that is not known
SELECT idempotency_event_key(NULL, '42', 1) IS NULL AS type,
       idempotency_event_key('order.paid', NULL, 1) IS NULL AS aggregate,
       idempotency_event_key('order.paid', '42', NULL) IS NULL AS sequence,
       idempotency_event_key('order.paid', '42', 1, NULL) IS NULL AS namespace;

--
-- The same for ever: fit for an index, a generated column and parallel workers
--
SELECT provolatile, proisstrict, proparallel FROM pg_proc WHERE oid = 'idempotency_event_key'::regproc;
CREATE TABLE event (
    aggregate_id text,
    sequence bigint,
    key uuid GENERATED ALWAYS AS (idempotency_event_key('order.paid', aggregate_id, sequence)) STORED
);
CREATE UNIQUE INDEX event_key_idx ON event (idempotency_event_key('order.paid', aggregate_id, sequence));
INSERT INTO event (aggregate_id, sequence)
SELECT (i % 30)::text, i / 30 FROM generate_series(0, 299) i;
SELECT count(*), count(DISTINCT key) FROM event;
SELECT key FROM event WHERE aggregate_id = '7' AND sequence = 3;
SET enable_seqscan = off;
SELECT aggregate_id, sequence FROM event
WHERE idempotency_event_key('order.paid', aggregate_id, sequence) = '1862812d-e4bc-5ad7-bd87-05bd25f28dcd';
RESET enable_seqscan;
\set VERBOSITY terse
INSERT INTO event (aggregate_id, sequence) VALUES ('7', 3);
\echo :SQLSTATE
\set VERBOSITY default
DROP TABLE event;

--
-- It is a key, also where keys must be UUIDs
--
SET idempotency.key_format = 'uuid';
BEGIN;
SELECT outcome FROM idempotency_begin('t', 'order.paid', idempotency_event_key('order.paid', '42', 1)::text);
SELECT idempotency_finish('t', 'order.paid', idempotency_event_key('order.paid', '42', 1)::text, 200, '"shipped"');
COMMIT;
SELECT outcome, response FROM idempotency_begin('t', 'order.paid', idempotency_event_key('order.paid', '42', 1)::text);
RESET idempotency.key_format;

DROP TABLE known;
DROP EXTENSION idempotency;
