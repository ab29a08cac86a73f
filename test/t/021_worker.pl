# With the library preloaded, every database that has the extension is swept in
# the background, whatever happens to it, to the workers and to the server, and
# the workers are in nobody's way.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

# Every database starts as a copy of one of these, which nobody sweeps
my $large = 20_000;		# expired records in the template "large"

my $node = new_server(
	'main',
	worker => 1,
	init => [ allows_streaming => 1 ],
	conf => <<'CONF');
idempotency.sweep_interval = 100ms
restart_after_crash = on
autovacuum = off
allow_in_place_tablespaces = on
log_line_prefix = '%m [%p] %b '
CONF
$node->start;

sub on
{
	my ($dbname, $sql) = @_;

	return $node->safe_psql($dbname, $sql);
}

# Records that expired a day ago
sub fill_sql
{
	my ($count) = @_;

	return 'INSERT INTO idempotency_key (tenant, action, key, actor, state,'
	  . ' request_hash, status_code, attempt, created_at, finished_at, expires_at)'
	  . " SELECT 't', 'a', 'expired-' || gen_random_uuid(), '', 'completed',"
	  . " '\\x00', 200, 1, now() - interval '2 days', now() - interval '2 days',"
	  . " now() - interval '1 day' FROM generate_series(1, $count);";
}

my $expired =
  "SELECT count(*) FROM idempotency_key WHERE key LIKE 'expired-%'";
my $is_swept = "SELECT ($expired) = 0";

sub is_swept
{
	my ($dbname, $test) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return ok($node->poll_query_until($dbname, $is_swept), $test);
}

# Let sweeps go on for a while: the launcher has come round at least twice.
sub let_sweep
{
	foreach my $round (1 .. 3)
	{
		on('postgres', fill_sql(1));
		$node->poll_query_until('postgres', $is_swept)
		  or die 'no sweep comes';
	}
	return;
}

# Wait until a sweep of a database that was a copy of "large" is on its way.
sub wait_for_sweep
{
	my ($dbname) = @_;

	$node->poll_query_until($dbname, "SELECT ($expired) < $large")
	  or die 'no sweep begins';
	return;
}

# How many transactions there were in a database that nobody but workers
# connects to.  Each worker has some, and they are counted when it has gone.
sub count_transactions
{
	my ($dbname) = @_;

	return on('postgres',
		"SELECT xact_commit FROM pg_stat_database WHERE datname = '$dbname'");
}

# Wait until a worker was in such a database.
sub wait_for_worker
{
	my ($dbname, $before) = @_;

	return $node->poll_query_until('postgres',
		"SELECT xact_commit > $before FROM pg_stat_database WHERE datname = '$dbname'"
	);
}

sub pid_of
{
	my ($type, $dbname) = @_;

	return on('postgres',
			"SELECT pid FROM pg_stat_activity WHERE backend_type = '$type'"
		  . (defined $dbname ? " AND datname = '$dbname'" : ''));
}

# Wait until the status of a database is like that.
sub has_status
{
	my ($dbname, $condition, $test) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return ok(
		$node->poll_query_until(
			$dbname, "SELECT $condition FROM idempotency_worker_status()"),
		$test);
}

# Whether new expired records stay at last, for much longer than the interval.
# While a pass is under way that began before, they need not.
sub comes_to_rest
{
	my ($dbname) = @_;

	for (1 .. $PostgreSQL::Test::Utils::timeout_default)
	{
		on($dbname, 'DELETE FROM idempotency_key; ' . fill_sql(7));
		on($dbname, 'SELECT pg_sleep(1)');
		return 1 if on($dbname, $expired) eq '7';
	}
	return 0;
}

# A table that cannot be swept
my $fail_sql = q{
	CREATE OR REPLACE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN old; END';
	CREATE TRIGGER nothing BEFORE DELETE ON idempotency_key EXECUTE FUNCTION nothing();};

# Databases with the extension, and one without
on('postgres', 'CREATE EXTENSION idempotency');
on('postgres', "CREATE DATABASE $_") foreach 'one', 'two', 'plain', 'large';
on('postgres', 'ALTER DATABASE large IS_TEMPLATE true');
on($_, 'CREATE EXTENSION idempotency; ' . fill_sql(2500)) foreach 'one', 'two';
is_swept($_, "database $_ is swept") foreach 'one', 'two';
ok( $node->poll_query_until(
		'one', q{
		SELECT n_tup_del >= 2500 FROM pg_stat_user_tables
		WHERE relname = 'idempotency_key'}),
	'its statistics count what was swept');
has_status(
	'one',
	q{state = 'running' AND last_sweep_at <= clock_timestamp() AND NOT behind
	AND duration > '0' AND duration <= clock_timestamp() - pg_postmaster_start_time()
	AND last_error IS NULL AND last_error_at IS NULL AND failures = 0},
	'its status says that all is well');

# What is not expired, or is being claimed, stays
my @kept = ('expired-claimed', 'lease', 'live', 'stalled');
my $keys = 'SELECT key FROM idempotency_key ORDER BY key COLLATE "C"';
my $session = session($node, 'one');
$session->query_safe('BEGIN');
$session->query_safe(
	"SELECT idempotency_begin('t', 'a', 'expired-claimed', '{}')");
on( 'one', q{
	INSERT INTO idempotency_key (tenant, action, key, actor, state, status_code, attempt, created_at, expires_at)
	VALUES ('t', 'a', 'expired-claimed', '', 'completed', 200, 1, now() - interval '2 days', now() - interval '1 day');
	BEGIN;
	SELECT idempotency_begin('t', 'a', 'live', '{}');
	SELECT idempotency_finish('t', 'a', 'live', 201);
	COMMIT;
	SELECT idempotency_begin('t', 'a', 'lease', '{}', lease => '1 hour');
	SELECT idempotency_begin('t', 'a', 'stalled', '{}', lease => '1 hour');
	UPDATE idempotency_key SET lease_expires_at = clock_timestamp() WHERE key = 'stalled'});
let_sweep();
is(on('one', $keys), join("\n", @kept),
	'answers, leases and the record of a claimed request stay');
$session->query_safe('ROLLBACK');
is_swept('one', 'the record that was claimed is swept after the claim');
is(on('one', $keys), join("\n", @kept[ 1 .. 3 ]), 'the others stay');
$session->quit;

# Where there is no extension, a worker looks once
on('postgres', "CREATE DATABASE $_") foreach 'late', 'never', 'closed';
ok(wait_for_worker($_, 0), "a worker looks into database $_")
  foreach 'late', 'never', 'closed';
on('postgres', 'ALTER DATABASE closed ALLOW_CONNECTIONS false');
let_sweep();
my %seen = map { $_ => count_transactions($_) } 'never', 'closed';
let_sweep();
is(count_transactions('never'), $seen{never}, 'and then no more');
on('late', 'DROP EXTENSION plpgsql; CREATE EXTENSION plpgsql');
let_sweep();
is(count_transactions('never'),
	$seen{never}, 'also when another extension is created');

# When ours is created anywhere, one looks again, but not where nobody
# can connect
on('late', 'CREATE EXTENSION idempotency; ' . fill_sql(100));
is_swept('late', 'a database that gets the extension later is swept');
ok(wait_for_worker('never', $seen{never}), 'a worker looks again');
let_sweep();
$seen{never} = count_transactions('never');

# Templates are left alone
on('large', 'CREATE EXTENSION idempotency; ' . fill_sql($large));
ok(wait_for_worker('never', $seen{never}), 'and again');
on('postgres', 'CREATE DATABASE copied TEMPLATE large');
is_swept('copied', 'the copy of a template that has the extension is swept');
is(on('large', $expired), $large, 'the template is not');
let_sweep();
$seen{never} = count_transactions('never');
let_sweep();
is(count_transactions($_), $seen{$_}, "no worker looks into database $_")
  foreach 'never', 'closed';
on('postgres', 'ALTER DATABASE closed ALLOW_CONNECTIONS true');
ok(wait_for_worker('closed', $seen{closed}),
	'until connections are allowed again');
on('postgres', 'DROP DATABASE copied');

# The same when it is created by a transaction that is prepared, in a database
# that is known to have none
on('postgres', "CREATE DATABASE $_") foreach 'prepared', 'undone';
ok(wait_for_worker($_, 0), "a worker looks into database $_")
  foreach 'prepared', 'undone';
let_sweep();
on($_,
	'BEGIN; CREATE EXTENSION idempotency; ' . fill_sql(100) . " PREPARE TRANSACTION '$_'")
  foreach 'prepared', 'undone';
let_sweep();
$seen{never} = count_transactions('never');
let_sweep();
is(count_transactions('never'),
	$seen{never}, 'a transaction that is only prepared has nobody look');
on('undone', "ROLLBACK PREPARED 'undone'");
let_sweep();
is(count_transactions('never'),
	$seen{never}, 'nor has one that was rolled back');
on('prepared', "COMMIT PREPARED 'prepared'");
is_swept('prepared', 'an extension that was prepared is swept after its commit');
ok(wait_for_worker('never', $seen{never}), 'and a worker looks everywhere');
let_sweep();
on('prepared', "BEGIN; CREATE TABLE other (); PREPARE TRANSACTION 'other'");
$seen{never} = count_transactions('never');
on('prepared', "COMMIT PREPARED 'other'");
let_sweep();
is(count_transactions('never'),
	$seen{never}, 'which is not done for each transaction that was prepared');
on('postgres', "DROP DATABASE $_") foreach 'prepared', 'undone';

# CREATE EXTENSION makes a database known at once, and not after the interval,
# also while the launcher waits for a worker, or when the last one failed
on('two', $fail_sql . fill_sql(1));
$node->wait_for_log(qr/ERROR:  table "idempotency_key" must not have triggers/);
set_conf($node, 'idempotency.sweep_interval', "'1h'");
ok(comes_to_rest('postgres'), 'a longer interval takes effect by reload');
on('plain', 'BEGIN; CREATE EXTENSION idempotency; ' . fill_sql(100) . ' COMMIT');
is_swept('plain', 'CREATE EXTENSION makes a database known');
has_status('plain', 'swept = 100 AND NOT behind',
	'the status has what a worker swept');
is(count_swept($node), 7, 'a sweep by hand, when none comes');
is( on( 'postgres', q{SELECT swept, behind,
			last_sweep_at BETWEEN clock_timestamp() - interval '1 min' AND clock_timestamp()
			FROM idempotency_worker_status()}),
	'7|f|t',
	'the status has it');
is( on( 'postgres', q{CALL idempotency_sweep(max_duration => '1 us');
			SELECT swept, behind FROM idempotency_worker_status()}),
	'0|t',
	'and whether it was over before its end');
on('two', 'DROP EXTENSION idempotency');
on('two', 'BEGIN; CREATE EXTENSION idempotency; ' . fill_sql(100) . ' COMMIT');
is_swept('two', 'and where the one before could not be swept');
on('late', 'DROP EXTENSION idempotency');
set_conf($node, 'idempotency.sweep_batch_size', 1);
on('postgres', 'CREATE DATABASE busy TEMPLATE large');
# which has the launcher find the new database
on('late', 'CREATE EXTENSION idempotency');
wait_for_sweep('busy');
has_status('busy', q{state = 'sweeping'}, 'a sweep under way is seen');
is(on('postgres', 'SELECT state FROM idempotency_worker_status()'),
	'running', 'but not from another database');
on('never', 'BEGIN; CREATE EXTENSION idempotency; ' . fill_sql(100) . ' COMMIT');
is_swept('never', 'also in the middle of a sweep of another one');
on('postgres', 'DROP DATABASE busy');
set_conf($node, 'idempotency.sweep_batch_size', 1000);
set_conf($node, 'idempotency.sweep_interval', "'100ms'");
is_swept('postgres', 'a shorter interval takes effect by reload');

# Off and on
set_conf($node, 'idempotency.worker', 'off');
ok(comes_to_rest('postgres'), 'nothing is swept when worker is off');
has_status('postgres', q{state = 'off'}, 'and the status says so');

# What is known of a database goes when it is dropped, whoever has its OID then
my $again = 'CREATE DATABASE again OID = 4000000000 TEMPLATE large';
my $known = 'SELECT last_sweep_at IS NOT NULL FROM idempotency_worker_status()';
on('postgres', $again);
on('again', 'CALL idempotency_sweep(max_duration => \'1 us\')');
is(on('again', $known), 't', 'the status of a database is known');
for (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
{
	on('postgres', 'DROP DATABASE again');
	$node->reload;
	on('postgres', $again);
	last if on('again', $known) eq 'f';
}
is(on('again', $known), 'f', 'and not after it was dropped');
on('postgres', 'DROP DATABASE again');
set_conf($node, 'idempotency.worker', 'on');
is_swept('postgres', 'and again when it is on');

# What needs a database for itself gets it in the middle of a sweep
on('postgres', "CREATE TABLESPACE elsewhere LOCATION ''");
my $unfinished = 0;
foreach my $batch_size (1, 10)
{
	set_conf($node, 'idempotency.sweep_batch_size', $batch_size);
	foreach my $command (
		'DROP DATABASE busy',
		'CREATE DATABASE other TEMPLATE busy',
		'ALTER DATABASE busy RENAME TO other',
		'ALTER DATABASE busy SET TABLESPACE elsewhere')
	{
		my $left = 0;
		on('postgres', 'CREATE DATABASE busy TEMPLATE large');
		wait_for_sweep('busy');
		my ($rc, $stdout, $stderr) = $node->psql('postgres', $command);
		is($stderr, '', "$command while it is swept, batches of $batch_size");
		foreach my $dbname ('busy', 'other')
		{
			next
			  if on('postgres',
				"SELECT count(*) FROM pg_database WHERE datname = '$dbname'")
			  eq '0';
			$left += on($dbname, $expired);
			is_swept($dbname, "then $dbname is swept");
			on('postgres', "DROP DATABASE $dbname");
		}
		$unfinished++ if $left > 0;
	}
}
cmp_ok($unfinished, '>', 0, 'sweeps were not over by then');

# So does what needs the table or the extension, which may take its time
on('postgres', 'CREATE DATABASE busy TEMPLATE large');
my $offset = -s $node->logfile;
$session = session($node, 'busy');
$session->query_safe('BEGIN; TRUNCATE idempotency_key');
let_sweep();
$session->query_safe('DROP EXTENSION idempotency');
let_sweep();
$session->query_safe('ROLLBACK');
unlike(substr(slurp_file($node->logfile), $offset),
	qr/ERROR/, 'nobody waits, or fails, where a table is locked');
$session->quit;
is_swept('busy', 'it is swept when it can be had');
foreach my $command (
	'VACUUM FULL idempotency_key',
	'REINDEX TABLE idempotency_key',
	'TRUNCATE idempotency_key',
	'DROP EXTENSION idempotency')
{
	on('busy', "DELETE FROM idempotency_key; " . fill_sql($large));
	wait_for_sweep('busy');
	my ($rc, $stdout, $stderr) = $node->psql('busy', $command);
	is($stderr, '', "$command while it is swept");
}
on('busy', 'CREATE EXTENSION idempotency; ' . fill_sql(100));
is_swept('busy', 'an extension that was dropped and created again is swept');
like(
	error_of($node, 'busy',
		'CREATE SCHEMA s; ALTER EXTENSION idempotency SET SCHEMA s'),
	qr/ERROR:  0A000: extension "idempotency" does not support SET SCHEMA\n/,
	'its schema cannot be changed');
on('postgres', 'DROP DATABASE busy');
set_conf($node, 'idempotency.sweep_batch_size', 1000);

# A database that cannot be swept does not keep the others from it.  Workers
# come later and later; the least time between them is known, so a slow machine
# makes no difference.
$offset = -s $node->logfile;
on('two', $fail_sql . fill_sql(100));
my $failure =
  qr/^(\S+) (\d+):(\d+):(\d+\.\d+) \S+ \[\d+\] idempotency worker +ERROR:  table "idempotency_key" must not have triggers/m;
for (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
{
	last
	  if (() = substr(slurp_file($node->logfile), $offset) =~ /$failure/g) >=
	  5 * 4;
	select(undef, undef, undef, 0.1);
}
my @times;
my $text = substr(slurp_file($node->logfile), $offset);
push @times, ($2 * 60 + $3) * 60 + $4 while $text =~ /$failure/g;
cmp_ok(scalar(@times), '>=', 5, 'a database that fails says so');
like(
	$text,
	qr/idempotency worker +CONTEXT:  idempotency worker in database "two"$/m,
	'and which one it is');
foreach my $n (1 .. 4)
{
	my $gap = $times[$n] - $times[ $n - 1 ];
	$gap += 24 * 60 * 60 if $gap < 0;
	cmp_ok($gap, '>=', 0.1 * 2**$n, "failure $n: the next try comes later");
}
on($_, fill_sql(10)) foreach 'postgres', 'one';
is_swept($_, "database $_ is swept meanwhile") foreach 'postgres', 'one';
is(on('two', $expired), '100', 'the one that fails is not');
has_status(
	'two',
	q{failures >= 5 AND last_error_at <= clock_timestamp()
	AND last_error = 'table "idempotency_key" must not have triggers, rules or foreign keys that reference it'},
	'its status says why');
is( on( 'one',
		'SELECT last_error, failures FROM idempotency_worker_status()'),
	'|0',
	'and that of another one does not');
on('two', 'DROP TRIGGER nothing ON idempotency_key');
is_swept('two', 'it is swept when the cause is gone');
has_status('two', 'failures = 0 AND last_error_at < last_sweep_at',
	'the error is still known');

# Processes end
set_conf($node, 'idempotency.sweep_batch_size', 1);
foreach my $signal ('TERM', 'KILL')
{
	foreach my $type ('idempotency worker', 'idempotency launcher')
	{
		$offset = -s $node->logfile;
		on('postgres', 'CREATE DATABASE busy TEMPLATE large');
		wait_for_sweep('busy');
		my $pid =
		  pid_of($type, $type eq 'idempotency worker' ? 'busy' : undef);
		like($pid, qr/^\d+$/, "there is an $type");
		kill $signal, $pid;
		if ($signal eq 'TERM')
		{
			wait_for_end_of($node, $pid);
			has_status('busy', q{state = 'not running'},
				'while there is no launcher, the status says so')
			  if $type eq 'idempotency launcher';
		}
		else
		{
			wait_for_restart($node, $offset);
		}
		is_swept('busy', "$type gets $signal: sweeping goes on");
		ok( $node->poll_query_until(
				'postgres',
				"SELECT count(*) = 1 AND min(pid) <> $pid FROM pg_stat_activity WHERE backend_type = 'idempotency launcher'"
			),
			'there is a new launcher')
		  if $type eq 'idempotency launcher';
		on('postgres', 'DROP DATABASE busy');
	}
}

# A worker that does not end, whatever it is told, does not stop the others.  It
# is stopped while it waits for a lock, when it is in nobody's way.
$offset = -s $node->logfile;
on('postgres', 'CREATE DATABASE busy TEMPLATE large');
$session = session($node, 'busy');
$session->query_safe(
	'BEGIN; ALTER INDEX idempotency_key_expires_at_idx SET TABLESPACE elsewhere');
my $stuck;
for (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
{
	$stuck = on('postgres',
		"SELECT pid FROM pg_stat_activity WHERE datname = 'busy'"
		  . " AND backend_type = 'idempotency worker' AND wait_event_type = 'Lock'"
	);
	last if $stuck ne '' and kill 'STOP', $stuck;
	select(undef, undef, undef, 0.05);
}
$session->query_safe('ROLLBACK');
$session->quit;
on('postgres', fill_sql(100));
is_swept('postgres', 'a worker is stuck: other databases are swept');
kill 'CONT', $stuck;
wait_for_end_of($node, $stuck);
like(
	substr(slurp_file($node->logfile), $offset),
	qr/LOG:  terminating idempotency worker for database with OID \d+\n.*DETAIL:  It did not end within 30 seconds\.\n/,
	'and the log says so');
is_swept('busy', 'then its own, too');
on('postgres', 'DROP DATABASE busy');

# The time that a transaction may take is for others
SKIP:
{
	skip 'there is no transaction_timeout', 2 if $node->pg_version < 17;

	set_conf($node, 'idempotency.sweep_batch_size', $large);
	set_conf($node, 'idempotency.worker', 'off');
	ok(comes_to_rest('postgres'), 'worker is off');
	on('postgres', 'CREATE DATABASE busy TEMPLATE large');
	on('postgres', 'ALTER DATABASE busy SET transaction_timeout = 1');
	set_conf($node, 'idempotency.worker', 'on');
	ok( $node->poll_query_until(
			'postgres',
			"SELECT tup_deleted >= $large FROM pg_stat_database WHERE datname = 'busy'"
		),
		'a batch may take longer than transaction_timeout');
	on('postgres', 'DROP DATABASE busy');
	set_conf($node, 'idempotency.sweep_batch_size', 1);
}

# A stop in the middle of a sweep is a clean one
on('postgres', 'CREATE DATABASE busy TEMPLATE large');
wait_for_sweep('busy');
$node->stop('fast');
my ($control) = run_command([ 'pg_controldata', $node->data_dir ]);
like($control, qr/^Database cluster state: +shut down$/m,
	'a fast stop in the middle of a sweep is a clean one');
$node->start;
is_swept('busy', 'and sweeping goes on after it');

# Out of slots: the launcher has the only one
$node->append_conf('postgresql.conf', <<'CONF');
max_worker_processes = 1
max_logical_replication_workers = 0
CONF
$offset = -s $node->logfile;
$node->restart;
my $no_slot =
  qr/WARNING:  out of background worker slots\n.*DETAIL:  Expired idempotency records are not swept until there is one\.\n.*HINT:  You might need to increase "max_worker_processes"\.\n/;
$node->wait_for_log($no_slot, $offset);
on('postgres', fill_sql(100));
on('postgres', 'SELECT pg_sleep(1)');
is( scalar(() = substr(slurp_file($node->logfile), $offset) =~ /$no_slot/g),
	1, 'without a slot for a worker, the log says so once');
is(on('postgres', $expired), '100', 'and nothing is swept');
has_status('postgres', q{state = 'waiting for a slot' AND last_sweep_at IS NULL},
	'the status says so, too');
$node->append_conf('postgresql.conf', 'max_worker_processes = 8');
$node->restart;
is_swept('postgres', 'with a slot it is');

# A standby sweeps nothing until it is promoted
set_conf($node, 'idempotency.worker', 'off');
ok(comes_to_rest('postgres'), 'worker is off');
$node->backup('base');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($node, 'base', has_streaming => 1);
$standby->append_conf('postgresql.conf', 'idempotency.worker = on');
$standby->start;
on('postgres', fill_sql(100));
$node->wait_for_catchup($standby);
is( $standby->safe_psql(
		'postgres',
		"SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'idempotency%'"
	),
	'0',
	'a standby has no launcher');
is( $standby->safe_psql(
		'postgres',
		'SELECT state, failures FROM idempotency_worker_status()'),
	'standby|',
	'and its status says so');
$standby->promote;
ok($standby->poll_query_until('postgres', $is_swept),
	'a standby that is promoted is swept');

unlike(slurp_file($_->logfile), qr/TRAP|PANIC|deadlock detected/,
	'no crash of our own and no deadlock: ' . $_->name)
  foreach $node, $standby;
$standby->stop;
$node->stop;
done_testing();
