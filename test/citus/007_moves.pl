# Tenants that move to another node with their records, also under an open claim and
# between the two transactions of a lease: no record is lost or left behind, and no
# request has a second effect.

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

my $cluster = CitusCluster->new;
my ($coordinator, $worker1, $worker2) = my @nodes = $cluster->nodes;
my ($tenant) = $cluster->tenants_of($worker1, 1);
my $run =
  "SELECT concat_ws(' ', outcome, response->>'receipt') FROM idempotency_run('%1\$s', 'pay', '%2\$s', '{\"tenant\": \"%1\$s\", \"key\": \"%2\$s\"}', 'pay(jsonb)')";
my $begin = "SELECT outcome FROM idempotency_begin('%s', 'pay', '%s')";
my $pay = "INSERT INTO payment VALUES ('%s', '%s', '%s')";
my $finish =
  "SELECT idempotency_finish('%s', 'pay', '%s', 201, '{\"receipt\": \"%s\"}')";
my @requests;

# Make a move in the background.
sub start_move
{
	my ($tenant, $to, $mode) = @_;
	my $session = $coordinator->background_psql('postgres', on_error_stop => 0);

	$session->query_until(qr/sent/,
		"\\echo sent\n" . $cluster->move_sql($tenant, $to, $mode) . ";\n\\echo ended\n");
	return $session;
}

# Wait for it; if it has given way to a transaction, the tenant is moved now.
sub finish_move
{
	my ($session, $tenant, $to) = @_;

	$session->query_until(qr/ended/, '');
	$session->quit;
	$cluster->move_tenant($tenant, $to);
	return;
}

# The node after that of a tenant
sub node_after
{
	my ($tenant) = @_;
	my ($i) = grep { $nodes[$_] == $cluster->owner_of($tenant) } 0 .. 2;

	return $nodes[ ($i + 1) % 3 ];
}

# What was answered before a move is answered after it, by all nodes.
sub is_replayed_everywhere
{
	my ($tenant, $key, $receipt, $test) = @_;

	is($cluster->app($_, sprintf $run, $tenant, $key),
		"replayed $receipt", "$test: replayed on " . $_->name)
	  foreach $cluster->nodes;
	return;
}

foreach my $mode ('force_logical', 'block_writes')
{
	foreach my $to ($worker2, $coordinator, $worker1)
	{
		my $key = "answered-$mode-" . $to->name;
		my $receipt =
		  $cluster->app($nodes[1], sprintf $run, $tenant, $key) =~ s/^completed //r;

		$cluster->move_tenant($tenant, $to, $mode);
		is($cluster->owner_of($tenant)->name, $to->name, "$key: the tenant is there");
		is_replayed_everywhere($tenant, $key, $receipt, $key);
		push @requests, "$tenant $key";
	}
}

# A claim that is open while its tenant moves: whether the move waits for it or it has
# to be begun again, there is one effect.
foreach my $node (@nodes)
{
	foreach my $work ('begun', 'worked', 'finished')
	{
		my $to = node_after($tenant);
		my $key = "$work-" . $node->name . '-' . $to->name;
		my $session = $cluster->app_session($node);
		my $receipt = claim_of(scalar @requests);

		$session->query_safe('BEGIN');
		$session->query_safe(sprintf $begin, $tenant, $key);
		$session->query_safe(sprintf $pay, $tenant, $key, $receipt)
		  if $work ne 'begun';
		$session->query_safe(sprintf $finish, $tenant, $key, $receipt)
		  if $work eq 'finished';
		my $move = start_move($tenant, $to);
		$coordinator->poll_query_until('postgres', <<'SQL') or die 'no move begins';
SELECT EXISTS (SELECT FROM get_rebalance_progress()) OR EXISTS (
	SELECT FROM pg_stat_activity WHERE query LIKE '%citus_move%' AND state = 'idle')
SQL

		$session->query(sprintf $pay, $tenant, $key, $receipt)
		  if $work eq 'begun';
		$session->query(sprintf $finish, $tenant, $key, $receipt)
		  if $work ne 'finished';
		$session->query('COMMIT');
		my $error = $session->{stderr};
		$session->quit;
		finish_move($move, $tenant, $to);

		unlike($error, qr/ERROR:  (?!could not serialize|current transaction is aborted)/,
			"$key: no error but that the transaction is to be retried");
		like($cluster->app($_, sprintf $run, $tenant, $key),
			$error eq '' ? qr/^replayed $receipt$/ : qr/^(completed|replayed) /,
			"$key: a repeat on " . $_->name)
		  foreach @nodes;
		push @requests, "$tenant $key";
	}
}

# A lease that is begun on one node and finished on another, after a move
foreach my $i (0 .. 2)
{
	my ($from, $to) = ($nodes[$i], node_after($tenant));
	my $key = 'lease-' . $from->name;
	my $claim = claim_of($i + 1);
	my $receipt = claim_of(100 + $i);

	is( $cluster->app($from,
			"SELECT outcome FROM idempotency_begin('$tenant', 'pay', '$key', lease => '1 hour', claim => '$claim')"
		),
		'started',
		"$key: begun");
	$cluster->move_tenant($tenant, $to);
	is( $cluster->app($nodes[ ($i + 2) % 3 ],
			"SELECT outcome, attempt FROM idempotency_try_begin('$tenant', 'pay', '$key', lease => '1 hour')"
		),
		'in_flight|1',
		"$key: in flight after the move");
	$cluster->app($from,
		"SELECT idempotency_checkpoint('$tenant', 'pay', '$key', '$claim', 'charged', '{\"id\": $i}')");
	is( $cluster->app($to,
			"SELECT recovery_point, recovery_state FROM idempotency_replay('$tenant', 'pay', '$key')"),
		'charged|',
		"$key: its recovery point is seen after the move");
	is( $cluster->app($to,
			"BEGIN; "
			  . sprintf($pay, $tenant, $key, $receipt)
			  . "; SELECT idempotency_finish('$tenant', 'pay', '$key', 201, '{\"receipt\": \"$receipt\"}', claim => '$claim'); COMMIT"
		),
		'completed',
		"$key: finished on another node");
	is_replayed_everywhere($tenant, $key, $receipt, $key);
	push @requests, "$tenant $key";
}
$cluster->effects_are(\@requests, undef, 'all of this');

done_testing();
