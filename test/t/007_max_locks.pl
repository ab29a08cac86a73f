# A transaction that begins more claims than the lock table has room for gets
# an error, and leaves nothing behind.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_server('main',
	conf => "max_locks_per_transaction = 10\nmax_connections = 10");
$node->start;
create_shop($node);

my $begin_many = q{
	SELECT count(*)
	FROM generate_series(1, 100000) AS n,
		 LATERAL idempotency_%s('shop', 'pay', 'many-' || n)};

sub nothing_is_left
{
	my ($how) = @_;

	is($node->safe_psql('postgres', $count_userlocks),
		'0', "$how: no lock is left");
	is($node->safe_psql('postgres', 'SELECT used FROM idempotency_tracking()'),
		'0', "$how: no entry in shared memory is left");
	is( $node->safe_psql(
			'postgres', q{
			SELECT (SELECT count(*) FROM idempotency_key WHERE key LIKE 'many-%')
				 + (SELECT count(*) FROM payment WHERE key LIKE 'many-%')}),
		'0',
		"$how: no row is left");
	is( $node->safe_psql(
			'postgres', q{
			BEGIN;
			SELECT outcome FROM idempotency_begin('shop', 'pay', 'many-1');
			ROLLBACK}),
		'started',
		"$how: a claim that was lost can be begun again");
	return;
}

foreach my $call ('begin', 'try_begin')
{
	like(
		error_of(
			$node, 'postgres',
			"BEGIN; INSERT INTO payment VALUES ('many-0');"
			  . sprintf($begin_many, $call)),
		qr/ERROR:  53200: out of shared memory\nHINT:  .*max_locks_per_transaction/,
		"$call: there is an end to the claims");
	nothing_is_left($call);
}

# Inside an exception block the claims of the block go, and no others
my $session = session($node);
$session->query_safe('BEGIN');
is($session->query_safe(
		"SELECT outcome FROM idempotency_begin('shop', 'pay', 'kept')"),
	'started', 'exception block: a claim is held');
$session->query_safe("INSERT INTO payment VALUES ('kept')");
is( $session->query_safe('DO $$ BEGIN PERFORM * FROM ('
		  . sprintf($begin_many, 'begin')
		  . ') AS many; RAISE assert_failure; EXCEPTION WHEN out_of_memory THEN'
		  . ' NULL; END $$'),
	'',
	'exception block: the error is caught');
is($node->safe_psql('postgres', $count_userlocks),
	'1', 'exception block: one lock is left');
is($node->safe_psql('postgres', 'SELECT key FROM idempotency_in_flight'),
	'kept', 'exception block: it is that of the claim before');
is($session->query_safe("SELECT idempotency_finish('shop', 'pay', 'kept')"),
	'completed', 'exception block: which is finished');
$session->query_safe('COMMIT');
$session->quit;
is( $node->safe_psql(
		'postgres', 'SELECT key FROM idempotency_key UNION ALL TABLE payment'),
	"kept\nkept",
	'exception block: and committed');
nothing_is_left('exception block');

done_testing();
