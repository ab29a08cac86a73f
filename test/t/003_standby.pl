# A hot standby replays what is committed, and nothing else; once promoted, it
# also begins.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $primary = new_server('primary', init => [ allows_streaming => 1 ]);
$primary->start;
create_shop($primary);
$primary->backup('base');

my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($primary, 'base', has_streaming => 1);
$standby->start;

sub replay_on_standby
{
	my ($key) = @_;

	return $standby->safe_psql('postgres',
		"SELECT outcome, status_code, response"
		  . " FROM idempotency_replay('shop', 'pay', '$key', '{\"key\": \"$key\"}')"
	);
}

# A committed answer, one that is not committed, and one that is prepared
$primary->safe_psql('postgres', "SELECT pay('done')");
my $session = session($primary);
$session->query_safe("BEGIN");
$session->query_safe("SELECT pay('open')");
$primary->safe_psql('postgres',
	"BEGIN; SELECT pay('prepared'); PREPARE TRANSACTION 'prepared'");
$primary->safe_psql('postgres', 'SELECT pg_switch_wal()');
$primary->wait_for_catchup($standby);

is(replay_on_standby('done'), 'replayed|201|{"paid" :  "done"}',
	'a committed answer is replayed');
is(replay_on_standby('open'),
	'||', 'an answer that is not committed is not there');
is(replay_on_standby('prepared'),
	'||', 'an answer that is only prepared is not there');
is(replay_on_standby('never'), '||', 'nor is one that was never given');
like(
	error_of(
		$standby, 'postgres',
		q{SELECT idempotency_replay('shop', 'pay', 'done', '{"key": "other"}')}
	),
	qr/ERROR:  ID004: idempotency key was used with a different request\n/,
	'a different request is told from a repeat');

foreach my $isolation ('READ COMMITTED', 'REPEATABLE READ')
{
	my $key = lc($isolation =~ s/ /-/r);
	my $reader = session($standby);

	$reader->query_safe("BEGIN ISOLATION LEVEL $isolation");
	is($reader->query_safe('SELECT count(*) FROM payment'),
		$standby->safe_psql('postgres', 'SELECT count(*) FROM payment'),
		"$isolation: snapshot is taken");
	$primary->safe_psql('postgres', "SELECT pay('$key')");
	$primary->wait_for_catchup($standby);
	is( $reader->query_safe(
			"SELECT response FROM idempotency_replay('shop', 'pay', '$key')"),
		qq({"paid" :  "$key"}),
		"$isolation: an answer newer than the snapshot is replayed");
	$reader->query_safe('COMMIT');
	$reader->quit;
}

# What would write is refused
my %refused = (
	'idempotency_begin()' => q{SELECT idempotency_begin('shop', 'pay', 'done')},
	'idempotency_try_begin()' =>
	  q{SELECT idempotency_try_begin('shop', 'pay', 'done')},
	'idempotency_finish()' => q{SELECT idempotency_finish('shop', 'pay', 'done')},
	'idempotency_release()' =>
	  q{SELECT idempotency_release('shop', 'pay', 'done')},
	'idempotency_store()' =>
	  q{SELECT idempotency_store('shop', 'pay', 'done', NULL, 402)},
	'idempotency_try_run()' =>
	  q{SELECT idempotency_try_run('shop', 'pay', 'done', NULL, 'idempotency_request_hash(jsonb)')});
foreach my $call (sort keys %refused)
{
	like(
		error_of($standby, 'postgres', $refused{$call}),
		qr/ERROR:  25006: cannot execute \Q$call\E in a read-only transaction\nHINT:  Use idempotency_replay to get an answer that is stored already\.\n/,
		"$call is refused");
}
like(
	error_of($standby, 'postgres', 'CALL idempotency_sweep()'),
	qr/ERROR:  25006: cannot execute idempotency_sweep\(\) in a read-only transaction\n/,
	'idempotency_sweep() is refused');
like(
	error_of(
		$standby, 'postgres', q{SELECT idempotency_forget('shop', 'pay', 'done')}
	),
	qr/ERROR:  25006: cannot execute idempotency_forget\(\) in a read-only transaction\n/,
	'idempotency_forget() is refused');
is($standby->safe_psql('postgres', 'SELECT count(*) FROM idempotency_in_flight'),
	'0', 'no claim is in flight on the standby');
is($standby->safe_psql('postgres', 'SELECT used FROM idempotency_tracking()'),
	'0', 'and none takes room');
is($standby->safe_psql('postgres', "SELECT octet_length(idempotency_request_hash('1'))"),
	'32', 'a fingerprint can be made');

# The standby takes over, while a request is open and another one is prepared
$session->query_safe("COMMIT");
$session->query_safe("BEGIN");
$session->query_safe("SELECT pay('lost')");
$primary->safe_psql('postgres', 'SELECT pg_switch_wal()');
$primary->wait_for_catchup($standby);
is(replay_on_standby('open'), 'replayed|201|{"paid" :  "open"}',
	'an answer is there once it is committed');
$primary->stop('immediate');
end_session($session);
$standby->promote;

my %expected = (
	'done' => 'replayed {"paid" :  "done"}',
	'open' => 'replayed {"paid" :  "open"}',
	'lost' => 'started {"paid" :  "lost"}',
	'new' => 'started {"paid" :  "new"}');
foreach my $key (sort keys %expected)
{
	is($standby->safe_psql('postgres', "SELECT pay('$key')"),
		$expected{$key}, "promoted: $key");
	is($standby->safe_psql('postgres', "SELECT pay('$key')"),
		qq(replayed {"paid" :  "$key"}), "promoted: $key, repeated");
}
like(
	error_of($standby, 'postgres', "SELECT pay('prepared')"),
	qr/ERROR:  ID003: /,
	'promoted: a prepared request is in flight');
$standby->safe_psql('postgres', "COMMIT PREPARED 'prepared'");
is($standby->safe_psql('postgres', "SELECT pay('prepared')"),
	'replayed {"paid" :  "prepared"}',
	'promoted: and replayed when it is committed');
is( $standby->safe_psql(
		'postgres',
		'SELECT key, count(*) FROM payment GROUP BY key ORDER BY key COLLATE "C"'),
	join("\n",
		map { "$_|1" }
		  sort(keys %expected, 'prepared', 'read-committed', 'repeatable-read')
	),
	'promoted: one payment of each key was made');
is($standby->safe_psql('postgres', $count_userlocks),
	'0', 'promoted: no lock is left');

done_testing();
