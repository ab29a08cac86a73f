# What the calls say on a cluster is what they say on a server without Citus: outcomes,
# answers byte for byte, and errors with their SQLSTATE, detail and hint, on each
# node and for tenants of each node.  A script of calls is run on both.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use CitusCluster;
use IPC::Run;
use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

skip_without_citus();

my $functions = q{
	CREATE FUNCTION refuse(request jsonb) RETURNS idempotency_response LANGUAGE sql AS $$
		SELECT ROW(404, '{"x-reason": "none"}', '{"error" :  "none"}', NULL, '10 min')::idempotency_response $$;
	CREATE FUNCTION fail(request jsonb) RETURNS json LANGUAGE plpgsql AS $$
	BEGIN
		RAISE 'no luck' USING ERRCODE = 'P0042', DETAIL = 'none at all', HINT = 'try later';
	END $$;
	CREATE FUNCTION be_busy(request jsonb) RETURNS idempotency_response LANGUAGE sql AS $$
		SELECT ROW(503, NULL, '{}', NULL, NULL)::idempotency_response $$;
	CREATE FUNCTION echo(request jsonb) RETURNS jsonb LANGUAGE sql AS 'SELECT request';
	CREATE FUNCTION set_ttl(t text, k text) RETURNS text LANGUAGE sql SET idempotency.ttl = '7 h' AS $$
		SELECT outcome FROM idempotency_run(t, 'pay', k, '{}', 'echo(jsonb)') $$};

my $script = <<'PSQL';
\pset null null
\echo == begin and finish
BEGIN;
SELECT * FROM idempotency_begin(:'tenant', 'pay', 'one', '{"amount": 5}');
SELECT * FROM idempotency_replay(:'tenant', 'pay', 'one');
SELECT idempotency_finish(:'tenant', 'pay', 'one', 201, '{"b" :  1,  "a":"é"}', '{"x": 1, "a": null}');
SELECT * FROM idempotency_begin(:'tenant', 'pay', 'one', '{"amount": 5}');
COMMIT;
SELECT * FROM idempotency_begin(:'tenant', 'pay', 'one', '{"amount": 5.0}');
SELECT * FROM idempotency_try_begin(:'tenant', 'pay', 'one');
SELECT * FROM idempotency_replay(:'tenant', 'pay', 'one', '{"amount": 5}');
SELECT * FROM idempotency_begin(:'tenant', 'pay', 'one', '{"amount": 6}');
SELECT * FROM idempotency_try_begin(:'tenant', 'pay', 'one', '{"amount": 6}');
SELECT * FROM idempotency_replay(:'tenant', 'pay', 'one', '{"amount": 6}');
SELECT * FROM idempotency_replay(:'tenant', 'pay', 'one', request_hash => sha256('one'));
SELECT * FROM idempotency_replay(:'tenant', 'pay', 'none');
BEGIN;
SELECT * FROM idempotency_begin(:'tenant', 'pay', 'one', '{"amount": 5}', actor => 'ann');
SELECT idempotency_finish(:'tenant', 'pay', 'one', body => '\x00ff', actor => 'ann', ttl => '2 h');
COMMIT;
SELECT * FROM idempotency_replay(:'tenant', 'pay', 'one', actor => 'ann');
\echo == released and errored
BEGIN;
SELECT outcome FROM idempotency_begin(:'tenant', 'pay', 'two');
SELECT idempotency_finish(:'tenant', 'pay', 'two', 503);
COMMIT;
SELECT * FROM idempotency_replay(:'tenant', 'pay', 'two');
BEGIN;
SELECT outcome FROM idempotency_begin(:'tenant', 'pay', 'two');
SELECT idempotency_release(:'tenant', 'pay', 'two');
SELECT idempotency_release(:'tenant', 'pay', 'two');
COMMIT;
BEGIN;
SELECT outcome FROM idempotency_begin(:'tenant', 'pay', 'two');
SELECT idempotency_finish(:'tenant', 'pay', 'two', 422, '{"error": "no"}');
COMMIT;
SELECT * FROM idempotency_begin(:'tenant', 'pay', 'two');
\echo == out of order
SELECT idempotency_finish(:'tenant', 'pay', 'three');
SELECT idempotency_release(:'tenant', 'pay', 'three');
BEGIN;
SELECT outcome FROM idempotency_begin(:'tenant', 'pay', 'three');
SELECT outcome FROM idempotency_begin(:'tenant', 'pay', 'three');
COMMIT;
SELECT outcome FROM idempotency_begin(:'tenant', 'pay', 'three');
BEGIN;
SELECT outcome FROM idempotency_begin(:'tenant', 'pay', 'three');
COMMIT;
BEGIN;
SELECT outcome FROM idempotency_begin(:'tenant', 'pay', 'three');
PREPARE TRANSACTION 'three';
SELECT * FROM idempotency_replay(:'tenant', 'pay', 'three');
\echo == arguments
SELECT idempotency_begin(:'tenant', 'pay', NULL);
SELECT idempotency_begin(:'tenant', 'pay', '');
SELECT idempotency_begin(:'tenant', 'pay', 'with space');
SELECT idempotency_begin(:'tenant', NULL, 'four');
SELECT idempotency_begin(:'tenant', '', 'four');
SELECT idempotency_begin(repeat('x', 1000), 'pay', 'four');
SELECT idempotency_begin(:'tenant', 'pay', 'four', ttl => '1 s');
SELECT idempotency_begin(:'tenant', 'pay', 'four', ttl => '1000 d');
SELECT idempotency_begin(:'tenant', 'pay', 'four', wait => '-1 s');
SELECT idempotency_begin(:'tenant', 'pay', 'four', lease => '0');
SELECT idempotency_begin(:'tenant', 'pay', 'four', request_hash => '');
SELECT idempotency_begin(:'tenant', 'pay', 'four', '{}', request_hash => sha256('one'));
SELECT idempotency_begin(:'tenant', 'pay', 'four', request_hash => '\xabcdef');
SELECT idempotency_begin(:'tenant', 'pay', 'four', claim => '00000000-0000-0000-0000-000000000001');
BEGIN;
SELECT outcome FROM idempotency_begin(:'tenant', 'pay', 'four');
SAVEPOINT s;
SELECT idempotency_finish(:'tenant', 'pay', 'four', 99);
ROLLBACK TO s;
SELECT idempotency_finish(:'tenant', 'pay', 'four', 200, '{}', body => '\x00');
ROLLBACK TO s;
SELECT idempotency_finish(:'tenant', 'pay', 'four', 200, to_json(repeat('x', 2000000)));
ROLLBACK TO s;
SELECT idempotency_finish(:'tenant', 'pay', 'four', 200, to_json(repeat('x', 20)));
COMMIT;
\echo == in flight elsewhere
SELECT idempotency_begin(:'tenant', 'pay', 'held', '{"a": 1}');
SELECT * FROM idempotency_try_begin(:'tenant', 'pay', 'held', '{"a": 1}');
SELECT * FROM idempotency_try_begin(:'tenant', 'pay', 'held', '{"a": 1}', wait => '10 ms');
SELECT idempotency_begin(:'tenant', 'pay', 'held', '{"a": 2}');
SELECT * FROM idempotency_try_begin(:'tenant', 'pay', 'held', '{"a": 2}');
SELECT * FROM idempotency_replay(:'tenant', 'pay', 'held', '{"a": 1}');
SELECT * FROM idempotency_store(:'tenant', 'pay', 'held', '{"a": 1}', 200);
SELECT * FROM idempotency_try_run(:'tenant', 'pay', 'held', '{"a": 1}', 'echo(jsonb)');
SELECT * FROM idempotency_run(:'tenant', 'pay', 'held', '{"a": 1}', 'echo(jsonb)');
SELECT idempotency_forget(:'tenant', 'pay', 'held');
SET statement_timeout = '200 ms';
SELECT * FROM idempotency_try_begin(:'tenant', 'pay', 'held', '{"a": 1}', wait => '1 h');
RESET statement_timeout;
SET idempotency.wait = '20 ms';
SET idempotency.retry_after = '17 s';
SELECT * FROM idempotency_try_begin(:'tenant', 'pay', 'held', '{"a": 1}');
RESET idempotency.wait;
RESET idempotency.retry_after;
\echo == leases
SELECT * FROM idempotency_begin(:'tenant', 'charge', 'one', '{"a": 1}', lease => '1 h', claim => '00000000-0000-0000-0000-000000000001');
SELECT * FROM idempotency_begin(:'tenant', 'charge', 'one', '{"a": 1}', lease => '1 h', claim => '00000000-0000-0000-0000-000000000001');
SELECT * FROM idempotency_try_begin(:'tenant', 'charge', 'one', '{"a": 1}', lease => '1 h');
SELECT * FROM idempotency_try_begin(:'tenant', 'charge', 'one', '{"a": 2}', lease => '1 h');
SELECT * FROM idempotency_replay(:'tenant', 'charge', 'one', '{"a": 1}');
SELECT idempotency_checkpoint(:'tenant', 'charge', 'one', '00000000-0000-0000-0000-000000000001', 'charged', '{"id": 7}') - clock_timestamp() BETWEEN '29 min' AND '30 min';
SELECT idempotency_checkpoint(:'tenant', 'charge', 'one', '00000000-0000-0000-0000-000000000002', 'stolen');
SELECT idempotency_finish(:'tenant', 'charge', 'one', claim => '00000000-0000-0000-0000-000000000002');
SELECT idempotency_finish(:'tenant', 'charge', 'one');
SELECT idempotency_forget(:'tenant', 'charge', 'one');
SELECT idempotency_finish(:'tenant', 'charge', 'one', 503, claim => '00000000-0000-0000-0000-000000000001');
SELECT * FROM idempotency_replay(:'tenant', 'charge', 'one', '{"a": 1}');
SELECT * FROM idempotency_begin(:'tenant', 'charge', 'one', '{"a": 1}', lease => '200 ms', claim => '00000000-0000-0000-0000-000000000003');
SELECT pg_sleep(0.3);
SELECT * FROM idempotency_replay(:'tenant', 'charge', 'one', '{"a": 1}');
SELECT * FROM idempotency_begin(:'tenant', 'charge', 'one', '{"a": 1}', lease => '1 h', claim => '00000000-0000-0000-0000-000000000004');
SELECT idempotency_finish(:'tenant', 'charge', 'one', claim => '00000000-0000-0000-0000-000000000003');
BEGIN;
SELECT idempotency_checkpoint(:'tenant', 'charge', 'one', '00000000-0000-0000-0000-000000000004', 'mailed', NULL, '2 h') - clock_timestamp() BETWEEN '119 min' AND '2 h';
SELECT idempotency_finish(:'tenant', 'charge', 'one', 200, '{"id" : 7}', claim => '00000000-0000-0000-0000-000000000004', ttl => '3 h');
COMMIT;
SELECT idempotency_finish(:'tenant', 'charge', 'one', 200, '{"id" : 7}', claim => '00000000-0000-0000-0000-000000000004', ttl => '3 h');
SELECT idempotency_finish(:'tenant', 'charge', 'one', 200, '{"id" : 8}', claim => '00000000-0000-0000-0000-000000000004');
SELECT * FROM idempotency_begin(:'tenant', 'charge', 'one', '{"a": 1}', lease => '1 h');
SELECT * FROM idempotency_begin(:'tenant', 'charge', 'two', lease => '1 h', claim => '00000000-0000-0000-0000-000000000005');
SELECT idempotency_release(:'tenant', 'charge', 'two', claim => '00000000-0000-0000-0000-000000000006');
SELECT idempotency_release(:'tenant', 'charge', 'two', claim => '00000000-0000-0000-0000-000000000005');
SELECT idempotency_release(:'tenant', 'charge', 'two', claim => '00000000-0000-0000-0000-000000000005');
SELECT * FROM idempotency_begin(:'tenant', 'charge', 'two');
\echo == run
SELECT * FROM idempotency_run(:'tenant', 'pay', 'echo', '{"b":1, "a" : 2}', 'echo(jsonb)', ttl => '1 h');
SELECT * FROM idempotency_run(:'tenant', 'pay', 'echo', '{"b":1, "a" : 2}', 'echo(jsonb)');
SELECT * FROM idempotency_run(:'tenant', 'pay', 'echo', '{"b":1}', 'echo(jsonb)');
SELECT * FROM idempotency_try_run(:'tenant', 'pay', 'echo', '{"b":1}', 'echo(jsonb)');
SELECT * FROM idempotency_run(:'tenant', 'pay', 'refuse', '{}', 'refuse(jsonb)');
SELECT * FROM idempotency_run(:'tenant', 'pay', 'refuse', '{}', 'refuse(jsonb)');
SELECT * FROM idempotency_run(:'tenant', 'pay', 'busy', '{}', 'be_busy(jsonb)');
SELECT * FROM idempotency_run(:'tenant', 'pay', 'busy', '{}', 'be_busy(jsonb)');
SELECT * FROM idempotency_run(:'tenant', 'pay', 'fail', '{}', 'fail(jsonb)');
SELECT * FROM idempotency_replay(:'tenant', 'pay', 'fail');
SELECT * FROM idempotency_run(:'tenant', 'pay', 'wrong', '{}', 'length(text)');
SELECT * FROM idempotency_run(:'tenant', 'pay', 'wrong', '{}', 'pg_reload_conf()');
SELECT * FROM idempotency_run(:'tenant', 'pay', 'wrong', '{}', NULL);
SELECT * FROM idempotency_run(:'tenant', 'pay', 'null', NULL, 'echo(jsonb)');
\echo == store and forget
SELECT * FROM idempotency_store(:'tenant', 'pay', 'stored', '{}', 404, '{"error" : 1}', '{"x": 1}', ttl => '2 h');
SELECT * FROM idempotency_store(:'tenant', 'pay', 'stored', '{}', 200, '{"error" : 2}');
SELECT * FROM idempotency_store(:'tenant', 'pay', 'stored', '{"a": 1}', 200);
SELECT * FROM idempotency_store(:'tenant', 'pay', 'stored', '{"a": 1}', 200, request_hash => '\x00');
SELECT * FROM idempotency_replay(:'tenant', 'pay', 'stored');
SELECT idempotency_forget(:'tenant', 'pay', 'stored');
SELECT idempotency_forget(:'tenant', 'pay', 'stored');
SELECT * FROM idempotency_replay(:'tenant', 'pay', 'stored');
\echo == first_seen
SELECT * FROM idempotency_first_seen(:'tenant', 'mail', '{b,a,b,c}');
SELECT * FROM idempotency_first_seen(:'tenant', 'mail', '{c,d}', '2 h');
SELECT * FROM idempotency_first_seen(:'tenant', 'other', '{c,d}');
SELECT * FROM idempotency_first_seen(:'tenant', 'mail', '{}');
SELECT * FROM idempotency_first_seen(:'tenant', 'mail', NULL);
SELECT * FROM idempotency_first_seen(:'tenant', 'mail', '{e,NULL}');
SELECT * FROM idempotency_first_seen(:'tenant', 'mail', '{e,"with space"}');
SELECT * FROM idempotency_first_seen(:'tenant', 'mail', '{{e,f},{g,h}}');
SELECT * FROM idempotency_first_seen(:'tenant', 'mail', '{e}', '1 s');
SELECT idempotency_first_seen(:'tenant', 'mail', '{e}');
SELECT idempotency_forget(:'tenant', 'mail', 'e');
SELECT idempotency_first_seen(:'tenant', 'mail', '{e}');
\echo == transactions
BEGIN READ ONLY;
SELECT idempotency_begin(:'tenant', 'pay', 'five');
ROLLBACK;
BEGIN READ ONLY;
SELECT outcome FROM idempotency_replay(:'tenant', 'pay', 'one');
COMMIT;
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT outcome FROM idempotency_begin(:'tenant', 'pay', 'five');
SELECT idempotency_finish(:'tenant', 'pay', 'five');
COMMIT;
BEGIN ISOLATION LEVEL SERIALIZABLE;
SELECT outcome FROM idempotency_begin(:'tenant', 'pay', 'five');
COMMIT;
BEGIN;
SAVEPOINT s;
SELECT outcome FROM idempotency_begin(:'tenant', 'pay', 'six');
ROLLBACK TO s;
SELECT outcome FROM idempotency_begin(:'tenant', 'pay', 'six');
SAVEPOINT s;
SELECT idempotency_finish(:'tenant', 'pay', 'six', 200, '1');
SELECT outcome, response FROM idempotency_replay(:'tenant', 'pay', 'six');
ROLLBACK TO s;
SELECT outcome, response FROM idempotency_replay(:'tenant', 'pay', 'six');
SELECT idempotency_finish(:'tenant', 'pay', 'six', 200, '2');
COMMIT;
SELECT outcome, response FROM idempotency_replay(:'tenant', 'pay', 'six');
\echo == settings
SET idempotency.ttl = '5 h';
SET idempotency.error_ttl = '17 min';
SET idempotency.retryable_status = '404';
SELECT expires_at - finished_at AS kept FROM idempotency_run(:'tenant', 'pay', 'kept', '{}', 'echo(jsonb)');
SELECT outcome FROM idempotency_run(:'tenant', 'pay', 'not kept', '{}', 'refuse(jsonb)');
SELECT outcome FROM idempotency_run(:'tenant', 'pay', 'not-kept', '{}', 'refuse(jsonb)');
SELECT outcome FROM idempotency_store(:'tenant', 'pay', 'kept-error', NULL, 422);
SELECT expires_at - finished_at AS kept FROM idempotency_replay(:'tenant', 'pay', 'kept-error');
BEGIN;
SET LOCAL idempotency.ttl = '6 h';
SELECT outcome FROM idempotency_run(:'tenant', 'pay', 'kept-local', '{}', 'echo(jsonb)');
COMMIT;
SELECT expires_at - finished_at AS kept FROM idempotency_replay(:'tenant', 'pay', 'kept-local');
SELECT set_ttl(:'tenant', 'kept-by-function');
SELECT expires_at - finished_at AS kept FROM idempotency_replay(:'tenant', 'pay', 'kept-by-function');
RESET ALL;
SET search_path = public, idempotency;
SELECT outcome FROM idempotency_run(:'tenant', 'pay', 'kept-again', '{}', 'echo(jsonb)');
SELECT expires_at - finished_at AS kept FROM idempotency_replay(:'tenant', 'pay', 'kept-again');
PSQL

# What the script says on a server, for a tenant, without what differs from one time
# to the next.  Meanwhile a session on another server, or on the same one, holds a claim.
sub said
{
	my ($node, $other, $tenant) = @_;
	my $file = $node->basedir . "/$tenant.sql";
	my $session = $other->background_psql('postgres', extra_params => [ '-U', 'app' ]);
	my $said;

	$session->query_safe('BEGIN');
	$session->query_safe(
		"SELECT idempotency_begin('$tenant', 'pay', 'held', '{\"a\": 1}')");
	append_to_file($file, $script);
	IPC::Run::run(
		[
			'psql', '-XqA', '-v', 'VERBOSITY=verbose', '-v', 'SHOW_CONTEXT=never',
			'-v', "tenant=$tenant", '-f', $file, $node->connstr('postgres') . ' user=app'
		],
		'<', \'', '>&', \$said);
	$session->query_safe('ROLLBACK');
	$session->quit;

	$said =~ s/^psql:.*?: //mg;
	$said =~ s/^LOCATION:.*\n//mg;
	$said =~ s/\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[.\d]*[+-]\d\d/TIME/g;
	$said =~ s/\d+\.\d{3} s/DURATION/g;
	$said =~ s/(\bprocess )\d+/$1PID/gi;
	return $said;
}

my $plain = new_server('plain', conf => "search_path = 'public, idempotency'");
$plain->start;
$plain->safe_psql('postgres', "CREATE ROLE app LOGIN; CREATE SCHEMA idempotency");
CitusCluster::create_extension_on($plain, 'idempotency');
$plain->safe_psql('postgres', $functions);
my @expected = split /^(?=== )/m, said($plain, $plain, 'tenant');

my $cluster = CitusCluster->new;
$cluster->on_coordinator($functions);
foreach my $round (0 .. 2)
{
	my $node = ($cluster->nodes)[$round];

	foreach my $owner ($cluster->nodes)
	{
		my $where = $node->name . ', tenant of ' . $owner->name;
		my $tenant = ($cluster->tenants_of($owner, 3))[ $round ];
		my @said = split /^(?=== )/m,
		  said($node, ($cluster->nodes)[1], $tenant);

		foreach my $i (0 .. $#expected)
		{
			my ($part) = $expected[$i] =~ /^(== .*)/;

			is($said[$i], $expected[$i], "$where: " . ($part // 'at first'));
		}
	}
}
done_testing();
