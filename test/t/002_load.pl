# A server that is stopped at once under load: after its recovery every payment
# has its record and every record its payment, one of each a key, and nothing
# that was seen committed before is gone.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IPC::Run;
use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $rounds = 3;
my $node = new_server('main');
$node->start;
create_shop($node);

# Few of the keys are drawn often, and many of them once
my $script = $node->basedir . '/load.sql';
append_to_file($script, <<'SQL');
\set n random_zipfian(1, 100000, 1.1)
BEGIN;
SELECT (outcome = 'started')::int AS started FROM idempotency_try_begin('shop', 'pay', 'key-' || :n) \gset
\if :started
INSERT INTO payment VALUES ('key-' || :n);
SELECT idempotency_finish('shop', 'pay', 'key-' || :n, 201, json_build_object('n', :n));
\endif
COMMIT;
SQL

foreach my $round (1 .. $rounds)
{
	my $before = $node->safe_psql('postgres', 'SELECT count(*) FROM payment');
	my ($out, $err) = ('', '');
	my $pgbench = IPC::Run::start(
		[
			'pgbench', '-n', '-c', '12', '-j', '2',
			'-T', $PostgreSQL::Test::Utils::timeout_default,
			'-f', $script, '-h', $node->host, '-p', $node->port, 'postgres'
		],
		'>', \$out, '2>', \$err);

	$node->poll_query_until('postgres',
		"SELECT count(*) > $before + 1000 FROM payment")
	  or die 'load does not get going';
	my $seen = $node->safe_psql('postgres',
		"SELECT string_agg(key, ' ') FROM idempotency_key");

	$node->stop('immediate');
	$pgbench->finish;
	like($err, qr/aborted/, "round $round: clients lost their server");
	$node->start;

	is($node->safe_psql('postgres', $count_userlocks),
		'0', "round $round: no lock is left");
	is( $node->safe_psql(
			'postgres', q{
			SELECT count(*)
			FROM (SELECT key FROM payment
				  GROUP BY key HAVING count(*) > 1) AS twice}),
		'0',
		"round $round: no payment was made twice");
	is( $node->safe_psql(
			'postgres', q{
			SELECT count(*)
			FROM payment FULL JOIN idempotency_key USING (key)
			WHERE payment IS NULL OR idempotency_key IS NULL}),
		'0',
		"round $round: payments and records belong together");
	is( $node->safe_psql(
			'postgres', qq{
			SELECT count(*)
			FROM string_to_table('$seen', ' ') AS seen (key)
			WHERE key NOT IN (SELECT key FROM payment)}),
		'0',
		"round $round: nothing that was committed is gone");
	is( $node->safe_psql(
			'postgres', q{
			SELECT count(*)
			FROM payment,
				 idempotency_replay('shop', 'pay', payment.key) AS replay
			WHERE replay.response->>'n' IS DISTINCT FROM substr(key, 5)}),
		'0',
		"round $round: every payment has its own answer");
}

done_testing();
