# Behind a pooler that hands a server connection to another client after each
# transaction, a transaction claim never outlives its transaction, a leased claim
# belongs to whoever knows its id, and an answer is found whatever the
# connection.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IPC::Run;
use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my ($pgbouncer) =
  grep { -x } map { "$_/pgbouncer" } split(/:/, $ENV{PATH}), '/usr/sbin';
plan skip_all => 'pgbouncer is not installed' unless defined $pgbouncer;

my $node = new_server('main');
$node->start;
create_shop($node);

# Database "pooled" has three server connections, "single" has one
my $dir = PostgreSQL::Test::Utils::tempdir_short();
my $port = PostgreSQL::Test::Cluster::get_free_port();
my $user = getpwuid($<);
my $server =
  'host=' . $node->host . ' port=' . $node->port . " user=$user dbname=postgres";
append_to_file("$dir/pgbouncer.ini", <<"INI");
[databases]
pooled = $server pool_size=3
single = $server pool_size=1
[pgbouncer]
listen_port = $port
unix_socket_dir = $dir
auth_type = any
pool_mode = transaction
logfile = $dir/pgbouncer.log
INI
my ($out, $err) = ('', '');
my $pooler =
  IPC::Run::start([ $pgbouncer, "$dir/pgbouncer.ini" ], '>', \$out, '2>', \$err);

# also when a test dies
END
{
	local $?;
	if (defined $pooler)
	{
		$pooler->signal('KILL');
		$pooler->finish;
	}
}

for (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
{
	last if -S "$dir/.s.PGSQL.$port";
	select(undef, undef, undef, 0.1);
}

# The server as clients see it: through the pooler
my $door = bless { %$node, _host => $dir, _port => $port }, ref $node;

sub pooled_session
{
	my ($dbname) = @_;

	return $door->background_psql(
		$dbname,
		on_error_stop => 0,
		extra_params => [ '-v', 'VERBOSITY=verbose' ]);
}

# The answer is found on another connection than the one that stored it
my ($first, $second) = map { pooled_session('pooled') } 1 .. 2;
$_->query_safe('BEGIN') foreach $first, $second;
isnt(
	$first->query_safe('SELECT pg_backend_pid()'),
	$second->query_safe('SELECT pg_backend_pid()'),
	'two transactions use two server connections');
is($first->query_safe("SELECT pay('a')"),
	'started {"paid" :  "a"}', 'one of them pays');
is( $second->query_safe(
		"SELECT outcome FROM idempotency_try_begin('shop', 'pay', 'a')"),
	'in_flight', 'for the other one it is in flight');
$first->query_safe('COMMIT');
is($second->query_safe("SELECT pay('a')"),
	'replayed {"paid" :  "a"}', 'and is replayed after commit');
$second->query_safe('COMMIT');
$_->quit foreach $first, $second;

# A leased claim is begun, saved, finished and asked for on different connections
sub on_each_connection
{
	my (@statements) = @_;
	my @clients = map { pooled_session('pooled') } 1 .. 3;
	my (@answers, %pids);

	$_->query_safe('BEGIN') foreach @clients;
	foreach my $client (@clients)
	{
		$pids{ $client->query_safe('SELECT pg_backend_pid()') } = 1;
		push @answers, $client->query_safe(shift @statements);
		$client->query_safe('COMMIT');
	}
	$_->quit foreach @clients;
	is(scalar(keys %pids), 3, 'lease: three server connections are used');
	return join(', ', @answers);
}

sub lease_sql
{
	my ($key, $attempt) = @_;
	my $claim = defined $attempt ? ", claim => '@{[ claim_of($attempt) ]}'" : '';

	return 'SELECT outcome, attempt, recovery_point, response'
	  . " FROM idempotency_try_begin('shop', 'charge', '$key', lease => '1 hour'$claim)";
}

sub save_sql
{
	my ($key, $attempt) = @_;

	return "SELECT idempotency_checkpoint('shop', 'charge', '$key',"
	  . " '@{[ claim_of($attempt) ]}', 'charged') > now()";
}

sub answer_sql
{
	my ($key, $attempt) = @_;

	return "SELECT idempotency_finish('shop', 'charge', '$key', 201,"
	  . " '{\"by\" :  $attempt}', claim => '@{[ claim_of($attempt) ]}')";
}

sub release_sql
{
	my ($key, $attempt) = @_;

	return "SELECT idempotency_release('shop', 'charge', '$key',"
	  . " claim => '@{[ claim_of($attempt) ]}')";
}

is( on_each_connection(
		lease_sql('l1', 1), save_sql('l1', 1), answer_sql('l1', 1)),
	'started|1||, t, completed',
	'lease: begun, saved and finished on a connection each');
is( on_each_connection(
		lease_sql('l1', 1), answer_sql('l1', 1), lease_sql('l1')),
	'replayed|1||{"by" :  1}, completed, replayed|1||{"by" :  1}',
	'lease: replayed, finished again and replayed');
is( on_each_connection(
		lease_sql('l2', 1), lease_sql('l2'), release_sql('l2', 1)),
	'started|1||, in_flight|1||, t',
	'lease: in flight for the next one, and released by another');
is( on_each_connection(
		lease_sql('l2', 2), save_sql('l2', 2), lease_sql('l2', 3)),
	'started|2||, t, in_flight|2||',
	'lease: the next attempt, and in flight');
is( on_each_connection(
		lease_sql('l2', 2), lease_sql('l2', 2), lease_sql('l2')),
	'started|2|charged|, started|2|charged|, in_flight|2||',
	'lease: had again by its id, wherever it was begun');
run_out($node, 'l2');
is( on_each_connection(
		lease_sql('l2', 3), save_sql('l2', 3), answer_sql('l2', 3)),
	'started|3|charged|, t, completed',
	'lease: taken over with the recovery point, saved and finished');
my $zombie = pooled_session('single');
$zombie->query(answer_sql('l2', 2));
like($zombie->{stderr}, qr/ERROR:  ID005: /, 'lease: the old claim is refused');
$zombie->{stderr} = '';
$zombie->quit;

# A client that vanishes leaves its lease to whoever knows its claim id
my $gone = pooled_session('pooled');
is($gone->query_safe(lease_sql('l3', 1)), 'started|1||', 'lease: a client begins');
$gone->query_safe('BEGIN');
$gone->query_safe(answer_sql('l3', 1));
$gone->{run}->kill_kill;
ok( $node->poll_query_until(
		'postgres',
		"SELECT count(*) = 0 FROM pg_stat_activity WHERE state LIKE 'idle in%'"),
	'lease: its transaction ends when it is killed');
is($node->safe_psql('postgres', lease_sql('l3')),
	'in_flight|1||', 'lease: and its claim is in flight still');
is($node->safe_psql('postgres', lease_sql('l3', 1)),
	'started|1||', 'lease: but not for who knows its id');
is($node->safe_psql('postgres', answer_sql('l3', 1)),
	'completed', 'lease: another client finishes it');
is($node->safe_psql('postgres', $count_userlocks),
	'0', 'lease: no lock is left');

# What a client leaves behind on a connection does not meet the next client
my %leave = (
	'rolled back' => [ 'ROLLBACK', qr/^$/ ],
	'not finished' => [ 'COMMIT', qr/ERROR:  ID006: /, ],
	'failed' => [ 'SELECT 1 / 0; COMMIT', qr/ERROR:  22012: / ]);
foreach my $how (sort keys %leave)
{
	my ($sql, $error) = @{ $leave{$how} };
	my $key = $how =~ s/ /-/r;
	my ($one, $next) = map { pooled_session('single') } 1 .. 2;

	$one->query_safe('BEGIN');
	my $pid = $one->query_safe('SELECT pg_backend_pid()');
	$one->query_safe("SELECT idempotency_begin('shop', 'pay', '$key')");
	$one->query_safe("INSERT INTO payment VALUES ('$key')");
	$one->query($sql);
	like($one->{stderr}, $error, "$how: the transaction ends");

	is($next->query_safe("SELECT pg_backend_pid()"),
		$pid, "$how: the next client gets the same server connection");
	is($node->safe_psql('postgres', $count_userlocks),
		'0', "$how: no lock is left on it");
	is($next->query_safe("SELECT pay('$key')"),
		qq(started {"paid" :  "$key"}), "$how: the next client runs");
	$_->quit foreach $one, $next;
}

# A client that vanishes in its transaction takes its claim along
my $victim = pooled_session('pooled');
$victim->query_safe('BEGIN');
$victim->query_safe("SELECT idempotency_begin('shop', 'pay', 'vanish')");
is($node->safe_psql('postgres', $count_userlocks),
	'1', 'a client holds a claim');
$victim->{run}->kill_kill;
ok($node->poll_query_until('postgres', "SELECT ($count_userlocks) = 0"),
	'its claim goes when the client is killed');
is($node->safe_psql('postgres', "SELECT pay('vanish')"),
	'started {"paid" :  "vanish"}', 'and a repeat runs');

# Many clients on the three connections, some of which roll back
my $script = "$dir/pool.sql";
append_to_file($script, <<'SQL');
\set n random(1, 300)
\set fail random(1, 4)
BEGIN;
SELECT (outcome = 'started')::int AS started FROM idempotency_try_begin('shop', 'pay', 'key-' || :n) \gset
\if :started
INSERT INTO payment VALUES ('key-' || :n);
\if :fail = 1
ROLLBACK;
\else
SELECT idempotency_finish('shop', 'pay', 'key-' || :n, 201, json_build_object('n', :n));
COMMIT;
\endif
\else
COMMIT;
\endif
SQL
command_ok(
	[
		'pgbench', '-n', '-c', '16', '-j', '2', '-t', '200',
		'-f', $script, '-h', $dir, '-p', $port, 'pooled'
	],
	'16 clients share three connections');
is($node->safe_psql('postgres', $count_userlocks),
	'0', 'no lock is left after them');
is($node->safe_psql('postgres', $tracked),
	'0', 'no entry in shared memory is left after them');
is( $node->safe_psql(
		'postgres', q{
		SELECT count(*) > 200, count(*) - count(DISTINCT key)
		FROM payment WHERE key LIKE 'key-%'}),
	't|0',
	'they paid, and never twice');
is( $node->safe_psql(
		'postgres', q{
		SELECT count(*)
		FROM (SELECT key FROM idempotency_key WHERE action = 'pay') AS record
			 FULL JOIN payment USING (key)
		WHERE payment IS NULL OR record IS NULL}),
	'0',
	'payments and records belong together');

done_testing();
