# An asynchronous standby that is promoted has less than clients were told.  What it
# lacks is lost as a whole: a record with its business rows, never one without the
# other, so that a repeat runs again and its effect is in the database once.  Leases
# are as they were before, and their claim ids fence as ever.
#
# Who does something outside the database that must not be lost waits for the standby,
# in the transactions that need it.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IPC::Run;
use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $primary = new_server('primary', init => [ allows_streaming => 1 ]);
$primary->start;
create_shop($primary);
my $standby = new_standby('standby', $primary);
$standby->start;

sub on
{
	my ($server, $sql) = @_;

	return $server->safe_psql('postgres', $sql);
}

# Calls on a key, with the claim id of an attempt

sub try_begin
{
	my ($server, $key, $attempt) = @_;

	return on($server,
		'SELECT outcome, attempt, recovery_point'
		  . " FROM idempotency_try_begin('shop', 'pay', '$key', '{\"key\": \"$key\"}',"
		  . " lease => '1 hour', claim => '@{[ claim_of($attempt) ]}')");
}

sub checkpoint_sql
{
	my ($key, $attempt) = @_;

	return "SELECT idempotency_checkpoint('shop', 'pay', '$key',"
	  . " '@{[ claim_of($attempt) ]}', 'charged', lease => '1 hour') > now()";
}

sub finish_sql
{
	my ($key, $attempt) = @_;

	return "BEGIN; INSERT INTO payment VALUES ('$key');"
	  . " SELECT idempotency_finish('shop', 'pay', '$key', 201,"
	  . " '{\"paid\" :  \"$key\"}', claim => '@{[ claim_of($attempt) ]}'); COMMIT";
}

sub release_sql
{
	my ($key, $attempt) = @_;

	return "SELECT idempotency_release('shop', 'pay', '$key',"
	  . " claim => '@{[ claim_of($attempt) ]}')";
}

# What there is of a key: the outcome of a replay, and the number of payments
sub known
{
	my ($server, $key) = @_;

	return on($server,
		"SELECT outcome, (SELECT count(*) FROM payment WHERE payment.key = '$key')"
		  . " FROM idempotency_replay('shop', 'pay', '$key')");
}

sub prepare
{
	my ($key) = @_;

	on($primary, "BEGIN; SELECT pay('$key'); PREPARE TRANSACTION '$key'");
	return;
}

# What the standby gets to know
ok(try_begin($primary, $_, 1), "$_: begun") foreach 'checkpoint', 'finish', 'release', 'takeover';
run_out($primary, 'takeover');
prepare('commit');
$primary->wait_for_catchup($standby);

# A session that commits the payment of a key and waits for the standby
sub commit_and_wait
{
	my ($key) = @_;
	my $session = session($primary);
	my $pid = $session->query_safe('SELECT pg_backend_pid()');

	$session->query_until(qr/about to commit/, <<"SQL");
BEGIN;
SET LOCAL synchronous_commit = on;
SELECT pay('$key');
\\echo about to commit
COMMIT;
\\echo failed: :ERROR
SQL
	eventually($primary,
		"wait_event = 'SyncRep' FROM pg_stat_activity WHERE pid = $pid",
		"$key: who wants to waits for the standby");
	return { session => $session, pid => $pid };
}

# Payments without a record, or with more than one, and the other way round
my $unmatched = q{
	SELECT key
	FROM payment FULL JOIN
		 (SELECT key FROM idempotency_key
		  WHERE action = 'pay' AND state = 'completed') AS record USING (key)
	GROUP BY key HAVING count(payment) <> 1 OR count(record) <> 1};

# Under load, whatever it has received so far is what it might be promoted with
my $script = $primary->basedir . '/load.sql';
append_to_file($script, <<'SQL');
\set n random(1, 1000000)
BEGIN;
SELECT pay('load-' || :client_id || '-' || :n);
COMMIT;
SQL
my ($out, $err) = ('', '');
my $load = IPC::Run::start(
	[
		'pgbench', '-n', '-c', '4', '-T', '600', '-R', '500', '-f', $script,
		$primary->connstr('postgres')
	],
	'>', \$out, '2>', \$err);
my $payments = 'SELECT count(*) FROM payment';
my @snapshots;
while (@snapshots < 20 || on($standby, $payments) < 200)
{
	push @snapshots, on($standby, $unmatched);
}
is(join('', @snapshots), '', 'under load the standby has records and payments together');

# From here on nothing gets there, and clients are told all the same
cut_off($standby);
eventually($primary, "($payments) > " . (100 + on($standby, $payments)),
	'the primary goes on answering');
is(on($primary, "SELECT pay('done')"), 'started {"paid" :  "done"}', 'primary: done');
is(try_begin($primary, $_, 1), 'started|1|', "primary: $_")
  foreach 'begin', 'begin-again';
is(on($primary, checkpoint_sql('checkpoint', 1)), 't', 'primary: checkpoint');
is(try_begin($primary, 'takeover', 2), 'started|2|', 'primary: takeover');
is(on($primary, finish_sql('finish', 1)), 'completed', 'primary: finish');
is(on($primary, release_sql('release', 1)), 't', 'primary: release');
on($primary, "COMMIT PREPARED 'commit'");
prepare('prepare');
my $first_seen = q{SELECT idempotency_first_seen('shop', 'mailer', '{message}')};
is(on($primary, $first_seen), 'message', 'primary: a message is seen first');

# Where transactions do not wait for the standby by default, one can say that it does.
# Then nobody is told, nor can be in its place, as long as the standby has not got it.
set_conf($primary, 'synchronous_commit', 'local');
set_conf($primary, 'synchronous_standby_names', "'*'");
my ($waiting, $cancelled) = map { commit_and_wait($_) } 'waiting', 'cancelled';
is(on($primary, "SELECT pay('local')"), 'started {"paid" :  "local"}',
	'while others do not');
like(error_of($primary, 'postgres', "SELECT pay('waiting')"),
	qr/ERROR:  ID003: /, 'a repeat is told that the request is in flight');

# To cancel such a commit does not undo it, but ends the wait, with a warning only
$primary->safe_psql('postgres', "SELECT pg_cancel_backend($cancelled->{pid})");
$cancelled->{session}->query_until(qr/failed: false/, "\n");
$primary->wait_for_log(qr/WARNING:  canceling wait for synchronous replication/);
is(known($primary, 'cancelled'), 'replayed|1', 'and repeats get its answer');
$cancelled->{session}->quit;

# What waited is there after a restart of the primary, whether the standby has it or not
my @keys = split(/\n/,
	on($primary, "SELECT key FROM payment WHERE key LIKE 'load-%' ORDER BY key"));
$primary->stop('immediate');
$load->finish;
end_session($waiting->{session});
$primary->start;
is(known($primary, 'waiting'), 'replayed|1',
	'when the primary has restarted, repeats get what was waiting');

# The standby is promoted with what it has
$primary->stop('immediate');
$standby->promote;
my %known = (
	'begin' => '|0',
	'begin-again' => '|0',
	'cancelled' => '|0',
	'checkpoint' => 'in_flight|0',
	'commit' => '|0',
	'done' => '|0',
	'finish' => 'in_flight|0',
	'local' => '|0',
	'prepare' => '|0',
	'release' => 'in_flight|0',
	'takeover' => 'stalled|0',
	'waiting' => '|0');
is(known($standby, $_), $known{$_}, "promoted: $_") foreach sort keys %known;
is(on($standby, $unmatched), '', 'promoted: no payment or record was lost alone');

# Repeats run again
foreach my $key ('cancelled', 'done', 'local', 'prepare', 'waiting')
{
	is(on($standby, "SELECT pay('$key')"),
		qq(started {"paid" :  "$key"}), "promoted: $key runs again");
	is(on($standby, "SELECT pay('$key')"),
		qq(replayed {"paid" :  "$key"}), "promoted: $key, and once");
}
my %outcomes = split(/[|\n]/,
	on($standby,
		'SELECT split_part(pay(key), chr(32), 1) AS outcome, count(*)'
		  . " FROM unnest('{" . join(',', @keys) . "}'::text[]) AS key GROUP BY outcome"));
cmp_ok($outcomes{started}, '>=', 100, 'promoted: what was lost of the load runs again');
is($outcomes{started} + $outcomes{replayed}, @keys, 'promoted: and the rest is replayed');
is(on($standby, $first_seen), 'message', 'promoted: a message is seen first again');
like(error_of($standby, 'postgres', "COMMIT PREPARED 'prepare'"),
	qr/ERROR:  42704: /, 'promoted: a prepared transaction is lost');
like(error_of($standby, 'postgres', "SELECT pay('commit')"),
	qr/ERROR:  ID003: /, 'promoted: one that was committed is in flight');
on($standby, "COMMIT PREPARED 'commit'");
is(on($standby, "SELECT pay('commit')"),
	'replayed {"paid" :  "commit"}', 'promoted: and can be committed again');

# A claim that was lost fences nobody off, and its holder does not get through
sub is_fenced
{
	my ($key, $attempt) = @_;

	foreach my $sql (
		checkpoint_sql($key, $attempt),
		release_sql($key, $attempt),
		finish_sql($key, $attempt))
	{
		like(error_of($standby, 'postgres', $sql),
			qr/ERROR:  ID005: claim was lost\n/, "promoted: $key: fenced off: $sql");
	}
	return;
}

is_fenced('begin', 1);
is(try_begin($standby, 'begin', 2), 'started|1|', 'promoted: begin: begun by another');
is_fenced('begin', 1);
is(on($standby, finish_sql('begin', 2)), 'completed', 'promoted: begin: who finishes');
is(try_begin($standby, 'begin-again', 1),
	'started|1|', 'promoted: begin-again: its holder begins again');
is(on($standby, finish_sql('begin-again', 1)),
	'completed', 'promoted: begin-again: and finishes');

# A takeover that was lost did not happen
is_fenced('takeover', 2);
is(on($standby, finish_sql('takeover', 1)),
	'completed', 'promoted: takeover: the first claim was not taken over');

# Nor did what ended a claim or went on with it, which its holder can do again
is(try_begin($standby, 'checkpoint', 1),
	'started|1|', 'promoted: checkpoint: the recovery point is lost');
is(on($standby, checkpoint_sql('checkpoint', 1)),
	't', 'promoted: checkpoint: its holder saves it again');
foreach my $key ('checkpoint', 'finish')
{
	is(try_begin($standby, $key, 2), 'in_flight|1|', "promoted: $key: in flight for others");
	is(on($standby, finish_sql($key, 1)), 'completed', "promoted: $key: its holder finishes");
}
is(try_begin($standby, 'release', 2), 'in_flight|1|',
	'promoted: release: in flight for others');
run_out($standby, 'release');
is(try_begin($standby, 'release', 2), 'started|2|',
	'promoted: release: taken over when it runs out');
is_fenced('release', 1);
is(on($standby, finish_sql('release', 2)), 'completed', 'promoted: release: and finished');

is(on($standby, $unmatched), '', 'in the end there is one payment for each record');
is(on($standby, 'SELECT count(*) FROM idempotency_in_flight'),
	'0', 'nothing is in flight');
is(on($standby, $count_userlocks), '0', 'no lock is left');
is(on($standby, $tracked), '0', 'no entry in shared memory is left');
is(complaints_of($standby, deadlocks => 1), '', 'the server has nothing to complain of');

done_testing();
