# Servers, sessions and questions that the TAP tests of idempotency share.
package IdempotencyTest;

use strict;
use warnings;

use Exporter 'import';
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More ();

our @EXPORT = qw(
  new_server
  new_standby
  cut_off
  set_conf
  restart_with
  create_shop
  error_of
  session
  end_session
  accidents
  start_after_kill
  wait_for_restart
  wait_for_end_of
  eventually
  run_out
  claim_of
  count_swept
  complaints_of
  $count_userlocks
  $tracked
);

# What the tests send and compare is UTF-8, in any locale.
$ENV{PGCLIENTENCODING} = 'UTF8';

# How many claims hold their lock, whoever holds it.
our $count_userlocks =
  "SELECT count(*) FROM pg_locks WHERE locktype = 'userlock'";

# How many claims shared memory knows of
our $tracked = 'SELECT used FROM idempotency_tracking()';

# A server that is set up but not started.
#
# preload => 0 leaves the library out of shared_preload_libraries; worker => 1
# has databases swept in the background, which most tests do not expect; conf
# is added to the configuration, and init goes to the init of the node.
sub new_server
{
	my ($name, %options) = @_;
	my $node = PostgreSQL::Test::Cluster->new($name);

	$node->init(
		extra => [ '--no-locale', '--encoding=UTF8' ],
		@{ $options{init} // [] });
	$node->append_conf('postgresql.conf',
		"shared_preload_libraries = 'idempotency'")
	  if $options{preload} // 1;
	$node->append_conf('postgresql.conf', 'idempotency.worker = off')
	  unless $options{worker};
	$node->append_conf('postgresql.conf', 'max_prepared_transactions = 10');
	$node->append_conf('postgresql.conf', $options{conf})
	  if defined $options{conf};
	return $node;
}

# A standby of a running server, which may be a standby itself, with the same
# configuration; set up but not started.
sub new_standby
{
	my ($name, $upstream) = @_;
	my $standby = PostgreSQL::Test::Cluster->new($name);

	$upstream->backup($name);
	$standby->init_from_backup($upstream, $name, has_streaming => 1);
	return $standby;
}

# Have a running standby receive nothing any more.  What it has received stays.
sub cut_off
{
	my ($standby) = @_;

	set_conf($standby, 'primary_conninfo', "''");
	$standby->poll_query_until('postgres',
		'SELECT count(*) = 0 FROM pg_stat_wal_receiver')
	  or die 'standby goes on receiving';
	return;
}

# Give a running server another setting, which a reload is enough for.
sub set_conf
{
	my ($node, $name, $value) = @_;

	$node->append_conf('postgresql.conf', "$name = $value");
	$node->reload;
	return;
}

# Add to the configuration of a running server what takes a restart.
sub restart_with
{
	my ($node, $conf) = @_;

	$node->append_conf('postgresql.conf', $conf);
	$node->restart;
	return;
}

# The extension, and an application on top of it: pay(key) makes a payment
# once, and tells what begin said and what the answer is.  Nothing but the
# extension keeps the table of payments from having a key twice.
sub create_shop
{
	my ($node, $dbname) = @_;

	$node->safe_psql(
		$dbname // 'postgres', q{
		CREATE EXTENSION idempotency;
		CREATE TABLE payment (key text NOT NULL);
		CREATE FUNCTION pay(key text) RETURNS text LANGUAGE plpgsql AS $$
		DECLARE
			request jsonb := jsonb_build_object('key', key);
			answer json := format('{"paid" :  "%s"}', key);
			result idempotency_result;
		BEGIN
			result := idempotency_begin('shop', 'pay', key, request);
			IF result.outcome = 'started' THEN
				INSERT INTO payment VALUES (key);
				PERFORM idempotency_finish('shop', 'pay', key, 201, answer);
				RETURN 'started ' || answer;
			END IF;
			RETURN result.outcome || ' ' || result.response;
		END $$;});
	return;
}

# The error that a statement gets, with its SQLSTATE, detail and hint.
sub error_of
{
	my ($node, $dbname, $sql) = @_;
	my ($rc, $stdout, $stderr) = $node->psql($dbname, $sql,
		extra_params => [ '-v', 'VERBOSITY=verbose' ]);

	return "no error, but: $stdout" if $rc == 0;
	$stderr =~ s/^LOCATION:.*\n?//mg;
	return $stderr;
}

# A session that stays open, and goes on after an error.
sub session
{
	my ($node, $dbname) = @_;

	return $node->background_psql($dbname // 'postgres', on_error_stop => 0);
}

# End a session whose server process may be gone already.
sub end_session
{
	my ($session) = @_;

	eval { $session->quit; 1 } or $session->{run}->kill_kill;
	return;
}

# What may happen to server processes, or to all of them, by name.  Each gets the
# pids of those whose end is awaited, and comes back when a client can connect.
# The server must have restart_after_crash on.
sub accidents
{
	my ($node) = @_;

	return (
		'backend killed' => sub {
			my (@pids) = @_;
			my $log = -s $node->logfile;

			kill 'KILL', $pids[0];
			wait_for_restart($node, $log);
		},
		'backend terminated' => sub {
			foreach my $pid (@_)
			{
				$node->safe_psql('postgres',
					"SELECT pg_terminate_backend($pid)");
				wait_for_end_of($node, $pid);
			}
		},
		'server stopped at once' => sub {
			$node->stop('immediate');
			$node->start;
		},
		'postmaster killed' => sub {
			$node->kill9;
			start_after_kill($node);
		});
}

# Start a server whose postmaster was killed.  Its children end by themselves,
# and until the last of them has, the data directory is still in use.
sub start_after_kill
{
	my ($node) = @_;

	for (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
	{
		return if $node->start(fail_ok => 1);
		$node->stop('fast', fail_ok => 1);
		select(undef, undef, undef, 0.1);
	}
	die 'server does not start after its postmaster was killed';
}

# Wait until a server has begun anew, after one of its processes was killed, and
# lets clients in; its log is looked at from an offset on.
#
# Meanwhile it turns clients away, and a psql that is turned away may be gone
# before its first statement has been written to it, which would be an error in
# IPC::Run.  pg_isready reads nothing.
sub wait_for_restart
{
	my ($node, $offset) = @_;

	$node->wait_for_log(qr/all server processes terminated/, $offset);
	for (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
	{
		return
		  if run_log(
			[ 'pg_isready', '-q', '-h', $node->host, '-p', $node->port ]);
		select(undef, undef, undef, 0.1);
	}
	die 'server does not come back after a process was killed';
}

# Wait until a server process is gone.
sub wait_for_end_of
{
	my ($node, $pid) = @_;

	$node->poll_query_until('postgres',
		"SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = $pid")
	  or die "process $pid does not end";
	return;
}

# What is in the log of a server and should not be.  Who terminates a process may
# find that it has just ended by itself, and where autovacuum_naptime is short, a
# busy machine may take longer than that to start a worker of autovacuum.  Tests
# of what waits in one order only want no deadlock either.
sub complaints_of
{
	my ($node, %options) = @_;
	my $complaint = qr/PANIC|TRAP|terminated by signal|WARNING/;

	$complaint = qr/$complaint|deadlock detected/ if $options{deadlocks};
	return join("\n",
		grep { /$complaint/ }
		grep { !/WARNING:  PID \d+ is not a PostgreSQL (backend|server) process/ }
		grep { !/WARNING:  autovacuum worker took too long to start; canceled/ }
		  split(/\n/, slurp_file($node->logfile)));
}

# Test that a condition, which is what may follow SELECT, comes true on a server.
sub eventually
{
	my ($node, $condition, $test) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return Test::More::ok(
		$node->poll_query_until('postgres', "SELECT $condition"), $test);
}

# Make the lease of a key run out now, as only an administrator can.
sub run_out
{
	my ($node, $key) = @_;

	$node->safe_psql('postgres',
		'UPDATE idempotency_key SET lease_expires_at = clock_timestamp()'
		  . " WHERE key = '$key' AND state = 'pending'");
	return;
}

# The claim id that a test brings for an attempt, so that it knows it.
sub claim_of
{
	my ($attempt) = @_;

	return sprintf('00000000-0000-0000-0000-%012d', $attempt);
}

# Sweep a database, and count the records that went.
sub count_swept
{
	my ($node, $dbname) = @_;

	my ($before, $after) = split /\n/, $node->safe_psql(
		$dbname // 'postgres', q{
		SELECT count(*) FROM idempotency_key;
		CALL idempotency_sweep();
		SELECT count(*) FROM idempotency_key});
	return $before - $after;
}

1;
