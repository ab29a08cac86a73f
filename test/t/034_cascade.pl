# A standby of a standby.  It replays what the primary has answered, as does the
# one between them; that one is promoted, and the last one follows it to the new
# timeline; then the last one is promoted, and goes on with what was begun on the
# first server.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $first = new_server('first', init => [ allows_streaming => 1 ]);
$first->start;
create_shop($first);
my $middle = new_standby('middle', $first);
$middle->start;
my $last = new_standby('last', $middle);
$last->start;

my ($running, $stalled) = map { claim_of($_) } 1, 2;

sub on
{
	my ($server, $sql) = @_;

	return $server->safe_psql('postgres', $sql);
}

# Wait until the last server has replayed what the first of some others wrote.
sub catch_up
{
	my (@servers) = @_;
	my $lsn = $servers[0]->lsn('write');

	$servers[ $_ - 1 ]->wait_for_catchup($servers[$_], 'replay', $lsn)
	  foreach 1 .. $#servers;
	return;
}

sub replay
{
	my ($server, $key) = @_;

	return on($server,
		'SELECT outcome, status_code, response, attempt, recovery_point'
		  . " FROM idempotency_replay('shop', 'pay', '$key', '{\"key\": \"$key\"}')");
}

sub try_begin
{
	my ($server, $key, $claim) = @_;

	return on($server,
		'SELECT outcome, attempt, recovery_point, recovery_state'
		  . " FROM idempotency_try_begin('shop', 'pay', '$key', '{\"key\": \"$key\"}',"
		  . " lease => '1 hour', claim => '$claim')");
}

sub finish
{
	my ($server, $key, $claim) = @_;

	return on($server, qq{
		BEGIN;
		INSERT INTO payment VALUES ('$key');
		SELECT idempotency_finish('shop', 'pay', '$key', 201, '{"paid" :  "$key"}', claim => '$claim');
		COMMIT});
}

sub checkpoint
{
	my ($server, $key, $claim, $lease) = @_;

	return on($server,
		"SELECT idempotency_checkpoint('shop', 'pay', '$key', '$claim', 'charged',"
		  . " '{\"n\": 1}', '$lease') IS NOT NULL");
}

# Both standbys tell the same of each request
sub is_replayed
{
	my ($servers, $test, %expected) = @_;

	foreach my $server (@$servers)
	{
		is(replay($server, $_), $expected{$_}, "$test: " . $server->name . ": replay: $_")
		  foreach sort keys %expected;
		like(
			error_of($server, 'postgres',
				q{SELECT idempotency_replay('shop', 'pay', 'done', '{"key": "other"}')}),
			qr/ERROR:  ID004: /,
			"$test: " . $server->name . ': a different request is told from a repeat');
	}
	return;
}

# What is answered, at work, left and prepared on the first server
on($first, "SELECT pay('done')");
on($first, "BEGIN; SELECT pay('$_'); PREPARE TRANSACTION '$_'")
  foreach 'prepared', 'prepared-long';
try_begin($first, 'running', $running);
checkpoint($first, 'running', $running, '1 hour');
try_begin($first, 'stalled', $stalled);
checkpoint($first, 'stalled', $stalled, '1 ms');
my $open = session($first);
$open->query_safe("BEGIN");
$open->query_safe("SELECT pay('open')");
catch_up($first, $middle, $last);
is_replayed(
	[ $middle, $last ],
	'two standbys',
	'done' => 'replayed|201|{"paid" :  "done"}|1|',
	'never' => '||||',
	'open' => '||||',
	'prepared' => '||||',
	'running' => 'in_flight|||1|charged',
	'stalled' => 'stalled|||1|charged');
$open->query_safe('COMMIT');
catch_up($first, $middle, $last);
is(replay($last, 'open'), 'replayed|201|{"paid" :  "open"}|1|',
	'two standbys: last: an answer comes with its commit');
like(error_of($last, 'postgres', "SELECT pay('new')"),
	qr/ERROR:  25006: cannot execute idempotency_begin\(\) in a read-only transaction\n/,
	'two standbys: last: begin is refused');
$open->quit;

# The one in the middle takes over, and the last one follows it
my $timeline = 'received_tli FROM pg_stat_wal_receiver';
is(on($last, "SELECT $timeline"), '1', 'the last one receives the first timeline');
$first->stop('immediate');
$middle->promote;
eventually($last, "(SELECT $timeline) = 2", 'the last one follows to the second');

is(on($middle, "SELECT pay('new')"), 'started {"paid" :  "new"}', 'middle: a request');
is(on($middle, "SELECT pay('done')"), 'replayed {"paid" :  "done"}', 'middle: a repeat');
on($middle, "COMMIT PREPARED 'prepared'");
is(finish($middle, 'running', $running), 'completed',
	'middle: a lease of the first server is finished by its holder');
catch_up($middle, $last);
is_replayed(
	[$last],
	'one standby',
	'done' => 'replayed|201|{"paid" :  "done"}|1|',
	'never' => '||||',
	'new' => 'replayed|201|{"paid" :  "new"}|1|',
	'prepared' => 'replayed|201|{"paid" :  "prepared"}|1|',
	'prepared-long' => '||||',
	'running' => 'replayed|201|{"paid" :  "running"}|1|',
	'stalled' => 'stalled|||1|charged');

# Then the last one takes over
$middle->stop('immediate');
$last->promote;
foreach my $key ('done', 'new', 'open', 'prepared', 'running')
{
	is(on($last, "SELECT pay('$key')"),
		qq(replayed {"paid" :  "$key"}), "last: $key is replayed");
}
like(error_of($last, 'postgres', "SELECT pay('prepared-long')"),
	qr/ERROR:  ID003: /, 'last: what was prepared on the first server is in flight');
on($last, "ROLLBACK PREPARED 'prepared-long'");
is(on($last, "SELECT pay('prepared-long')"),
	'started {"paid" :  "prepared-long"}',
	'last: and runs when it is rolled back');
is(try_begin($last, 'stalled', claim_of(3)),
	'started|2|charged|{"n": 1}',
	'last: a lease that stalled on the first server is taken over');
like(
	error_of($last, 'postgres',
		"SELECT idempotency_finish('shop', 'pay', 'stalled', claim => '$stalled')"),
	qr/ERROR:  ID005: /,
	'last: which fences off its first claim');
is(finish($last, 'stalled', claim_of(3)), 'completed', 'last: and is finished');
is(on($last, "SELECT pay('never')"),
	'started {"paid" :  "never"}', 'last: a request that nobody has made runs');

is( on($last, 'SELECT key, count(*) FROM payment GROUP BY key ORDER BY key COLLATE "C"'),
	on($last, q{SELECT key, 1 FROM idempotency_key WHERE state = 'completed' ORDER BY key}),
	'one payment was made for each record');
is(on($last, 'SELECT count(*) FROM payment'), '8', 'of each key');
is(on($last, 'SELECT count(*) FROM idempotency_in_flight'),
	'0', 'nothing is in flight');
is(on($last, $count_userlocks), '0', 'no lock is left');
is(on($last, $tracked), '0', 'no entry in shared memory is left');
is(complaints_of($_, deadlocks => 1), '', 'no complaints: ' . $_->name)
  foreach $first, $middle, $last;

done_testing();
