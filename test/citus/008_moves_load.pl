# Clients on all nodes that make requests while tenants move from node to node, one is
# isolated, and nodes come and go: each request has one effect, and all records are
# where their tenants are.

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
my @nodes = $cluster->nodes;
my @tenants = map { $cluster->tenants_of($_, 2) } @nodes;
my @requests = map { $tenants[ $_ % @tenants ] . " key-$_" } 1 .. 500;

sub under_load
{
	my ($test, $change, %options) = @_;
	my $clients = $cluster->start_clients(
		request => $begin_and_finish,
		requests => \@requests,
		count => 6,
		%options);

	$cluster->coordinator->poll_query_until('postgres', 'SELECT count(*) > 20 FROM payment')
	  or die 'load does not get going';
	$change->();
	my $answers = $cluster->answers_of($clients);
	is($cluster->surprises_of($clients),
		'', "$test: no error but that a request is to be made again");
	$cluster->effects_are(\@requests, $answers, $test);
	$cluster->forget_everything;
	return;
}

under_load(
	'tenants that move',
	sub {
		foreach my $to (@nodes)
		{
			$cluster->move_tenant($_, $to) foreach @tenants[ 0, 2, 4 ];
		}
	});
under_load(
	'tenants that move while writes are blocked, leases',
	sub {
		foreach my $to (@nodes)
		{
			$cluster->move_tenant($_, $to, 'block_writes') foreach @tenants[ 1, 3, 5 ];
		}
	},
	request => $lease);
under_load(
	'a tenant that is isolated',
	sub {
		$cluster->on_coordinator(
			"SELECT isolate_tenant_to_new_shard('payment', '$tenants[0]', 'CASCADE', shard_transfer_mode => 'block_writes')");
	});
under_load(
	'a node that is added, and gets tenants',
	sub {
		# the collation of tenants has to be the same there
		my $worker3 = $cluster->add_node(
			'worker3', q{
			CREATE SCHEMA idempotency;
			CREATE EXTENSION idempotency SCHEMA idempotency;
			ALTER TABLE idempotency.idempotency_key ALTER COLUMN tenant TYPE text COLLATE "default"});

		$cluster->distribute;
		$cluster->move_tenant($_, $worker3) foreach @tenants[ 0, 1 ];
	});
under_load(
	'a node that is drained',
	sub {
		my $worker3 = ($cluster->nodes)[3];

		$cluster->on_coordinator(
			'SELECT citus_drain_node(' . $cluster->address($worker3) . ", shard_transfer_mode => 'force_logical')");
		is($cluster->on_coordinator(
				'SELECT count(*) FROM citus_shards WHERE nodeport = ' . $worker3->port),
			'0', 'nothing is left on it');
	});

done_testing();
