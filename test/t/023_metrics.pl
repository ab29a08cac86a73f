# Metrics are kept across restarts, and across crashes to the last flush; what is
# flushed is neither lost nor doubled, whatever becomes of the flush; and the sums
# are right when there is no room for all actions.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IPC::Run;
use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_server('main', conf => <<'CONF');
restart_after_crash = on
autovacuum = off
log_statement = none
CONF
$node->start;
my $saved = $node->data_dir . '/pg_stat/idempotency.stat';
my %accident = accidents($node);

sub on
{
	my ($dbname, $sql) = @_;

	return $node->safe_psql($dbname, $sql);
}

# What was counted since counting began, and what was flushed, by action
my @classes =
  qw(started replayed in_flight mismatched expired taken_over completed errored released swept);
my $counted =
    "SELECT action, @{[ join(', ', @classes) ]}, round(run_time::numeric, 3),"
  . ' run_time_histogram, lookup_time_histogram'
  . ' FROM idempotency_stats ORDER BY action COLLATE "C"';
my $flushed =
    "SELECT action, @{[ join(', ', map { qq(sum($_)) } @classes) ]},"
  . ' round(sum(run_time)::numeric, 3),'
  . ' idempotency_histogram_sum(run_time_histogram),'
  . ' idempotency_histogram_sum(lookup_time_histogram)'
  . ' FROM idempotency_metric GROUP BY action ORDER BY action';

sub flushed_is_counted
{
	my ($dbname, $test) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return is(on($dbname, $flushed), on($dbname, $counted), $test);
}

# How many requests were started, as one of the two has it
sub started_in
{
	my ($dbname, $where) = @_;

	return on($dbname, "SELECT coalesce(sum(started), 0) FROM $where");
}

# Flush, and make sure that a crash does not lose it
sub flush
{
	my ($dbname) = @_;

	on($dbname, 'CALL idempotency_sweep()');
	on($dbname, 'CHECKPOINT');
	return;
}

# Requests for an action, with answers
sub work
{
	my ($dbname, $action, $count) = @_;

	on($dbname, "SELECT idempotency_run('t', '$action',"
		  . " gen_random_uuid()::text, '1', 'echo(jsonb)')"
		  . " FROM generate_series(1, $count)");
	return;
}

sub create_database
{
	my ($dbname) = @_;

	on('postgres', "CREATE DATABASE $dbname");
	on($dbname, q{
		CREATE EXTENSION idempotency;
		CREATE FUNCTION echo(jsonb) RETURNS jsonb LANGUAGE sql AS 'SELECT $1'});
	return;
}

# A restart keeps all, whether it was flushed or not
create_database('shop');
work('shop', 'flushed', 3);
flush('shop');
flushed_is_counted('shop', 'a flush');
work('shop', 'flushed', 5);
work('shop', 'not flushed', 7);
my $began = 'SELECT DISTINCT since FROM idempotency_stats';
my $since = on('shop', $began);
my $before = on('shop', $counted);
$node->restart;
is(on('shop', $counted), $before, 'a restart keeps what was counted');
is(on('shop', $began), $since, 'and since when');
ok(!-e $saved, 'the file that it was in is gone');
flush('shop');
flushed_is_counted('shop', 'what was not flushed before is flushed after it');
is( on( 'shop', q{
		SELECT count(*) = 1
		FROM pg_control_system(), pg_database AS d,
			CAST(extract(epoch FROM pg_postmaster_start_time() - timestamptz '2000-01-01 00:00:00+00') * 1000000 AS bigint) AS started_at,
			(SELECT DISTINCT node FROM idempotency_metric) AS m
		WHERE datname = current_database()
		AND node = concat_ws('/', system_identifier, started_at, d.oid)}),
	't',
	'by the node that it is since then');

# What another node has counted in the same minute is not added to
on( 'shop', q{
	INSERT INTO idempotency_metric
	SELECT date_trunc('minute', now()) + n * interval '1 min', 'flushed', 'another', 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, '{}', '{}'
	FROM generate_series(0, 9) AS n});
work('shop', 'flushed', 1);
flush('shop');
is( on( 'shop', q{
		SELECT count(*), sum(started) FROM idempotency_metric
		WHERE node = 'another' AND started = 1}),
	'10|10',
	'another node has rows of its own');
on('shop', "DELETE FROM idempotency_metric WHERE node = 'another'");
flushed_is_counted('shop', 'and so has this one');
$before = on('shop', $counted);
$node->restart;
flush('shop');
is(on('shop', $counted), $before, 'another restart changes nothing');
flushed_is_counted('shop', 'and nothing is flushed twice');

# So does a start that fails when the file was read
work('shop', 'not flushed', 2);
$before = on('shop', $counted);
$node->stop;
my $hba = slurp_file($node->data_dir . '/pg_hba.conf');
$node->append_conf('pg_hba.conf', 'nonsense');
is($node->start(fail_ok => 1), 0, 'the server does not start');
unlink $node->data_dir . '/pg_hba.conf';
$node->append_conf('pg_hba.conf', $hba);
$node->start;
is(on('shop', $counted), $before, 'a start that fails loses nothing');
flush('shop');
flushed_is_counted('shop', 'and doubles nothing');

# A crash keeps what was flushed, and the end of a process everything.  No claim
# is held after either.
foreach my $name (sort keys %accident)
{
	my $crash = $name ne 'backend terminated';
	my $session = session($node, 'shop');
	my $pid = $session->query_safe('SELECT pg_backend_pid()');
	my $held = 'SELECT coalesce(sum(held), 0) FROM idempotency_stats';

	work('shop', 'before', 3);
	flush('shop');
	my $kept = started_in('shop', 'idempotency_metric');
	work('shop', 'before', 4);
	$session->query_safe('BEGIN');
	$session->query_safe("SELECT idempotency_begin('t', 'claimed', 'a')");
	is(on('shop', $held), '1', "$name: a claim is held");
	$before = on('shop', $counted);

	$accident{$name}->($pid);
	end_session($session);
	is(on('shop', $held), '0', "$name: none is held after it");
	is(on('shop', $counted), $crash ? '' : $before,
		"$name: what counting goes on from");
	is(started_in('shop', 'idempotency_metric'),
		$kept, "$name: what was flushed is kept");
	work('shop', 'after', 6);
	flush('shop');
	is( started_in('shop', 'idempotency_metric'),
		$kept + ($crash ? 0 : 4 + 1) + 6,
		"$name: what was flushed after it");
	ok(!-e $saved, "$name: nothing was saved to a file");
}

# A flush that comes to nothing, in each of many ways, at the last moment
create_database('failing');
on(
	'failing', q{
	CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		EXECUTE tg_argv[0];
		RETURN NULL;
	END $$});
my %failure = (
	'error' => [ q{SELECT 1 / 0}, '' ],
	'deferred' => [ q{SELECT 1 / 0}, 'DEFERRABLE INITIALLY DEFERRED' ],
	'cancel' => [ q{SELECT pg_cancel_backend(pg_backend_pid())}, '' ],
	'terminate' => [ q{SELECT pg_terminate_backend(pg_backend_pid())}, '' ]);
work('failing', 'a', 2);
work('failing', 'b', 3);
flush('failing');
foreach my $name (sort keys %failure)
{
	my ($sql, $when) = @{ $failure{$name} };
	my $kept = on('failing', $flushed);

	work('failing', 'a', 4);
	work('failing', 'c', 5);
	on('failing',
		'CREATE CONSTRAINT TRIGGER fail AFTER INSERT OR UPDATE'
		  . " ON idempotency_metric $when FOR EACH ROW EXECUTE FUNCTION fail('$sql')"
	);
	isnt($node->psql('failing', 'CALL idempotency_sweep()'),
		0, "$name: a flush fails");
	is(on('failing', $flushed), $kept, "$name: and has written nothing");
	on('failing', 'DROP TRIGGER fail ON idempotency_metric');
	flush('failing');
	flushed_is_counted('failing', "$name: the next one makes up for it");
}

# The same for one that is stopped from without, beside another one that finds
# nothing to do
on('failing',
	'CREATE CONSTRAINT TRIGGER fail AFTER INSERT OR UPDATE'
	  . ' ON idempotency_metric FOR EACH ROW'
	  . " EXECUTE FUNCTION fail('SELECT pg_advisory_xact_lock(1)')");
foreach my $name ('nothing', sort keys %accident)
{
	my $gate = session($node, 'failing');
	my $session = session($node, 'failing');
	my $pid = $session->query_safe('SELECT pg_backend_pid()');
	my $crash = $name ne 'nothing' && $name ne 'backend terminated';

	work('failing', 'a', 2);
	work('failing', 'd', 2);
	my $kept = on('failing', $flushed);
	my $started = started_in('failing', 'idempotency_metric');
	$gate->query_safe('SELECT pg_advisory_lock(1)');
	$session->{stdin} .= "CALL idempotency_sweep();\n";
	$session->{run}->pump_nb;
	$node->poll_query_until('failing',
		"SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = $pid"
	) or die 'the flush does not wait';
	flush('failing');
	is(on('failing', $flushed), $kept,
		"stopped by $name: another flush has nothing to do");

	$accident{$name}->($pid) if $name ne 'nothing';
	end_session($_) foreach $gate, $session;
	wait_for_end_of($node, $pid);
	if ($crash)
	{
		is(on('failing', $flushed), $kept,
			"stopped by $name: the flush has written nothing");
		work('failing', 'd', 1);
		flush('failing');
		is(started_in('failing', 'idempotency_metric'),
			$started + 1, "stopped by $name: nor does the next one");
		on('failing', 'TRUNCATE idempotency_metric');
		$node->stop('immediate');
		$node->start;
	}
	else
	{
		flush('failing');
		flushed_is_counted('failing', "stopped by $name: nothing is lost");
	}
}

# Many clients, and many flushes that are cancelled or terminated at random
create_database('storm');
on(
	'storm', q{
	CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		PERFORM pg_sleep(0.01);
		RETURN NULL;
	END $$;
	CREATE TRIGGER dawdle AFTER INSERT OR UPDATE ON idempotency_metric
	FOR EACH ROW EXECUTE FUNCTION dawdle();
	BEGIN;
	SELECT idempotency_begin('t', 'action-' || n, 'answered', '1') FROM generate_series(1, 5) AS n;
	SELECT idempotency_finish('t', 'action-' || n, 'answered') FROM generate_series(1, 5) AS n;
	COMMIT;
	SELECT idempotency_begin('t', 'action-' || n, 'leased', '1', lease => '1 hour') FROM generate_series(1, 5) AS n});
my $scope = q{'t', 'action-:n', };
my $catch = 'DO $$BEGIN PERFORM idempotency_begin(%s); RAISE EXCEPTION'
  . " 'it began'; EXCEPTION WHEN SQLSTATE '%s' THEN RETURN; END\$\$;";
my @scripts = (
	# what a client does, and what that comes to
	[
		"BEGIN; SELECT idempotency_begin($scope ':k'); SELECT idempotency_finish($scope ':k'); COMMIT;",
		started => 1, completed => 1
	],
	[
		"BEGIN; SELECT idempotency_begin($scope ':k'); SELECT idempotency_finish($scope ':k'); ROLLBACK;",
		started => 1
	],
	[
		"BEGIN; SELECT idempotency_begin($scope ':k');"
		  . " SAVEPOINT a; SELECT idempotency_finish($scope ':k', 404); ROLLBACK TO a;"
		  . " SAVEPOINT b; SELECT idempotency_begin($scope ':k-b'); SELECT idempotency_finish($scope ':k-b'); ROLLBACK TO b;"
		  . " SAVEPOINT c; SELECT idempotency_finish($scope ':k', 503); RELEASE c; COMMIT;",
		started => 2, released => 1
	],
	[
		"BEGIN; SELECT idempotency_begin($scope ':k');"
		  . " SAVEPOINT a; SELECT idempotency_finish($scope ':k', 422); RELEASE a; COMMIT;",
		started => 1, errored => 1
	],
	[
		"BEGIN; SELECT idempotency_begin($scope 'answered', '1'); ROLLBACK;"
		  . " SELECT idempotency_replay($scope 'answered');",
		replayed => 2
	],
	[
		"SELECT idempotency_try_begin($scope 'answered', '2');"
		  . sprintf($catch, "$scope 'leased', '2'", 'ID004'),
		mismatched => 2
	],
	[
		"SELECT idempotency_try_begin($scope 'leased', '1');"
		  . sprintf($catch, "$scope 'leased', '1'", 'ID003'),
		in_flight => 2
	]);
my ($clients, $transactions) = (6, 300);
my @options;
foreach my $n (0 .. $#scripts)
{
	my $file = $node->basedir . "/storm-$n.sql";

	append_to_file($file,
		"\\set n random(1, 5)\n\\set k random(1, 1000000000000000)\n"
		  . join("\n", split(/(?<=;) (?=[A-Z])/, $scripts[$n][0])) . "\n");
	push @options, '-f', $file;
}
my $output = '';
my $pgbench = IPC::Run::start(
	[
		'pgbench', '-n', '-c', $clients, '-t', $transactions, @options,
		$node->connstr('storm')
	],
	'>', \$output, '2>&1');

# Three sessions at a time flush again and again
my $flushes = $node->basedir . '/flushes.sql';
append_to_file($flushes, "CALL idempotency_sweep();\n" x 50);
my @flushers;
my $log_offset = -s $node->logfile;
my $disturb = q{
	SELECT CASE WHEN random() < 0.5 THEN pg_cancel_backend(pid) ELSE pg_terminate_backend(pid) END
	FROM pg_stat_activity
	WHERE query LIKE 'CALL idempotency_sweep%' AND state = 'active' AND random() < 0.3};
my ($cancelled, $terminated) = (0, 0);
while ($pgbench->pumpable || $cancelled < 3 || $terminated < 3)
{
	foreach my $n (0 .. 2)
	{
		next if defined $flushers[$n] && $flushers[$n]->pumpable;
		$flushers[$n]->finish if defined $flushers[$n];
		$flushers[$n] = IPC::Run::start(
			[ 'psql', '-XqAt', '-f', $flushes, $node->connstr('storm') ],
			'>', '/dev/null', '2>', '/dev/null');
	}
	on('postgres', $disturb);
	eval { $pgbench->pump_nb };		# it may just have ended
	my $log = substr(slurp_file($node->logfile), $log_offset);
	$cancelled = () = $log =~
	  /ERROR:  canceling statement due to user request\n(?:.*\n){0,8}?.*STATEMENT:  CALL idempotency_sweep/g;
	$terminated = () = $log =~
	  /FATAL:  terminating connection due to administrator command\n(?:.*\n){0,8}?.*STATEMENT:  CALL idempotency_sweep/g;
}
ok($pgbench->finish, 'clients end') or diag($output);
$_->finish foreach @flushers;

# what the clients counted themselves
my %expected = map { $_ => 0 } @classes;
$expected{started} = 10;
$expected{completed} = 5;
my @counts = $output =~ /^ - (\d+) transactions/mg;
is(scalar(@counts), scalar(@scripts), 'each client says what it did')
  or diag($output);
foreach my $n (0 .. $#scripts)
{
	my ($sql, %of_one) = @{ $scripts[$n] };

	$expected{$_} += $counts[$n] * $of_one{$_} foreach keys %of_one;
}
flush('storm');
is( on('storm',
		"SELECT @{[ join(', ', map { qq(sum($_)) } @classes) ]} FROM idempotency_stats"
	),
	join('|', map { $expected{$_} } @classes),
	'clients and flushes: what clients count is what was counted');
flushed_is_counted('storm',
	'clients and flushes: what was counted is what was flushed');
is(on('storm', 'SELECT sum(held) FROM idempotency_stats'),
	'0', 'clients and flushes: no claim is held');

# A smaller table, in which the second database finds no room
my $sum = started_in('storm', 'idempotency_stats');
restart_with($node, 'idempotency.max_actions = 3');
is(started_in('storm', 'idempotency_stats'),
	$sum, 'a smaller table: the sum is the same');
flush('storm');
is(started_in('storm', 'idempotency_metric'),
	$sum, 'a smaller table: nothing is flushed twice');
$node->stop;
unlink $saved or die "could not remove $saved";
$node->start;
create_database('other');
my $rows = 'SELECT action, started, completed FROM idempotency_stats ORDER BY 1';
work($_, 'one', 1) foreach 'shop', 'other';
work('shop', $_, 2) foreach 'two', 'three', 'four';
work('other', $_, 3) foreach 'one', 'two', 'five';
is(on('shop', $rows), "|4|4\none|1|1\ntwo|2|2", 'overflow: one database');
is(on('other', $rows), "|6|6\none|4|4", 'overflow: the other one');
is(on($_, 'SELECT capacity, used, lost FROM idempotency_metrics_room()'),
	'3|3|0', "overflow: database $_ sees that there is no room")
  foreach 'shop', 'other';
$before = on('other', $counted);
$node->restart;
is(on('other', $counted), $before, 'overflow: kept across a restart');
flush('other');
flushed_is_counted('other', 'overflow: flushed');

# No table at all
restart_with($node, 'idempotency.max_actions = 0');
is(on('other', $rows), '', 'max_actions = 0: nothing is counted');
is(on('other', 'SELECT num_nulls(capacity, used, lost) FROM idempotency_metrics_room()'),
	'3', 'max_actions = 0: there is no room');
my $kept = on('other', $flushed);
work('other', 'one', 5);
on('other', "UPDATE idempotency_key SET expires_at = now() WHERE action = 'five'");
is(count_swept($node, 'other'),
	3, 'max_actions = 0: requests and sweeps work');
is(on('other', $flushed), $kept, 'max_actions = 0: what was flushed is kept');

# Nor without preload
restart_with($node, "shared_preload_libraries = ''");
is(on('other', $rows), '', 'not preloaded: nothing is counted');
work('other', 'one', 5);
on('other', "UPDATE idempotency_key SET expires_at = now() WHERE action = 'two'");
is(count_swept($node, 'other'), 3, 'not preloaded: sweeps work');
is(on('other', $flushed), $kept, 'not preloaded: what was flushed is kept');
restart_with($node, "shared_preload_libraries = 'idempotency'\n"
	  . 'idempotency.max_actions = 256');
is(on('other', $counted), $before, 'preloaded again: counting goes on');

# Whatever is in the file, the server starts, and doubles nothing.  The flipped
# bit in the middle is in the counts, those at the ends in the head and in the
# checksum.
sub flip_bit
{
	my ($data, $at) = @_;

	substr($data, $at, 1) ^= "\x01";
	return $data;
}

work('other', 'one', 5);
my %damage = (
	'empty' => sub { '' },
	'foreign' => sub { 'not what we wrote' x 1000 },
	'truncated' => sub { substr($_[0], 0, -100) },
	'truncated by a byte' => sub { substr($_[0], 0, -1) },
	'longer' => sub { "$_[0]\0" },
	'flipped bit in the middle' => sub { flip_bit($_[0], length($_[0]) / 2) },
	'flipped bit in the first entry' => sub { flip_bit($_[0], 100) },
	'flipped bit at the end' => sub { flip_bit($_[0], -1) },
	'another version' => sub { "\xff" . substr($_[0], 1) });
foreach my $name (sort keys %damage)
{
	my $file_offset = -s $node->logfile;

	work('other', 'one', 5);
	flush('other');
	my $started = started_in('other', 'idempotency_metric');
	$node->stop;
	my $data = $damage{$name}->(slurp_file($saved));
	unlink $saved;
	append_to_file($saved, $data);
	$node->start;
	$node->wait_for_log(
		qr/LOG:  ignoring invalid data in file "pg_stat\/idempotency\.stat"/,
		$file_offset);
	ok(!-e $saved, "$name file: it is removed");
	is(on('other', $counted), '', "$name file: counting begins anew");
	flush('other');
	is(started_in('other', 'idempotency_metric'),
		$started, "$name file: nothing is flushed twice");
	work('other', 'one', 1);
	flush('other');
	is(started_in('other', 'idempotency_metric'),
		$started + 1, "$name file: counting goes on");
	on('other',
		"UPDATE idempotency_key SET expires_at = now() WHERE action = 'one'");
	cmp_ok(count_swept($node, 'other'), '>', 0, "$name file: so do sweeps");
}
$node->stop;
unlink $saved;
mkdir $saved or die "could not make $saved";
$node->start;
work('other', 'one', 1);
$node->restart;
like(
	slurp_file($node->logfile),
	qr/LOG:  could not remove file "pg_stat\/idempotency\.stat": (?:.*\n)+?.*LOG:  could not open file "pg_stat\/idempotency\.stat": /,
	'a directory in its place is no reason to fail');
rmdir $saved;

# Metrics are kept for as long as is set
on(
	'other', q{
	TRUNCATE idempotency_metric;
	INSERT INTO idempotency_metric
	SELECT now() - age, 'aged', 'node', 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, '{}', '{}'
	FROM unnest('{47 hours,49 hours,167 hours,169 hours}'::interval[]) AS age});
my $aged = q{SELECT count(*) FROM idempotency_metric WHERE action = 'aged'};
flush('other');
is(on('other', $aged), '3', 'metrics are kept for a week');
$node->append_conf('postgresql.conf', q{idempotency.metrics_retention = '2d'});
$node->reload;
$node->poll_query_until('other',
	q{SELECT current_setting('idempotency.metrics_retention') = '2d'})
  or die 'the setting does not change';
flush('other');
is(on('other', $aged), '1', 'or for as long as is set');

unlike(slurp_file($node->logfile), qr/PANIC|TRAP|terminated by signal (?!9)/,
	'no crash of our own');
$node->stop;
done_testing();
