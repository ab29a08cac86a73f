# Waits of a few milliseconds, for claims that are held about as long: the time
# of a wait often runs out in the moment in which its lock is granted.  It must
# end with an answer all the same, never with an error.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_server('main');
$node->start;
create_shop($node);

my $script = $node->basedir . '/wait.sql';
append_to_file($script, <<'SQL');
\set n random(1, 3)
\set ms random(1, 3)
BEGIN;
SELECT outcome FROM idempotency_try_begin('shop', 'wait', :n::text, wait => make_interval(secs => :ms / 1000.0)) \gset
SELECT pg_sleep(0.0005);
ROLLBACK;
SQL

$node->command_checks_all(
	[
		'pgbench', '-n', '-c', '30', '-j', '2', '-T', '8',
		'-f', $script, 'postgres'
	],
	0,
	[qr/number of transactions actually processed: [1-9]/],
	[qr/^(?!.*aborted)/s],
	'no wait ends with an error');
is($node->safe_psql('postgres', $count_userlocks), '0', 'no lock is left');
is($node->safe_psql('postgres', 'SELECT used FROM idempotency_tracking()'),
	'0', 'nothing is in flight any more');

$node->stop;
done_testing();
