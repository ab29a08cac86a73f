# The tables may belong to somebody who has no other rights, and who alters them.
# That does no harm to the server, and the sweep goes on as long as it can.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_server(
	'main',
	worker => 1,
	conf => <<'CONF');
idempotency.sweep_interval = 100ms
idempotency.metrics_interval = 1s
CONF
$node->start;

sub on
{
	my ($sql) = @_;

	return $node->safe_psql('postgres', "SET search_path = idempotency; $sql");
}

# Wait until the last worker failed with an error.
sub fails
{
	my ($error, $test) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return ok(
		$node->poll_query_until(
			'postgres', qq{
			SELECT failures > 0 AND last_error LIKE '$error%'
			FROM idempotency.idempotency_worker_status()}),
		$test);
}

on( q{
	CREATE SCHEMA idempotency;
	CREATE EXTENSION idempotency SCHEMA idempotency;
	CREATE ROLE other;
	ALTER TABLE idempotency_metric OWNER TO other;
	SELECT idempotency_begin('t', 'pay', 'lease', lease => '1 hour')});

# Metrics cannot be written
fails('permission denied for schema idempotency',
	'the owner of the metrics has no right to write them');
on( q{
	INSERT INTO idempotency_key (tenant, action, key, actor, state, attempt, created_at, expires_at)
	SELECT 't', 'pay', k, '', 'completed', 1, now() - interval '2 days', now() - interval '1 day'
	FROM generate_series(1, 10) AS k});
ok( $node->poll_query_until(
		'postgres', 'SELECT count(*) = 1 FROM idempotency.idempotency_key'),
	'expired records are swept all the same');
on( q{
	GRANT USAGE ON SCHEMA idempotency TO other;
	GRANT EXECUTE ON FUNCTION idempotency_histogram_add TO other});
on('CALL idempotency_sweep()');
# if a worker is just writing them, this has found nothing to do
ok( $node->poll_query_until(
		'postgres', q{
		SELECT sum(started) = 1 AND sum(swept) = 10
		FROM idempotency.idempotency_metric}),
	'with the rights that it takes the metrics are written');

# Leases cannot be read.  Only the watch over them comes, because no sweep is due.
$node->append_conf('postgresql.conf', "idempotency.sweep_interval = '1h'");
$node->restart;
ok( $node->poll_query_until(
		'postgres',
		'SELECT last_sweep_at IS NOT NULL FROM idempotency.idempotency_worker_status()'
	),
	'the last sweep for long');
on( q{
	ALTER TABLE idempotency_key OWNER TO other;
	SET ROLE other;
	ALTER TABLE idempotency_key DROP CONSTRAINT idempotency_key_pkey, ALTER tenant DROP NOT NULL;
	UPDATE idempotency_key SET tenant = NULL});
fails('table "idempotency_key" has no valid primary key',
	'a table that was altered is not read');

is(complaints_of($node), '', 'no crash');
$node->stop;
done_testing();
