# How long a repeat waits for a lease does not depend on the time of day: when that
# is set back while it waits, it is not told any later.  The server has its time
# from libfaketime, which has another one as soon as a file says so.

use strict;
use warnings;

use File::Spec;
use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use POSIX ':sys_wait_h';
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my ($library) =
  grep { -e }
  map { glob("$_/faketime/libfaketime.so.1") } '/usr/lib/*', '/usr/lib',
  '/usr/lib64', '/usr/local/lib';
plan skip_all => 'libfaketime is not installed' unless defined $library;

# If the time of day did matter, the waiter would be told after STEP seconds and
# those that it waits, when the process has ended that sleeps for less.
my $step = 100;
my $asleep = 60;

my $node;
my $clock;

# Set the clock of the server, by so many seconds from the real one
sub set_clock
{
	my ($offset) = @_;

	append_to_file("$clock.new", "$offset\n");
	rename("$clock.new", $clock) or die "could not rename $clock.new: $!";
	return;
}

sub ask
{
	my ($sql) = @_;

	return $node->safe_psql('postgres', $sql);
}

# A process that sleeps by the real clock
sub sleeping_process
{
	my $pid = fork();

	die "could not fork: $!" unless defined $pid;
	return $pid if $pid != 0;
	exec('sleep', $asleep) or POSIX::_exit(1);
}

# A waiter whose clock is set back meanwhile: whether that was in time, what it is
# told, and whether the process still sleeps then
sub wait_for_lease
{
	my $session = session($node);
	my $pid = $session->query_safe('SELECT pg_backend_pid()');
	my $waits = "wait_event_type = 'Extension' AND state = 'active'";
	my $activity = "FROM pg_stat_activity WHERE pid = $pid";
	my $before = ask('SELECT clock_timestamp()');
	my $sleeper = sleeping_process();

	$session->query_until(
		qr/^asked$/m,
		"\\echo asked\nSELECT outcome, attempt FROM idempotency_try_begin('shop', 'charge', 'k', wait => '3 s');\n"
	);
	$node->poll_query_until('postgres', "SELECT $waits $activity");
	set_clock("-$step");
	my $in_time = ask(
		"SELECT clock_timestamp() < '$before' AND $waits $activity");
	my $answer = $session->query_safe('');
	my $sleeps = waitpid($sleeper, WNOHANG) == 0;

	kill 'TERM', $sleeper if $sleeps;
	waitpid($sleeper, 0) if $sleeps;
	set_clock('+0');
	$session->quit;
	return ($in_time eq 't', $answer, $sleeps);
}

foreach my $preload (0, 1)
{
	my $how = $preload ? 'preloaded' : 'not preloaded';

	$node = new_server("preload_$preload", preload => $preload);
	$clock = File::Spec->rel2abs($node->basedir . '/clock');
	set_clock('+0');
	{
		local $ENV{LD_PRELOAD} = $library;
		local $ENV{FAKETIME_TIMESTAMP_FILE} = $clock;
		local $ENV{FAKETIME_NO_CACHE} = 1;
		local $ENV{DONT_FAKE_MONOTONIC} = 1;
		$node->start;
	}
	ask( q{
		CREATE EXTENSION idempotency;
		SELECT idempotency_begin('shop', 'charge', 'k', lease => '1 day')});

	# a machine that is too slow has another try
	my ($in_time, $answer, $sleeps);
	for (1 .. 10)
	{
		($in_time, $answer, $sleeps) = wait_for_lease();
		last if $in_time;
	}
	ok($in_time, "$how: the clock is set back while a repeat waits");
	is($answer, 'in_flight|1', "$how: it is told when its time is up");
	ok($sleeps, "$how: which is not when the clock says so");

	is(complaints_of($node), '', "$how: the server has nothing to complain of");
	$node->stop;
}

done_testing();
