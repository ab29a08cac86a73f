# Logical replication of all tables between two servers that both have the
# extension preloaded: while one of them takes requests, the other one has all
# that the first one has, and its own metrics; then they change roles.  Last, what
# happens when both take the same request, and how to get out of it.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IPC::Run;
use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $timeout = $PostgreSQL::Test::Utils::timeout_default;
my $conf = <<'CONF';
idempotency.sweep_interval = 200ms
idempotency.metrics_interval = 1s
idempotency.min_ttl = 1s
CONF
my ($old, $new) = map {
	my $server = new_server(
		$_,
		worker => 1,
		init => [ allows_streaming => 'logical' ],
		conf => $conf);
	$server->start;
	$server;
} 'old', 'new';

sub on
{
	my ($server, $sql) = @_;

	return $server->safe_psql('postgres', $sql);
}

# Wait until two results are the same: servers sweep and flush as long as there is
# something to.
sub agree
{
	my ($got, $expected, $test) = @_;
	my @results;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	for (1 .. 10 * $timeout)
	{
		@results = ($got->(), $expected->());
		last if $results[0] eq $results[1];
		select(undef, undef, undef, 0.1);
	}
	return is($results[0], $results[1], $test);
}

# The same for a query on the servers
sub same
{
	my ($query, $test) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return agree(sub { on($new, $query) }, sub { on($old, $query) }, $test);
}

# Subscribe to all tables of a server.
sub subscribe
{
	my ($to, $from, $options) = @_;
	my $connection = $from->connstr('postgres');

	on($from, 'CREATE PUBLICATION everything FOR ALL TABLES');
	on($to,
		"CREATE SUBSCRIPTION everything CONNECTION \$\$$connection\$\$ PUBLICATION everything WITH ($options)"
	);
	return;
}

sub unsubscribe
{
	my ($to, $from) = @_;

	on($to, 'DROP SUBSCRIPTION everything');
	on($from, 'DROP PUBLICATION everything');
	return;
}

sub is_synchronized
{
	my ($server, $test) = @_;
	my $tables = on($server, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'");

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return eventually($server,
		"count(*) FILTER (WHERE srsubstate IN ('s', 'r')) = $tables FROM pg_subscription_rel",
		$test);
}

# A subscription that met no error and is still at work
sub is_sound
{
	my ($to, $from, $test) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;

	# the second has another name from PostgreSQL 19 on
	is( on( $to, q{
			SELECT apply_error_count,
				coalesce(to_jsonb(s) -> 'sync_table_error_count', to_jsonb(s) -> 'sync_error_count')
			FROM pg_stat_subscription_stats s}),
		'0|0',
		"$test: without errors");
	is( on($from, 'SELECT slot_name, active FROM pg_replication_slots'),
		'everything|t', "$test: at work");
	return;
}

# What one of a number of requests does.  They meet each other, and records that
# have just expired; whatever becomes of them is right.
on( $old, q{
	CREATE EXTENSION idempotency;
	CREATE TABLE payment (action text NOT NULL, key text NOT NULL);
	CREATE FUNCTION work(request jsonb) RETURNS json LANGUAGE sql AS $$
		INSERT INTO payment VALUES (request->>'action', request->>'key');
		SELECT json_build_object('paid', request->>'key') $$;
	CREATE FUNCTION attempt(call text) RETURNS boolean LANGUAGE plpgsql AS $$
	BEGIN
		EXECUTE 'SELECT ' || call;
		RETURN true;
	EXCEPTION WHEN SQLSTATE 'ID003' OR SQLSTATE 'ID005' THEN
		RETURN false;
	END $$;
	CREATE PROCEDURE make_request(kind text, n int) LANGUAGE plpgsql AS $$
	DECLARE
		action text := 'pay-' || n % 3;
		key text := 'key-' || n;
		request jsonb := jsonb_build_object('action', action, 'key', key);
		scope text := format('%L, %L, %L', 'shop', action, key);
		claim text;
	BEGIN
		CASE kind
			WHEN 'run' THEN
				PERFORM idempotency_try_run('shop', action, key, request, 'work(jsonb)', ttl => '1 s');
			WHEN 'store' THEN
				PERFORM idempotency_store('shop', action, key, request, 404, '{"error": "none"}', ttl => '1 s');
			WHEN 'seen' THEN
				PERFORM idempotency_first_seen('shop', 'consumer', ARRAY['message-' || n, 'message-' || n + 1], ttl => '1 s');
			WHEN 'forget' THEN
				PERFORM attempt(format('idempotency_forget(%s)', scope));
			ELSE
				claim := (idempotency_try_begin('shop', action, key, request, lease => '500 ms', ttl => '1 s')).claim;
				COMMIT;
				IF claim IS NULL THEN
					RETURN;
				END IF;
				PERFORM attempt(format('idempotency_checkpoint(%s, %L, ''charged'', ''{"n": 1}'', ''500 ms'')', scope, claim));
				COMMIT;
				PERFORM CASE kind
					WHEN 'finish' THEN attempt(format('idempotency_finish(%s, 200, claim => %L, ttl => ''1 s'')', scope, claim))
					WHEN 'release' THEN attempt(format('idempotency_release(%s, claim => %L)', scope, claim))
					WHEN 'fail' THEN attempt(format('idempotency_finish(%s, 503, claim => %L)', scope, claim))
				END;
		END CASE;
	END $$});

my $script = $old->basedir . '/load.sql';
append_to_file($script, <<'SQL');
\set n random(1, 50)
\set kind random(1, 9)
CALL make_request((ARRAY['run', 'run', 'store', 'seen', 'finish', 'release', 'fail', 'abandon', 'forget'])[:kind], :n);
SQL

# Make requests on a server for some seconds, and meanwhile do something else.
sub load
{
	my ($server, $seconds, $meanwhile) = @_;
	my ($out, $err) = ('', '');
	my $before = count_requests($server);
	my $pgbench = IPC::Run::start(
		[
			'pgbench', '-n', '-c', '4', '-T', $seconds, '-R', '300',
			'-f', $script, '-h', $server->host, '-p', $server->port, 'postgres'
		],
		'>', \$out, '2>', \$err);

	while ($pgbench->pumpable && $out !~ /^tps/m)
	{
		$meanwhile->();
		$pgbench->pump_nb;
	}
	$pgbench->finish;
	is($err, '', $server->name . ': no request fails');
	my $after = count_requests($server);
	foreach my $column (keys %$before)
	{
		cmp_ok($after->{$column}, '>', $before->{$column},
			$server->name . ": there were some $column");
	}
	return;
}

sub count_requests
{
	my ($server) = @_;
	my @columns = qw(started replayed expired completed errored released swept);
	my %count;

	@count{@columns} = split(
		/\|/,
		on( $server,
			'SELECT '
			  . join(', ', map { "coalesce(sum($_), 0)" } @columns)
			  . ' FROM idempotency_stats'));
	return \%count;
}

# Requests that come to nothing, but are counted
sub count_some
{
	my ($server) = @_;

	on( $server, q{
		BEGIN;
		SELECT idempotency_begin('other', 'pay-' || n, 'key') FROM generate_series(0, 2) AS n;
		ROLLBACK});
	return;
}

my $records =
  'SELECT k FROM idempotency_key AS k ORDER BY tenant, action, key, actor';
my $payments =
  'SELECT action, key, count(*) FROM payment GROUP BY action, key ORDER BY action, key';

sub metrics_of
{
	my ($node) = @_;

	return
	  "SELECT m FROM idempotency_metric AS m WHERE node = '$node' ORDER BY bucket, action";
}

# Unique requests and duplicates by action, as both servers have counted them
sub counted
{
	my %sum;

	foreach my $server ($old, $new)
	{
		foreach my $row (
			split(
				/\n/,
				on( $server,
					'SELECT action, started, replayed + in_flight FROM idempotency_stats'
				)))
		{
			my ($action, $requests, $duplicates) = split(/\|/, $row);

			foreach my $name ($action, 'total')
			{
				$sum{$name}[0] += $requests;
				$sum{$name}[1] += $duplicates;
			}
		}
	}
	return join("\n", sort map { "$_|$sum{$_}[0]|$sum{$_}[1]" } keys %sum);
}

# Records of each kind, kept for longer than the test takes
my ($running, $stalled, $failed) =
  map { "00000000-0000-0000-0000-00000000000$_" } 1 .. 3;
on( $old, qq{
	SELECT idempotency_run('bank', 'pay', 'done', '{"action": "bank", "key": "done"}', 'work(jsonb)');
	SELECT idempotency_store('bank', 'pay', 'denied', '{"n": 1}', 402, '{"error" :  "no money"}', '{"a": "b"}');
	SELECT idempotency_store('bank', 'pay', 'file', NULL, 200, body => '\\x00ff');
	SELECT idempotency_begin('bank', 'pay', 'running', '{"n": 2}', lease => '1 hour', claim => '$running');
	SELECT idempotency_checkpoint('bank', 'pay', 'running', '$running', 'charged', '{"n": 2}', '1 hour');
	SELECT idempotency_begin('bank', 'pay', 'stalled', '{"n": 3}', lease => '1 hour', claim => '$stalled');
	SELECT idempotency_checkpoint('bank', 'pay', 'stalled', '$stalled', 'charged', '{"n": 3}', '1 ms');
	SELECT idempotency_begin('bank', 'pay', 'failed', '{"n": 4}', lease => '1 hour', claim => '$failed');
	SELECT idempotency_checkpoint('bank', 'pay', 'failed', '$failed', 'reserved', '{"n": 4}');
	SELECT idempotency_finish('bank', 'pay', 'failed', 503, claim => '$failed');
	SELECT idempotency_first_seen('bank', 'consumer', ARRAY['m1', 'm2'])});

# The subscriber has counted the same actions in the same minute
my $dump = $old->basedir . '/schema.sql';
$old->command_ok([ 'pg_dump', '-s', '-f', $dump, 'postgres' ], 'schema is dumped');
on($new, slurp_file($dump));
my $minute = "SELECT max(bucket) FROM idempotency_metric WHERE action = 'pay-0'";
for (1 .. $timeout)
{
	foreach my $server ($old, $new)
	{
		count_some($server);
		on($server, 'CALL idempotency_sweep()');
	}
	last if on($old, $minute) eq on($new, $minute);
}
is(on($new, $minute), on($old, $minute), 'both servers have counted in one minute');
my $node_old = on($old, 'SELECT DISTINCT node FROM idempotency_metric');
my $node_new = on($new, 'SELECT DISTINCT node FROM idempotency_metric');
isnt($node_old, $node_new, 'as two nodes');

# A subscription that begins while requests come, and goes on with them
my $subscribed = 0;
load(
	$old, 8,
	sub {
		subscribe($new, $old, 'copy_data = true') unless $subscribed++;
		count_some($new);
		on( $new, q{
			SELECT idempotency_replay('bank', 'pay', 'done');
			CALL idempotency_sweep()});
	});
is_synchronized($new, 'the tables are copied');
same($records, 'the subscriber has all records');
same($payments, 'and all payments');
same(metrics_of($node_old), 'and the metrics of the publisher');
is( on($new, 'SELECT DISTINCT node FROM idempotency_metric ORDER BY node'),
	join("\n", sort $node_old, $node_new),
	'besides its own');
is( on( $new,
		"SELECT count(DISTINCT action) FROM idempotency_metric AS m JOIN idempotency_metric AS o USING (bucket, action) WHERE m.node = '$node_old' AND o.node = '$node_new' AND action LIKE 'pay-%'"
	),
	'3',
	'also of the same minutes and actions');
is( on($old, 'SELECT DISTINCT node FROM idempotency_metric'),
	$node_old, 'the publisher has only its own');
my $ratio =
  q{SELECT coalesce(action, 'total'), sum(requests), sum(duplicates) FROM idempotency_replay_ratio GROUP BY action};
agree(
	sub { join("\n", sort split(/\n/, on($new, $ratio))) },
	\&counted,
	'the ratio of replays is that of both');
is_sound($new, $old, 'subscription');
unlike(slurp_file($new->logfile), qr/ERROR|conflict/, 'and in its log');

# The publisher does not sweep what is claimed, so here is what the subscriber does
# by itself.
my $claims = session($old);
$claims->query_safe(q{
	BEGIN;
	SELECT idempotency_begin('bank', 'sweep', 'just expired');
	SELECT idempotency_begin('bank', 'sweep', 'long expired');
	SELECT idempotency_begin('bank', 'sweep', 'leased expired');}
	  =~ s/(just|long|leased) expired/$1-expired/gr);
on( $old, q{
	INSERT INTO idempotency_key (tenant, action, key, actor, state, status_code, attempt, created_at, lease_expires_at, expires_at, ttl)
	SELECT 'bank', 'sweep', key, '', 'completed'::idempotency_state, 200, 1, now() - interval '1 day', NULL::timestamptz, now() - ago, NULL::interval
	FROM (VALUES ('just-expired', interval '1 s'), ('long-expired', interval '10 min')) AS r (key, ago)
	UNION ALL
	SELECT 'bank', 'sweep', 'leased-expired', '', 'pending', NULL, 1, now() - interval '1 day', now() - interval '1 h', now() - interval '10 min', '1 s'}
);
my $expired =
  q{SELECT key FROM idempotency_key WHERE action = 'sweep' ORDER BY key};
$old->wait_for_catchup('everything');
eventually($new, "count(*) = 2 FROM ($expired) AS k",
	'a subscriber sweeps what expired long ago');
on($new, 'CALL idempotency_sweep()');
is(on($new, $expired), "just-expired\nleased-expired",
	'and leaves what has just expired to the publisher, and all leases');
is( on($old, $expired),
	"just-expired\nleased-expired\nlong-expired",
	'which has not swept yet');

# The subscriber becomes the server that takes requests
unsubscribe($new, $old);
eventually($new, "count(*) = 0 FROM ($expired) AS k",
	'without a subscription everything is swept at once');
is( on($old, $expired),
	"just-expired\nleased-expired\nlong-expired",
	'by this server alone');
$claims->query_safe('ROLLBACK');
$claims->quit;
eventually($old, "count(*) = 0 FROM ($expired) AS k", 'and then by the other one');
same($records, 'again both have the same records');
subscribe($old, $new, 'copy_data = false');

sub begin_on_new
{
	my ($key, $arguments) = @_;

	return on($new,
		"SELECT outcome, status_code, response, headers, body, attempt, recovery_point, recovery_state FROM idempotency_try_begin('bank', 'pay', '$key', $arguments)"
	);
}

is(begin_on_new('done', q{'{"action": "bank", "key": "done"}'}),
	'replayed|200|{"paid" : "done"}|||1||', 'an answer of the other server is replayed');
is(begin_on_new('denied', q{'{"n": 1}'}),
	'replayed|402|{"error" :  "no money"}|{"a": "b"}||1||', 'an error, too');
is(begin_on_new('file', 'NULL'),
	'replayed|200|||\x00ff|1||', 'and one that is not JSON');
is(begin_on_new('denied', q{'{"n": 9}'}),
	'mismatched|||||||', 'a different request is known as such');
like(begin_on_new('running', q{'{"n": 2}'}),
	qr/^in_flight\|/, 'a lease is held');
is( begin_on_new('running', qq('{"n": 2}', lease => '1 hour', claim => '$running')),
	'started|||||1|charged|{"n": 2}',
	'by the claim that began it on the other server, with its recovery point');
is( on( $new,
		"SELECT idempotency_checkpoint('bank', 'pay', 'running', '$running', 'mailed') IS NOT NULL"
	),
	't',
	'which can go on');
is( on( $new,
		"SELECT idempotency_finish('bank', 'pay', 'running', 201, '{}', claim => '$running')"
	),
	'completed',
	'and be finished');
is(begin_on_new('running', q{'{"n": 2}'}),
	'replayed|201|{}|||1||', 'which the repeat gets');
is( begin_on_new('stalled', q{'{"n": 3}', lease => '1 hour'}),
	'started|||||2|charged|{"n": 3}',
	'a lease that ran out is taken over');
like(
	error_of(
		$new, 'postgres',
		"SELECT idempotency_finish('bank', 'pay', 'stalled', claim => '$stalled')"
	),
	qr/ERROR:  ID005: /,
	'from the claim that had it');
is( begin_on_new('failed', q{'{"n": 4}', lease => '1 hour'}),
	'started|||||2|reserved|{"n": 4}',
	'so is one that was released');
is( on( $new,
		q{SELECT idempotency_first_seen('bank', 'consumer', ARRAY['m1', 'm3', 'm2'])}
	),
	'm3',
	'messages that the other server has seen are known');

load($new, 4, sub { count_some($old) });
same($records, 'roles are changed: the former publisher gets all records');
same($payments, 'and all payments');
is_sound($old, $new, 'subscription the other way round');
eventually($old,
	"sum(started) = (SELECT sum(started) FROM idempotency_stats) FROM idempotency_metric WHERE node = '$node_old'",
	'and keeps its own metrics');

# A subscription that begins with empty tables, on a server that was the publisher:
# what it has counted itself comes back to it, so it is to count under another name.
unsubscribe($old, $new);
$old->restart;
on($old, 'TRUNCATE idempotency_key, idempotency_metric, payment');
my $offset = -s $old->logfile;
$subscribed = 0;
load(
	$new, 4,
	sub {
		subscribe($old, $new, 'copy_data = true') unless $subscribed++;
		count_some($old);
	});
is_synchronized($old, 'the tables are copied back');
same($records, 'all records are there');
same($payments, 'and all payments');
same(metrics_of($node_new), 'and the metrics of the new publisher');
is_sound($old, $new, 'subscription with a copy');
unlike(substr(slurp_file($old->logfile), $offset),
	qr/ERROR|conflict/, 'and in its log');

# Both servers take a request.  Each runs it, and the second record to arrive stops
# the subscription, until that of the subscriber is forgotten.  The work was done on
# both, and nothing undoes that.
foreach my $server ($old, $new)
{
	is( on( $server,
			q{SELECT outcome FROM idempotency_run('bank', 'pay', 'both', '{"action": "bank", "key": "both"}', 'work(jsonb)')}
		),
		'completed',
		'a request to both servers runs on ' . $server->name);
}
eventually($old, 'apply_error_count > 0 FROM pg_stat_subscription_stats',
	'and stops the subscription');
on($new, q{SELECT idempotency_store('bank', 'pay', 'later', NULL, 200)});
is(on($old, q{SELECT outcome FROM idempotency_replay('bank', 'pay', 'later')}),
	'', 'so that nothing arrives');
is(on($old, q{SELECT idempotency_forget('bank', 'pay', 'both')}),
	't', 'the record of the subscriber is forgotten');
same($records, 'then the rest arrives');
is(on($old, q{SELECT count(*) FROM payment WHERE key = 'both'}),
	'2', 'with the work, which was done twice');

is(complaints_of($_, deadlocks => 1), '', 'no crash: ' . $_->name) foreach $old, $new;
$_->stop foreach $old, $new;
done_testing();
