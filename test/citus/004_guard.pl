# A claim that was not finished is refused before anything is committed on any node:
# whichever node the transaction began on and whichever has the tenant, whatever else
# it wrote and where, and in whatever order the libraries were loaded.  Savepoints
# take claims and their finish with them.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use CitusCluster;
use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

skip_without_citus();

# Transactions that leave a claim unfinished.  CLAIM begins it, PAY and FINISH are the
# work and its end; PAY_ELSEWHERE is for a tenant of another node, and NOTE_HERE writes
# a local table.
my %unfinished = (
	'begin alone' => 'CLAIM',
	'begin alone, in a block' => 'BEGIN; CLAIM; COMMIT',
	'begin and work' => 'BEGIN; CLAIM; PAY; COMMIT',
	'work and begin' => 'BEGIN; PAY; CLAIM; COMMIT',
	'work elsewhere' => 'BEGIN; CLAIM; PAY_ELSEWHERE; COMMIT',
	'work elsewhere first' => 'BEGIN; PAY_ELSEWHERE; CLAIM; COMMIT',
	'work on two nodes' => 'BEGIN; PAY; CLAIM; PAY_ELSEWHERE; COMMIT',
	'work on two nodes and in a local table' =>
	  'BEGIN; NOTE_HERE; PAY; CLAIM; PAY_ELSEWHERE; COMMIT',
	'work in a local table' => 'BEGIN; CLAIM; NOTE_HERE; COMMIT',
	'work in a local table first' => 'BEGIN; NOTE_HERE; CLAIM; COMMIT',
	'work on all shards' =>
	  "BEGIN; CLAIM; PAY; PAY_ELSEWHERE; UPDATE payment SET receipt = '00000000-0000-0000-0000-000000000000' WHERE key = 'KEY'; COMMIT",
	'one claim of two' =>
	  'BEGIN; CLAIM; CLAIM_ELSEWHERE; PAY; PAY_ELSEWHERE; FINISH; COMMIT',
	'the other claim of two' =>
	  'BEGIN; CLAIM; CLAIM_ELSEWHERE; PAY; PAY_ELSEWHERE; FINISH_ELSEWHERE; COMMIT',
	'COMMIT AND CHAIN' => 'BEGIN; CLAIM; PAY; COMMIT AND CHAIN; COMMIT',
	'one message of several statements' => 'CLAIM\; PAY',
	'one message, work first' => 'PAY\; CLAIM',
	'one statement' =>
	  "INSERT INTO payment SELECT 'TENANT', 'KEY', gen_random_uuid() FROM idempotency_begin('TENANT', 'pay', 'KEY')",
	'one statement, work elsewhere' =>
	  "INSERT INTO payment SELECT 'ELSEWHERE', 'KEY', gen_random_uuid() FROM idempotency_begin('TENANT', 'pay', 'KEY')",
	'one statement that calls a function' => "SELECT claim_and_pay('TENANT', 'KEY')",
	'PL/pgSQL' => "DO \$\$ BEGIN PERFORM claim_and_pay('TENANT', 'KEY'); END \$\$",
	'PL/pgSQL with COMMIT' =>
	  "DO \$\$ BEGIN PERFORM claim_and_pay('TENANT', 'KEY'); COMMIT; END \$\$",
	'PL/pgSQL, finish in a block that fails' => q{
		DO $$
		BEGIN
			PERFORM claim_and_pay('TENANT', 'KEY');
			BEGIN
				PERFORM idempotency_finish('TENANT', 'pay', 'KEY');
				RAISE division_by_zero;
			EXCEPTION WHEN division_by_zero THEN
				NULL;
			END;
		END $$},
	'savepoint' => 'BEGIN; SAVEPOINT s; CLAIM; PAY; RELEASE s; COMMIT',
	'savepoint after begin that is rolled back' =>
	  'BEGIN; CLAIM; SAVEPOINT s; PAY; ROLLBACK TO s; PAY; COMMIT',
	'finish that is rolled back' =>
	  'BEGIN; CLAIM; PAY; SAVEPOINT s; FINISH; ROLLBACK TO s; COMMIT',
	'finish that is rolled back, work elsewhere' =>
	  'BEGIN; CLAIM; PAY_ELSEWHERE; SAVEPOINT s; FINISH; ROLLBACK TO s; COMMIT',
	'finish that is rolled back, after another savepoint' =>
	  'BEGIN; SAVEPOINT a; CLAIM; RELEASE a; PAY; SAVEPOINT b; SAVEPOINT c; FINISH; RELEASE c; ROLLBACK TO b; COMMIT',
	'release that is rolled back' =>
	  "BEGIN; CLAIM; PAY; SAVEPOINT s; SELECT idempotency_release('TENANT', 'pay', 'KEY'); ROLLBACK TO s; COMMIT",
	'serializable' =>
	  'BEGIN ISOLATION LEVEL SERIALIZABLE; CLAIM; PAY; PAY_ELSEWHERE; COMMIT');

# Transactions that are committed, with the work that is left of them
my %finished = (
	'begin, work, finish' => [ 'BEGIN; CLAIM; PAY; FINISH; COMMIT', 'TENANT' ],
	'work elsewhere' => [ 'BEGIN; CLAIM; PAY_ELSEWHERE; FINISH; COMMIT', 'ELSEWHERE' ],
	'work on two nodes and in a local table' => [
		'BEGIN; PAY_ELSEWHERE; NOTE_HERE; CLAIM; PAY; FINISH; COMMIT',
		'TENANT', 'ELSEWHERE'
	],
	'work after finish' => [ 'BEGIN; CLAIM; FINISH; PAY; COMMIT', 'TENANT' ],
	'one message' => [ 'CLAIM\; PAY\; FINISH', 'TENANT' ],
	'savepoints that are released' => [
		'BEGIN; SAVEPOINT a; CLAIM; SAVEPOINT b; PAY; RELEASE b; SAVEPOINT c; FINISH; RELEASE a; COMMIT',
		'TENANT'
	],
	'work that is rolled back' =>
	  ['BEGIN; CLAIM; SAVEPOINT s; PAY; ROLLBACK TO s; FINISH; COMMIT'],
	'claim that is rolled back and begun again' => [
		'BEGIN; SAVEPOINT s; CLAIM; PAY; ROLLBACK TO s; CLAIM; PAY; FINISH; COMMIT',
		'TENANT'
	],
	'finish that is rolled back and called again' => [
		'BEGIN; CLAIM; PAY; SAVEPOINT s; FINISH; ROLLBACK TO s; FINISH; COMMIT',
		'TENANT'
	],
	'PL/pgSQL, work in a block that fails' => [
		q{
		DO $$
		BEGIN
			PERFORM idempotency_begin('TENANT', 'pay', 'KEY');
			BEGIN
				INSERT INTO payment VALUES ('TENANT', 'KEY', gen_random_uuid());
				RAISE division_by_zero;
			EXCEPTION WHEN division_by_zero THEN
				INSERT INTO payment VALUES ('ELSEWHERE', 'KEY', gen_random_uuid());
			END;
			PERFORM idempotency_finish('TENANT', 'pay', 'KEY');
		END $$},
		'ELSEWHERE'
	]);

# Transactions that are committed without a record
my %without_record = (
	'claim that is rolled back' => 'BEGIN; SAVEPOINT s; CLAIM; ROLLBACK TO s; PAY; COMMIT',
	'claim that is released' =>
	  "BEGIN; CLAIM; PAY; SELECT idempotency_release('TENANT', 'pay', 'KEY'); COMMIT",
	'claim in a block that fails' => q{
		DO $$
		BEGIN
			BEGIN
				PERFORM claim_and_pay('TENANT', 'KEY');
				RAISE division_by_zero;
			EXCEPTION WHEN division_by_zero THEN
				INSERT INTO payment VALUES ('TENANT', 'KEY', gen_random_uuid());
			END;
		END $$});

sub write_out
{
	my ($sql, $tenant, $elsewhere, $key) = @_;

	$sql =~ s/\bCLAIM(_ELSEWHERE)?\b/"SELECT idempotency_begin('" . ($1 ? 'ELSEWHERE' : 'TENANT') . "', 'pay', 'KEY')"/ge;
	$sql =~ s/\bFINISH(_ELSEWHERE)?\b/"SELECT idempotency_finish('" . ($1 ? 'ELSEWHERE' : 'TENANT') . "', 'pay', 'KEY')"/ge;
	$sql =~ s/\bPAY(_ELSEWHERE)?\b/"INSERT INTO payment VALUES ('" . ($1 ? 'ELSEWHERE' : 'TENANT') . "', 'KEY', gen_random_uuid())"/ge;
	$sql =~ s/\bNOTE_HERE\b/INSERT INTO note VALUES ('KEY')/g;
	$sql =~ s/\bTENANT\b/$tenant/g;
	$sql =~ s/\bELSEWHERE\b/$elsewhere/g;
	$sql =~ s/\bKEY\b/$key/g;
	return $sql;
}

sub sorted_lines
{
	return join "\n", sort map { split /\n/ } @_;
}

# Whatever a node and two tenants, of which the second is of another node
sub test_guard
{
	my ($cluster, $node, $tenant, $elsewhere, $where) = @_;
	my $unfinished = "unfinished-$where" =~ s/\W+/-/gr;
	my (@payments, @records);

	foreach my $name (sort keys %unfinished)
	{
		like(
			$cluster->error_of_app(
				$node, write_out($unfinished{$name}, $tenant, $elsewhere, $unfinished)),
			qr/ERROR:  ID006: /,
			"$where: $name is refused");
	}
	foreach my $name (sort keys %finished)
	{
		my ($sql, @left) = @{ $finished{$name} };
		my $key = "$name-$where" =~ s/\W+/-/gr;

		is( $cluster->error_of_app(
				$node, write_out($sql, $tenant, $elsewhere, $key)) =~ s/^no error.*//sr,
			'',
			"$where: $name is committed");
		push @payments, map { write_out("$_ KEY", $tenant, $elsewhere, $key) } @left;
		push @records, "$tenant $key";
	}
	foreach my $name (sort keys %without_record)
	{
		my $key = "$name-$where" =~ s/\W+/-/gr;

		is( $cluster->error_of_app($node,
				write_out($without_record{$name}, $tenant, $elsewhere, $key))
			  =~ s/^no error.*//sr,
			'',
			"$where: $name is committed");
		push @payments, "$tenant $key";
	}

	is( sorted_lines(
			$cluster->on_coordinator("SELECT concat_ws(' ', tenant, key) FROM payment")),
		sorted_lines(@payments),
		"$where: the work that is left is that of what was committed");
	is( sorted_lines(
			$cluster->on_coordinator(
				"SELECT concat_ws(' ', tenant, key) FROM idempotency_key")),
		sorted_lines(@records),
		"$where: so are the records");
	is($node->safe_psql('postgres', "SELECT count(*) FROM note WHERE key LIKE 'unfinished%'"),
		'0', "$where: and the rows of the local table");
	foreach ($cluster->nodes)
	{
		ok( $_->poll_query_until(
				'postgres', "SELECT ($count_userlocks) = 0 AND NOT EXISTS (SELECT FROM pg_prepared_xacts)"),
			"$where: nothing is held on " . $_->name);
	}
	$cluster->forget_everything;
	return;
}

foreach my $preload ('citus,idempotency', 'idempotency,citus')
{
	# Citus may refuse to be loaded after others, and then the server does not start.
	if ($preload ne 'citus,idempotency')
	{
		my $node = new_server('other-order', preload => 0,
			conf => "shared_preload_libraries = '$preload'");

		if (!$node->start(fail_ok => 1))
		{
			like(slurp_file($node->logfile), qr/FATAL:  Citus has to be loaded first/,
				"$preload: the server does not start");
			next;
		}
		$node->stop;
	}

	my $cluster = CitusCluster->new(
		preload => $preload,
		name => $preload =~ s/,/-before-/r . '-');
	my @nodes = $cluster->nodes;

	$cluster->on_coordinator(
		q{
		CREATE FUNCTION claim_and_pay(t text, k text) RETURNS text LANGUAGE plpgsql AS $$
		BEGIN
			PERFORM idempotency_begin(t, 'pay', k);
			INSERT INTO payment VALUES (t, k, gen_random_uuid());
			RETURN 'paid';
		END $$});
	$cluster->everywhere('CREATE TABLE note (key text); GRANT ALL ON note TO app');
	foreach my $i (0 .. $#nodes)
	{
		my ($own) = $cluster->tenants_of($nodes[$i], 1);
		my ($next) = $cluster->tenants_of($nodes[ ($i + 1) % @nodes ], 1);
		my ($last) = $cluster->tenants_of($nodes[ ($i + 2) % @nodes ], 1);
		my $where = "$preload, " . $nodes[$i]->name =~ s/.*-//r;

		test_guard($cluster, $nodes[$i], $own, $next, "$where, its own tenant");
		test_guard($cluster, $nodes[$i], $next, $last, "$where, a tenant of another node");
		test_guard($cluster, $nodes[$i], $last, $own, "$where, work on its own node");
	}

	# An administrator may turn the error into a warning, on all nodes.
	set_conf($_, 'idempotency.commit_guard', 'off') foreach @nodes;
	foreach my $node (@nodes)
	{
		my ($tenant) = $cluster->tenants_of($nodes[1], 1);
		my ($rc, $stdout, $stderr) = $node->psql(
			'postgres',
			write_out(
				'BEGIN; CLAIM; PAY; COMMIT',
				$tenant, '', 'warned-' . $node->name));

		like($stderr, qr/WARNING: /, "$preload: a warning is wanted on " . $node->name);
		is($rc, 0, "$preload: and no error");
	}
	is($cluster->on_coordinator("SELECT count(*) FROM payment"),
		'3', "$preload: what had a warning is committed");
	$cluster->stop;
}

done_testing();
