# A transaction over several nodes in which processes are killed leaves all of its
# effects and its record, or none of them: wherever it began, and whether the nodes
# were just preparing, or had all prepared and the commit was decided, or the node
# where it began refuses its own commit at last.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use CitusCluster;
use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

skip_without_citus();

# Nobody but a session that asks for it waits for a standby, of which there is none.
my $cluster = CitusCluster->new(conf => 'synchronous_commit = local');
my @nodes = $cluster->nodes;
my @tenants = map { ($cluster->tenants_of($_, 1))[0] } @nodes;

# A request is of a tenant on another node.  Its work may be a payment there, another
# one for a tenant of the third node, and a note in a local table where it begins.
$cluster->everywhere(
	q{
	CREATE TABLE note (key text, receipt uuid);
	CREATE TABLE duty (name text);
	GRANT ALL ON note, duty TO app});

my $begin = q{SELECT outcome FROM idempotency_try_begin('TENANT', 'pay', 'KEY')};
my $pay = q{INSERT INTO payment VALUES ('TENANT', 'KEY', 'RECEIPT')};
my $pay_elsewhere =
  q{INSERT INTO payment VALUES ('ELSEWHERE', 'KEY', 'RECEIPT')};
my $note = q{INSERT INTO note VALUES ('KEY', 'RECEIPT')};
my $finish =
  q{SELECT idempotency_finish('TENANT', 'pay', 'KEY', 201, '{"receipt": "RECEIPT"}')};

my %work = (
	'on two nodes' => [ $pay, $pay_elsewhere ],
	'on two nodes and here' => [ $pay, $pay_elsewhere, $note ],
	'elsewhere' => [$pay_elsewhere],
	'for its tenant and here' => [ $pay, $note ],
	'here' => [$note]);

sub write_out
{
	my ($sql, $request) = @_;

	return $sql =~ s/(TENANT|ELSEWHERE|KEY|RECEIPT)/$request->{lc $1}/gr;
}

# A request that begins on a node, with its session, which is about to commit
my $number = 0;

sub open_request
{
	my ($i, $work, @before) = @_;
	my $request = {
		node => $nodes[$i],
		owner => $nodes[ ($i + 1) % 3 ],
		other => $nodes[ ($i + 2) % 3 ],
		tenant => $tenants[ ($i + 1) % 3 ],
		elsewhere => $tenants[ ($i + 2) % 3 ],
		key => 'key-' . ++$number,
		receipt => claim_of($number),
		work => $work{$work}
	};
	my $session = $request->{session} = $cluster->app_session($nodes[$i]);

	$session->query_safe($_) foreach @before;
	$session->query_safe('BEGIN') unless @before;
	$session->query_safe(write_out($_, $request))
	  foreach $begin, @{ $work{$work} }, $finish;
	$request->{pid} = $session->query_safe('SELECT pg_backend_pid()');
	$request->{global_pid} = $session->query_safe('SELECT citus_backend_gpid()');
	return $request;
}

# Have a request commit, without waiting for it.
sub send_commit
{
	my ($request) = @_;

	$request->{session}->query_until(qr/sent/, "\\echo sent\nCOMMIT;\n\\echo ended\n");
	return;
}

# The processes on another node that work for a request
sub workers_of
{
	my ($request, $node) = @_;

	return split /\n/, $node->safe_psql('postgres',
		"SELECT pid FROM pg_stat_activity WHERE application_name = 'citus_internal gpid=$request->{global_pid}'");
}

sub is_prepared_on
{
	my ($node) = @_;

	$node->poll_query_until('postgres', 'SELECT count(*) > 0 FROM pg_prepared_xacts')
	  or die 'nothing is prepared on ' . $node->name;
	return;
}

# Kill a process, and wait until its server has begun anew.
sub kill_process
{
	my ($node, $pid) = @_;
	my $log = -s $node->logfile;

	kill 'KILL', $pid;
	wait_for_restart($node, $log);
	return;
}

sub kill_node
{
	my ($node) = @_;

	$node->kill9;
	start_after_kill($node);
	return;
}

# What a request has left, from all nodes: payments, notes and records
sub left_by
{
	my ($request) = @_;
	my $key = $request->{key};
	my ($payments, $records) = split /\|/, $cluster->on_coordinator(
		"SELECT (SELECT count(*) FROM payment WHERE key = '$key'), (SELECT count(*) FROM idempotency_key WHERE key = '$key')");

	return { payments => $payments, records => $records,
		notes => $request->{node}->safe_psql('postgres', "SELECT count(*) FROM note WHERE key = '$key'") };
}

# Test what became of a request: "all", "nothing" or, if it could be both, "either".  A
# repeat on another node is told the same.
sub became
{
	my ($request, $what, $test) = @_;
	my $payments = grep { /payment/ } @{ $request->{work} };
	my $notes = grep { /note/ } @{ $request->{work} };

	end_session($request->{session});
	$cluster->wait_for_recovery;

	my $left = left_by($request);
	$what = $left->{records} ? 'all' : 'nothing' if $what eq 'either';
	is_deeply(
		$left,
		$what eq 'all'
		? { payments => $payments, notes => $notes, records => 1 }
		: { payments => 0, notes => 0, records => 0 },
		"$test: $what is left");
	is( $cluster->app(
			$request->{other},
			write_out(
				"SELECT outcome, response->>'receipt' FROM idempotency_try_run('TENANT', 'pay', 'KEY', NULL, 'repeat(jsonb)')",
				$request)),
		$what eq 'all' ? "replayed|$request->{receipt}" : 'completed|repeat',
		"$test: a repeat is told so");
	return;
}

$cluster->on_coordinator(
	q{CREATE FUNCTION repeat(request jsonb) RETURNS json LANGUAGE sql AS $$ SELECT '{"receipt": "repeat"}'::json $$});

# Before the commit, nothing is left whoever is killed.
foreach my $i (0 .. 2)
{
	my $where = 'begun on ' . $nodes[$i]->name;
	my $request = open_request($i, 'on two nodes');

	kill_process($request->{node}, $request->{pid});
	became($request, 'nothing', "$where, its process killed before commit");

	$request = open_request($i, 'on two nodes');
	kill_process($request->{owner}, (workers_of($request, $request->{owner}))[0]);
	$request->{session}->query('COMMIT');
	became($request, 'nothing', "$where, the process of its tenant killed before commit");
}

# While nodes prepare: the one of the tenant has, and the third one has not yet.
sub half_prepare
{
	my ($i) = @_;
	my $request = open_request($i, 'on two nodes');

	$request->{stopped} = [ workers_of($request, $request->{other}) ];
	kill 'STOP', @{ $request->{stopped} };
	send_commit($request);
	is_prepared_on($request->{owner});
	return $request;
}

sub resume
{
	my ($request) = @_;

	kill 'CONT', @{ $request->{stopped} };
	return;
}

sub wait_for_workers
{
	my ($request) = @_;

	wait_for_end_of($request->{other}, $_) foreach @{ $request->{stopped} };
	return;
}

foreach my $i (0 .. 2)
{
	my $where = 'begun on ' . $nodes[$i]->name;
	my $request = half_prepare($i);

	kill_process($request->{node}, $request->{pid});
	resume($request);
	wait_for_workers($request);
	became($request, 'nothing', "$where, its process killed while nodes prepare");

	$request = half_prepare($i);
	kill_process($request->{other}, $request->{stopped}[0]);
	$request->{session}->query_until(qr/ended/, '');
	became($request, 'nothing', "$where, the process of the third node killed while it prepares");

	$request = half_prepare($i);
	kill_node($request->{owner});
	resume($request);
	$request->{session}->query_until(qr/ended/, '');
	became($request, 'all', "$where, the node of its tenant killed when it had prepared");
}

# When all have prepared and the commit is decided, all of it is left.  To be there,
# the node where the request began waits for a standby.
sub decide
{
	my ($i, $work) = @_;
	my $request = open_request($i, $work);

	$request->{session}->query_safe('SET synchronous_commit = on');
	$request->{node}->safe_psql('postgres',
		"ALTER SYSTEM SET synchronous_standby_names = 'nobody'");
	$request->{node}->reload;
	$request->{node}->poll_query_until('postgres', 'SHOW synchronous_standby_names', 'nobody')
	  or die;
	send_commit($request);
	$request->{node}->poll_query_until('postgres',
		"SELECT wait_event = 'SyncRep' FROM pg_stat_activity WHERE pid = $request->{pid}")
	  or die 'the commit is not waiting';
	return $request;
}

sub go_on
{
	my ($request) = @_;

	$request->{node}->safe_psql('postgres',
		'ALTER SYSTEM RESET synchronous_standby_names');
	$request->{node}->reload;
	return;
}

foreach my $i (0 .. 2)
{
	foreach my $work (sort keys %work)
	{
		my $where = 'begun on ' . $nodes[$i]->name . ", work $work";
		my $request = decide($i, $work);

		is_prepared_on($request->{owner});
		kill_process($request->{node}, $request->{pid});
		go_on($request);
		became($request, 'all', "$where, its process killed when the commit was decided");
	}

	my $where = 'begun on ' . $nodes[$i]->name;
	my $request = decide($i, 'on two nodes');
	is_prepared_on($request->{owner});
	is_prepared_on($request->{other});
	kill_process($request->{owner}, (workers_of($request, $request->{owner}))[0]);
	go_on($request);
	$request->{session}->query_until(qr/ended/, '');
	became($request, 'all', "$where, the process of its tenant killed when the commit was decided");

	$request = decide($i, 'on two nodes');
	is_prepared_on($request->{other});
	kill_node($request->{node});
	go_on($request);
	became($request, 'all', "$where, its node killed when the commit was decided");
}

# One node alone commits without preparing; what it makes of the commit is not
# known, but it is the same for the payment and the record.
foreach my $i (0 .. 2)
{
	my $where = 'begun on ' . $nodes[$i]->name . ', all of it on one node';

	$work{'for its tenant'} = [$pay];
	my $request = open_request($i, 'for its tenant');
	my @workers = workers_of($request, $request->{owner});

	kill 'STOP', @workers;
	send_commit($request);
	kill_process($request->{node}, $request->{pid});
	kill 'CONT', @workers;
	wait_for_end_of($request->{owner}, $_) foreach @workers;
	became($request, 'either', "$where, its process killed at commit");
}

# The node where a request began refuses the commit at last, since it would not be
# serializable together with another transaction there, which has committed.
foreach my $i (0 .. 2)
{
	foreach my $work (sort keys %work)
	{
		my $where = 'begun on ' . $nodes[$i]->name . ", work $work";
		my $request = open_request($i, $work, 'BEGIN ISOLATION LEVEL SERIALIZABLE',
			'SELECT count(*) FROM duty', q{INSERT INTO duty VALUES ('one')});

		$request->{node}->safe_psql('postgres', q{
			BEGIN ISOLATION LEVEL SERIALIZABLE;
			SELECT count(*) FROM duty;
			INSERT INTO duty VALUES ('two');
			COMMIT});
		$request->{session}->query('COMMIT');
		like($request->{session}{stderr}, qr/could not serialize access/,
			"$where: the commit is refused");
		became($request, 'nothing', "$where, refused by its own node");
	}
}

done_testing();
