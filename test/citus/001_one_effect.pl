# Many clients on all nodes of a cluster that make the same requests at the same time,
# until they are answered: each request has one effect, and everybody is told the
# same.  So it is for each kind of call.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use CitusCluster;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

skip_without_citus();

my $clients = 24;
my $cluster = CitusCluster->new;

# Tenants of each node, with a few keys each, forty in all
my @tenants = map { $cluster->tenants_of($_, 2) } $cluster->nodes;
my @requests = map { $tenants[ $_ % @tenants ] . " key-$_" } 1 .. 40;

sub test_clients
{
	my ($test, %options) = @_;
	my $started = $cluster->start_clients(
		requests => \@requests,
		count => $clients,
		%options);
	my $answers = $cluster->answers_of($started);

	is($cluster->surprises_of($started),
		'', "$test: no error but that a request is to be made again");
	$cluster->effects_are(\@requests, $answers, $test);
	$cluster->forget_everything;
	return;
}

test_clients('begin and finish', request => $begin_and_finish);

# The same without waiting, where most are turned away for a while
test_clients('begin and finish, impatient',
	request => $begin_and_finish =~ s/wait => '1 s'/wait => NULL/r);

test_clients("run, its handler $_", request => $run, before => $handler{$_})
  foreach sort keys %handler;

# Leases, which take two transactions; the work is in the second
test_clients('leases', request => $lease);

# Messages, in batches that overlap.  What is told of a message is whether it is new.
my @batches = map {
	my $tenant = $_;
	map { "$tenant " . join(',', map { "message-$_" } $_ .. $_ + 9) } (1, 6, 11)
} @tenants[ 0, 2, 4 ];
my @messages = map {
	my $tenant = $_;
	map { "$tenant message-$_" } 1 .. 20
} @tenants[ 0, 2, 4 ];
my $started = $cluster->start_clients(
	request => <<'PSQL',
\set seen false
\set receipt none
BEGIN;
INSERT INTO payment SELECT :'tenant', id, gen_random_uuid()
FROM idempotency_first_seen(:'tenant', 'pay', string_to_array(:'key', ',')) AS id;
SELECT true AS seen \gset
COMMIT;
\if :ERROR
\else
\set answered :seen
\endif
PSQL
	requests => \@batches,
	count => $clients);
my $answers = $cluster->answers_of($started);

is($cluster->surprises_of($started),
	'', 'first_seen: no error but that a batch is to be handed over again');
is_deeply([ sort keys %$answers ],
	[ sort @batches ], 'first_seen: all batches were worked on');
foreach my $table ('payment', 'idempotency_key')
{
	is_deeply(
		[
			sort split /\n/,
			$cluster->on_coordinator(
				"SELECT concat_ws(' ', tenant, key) FROM $table")
		],
		[ sort @messages ],
		"first_seen: each message is once in $table");
}

done_testing();
