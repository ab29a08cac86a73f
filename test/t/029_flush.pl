# Flushes in the background, and whatever else happens to their table: nobody is
# waited for, a sweep comes in time, no count is lost or doubled, and who owns
# the table gets no more rights by it.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IPC::Run;
use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_server('main', worker => 1, conf => <<'CONF');
idempotency.sweep_interval = 100ms
idempotency.metrics_interval = 1s
restart_after_crash = on
deadlock_timeout = 10ms
log_line_prefix = '%m [%p] %b '
CONF
$node->start;

sub on
{
	my ($sql) = @_;

	return $node->safe_psql('postgres', $sql);
}

sub count_requests
{
	my ($count) = @_;

	on("SELECT idempotency_run('t', 'pay', gen_random_uuid()::text, '{}', 'work(jsonb)') FROM generate_series(1, $count)"
	);
	return;
}

sub count_flushed
{
	return on('SELECT coalesce(sum(started), 0) FROM idempotency_metric');
}

# Wait until so many requests have been flushed.  Were it more, they would not
# become less.
sub flushes
{
	my ($count, $test) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return ok(
		$node->poll_query_until(
			'postgres',
			"SELECT sum(started) = $count FROM idempotency_metric"),
		$test);
}

# Wait until some text was logged so many times.
sub logs
{
	my ($text, $times, $offset) = @_;

	for (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
	{
		return 1
		  if (() = substr(slurp_file($node->logfile), $offset) =~ /$text/g) >=
		  $times;
		select(undef, undef, undef, 0.1);
	}
	return 0;
}

# The worker comes round, so that there would have been some flushes.
sub let_work
{
	foreach my $round (1 .. 3)
	{
		on('SELECT pg_sleep(1)');
		on( q{
			INSERT INTO idempotency_key (tenant, action, key, actor, state, status_code, attempt, created_at, expires_at)
			VALUES ('t', 'a', 'expired', '', 'completed', 200, 1, now() - interval '2 days', now() - interval '1 day')}
		);
		$node->poll_query_until('postgres',
			"SELECT count(*) = 0 FROM idempotency_key WHERE key = 'expired'")
		  or die 'no sweep comes';
	}
	return;
}

# What the table of metrics does to whoever writes to it
sub set_trigger
{
	my ($body, %options) = @_;
	my $kind = $options{deferred} ? 'CONSTRAINT TRIGGER' : 'TRIGGER';
	my $when = $options{deferred} ? 'DEFERRABLE INITIALLY DEFERRED' : '';

	on( qq{
		CREATE OR REPLACE FUNCTION public.act() RETURNS trigger LANGUAGE plpgsql AS
		\$\$BEGIN $body; RETURN new; END\$\$;
		CREATE $kind act AFTER INSERT OR UPDATE ON idempotency_metric
		$when FOR EACH ROW EXECUTE FUNCTION public.act()});
	return;
}

sub drop_trigger
{
	on('DROP TRIGGER act ON idempotency_metric');
	return;
}

# The worker in the middle of a flush that takes for ever
sub stuck_worker
{
	$node->poll_query_until('postgres',
		"SELECT count(*) = 1 FROM pg_stat_activity WHERE backend_type = 'idempotency worker' AND wait_event = 'PgSleep'"
	) or die 'no flush comes';
	return on(
		"SELECT pid FROM pg_stat_activity WHERE backend_type = 'idempotency worker'"
	);
}

on( q{
	CREATE EXTENSION idempotency;
	CREATE FUNCTION work(jsonb) RETURNS json LANGUAGE sql AS $$SELECT '1'::json$$});
count_requests(10);
flushes(10, 'metrics are flushed');

# Where the table or a row of it is locked, a flush is left for later
my $offset = -s $node->logfile;
my $total = 10;
foreach my $lock (
	'SELECT FROM idempotency_metric FOR UPDATE',
	'UPDATE idempotency_metric SET started = started',
	'LOCK TABLE idempotency_metric')
{
	my $session = session($node);

	$session->query_safe("BEGIN; $lock");
	count_requests(10);
	let_work();
	on("SET statement_timeout = '${PostgreSQL::Test::Utils::timeout_default}s'; CALL idempotency_sweep()"
	);
	$session->query_safe('ROLLBACK');
	$session->quit;
	$total += 10;
	flushes($total, "a flush is made up for after $lock");
}
unlike(substr(slurp_file($node->logfile), $offset),
	qr/ERROR/, 'nobody has waited or failed');

# The extension goes and comes again: what was not flushed is flushed then
set_conf($node, 'idempotency.metrics_interval', "'1h'");
let_work();
count_requests(7);
is(count_flushed(), $total, 'nothing is flushed for an hour');
on('DROP EXTENSION idempotency CASCADE');
on('CREATE EXTENSION idempotency');
set_conf($node, 'idempotency.metrics_interval', "'1s'");
flushes(7, 'the next extension gets what the last one did not');
$total = 7;

# A flush that fails time and again puts off no sweep: otherwise each failure would
# have the next one come twice as late.
set_conf($node, 'idempotency.sweep_interval', "'1s'");
$offset = -s $node->logfile;
set_trigger(q{RAISE 'no flush'});
count_requests(10);
ok(logs(qr/ERROR:  no flush/, 8, $offset), 'a flush fails again and again');
let_work();
drop_trigger();
set_conf($node, 'idempotency.sweep_interval', "'100ms'");
$total += 10;
flushes($total, 'and is made up for when it does not');

# Processes end in the middle of it
set_trigger('PERFORM pg_sleep(3600)');
count_requests(10);
my $pid = stuck_worker();
on("SELECT pg_terminate_backend($pid)");
wait_for_end_of($node, $pid);
drop_trigger();
$total += 10;
flushes($total, 'a worker is terminated: nothing is lost or doubled');

set_trigger('PERFORM pg_sleep(3600)');
count_requests(10);
$offset = -s $node->logfile;
kill 'KILL', stuck_worker();
wait_for_restart($node, $offset);
drop_trigger();
count_requests(3);
$total += 3;
flushes($total, 'a worker is killed: what was flushed is there, once');

set_trigger('PERFORM pg_sleep(3600)');
count_requests(10);
stuck_worker();
$node->stop('fast');
my ($control) = run_command([ 'pg_controldata', $node->data_dir ]);
like($control, qr/^Database cluster state: +shut down$/m,
	'a fast stop in the middle of a flush is a clean one');
$node->append_conf('postgresql.conf', 'idempotency.worker = off');
$node->start;
drop_trigger();
set_conf($node, 'idempotency.worker', 'on');
$total += 10;
flushes($total, 'and nothing is lost or doubled by it');

# What is attached to the table has the rights of its owner, and no others
on( q{
	CREATE ROLE other;
	GRANT USAGE ON SCHEMA public TO other;
	GRANT EXECUTE ON FUNCTION idempotency_histogram_add TO other;
	ALTER TABLE idempotency_metric OWNER TO other;
	CREATE TABLE seen (who name);
	GRANT ALL ON seen TO other});
set_trigger('INSERT INTO public.seen VALUES (current_user)');
count_requests(10);
$total += 10;
flushes($total, 'a flush in the name of the owner');
is(on('SELECT DISTINCT who FROM seen'),
	'other', 'which is who its triggers run as');
drop_trigger();
my %attack = (
	'ALTER ROLE other SUPERUSER' =>
	  qr/(permission denied to alter role|must be superuser to alter)/,
	'SET ROLE NONE' =>
	  qr/cannot set parameter "role" within security-restricted operation/,
	'RESET SESSION AUTHORIZATION' =>
	  qr/cannot set parameter "session_authorization" within security-restricted operation/,
	'CREATE TEMP TABLE pg_class ()' =>
	  qr/cannot create temporary table within security-restricted operation/);
foreach my $attack (sort keys %attack)
{
	$offset = -s $node->logfile;
	set_trigger($attack);
	count_requests(1);
	ok(logs(qr/idempotency worker ERROR:  $attack{$attack}/, 1, $offset),
		"no way out: $attack");
	drop_trigger();
}
$offset = -s $node->logfile;
set_trigger('INSERT INTO public.seen VALUES (current_user)', deferred => 1);
count_requests(1);
ok( logs(
		qr/idempotency worker ERROR:  cannot fire deferred trigger within security-restricted operation/,
		1, $offset),
	'no way out: a trigger at commit');
drop_trigger();
on('ALTER TABLE idempotency_metric OWNER TO CURRENT_USER');
$total += 1 + keys %attack;
flushes($total, 'then all is flushed');

# The server keeps on working while the table is maintained, dumped and copied
my $load = $node->basedir . '/load.sql';
append_to_file($load, <<'SQL');
\set action random(1, 20)
SELECT idempotency_run('t', 'action-' || :action, gen_random_uuid()::text, '{}', 'work(jsonb)');
CALL idempotency_sweep();
SQL
$offset = -s $node->logfile;
my ($out, $err) = ('', '');
my $pgbench = IPC::Run::start(
	[
		'pgbench', '-n', '-c', 4, '-T', 5, '-f', $load,
		'-h', $node->host, '-p', $node->port, 'postgres'
	],
	'>', \$out, '2>', \$err);
while ($pgbench->pumpable && $out !~ /^tps/m)
{
	on($_)
	  foreach 'VACUUM FULL idempotency_metric',
	  'REINDEX TABLE idempotency_metric',
	  'REINDEX TABLE CONCURRENTLY idempotency_metric',
	  'CLUSTER idempotency_metric USING idempotency_metric_pkey',
	  'ANALYZE idempotency_metric',
	  'ALTER EXTENSION idempotency UPDATE';
	$node->command_ok(
		[ 'pg_dump', '-f', $node->basedir . '/dump', 'postgres' ],
		'a dump in the meantime');
	$pgbench->pump_nb;
}
$pgbench->finish;
is($err, '', 'clients notice nothing of maintenance');
like($out, qr/^number of failed transactions: 0 /m, 'and none fails');
ok( $node->poll_query_until(
		'postgres', q{
		SELECT (SELECT sum(completed) FROM idempotency_metric WHERE action LIKE 'action-%') =
			   (SELECT count(*) FROM idempotency_key WHERE action LIKE 'action-%')}),
	'nothing is lost or doubled by it');

# The extension goes and comes while workers and others flush.  What one of them
# has when it is dropped was flushed, and the next one gets the rest.
my $rest = count_flushed();
set_conf($node, 'idempotency.metrics_interval', "'1s'");
$pgbench = IPC::Run::start(
	[
		'sh', '-c',
		"while [ -e '$load' ]; do psql -Xqc 'CALL idempotency_sweep()' -h '@{[ $node->host ]}' -p @{[ $node->port ]} postgres >/dev/null 2>&1; done"
	]);
for (1 .. 25)
{
	$rest -= on( q{
		BEGIN;
		LOCK TABLE idempotency_metric;
		SELECT coalesce(sum(started), 0) FROM idempotency_metric;
		DROP EXTENSION idempotency;
		COMMIT});
	on('CREATE EXTENSION idempotency');
	count_requests(1);
	$rest++;
}
unlink $load;
$pgbench->finish;
flushes($rest, 'an extension that is dropped and created again and again');
unlike(
	substr(slurp_file($node->logfile), $offset),
	qr/idempotency worker (ERROR|FATAL)|deadlock detected/,
	'no worker fails, and there is no deadlock');

# A database is copied while it is worked on
for (1 .. 3)
{
	count_requests(10);
	$node->safe_psql('template1', 'CREATE DATABASE copied TEMPLATE postgres');
	is( $node->safe_psql('copied', 'SELECT count(*) FROM idempotency_stats'),
		'0', 'a copy counts anew');
	$node->safe_psql('template1', 'DROP DATABASE copied');
}

unlike(slurp_file($node->logfile), qr/PANIC|TRAP|deadlock detected/, 'no crash');
$node->stop;
done_testing();
