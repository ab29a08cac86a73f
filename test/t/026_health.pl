# What an administrator is told: the view of health in one row, with a warning for
# each thing to look at; metrics that a background worker flushes, and leases
# that it watches.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_server(
	'main',
	worker => 1,
	init => [ allows_streaming => 'logical' ],
	conf => <<'CONF');
idempotency.sweep_interval = 100ms
idempotency.metrics_interval = 1s
idempotency.max_tracked_claims = 32
idempotency.max_actions = 4
restart_after_crash = on
CONF
$node->start;

sub on
{
	my ($dbname, $sql) = @_;

	return $node->safe_psql($dbname, $sql);
}

sub health
{
	my ($column, $server) = @_;

	return ($server // $node)
	  ->safe_psql('postgres', "SELECT $column FROM idempotency_health");
}

sub warns
{
	my ($warning, $test) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	ok( $node->poll_query_until(
			'postgres',
			"SELECT warnings::text ~ '$warning' FROM idempotency_health"),
		"warning: $test");
	return;
}

# Wait until there is nothing to warn about, after something was mended.
sub is_healthy
{
	my ($test) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	ok( $node->poll_query_until(
			'postgres', "SELECT warnings = '{}' FROM idempotency_health"),
		$test)
	  or diag(health('warnings'));
	return;
}

# Records that expired some time ago
sub fill
{
	my ($count, $ago) = @_;

	on('postgres',
		'INSERT INTO idempotency_key (tenant, action, key, actor, state, status_code, attempt, created_at, expires_at)'
		  . " SELECT 't', 'pay', gen_random_uuid(), '', 'completed', 200, 1, now() - interval '2 days', now() - interval '$ago'"
		  . " FROM generate_series(1, $count)");
	return;
}

on('postgres', 'CREATE EXTENSION idempotency');
on( 'postgres', q{
	CREATE FUNCTION work(request jsonb) RETURNS idempotency_response LANGUAGE sql
		RETURN ROW((request->>'status')::int, NULL, '{}', NULL, NULL)::idempotency_response});

# One row, when all is well
$node->poll_query_until('postgres',
	"SELECT worker = 'running' AND last_sweep_at IS NOT NULL FROM idempotency_health")
  or die 'no sweep';
is( health(
		'version, preloaded, last_error, last_error_at, pending, completed, errored,'
		  . ' oldest_expired_at, in_flight, stalled, warnings'),
	'1.0|t|||0|0|0||0|0|{}',
	'a database where nothing has happened yet');

# Records by state, claims in flight, leases
on( 'postgres', q{
	SELECT idempotency_run('t', 'pay', 'k' || k, '{"status": 200}', 'work(jsonb)') FROM generate_series(1, 3) AS k;
	SELECT idempotency_run('t', 'pay', 'e', '{"status": 404}', 'work(jsonb)');
	SELECT idempotency_begin('t', 'charge', 'a', lease => '1 hour');
	SELECT claim AS b FROM idempotency_begin('t', 'charge', 'b', lease => '1 hour') \gset
	SELECT idempotency_release('t', 'charge', 'b', claim => :'b');
	SELECT idempotency_begin('t', 'charge', 'c', lease => '100 ms');
	SELECT pg_sleep(0.2)});
my $session = session($node);
$session->query_safe('BEGIN');
$session->query_safe("SELECT idempotency_begin('t', 'charge', 'd')");
is( health('pending, completed, errored, in_flight, stalled'),
	'3|3|1|2|1', 'records by state, and what is in flight and stalled');
warns('leases that ran out and wait for a repeat: 1', 'a stalled lease');
is( on('postgres',
		"SELECT held, leases, stalled_leases, stalled FROM idempotency_stats WHERE action = 'charge'"),
	'1|1|1|1',
	'the metrics have them too');
$session->query_safe('ROLLBACK');
is( on('postgres',
		"SELECT outcome, attempt FROM idempotency_begin('t', 'charge', 'c', lease => '1 hour')"),
	'started|2',
	'the lease is taken over');
is_healthy('and then all is well');

# A lease that ran out is reported once, by whoever sees to it
my $stalled = qr/LOG:  idempotency event "stalled"\n.*DETAIL:  \{.*"key": "c",.*"attempt": 1\}/;
for (1 .. 3)
{
	on('postgres', 'SELECT pg_sleep(1.1)');
}
is(scalar(() = slurp_file($node->logfile) =~ /$stalled/g),
	1, 'it was logged once');

# also when the server was restarted while it waits for a repeat
on('postgres', "SELECT idempotency_begin('t', 'charge', 's', lease => '100 ms')");
my $reported = "SELECT stalled FROM idempotency_stats WHERE action = 'charge'";
ok($node->poll_query_until('postgres', "SELECT ($reported) = 2"),
	'another one');
$node->restart;
warns('leases that ran out and wait for a repeat: 1',
	'it is still there after a restart');
is(on('postgres', $reported), '2', 'and was not counted again');
is(scalar(() = slurp_file($node->logfile) =~ /"stalled".*"key": "s"/g),
	1, 'nor logged');
on('postgres', "SELECT idempotency_begin('t', 'charge', 's', lease => '1 hour')");
is_healthy('when it is taken over all is well');

# Looking at part of the columns reads part of the data
unlike(
	on('postgres', 'EXPLAIN SELECT warnings, table_size FROM idempotency_health'),
	qr/Function Scan on idempotency_record_counts/,
	'the records are not read for warnings');
like(on('postgres', 'EXPLAIN SELECT pending FROM idempotency_health'),
	qr/Function Scan on idempotency_record_counts/, 'but to count them');

# A background worker flushes metrics at its own interval
my $flushed =
  "SELECT sum(started) = (SELECT sum(started) FROM idempotency_stats) FROM idempotency_metric";
on('postgres',
	q{SELECT idempotency_begin('t', 'charge', 'f' || k, lease => '1 hour') FROM generate_series(1, 7) AS k}
);
ok($node->poll_query_until('postgres', $flushed), 'metrics are flushed');
set_conf($node, 'idempotency.sweep_interval', "'1h'");
on('postgres',
	q{SELECT idempotency_begin('t', 'charge', 'g' || k, lease => '1 hour') FROM generate_series(1, 7) AS k}
);
ok($node->poll_query_until('postgres', $flushed),
	'also when no sweep is due for long');

# Sweep behind, by an interval that is too long
fill(10, '2 hours');
warns('sweep is behind: records that expired 02:0\d:\d\d ago are still there',
	'records that expired two hours ago');
like(health('oldest_expired_at < now() - interval \'2 hours\''),
	qr/^t$/, 'the oldest is shown');
set_conf($node, 'idempotency.sweep_interval', "'100ms'");
is_healthy('when they are swept all is well');

# Off
set_conf($node, 'idempotency.worker', 'off');
ok($node->poll_query_until('postgres', "SELECT worker = 'off' FROM idempotency_health"),
	'off is shown');
is(health('warnings'), '{}', 'which is no reason to warn after a sweep');
is( on('postgres', 'SELECT count(*) FROM idempotency_stats WHERE leases IS NOT NULL'),
	'0',
	'leases are not watched then');
$node->restart;
warns('background worker is off, and nobody else has swept',
	'the worker is off');
on('postgres', 'CALL idempotency_sweep()');
is(health('warnings'), '{}', 'until somebody else sweeps');
set_conf($node, 'idempotency.worker', 'on');
is_healthy('and when it is on');

# A sweep that fails
on( 'postgres', q{
	CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN old; END';
	CREATE TRIGGER nothing BEFORE DELETE ON idempotency_key EXECUTE FUNCTION nothing()});
warns('background worker failed: table .*idempotency_key.* must not have triggers',
	'an error');
like(
	health('last_error'),
	qr/^table "idempotency_key" must not have triggers/,
	'the error is shown');
on('postgres', 'DROP TRIGGER nothing ON idempotency_key');
on('postgres', 'CALL idempotency_sweep()');
is_healthy('a sweep that succeeds takes the warning away');

# Records are published, and which one is deleted cannot be said
on('postgres', 'ALTER TABLE idempotency_key REPLICA IDENTITY NOTHING');
is(health('warnings'), '{}', 'nothing is published, so no identity is needed');
foreach my $what (
	'ALL TABLES',
	'TABLE idempotency_key',
	'TABLES IN SCHEMA public',
	q{TABLE idempotency_key WITH (publish = 'update')},
	q{TABLE idempotency_key WITH (publish = 'delete')})
{
	on('postgres', "CREATE PUBLICATION p FOR $what");
	warns('records or metrics are published without a replica identity',
		"no replica identity: $what");
	on('postgres', 'ALTER TABLE idempotency_key REPLICA IDENTITY DEFAULT');
	is(health('warnings'), '{}', 'with one all is well');
	on('postgres', 'ALTER TABLE idempotency_key REPLICA IDENTITY NOTHING');
	on('postgres', 'DROP PUBLICATION p');
}
on('postgres',
	q{CREATE PUBLICATION p FOR TABLE idempotency_key WITH (publish = 'insert')});
is(health('warnings'), '{}', 'nor for what is only inserted');
on('postgres', 'DROP PUBLICATION p; CREATE PUBLICATION p FOR TABLE idempotency_metric');
is(health('warnings'), '{}', 'nor when another table is published');
on('postgres', 'ALTER TABLE idempotency_key REPLICA IDENTITY DEFAULT');
on('postgres', 'ALTER TABLE idempotency_metric REPLICA IDENTITY NOTHING');
warns('records or metrics are published without a replica identity',
	'no replica identity of the metrics');
on('postgres', 'DROP PUBLICATION p; ALTER TABLE idempotency_metric REPLICA IDENTITY DEFAULT');

# Shared memory is full
$session->quit;
$session = session($node);
$session->query_safe('BEGIN');
$session->query_safe(
	"SELECT idempotency_begin('t', 'many', 'k' || k) FROM generate_series(1, 40) AS k");
warns('claims that found no room in shared memory: 8', 'claims without room');
$session->query_safe('ROLLBACK');
on( 'postgres', q{
	SELECT idempotency_run('t', 'action' || k, 'k', '{"status": 200}', 'work(jsonb)') FROM generate_series(1, 4) AS k});
warns('all 4 places for metrics of an action are taken',
	'actions without room');
is(on('postgres', "SELECT sum(started) > 0 FROM idempotency_stats WHERE action = ''"),
	't', 'they are counted together');

# What is known of a database goes with it
on('postgres', 'CREATE DATABASE other');
on('other', 'CREATE EXTENSION idempotency');
$session->quit;
$node->append_conf('postgresql.conf', 'idempotency.max_actions = 100');
$node->restart;
on('other', "SELECT idempotency_begin('t', 'only here', 'k', lease => '1 hour')");
my $used = on('postgres', 'SELECT used FROM idempotency_metrics_room()');
is(on('postgres', "SELECT count(*) FROM idempotency_stats WHERE action = 'only here'"),
	'0', 'a database does not see the metrics of another');
on('postgres', 'DROP DATABASE other');
ok( $node->poll_query_until(
		'postgres',
		"SELECT used = $used - 1 FROM idempotency_metrics_room()"),
	'metrics of a database that is dropped go');

# Not preloaded
$node->append_conf('postgresql.conf', "shared_preload_libraries = ''");
$node->restart;
is( health('preloaded, worker, last_sweep_at, in_flight >= 2, warnings'),
	'f|not preloaded||t|{"library is not preloaded: nothing is swept or counted in the background"}',
	'without preloading');
$node->append_conf('postgresql.conf', "shared_preload_libraries = 'idempotency'");

# No slot for a worker: the launcher has the only one
$node->append_conf('postgresql.conf',
	"max_worker_processes = 1\nmax_logical_replication_workers = 0");
$node->restart;
warns('there is no slot for a background worker', 'no slot');
$node->append_conf('postgresql.conf', 'max_worker_processes = 8');
$node->restart;
is_healthy('with a slot all is well');

# A standby
$node->backup('base');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($node, 'base', has_streaming => 1);
$standby->start;
is(health('worker, warnings', $standby),
	'standby|{}', 'a standby has nothing to do');
$standby->promote;
ok( $standby->poll_query_until(
		'postgres',
		"SELECT worker = 'running' AND last_sweep_at IS NOT NULL FROM idempotency_health"),
	'until it is promoted');

is(complaints_of($standby, deadlocks => 1), '', 'no crash: standby');
unlike(slurp_file($node->logfile), qr/PANIC|TRAP|deadlock detected/, 'no crash');
$standby->stop;
$node->stop;
done_testing();
