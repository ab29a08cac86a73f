# The commits of a sweep wait for nobody: neither for the disk nor for a
# standby that is not there.  An application's commit does.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_server('main', init => [ allows_streaming => 1 ]);
$node->start;
create_shop($node);
$node->safe_psql(
	'postgres', q{
	SELECT pay('k' || n) FROM generate_series(1, 25) AS n;
	UPDATE idempotency_key SET expires_at = created_at});

# From now on a commit waits for a standby that never comes
$node->append_conf('postgresql.conf', "synchronous_standby_names = 'nobody'");
$node->reload;
$node->poll_query_until('postgres',
	"SELECT current_setting('synchronous_standby_names') = 'nobody'")
  or die 'setting does not take effect';

my $application = session($node);
my $pid = $application->query_safe('SELECT pg_backend_pid()');
$application->query_until(qr/^asked$/m,
	"\\echo asked\nSELECT pay('new');\n");
ok( $node->poll_query_until(
		'postgres',
		"SELECT wait_event = 'SyncRep' FROM pg_stat_activity WHERE pid = $pid"
	),
	'a payment waits for its standby');

# if it did, it would do so for ever
my $timed_out;
my ($rc) = $node->psql(
	'postgres', 'CALL idempotency_sweep(10)',
	timeout => $PostgreSQL::Test::Utils::timeout_default,
	timed_out => \$timed_out);
ok(!$timed_out, 'a sweep does not');
is($rc, 0, 'and succeeds');
is( $node->safe_psql(
		'postgres',
		"SELECT key FROM idempotency_key WHERE expires_at <= clock_timestamp()"),
	'',
	'what it swept, which was all, is gone for everybody');

$node->append_conf('postgresql.conf', "synchronous_standby_names = ''");
$node->reload;
ok( $node->poll_query_until(
		'postgres',
		"SELECT state = 'idle' FROM pg_stat_activity WHERE pid = $pid"),
	'the payment goes on');
$application->quit;
is($node->safe_psql('postgres', "SELECT pay('new')"),
	'replayed {"paid" :  "new"}', 'and is kept');

$node->stop;
done_testing();
