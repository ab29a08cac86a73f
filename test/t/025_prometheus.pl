# prometheus-postgres-exporter, given the queries that come with the extension,
# shows over HTTP what the views say.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use HTTP::Tiny;
use IPC::Run;
use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my ($program) =
  grep { -x }
  map { "$_/prometheus-postgres-exporter" } split(/:/, $ENV{PATH});
plan skip_all => 'prometheus-postgres-exporter is not installed'
  unless defined $program;

my $node = new_server('main', worker => 1,
	conf => "idempotency.sweep_interval = 100ms\nidempotency.metrics_interval = 1s\n");
$node->start;

# A schema of its own, and a role that can do no more than watch
$node->safe_psql(
	'postgres', q{
	CREATE SCHEMA "Idempotency";
	CREATE EXTENSION idempotency SCHEMA "Idempotency";
	CREATE ROLE exporter LOGIN IN ROLE pg_monitor;
	GRANT USAGE ON SCHEMA "Idempotency" TO pg_monitor;
	ALTER ROLE exporter SET search_path = "Idempotency"});

# Some requests of two actions, with every outcome
$node->safe_psql(
	'postgres', q{
	SET search_path = "Idempotency";
	CREATE FUNCTION work(request jsonb) RETURNS idempotency_response LANGUAGE sql
		RETURN ROW((request->>'status')::int, NULL, '{}', NULL, NULL)::idempotency_response;
	SELECT idempotency_run('t', 'orders "create"', 'k' || k, '{"status": 200}', 'work(jsonb)')
	FROM generate_series(1, 10) AS k, generate_series(1, 3) AS repeat;
	SELECT idempotency_run('t', 'orders "create"', 'e', '{"status": 404}', 'work(jsonb)');
	SELECT idempotency_run('t', 'orders "create"', 'r', '{"status": 503}', 'work(jsonb)');
	SELECT idempotency_try_begin('t', 'orders "create"', 'k1', '{"status": 201}');
	SELECT idempotency_begin('t', 'cards.charge', 'a', '{}', lease => '1 hour');
	SELECT idempotency_begin('t', 'cards.charge', 'b', '{}', lease => '1 hour');
	SELECT idempotency_begin('t', 'cards.charge', 'c', '{}', lease => '100 ms');
	SELECT idempotency_try_begin('t', 'cards.charge', 'b', '{}', lease => '1 hour');
	UPDATE idempotency_key SET expires_at = clock_timestamp() - interval '1 hour' WHERE key = 'e'});
my $session = session($node);
$session->query_safe('BEGIN; SET search_path = "Idempotency"');
$session->query_safe("SELECT idempotency_begin('t', 'cards.charge', 'held')");
$node->poll_query_until(
	'postgres', q{
	SELECT count(*) = 2 AND sum(stalled_leases) = 1 AND sum(swept) = 1
	FROM "Idempotency".idempotency_stats WHERE leases IS NOT NULL})
  or die 'nobody watches';

# The exporter
my $port = PostgreSQL::Test::Cluster::get_free_port();
my $log = "$PostgreSQL::Test::Utils::log_path/exporter.log";
my $exporter;
{
	local $ENV{DATA_SOURCE_NAME} =
		'host=' . $node->host . ' port=' . $node->port
	  . ' user=exporter dbname=postgres sslmode=disable';
	$exporter = IPC::Run::start(
		[
			$program,
			'--disable-default-metrics',
			'--disable-settings-metrics',
			"--extend.query-path=$FindBin::RealBin/../../prometheus/queries.yaml",
			"--web.listen-address=127.0.0.1:$port"
		],
		'>&', $log);
}

# also when a test dies
END
{
	local $?;
	if (defined $exporter)
	{
		$exporter->signal('KILL');
		$exporter->finish;
	}
}

# All samples of our metrics: name and labels to value
sub scrape
{
	my %samples;

	for (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
	{
		my $response =
		  HTTP::Tiny->new(proxy => undef)->get("http://127.0.0.1:$port/metrics");

		%samples = ();
		if ($response->{success})
		{
			foreach (split(/\n/, $response->{content}))
			{
				my ($name, $labels, $value) =
				  /^(idempotency_\w+)\{(.*)\} (\S+)$/
				  or next;
				my $datname = $labels =~ /datname="(\w+)"/ ? $1 : '';
				my ($action) = $labels =~ /action="((?:[^"\\]|\\.)*)"/;
				$action =~ s/\\(.)/$1/g if defined $action;
				die "$name without its database" unless $datname eq 'postgres';
				$samples{ join '/', $name, $action // () } = 0 + $value;
			}
		}
		return %samples if %samples;
		select(undef, undef, undef, 0.1);
	}
	die 'nothing to be scraped: ' . slurp_file($log);
}

# What the views say, as a list of name, action and value
sub expected
{
	my %samples;
	my $rows = $node->safe_psql(
		'postgres', q{
		SET search_path = "Idempotency";
		SELECT 'idempotency_' || name, action, value
		FROM idempotency_stats AS s,
			LATERAL (VALUES
				('started_count', started),
				('replay_count', replayed),
				('in_flight_count', in_flight),
				('conflict_count', mismatched),
				('expired_count', expired),
				('stalled_count', stalled),
				('taken_over_count', taken_over),
				('completed_count', completed),
				('errored_count', errored),
				('released_count', released),
				('swept_count', swept),
				('inflight', (SELECT count(*) FROM idempotency_in_flight AS f WHERE f.action = s.action)),
				('stalled', (SELECT count(*) FROM idempotency_stalled AS f WHERE f.action = s.action)),
				('run_seconds_sum', run_time / 1000),
				('run_seconds_p50', run_time_p50 / 1000),
				('run_seconds_p95', run_time_p95 / 1000),
				('run_seconds_p99', run_time_p99 / 1000),
				('lookup_seconds_sum', lookup_time / 1000),
				('lookup_seconds_p50', lookup_time_p50 / 1000),
				('lookup_seconds_p95', lookup_time_p95 / 1000),
				('lookup_seconds_p99', lookup_time_p99 / 1000)) AS v (name, value)});

	foreach (split(/\n/, $rows))
	{
		my ($name, $action, $value) = split(/\|/, $_, -1);
		$samples{"$name/$action"} = 0 + $value if $value ne '';
	}
	return %samples;
}

my %scraped = scrape();
my %expected = expected();

cmp_ok(scalar(keys %expected), '>=', 2 * 17, 'the views say something');
foreach (sort keys %expected)
{
	cmp_ok($scraped{$_} // 'nothing', '==', $expected{$_}, $_);
}
is($scraped{'idempotency_replay_count/orders "create"'},
	20, 'so many replays there were');
is($scraped{'idempotency_conflict_count/orders "create"'},
	1, 'so many mismatches');
is($scraped{'idempotency_inflight/cards.charge'},
	3, 'so many requests are in flight');
is($scraped{'idempotency_stalled/cards.charge'}, 1, 'so many are stalled');

# The health of the database
is($scraped{idempotency_health_warnings}, 1, 'there is a warning: a lease is stalled');
cmp_ok($scraped{idempotency_health_last_sweep_age_seconds},
	'>=', 0, 'the age of the last sweep');
is($scraped{idempotency_health_unswept_age_seconds},
	0, 'nothing is left to be swept');
is( $scraped{idempotency_health_table_bytes},
	$node->safe_psql(
		'postgres', q{SELECT pg_table_size('"Idempotency".idempotency_key')}),
	'the size of the table');
is( $scraped{idempotency_health_index_bytes},
	$node->safe_psql(
		'postgres', q{SELECT pg_indexes_size('"Idempotency".idempotency_key')}),
	'the size of its indexes');

# Counters go on
$node->safe_psql(
	'postgres', q{
	SET search_path = "Idempotency";
	SELECT idempotency_run('t', 'orders "create"', 'k1', '{"status": 200}', 'work(jsonb)')
	FROM generate_series(1, 5)});
$session->query_safe('ROLLBACK');
%scraped = scrape();
is($scraped{'idempotency_replay_count/orders "create"'},
	25, 'the next scrape has what happened meanwhile');
is($scraped{'idempotency_inflight/cards.charge'},
	2, 'and what is not in flight any more');

unlike(slurp_file($log), qr{(?<!/)idempotency},
	'the exporter has nothing to say about our queries');

$session->quit;
$node->stop;
done_testing();
