# Records and metrics survive pg_dump and restore byte for byte, in whatever
# schema the extension is, and nothing of the extension keeps a database from being
# dropped, renamed or used as a template.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IPC::Run;
use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_server('main');
$node->start;
$node->safe_psql('postgres', 'CREATE ROLE app');

# One record of each kind: text that jsonb would change, bytes, a final error,
# a tenant and an actor that are not ASCII, no fingerprint, a digest
my $fill = <<'SQL';
GRANT USAGE ON SCHEMA :"schema" TO app;
SET search_path = :"schema";
GRANT EXECUTE ON FUNCTION idempotency_replay TO app;
BEGIN;
SELECT idempotency_begin('shop', 'pay', 'json', '{"amount": 10.0}');
SELECT idempotency_finish('shop', 'pay', 'json', 201,
	E'{ "b" : 1.00,"a":"\u00e9\\u00e9", "b":2 }', '{"Location": "/1"}');
SELECT idempotency_begin(NULL, 'pay', 'bytes', request_hash => '\x0123456789abcdef0123456789abcdef');
SELECT idempotency_finish(NULL, 'pay', 'bytes', 200, body => '\x00ff0a0d5c');
SELECT idempotency_begin('shop', 'pay', 'error', ttl => '2 days');
SELECT idempotency_finish('shop', 'pay', 'error', 402, '"declined"');
SELECT idempotency_begin(E'M\u00fcller', 'pay', 'actor', 'null', E'Z\u00f6e');
SELECT idempotency_finish(E'M\u00fcller', 'pay', 'actor', 204, actor => E'Z\u00f6e');
COMMIT;
CALL idempotency_sweep();
SQL
my $show = q{
	SET search_path = :"schema";
	SELECT * FROM idempotency_key ORDER BY key;
};
my $show_metrics = q{
	SET search_path = :"schema";
	SELECT * FROM idempotency_metric ORDER BY bucket, action, node;
};

foreach my $schema ('public', 'Odd; Schema')
{
	my %in_schema = (extra_params => [ '-v', "schema=$schema", '-v',
		'VERBOSITY=verbose' ]);

	$node->safe_psql('postgres', 'CREATE DATABASE source');
	$node->safe_psql('source', qq{
		CREATE SCHEMA IF NOT EXISTS "$schema";
		CREATE EXTENSION idempotency SCHEMA "$schema"});
	$node->safe_psql('source', $fill, %in_schema);
	my $records = $node->safe_psql('source', $show, %in_schema);
	is(scalar(split(/\n/, $records)), 4, "$schema: there are records");
	my $metrics = $node->safe_psql('source', $show_metrics, %in_schema);
	like($metrics, qr/\|pay\|\d+\/\d+\/\d+\|4\|/, "$schema: there are metrics");

	my $dump = $node->basedir . '/dump';
	my %restore = (
		'plain text' => [
			[ 'pg_dump', '-Fp', '-f', "$dump.sql", $node->connstr('source') ],
			[
				'psql', '-X', '-v', 'ON_ERROR_STOP=1', '-f', "$dump.sql",
				$node->connstr('target')
			]
		],
		'custom format' => [
			[ 'pg_dump', '-Fc', '-f', "$dump.custom", $node->connstr('source') ],
			[
				'pg_restore', '-e', '-j', '2', '-d', $node->connstr('target'),
				"$dump.custom"
			]
		]);

	foreach my $format (sort keys %restore)
	{
		my $what = "$schema, $format";

		$node->safe_psql('postgres', 'CREATE DATABASE target');
		foreach my $command (@{ $restore{$format} })
		{
			my ($stdout, $stderr);

			ok(IPC::Run::run($command, '>', \$stdout, '2>', \$stderr),
				"$what: $command->[0]");
			is($stderr, '', "$what: $command->[0] has nothing to complain of");
		}
		is($node->safe_psql('target', $show, %in_schema),
			$records, "$what: records are the same");
		is($node->safe_psql('target', $show_metrics, %in_schema),
			$metrics, "$what: metrics are the same");

		my $call = 'SET search_path = :"schema"; SELECT outcome, status_code,'
		  . ' response, headers, body FROM ';
		is( $node->safe_psql(
				'target',
				"$call idempotency_begin('shop', 'pay', 'json', '{\"amount\": 10}')",
				%in_schema),
			qq(replayed|201|{ "b" : 1.00,"a":"\x{c3}\x{a9}\\u00e9", "b":2 })
			  . '|{"Location": "/1"}|',
			"$what: an answer is replayed byte for byte");
		is( $node->safe_psql(
				'target',
				"$call idempotency_begin(NULL, 'pay', 'bytes', request_hash => '\\x0123456789abcdef0123456789abcdef')",
				%in_schema),
			'replayed|200|||\x00ff0a0d5c',
			"$what: so is one that is not JSON");
		is( $node->safe_psql(
				'target',
				"SET ROLE app; $call idempotency_replay('shop', 'pay', 'error')",
				%in_schema),
			'replayed|402|"declined"||',
			"$what: so is an error, to a role that had the right");
		my ($rc, $stdout, $stderr) = $node->psql(
			'target',
			"$call idempotency_begin('shop', 'pay', 'json', '{\"amount\": 11}')",
			%in_schema);
		like($stderr, qr/ERROR:  ID004: /,
			"$what: a different request is told from a repeat");
		is( $node->safe_psql(
				'target', q{
				SET search_path = :"schema";
				BEGIN;
				SELECT outcome FROM idempotency_begin('shop', 'pay', 'new');
				SELECT idempotency_finish('shop', 'pay', 'new');
				COMMIT;
				SELECT outcome FROM idempotency_begin('shop', 'pay', 'new')},
				%in_schema),
			"started\ncompleted\nreplayed",
			"$what: a new request runs");
		$node->safe_psql('postgres', 'DROP DATABASE target');
	}

	# A copy has the records, and claims of its own
	$node->safe_psql('postgres', 'CREATE DATABASE copy TEMPLATE source');
	is($node->safe_psql('copy', $show, %in_schema),
		$records, "$schema: a copy has the same records");
	my $session = $node->background_psql('source', %in_schema);
	$session->query_safe('SET search_path = :"schema"');
	$session->query_safe('BEGIN');
	$session->query_safe(
		q{SELECT idempotency_begin('shop', 'pay', 'two-databases')});
	is( $node->safe_psql(
			'copy', q{
			SET search_path = :"schema";
			BEGIN;
			SELECT outcome
			FROM idempotency_try_begin('shop', 'pay', 'two-databases');
			ROLLBACK}, %in_schema),
		'started',
		"$schema: a claim in one does not hold up the other");
	is( $node->safe_psql('copy', q{
			SET search_path = :"schema";
			SELECT count(*) FROM idempotency_in_flight}, %in_schema),
		'0',
		"$schema: nor is it shown there");
	$session->query_safe('ROLLBACK');
	$session->quit;

	$node->safe_psql('postgres', 'ALTER DATABASE copy RENAME TO renamed');
	is($node->safe_psql('renamed', $show, %in_schema),
		$records, "$schema: a renamed database has the same records");

	$node->safe_psql('renamed',
		'SET search_path = :"schema"; CALL idempotency_sweep()', %in_schema);
	$node->safe_psql('postgres', "DROP DATABASE $_")
	  foreach 'renamed', 'source';
	is( $node->safe_psql(
			'postgres', 'SELECT count(*) FROM pg_database WHERE NOT datistemplate'),
		'1',
		"$schema: databases can be dropped right after use");
}

done_testing();
