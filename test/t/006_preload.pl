# What works with and without shared_preload_libraries.  Without, everything
# but the description of claims in flight; with it, that too, as long as there
# is room for it in shared memory.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $capacity = 32;		# the least there can be
my $tracking = 'SELECT capacity, used, untracked FROM idempotency_tracking()';
my $worker = 'SELECT * FROM idempotency_worker_status()';
my $in_flight = 'SELECT tenant, actor, action, key, attempt, lease_expires_at'
  . ' FROM idempotency_in_flight ORDER BY key';

my $node = new_server('main', preload => 0);
$node->start;
create_shop($node);

# A session holds a claim: what others are told, before and after its commit.
# Returns the errors that a repeat and a different request get meanwhile.
sub meet_claim
{
	my ($how, $key, $tracked) = @_;
	my $session = session($node);
	my $pid = $session->query_safe('SELECT pg_backend_pid()');
	my $begin = "SELECT outcome, retry_after"
	  . " FROM idempotency_try_begin('shop', 'pay', '$key', '{\"key\": \"%s\"}')";

	$session->query_safe('BEGIN');
	is($session->query_safe("SELECT pay('$key')"),
		qq(started {"paid" :  "$key"}), "$how: a request runs");

	# What has taken long will be asked for later, if it is known for how long
	my $seconds = $tracked ? '\d+' : '1';
	like(
		$node->safe_psql('postgres', sprintf($begin, $key)),
		qr/^in_flight\|$seconds$/,
		"$how: a repeat is in flight");
	my $detail =
	  $tracked
	  ? "DETAIL:  Process $pid has held the claim for \\d+\\.\\d{3} s\\.\n"
	  : '';
	like(
		error_of($node, 'postgres', "SELECT pay('$key')"),
		qr/ERROR:  ID003: request with this idempotency key is in flight\n${detail}HINT:  Retry after $seconds s\.\n/,
		"$how: the error says " . ($tracked ? 'who holds it' : 'no more'));
	is( $node->safe_psql('postgres', sprintf($begin, 'other')),
		$tracked ? 'mismatched|' : 'in_flight|1',
		"$how: a different request is "
		  . ($tracked ? 'known for one' : 'not known for one yet'));
	is($node->safe_psql('postgres', $in_flight),
		$tracked ? "shop||pay|$key|1|" : '', "$how: what the view shows");
	is( $node->safe_psql(
			'postgres', "SELECT pid FROM idempotency_in_flight"),
		$tracked ? $pid : '',
		"$how: which process the view shows");

	$session->query_safe('COMMIT');
	$session->quit;
	is($node->safe_psql('postgres', sprintf($begin, 'other')),
		'mismatched|', "$how: a different request is known after commit");
	is($node->safe_psql('postgres', "SELECT pay('$key')"),
		qq(replayed {"paid" :  "$key"}), "$how: a repeat gets the answer");
	is($node->safe_psql('postgres', $in_flight),
		'', "$how: nothing is in flight any more");
	is($node->safe_psql('postgres', $count_userlocks),
		'0', "$how: no lock is left");
	return;
}

# Without preload: the library comes with the first call, or with LOAD, or
# with session_preload_libraries
meet_claim('not preloaded', 'plain', 0);
is($node->safe_psql('postgres', $tracking),
	'||', 'not preloaded: nothing is tracked');
is( $node->safe_psql(
		'postgres',
		'EXPLAIN (COSTS OFF)'
		  . " SELECT outcome FROM idempotency_replay('shop', 'pay', 'plain')"),
	"Custom Scan (Idempotency Call)\n  Function: idempotency_replay",
	'not preloaded: the first call of a session is planned as any other');
is($node->safe_psql('postgres', "LOAD 'idempotency'; SHOW idempotency.ttl"),
	'1d', 'LOAD: settings are known');
is($node->safe_psql('postgres', "LOAD 'idempotency'; $tracking"),
	'||', 'LOAD: nothing is tracked');
is( $node->safe_psql('postgres', "CALL idempotency_sweep(); $worker"),
	"not preloaded|||||||",
	'not preloaded: no sweep is noted');

# What only a preloaded library can use may be in the configuration file
restart_with($node, 'idempotency.max_tracked_claims = 100');
my ($status, $shown, $complaints) = $node->psql('postgres',
	"LOAD 'idempotency'; SHOW idempotency.max_tracked_claims");
is($shown, '100', 'LOAD: the size of the table can be set');
is($complaints, '', 'LOAD: without complaint');
is($node->safe_psql('postgres', "LOAD 'idempotency'; $tracking"),
	'||', 'LOAD: but there is no table');

restart_with($node, "session_preload_libraries = 'idempotency'");
meet_claim('session_preload_libraries', 'session', 0);
is($node->safe_psql('postgres', $tracking),
	'||', 'session_preload_libraries: nothing is tracked');

# With preload, and with both
restart_with(
	$node,
	"shared_preload_libraries = 'idempotency'\n"
	  . "idempotency.max_tracked_claims = $capacity");
meet_claim('preloaded', 'preloaded', 1);
is($node->safe_psql('postgres', $tracking),
	"$capacity|0|0", 'preloaded: the table is empty');
is($node->safe_psql('postgres', $worker),
	'off|||||||', 'preloaded: there was no sweep yet');
like(
	error_of($node, 'postgres', 'SET idempotency.max_tracked_claims = 100'),
	qr/ERROR:  55P02: /,
	'preloaded: the table cannot be resized');

# More claims than there is room for, in one transaction
my $claims = 3 * $capacity;
my $begin_all = "SELECT outcome, count(*)"
  . " FROM generate_series(1, $claims) AS n,"
  . " LATERAL idempotency_try_begin('shop', 'pay', '%s-' || n, '1') GROUP BY 1";
my $session = session($node);
$session->query_safe('BEGIN');
is($session->query_safe(sprintf($begin_all, 'many')),
	"started|$claims", 'full table: claims go on');
is($node->safe_psql('postgres', $tracking),
	"$capacity|$capacity|" . ($claims - $capacity),
	'full table: what found no room is counted');
is($node->safe_psql('postgres', 'SELECT count(*) FROM idempotency_in_flight'),
	$capacity, 'full table: what found room is shown');
is($node->safe_psql('postgres', sprintf($begin_all, 'many')),
	"in_flight|$claims", 'full table: every claim is exclusive');
is( $node->safe_psql(
		'postgres', qq{
		SELECT outcome, count(*)
		FROM generate_series(1, $claims) AS n,
			 LATERAL idempotency_try_begin('shop', 'pay', 'many-' || n, '2')
		GROUP BY 1 ORDER BY 1}),
	'in_flight|' . ($claims - $capacity) . "\nmismatched|$capacity",
	'full table: a different request is known where there was room');
is($node->safe_psql('postgres', "SELECT pay('beside')"),
	'started {"paid" :  "beside"}', 'full table: another request runs');
is($node->safe_psql('postgres', "SELECT untracked FROM idempotency_tracking()"),
	$claims - $capacity + 1, 'full table: and is counted');
$session->query_safe(
	"SELECT idempotency_finish('shop', 'pay', 'many-' || n)"
	  . " FROM generate_series(1, $claims) AS n");
$session->query_safe('COMMIT');
is($node->safe_psql('postgres', "SELECT used FROM idempotency_tracking()"),
	'0', 'full table: empty after commit');
is($node->safe_psql('postgres', sprintf($begin_all, 'many')),
	"replayed|$claims", 'full table: every answer is replayed');

# The same with a rollback, of a savepoint first
$session->query_safe('BEGIN; SAVEPOINT s');
is($session->query_safe(sprintf($begin_all, 'back')),
	"started|$claims", 'savepoint: claims fill the table');
$session->query_safe('ROLLBACK TO s');
is($node->safe_psql('postgres', "SELECT used FROM idempotency_tracking()"),
	'0', 'savepoint: empty after its rollback');
is($session->query_safe(sprintf($begin_all, 'back')),
	"started|$claims", 'savepoint: they can be begun again');
$session->query_safe('ROLLBACK');
is($node->safe_psql('postgres', "SELECT used FROM idempotency_tracking()"),
	'0', 'rollback: empty after it');
is($node->safe_psql('postgres', $count_userlocks),
	'0', 'rollback: no lock is left');

# A claim that is begun again in a savepoint, and held again after its rollback
$session->query_safe('BEGIN');
$session->query_safe("SELECT idempotency_begin('shop', 'pay', 'again')");
$session->query_safe('SAVEPOINT s');
$session->query_safe("SELECT idempotency_release('shop', 'pay', 'again')");
$session->query_safe("SELECT idempotency_begin('shop', 'pay', 'again')");
$session->query_safe('ROLLBACK TO s');
is($node->safe_psql('postgres', $in_flight),
	'shop||pay|again|1|', 'begun again: the older claim is shown');
$session->query_safe('ROLLBACK');
is($node->safe_psql('postgres', $in_flight),
	'', 'begun again: nothing is shown after rollback');

# Entries that prepared transactions left behind make room when it is needed
$session->query_safe("BEGIN");
$session->query_safe("SELECT pay('prepared-' || n)"
	  . " FROM generate_series(1, $capacity) AS n");
$session->query_safe("PREPARE TRANSACTION 'full'");
is( $node->safe_psql(
		'postgres',
		'SELECT count(*), count(pid) FROM idempotency_in_flight'),
	"$capacity|0",
	'prepared: claims are shown, without a process');
my $untracked =
  $node->safe_psql('postgres', 'SELECT untracked FROM idempotency_tracking()');
$node->safe_psql('postgres', "SELECT pay('too-early')");
is( $node->safe_psql(
		'postgres', 'SELECT used, untracked FROM idempotency_tracking()'),
	"$capacity|" . ($untracked + 1),
	'prepared: they keep their room');
$node->safe_psql('postgres', "COMMIT PREPARED 'full'");
is($node->safe_psql('postgres', $in_flight),
	'', 'prepared: nothing is shown after commit');
meet_claim('prepared before', 'room', 1);
is( $node->safe_psql(
		'postgres', 'SELECT used, untracked FROM idempotency_tracking()'),
	'0|' . ($untracked + 1),
	'prepared: their room was used again');
$session->quit;

done_testing();
