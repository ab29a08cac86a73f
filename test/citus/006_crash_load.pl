# Processes and nodes that are killed at random, while clients on all nodes make requests
# with effects on several nodes, until all are answered: each request has had its
# effects once, and those who were answered were all told of these.

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
my @requests = map { $tenants[ $_ % @tenants ] . " key-$_" } 1 .. 200;

# Besides the payment, a request has a row of another tenant, and a note in a local
# table of the node that it came to.
$cluster->on_coordinator(
	q{
	CREATE TABLE booking (account text, key text, receipt uuid);
	SELECT create_distributed_table('booking', 'account');
	GRANT ALL ON booking TO app});
$cluster->everywhere(
	'CREATE TABLE note (key text, receipt uuid); GRANT ALL ON note TO app');
my $request = $begin_and_finish =~ s{^(INSERT INTO payment .*)$}{$1
INSERT INTO booking VALUES (:'key', :'key', :'new_receipt');
INSERT INTO note VALUES (:'key', :'new_receipt');}mr;

sub sorted_lines
{
	return [ sort map { split /\n/ } @_ ];
}

# Wait until the clients have made another few payments, or all of them.
sub let_pay
{
	my $before = $cluster->on_coordinator('SELECT count(*) FROM payment');

	$cluster->coordinator->poll_query_until('postgres',
			"SELECT count(*) >= least($before + 8, "
		  . scalar(@requests)
		  . ') FROM payment')
	  or die 'clients do not get on';
	return;
}

my %accident = (
	'process killed' => sub {
		my ($node) = @_;
		my $log = -s $node->logfile;
		my $pid = $node->safe_psql('postgres',
			"SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() ORDER BY random() LIMIT 1"
		);

		kill 'KILL', $pid;
		wait_for_restart($node, $log);
	},
	'processes terminated' => sub {
		my ($node) = @_;

		$node->safe_psql('postgres',
			"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND random() < 0.5"
		);
	},
	'node killed' => sub {
		my ($node) = @_;

		$node->kill9;
		start_after_kill($node);
	});

my $clients = $cluster->start_clients(
	request => $request,
	requests => \@requests,
	count => 12);

foreach my $accident (sort keys %accident)
{
	foreach my $node (@nodes)
	{
		let_pay();
		$accident{$accident}->($node);
	}
}

my $answers = $cluster->answers_of($clients);
$cluster->wait_for_recovery;
$cluster->effects_are(\@requests, $answers, 'after all accidents');

my $payments = sorted_lines(
	$cluster->on_coordinator("SELECT concat_ws(' ', key, receipt) FROM payment"));
is_deeply(
	sorted_lines($cluster->on_coordinator("SELECT concat_ws(' ', key, receipt) FROM booking")),
	$payments, 'the rows of other tenants are about these payments');
is_deeply(
	sorted_lines($cluster->everywhere("SELECT concat_ws(' ', key, receipt) FROM note")),
	$payments, 'so are the notes in local tables');
is_deeply([ $cluster->everywhere($count_userlocks) ],
	[ 0, 0, 0 ], 'no lock is left');
is_deeply([ $cluster->everywhere($tracked) ],
	[ 0, 0, 0 ], 'no entry in shared memory is left');

done_testing();
