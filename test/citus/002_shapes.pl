# A call works in whatever statement it stands, on each node and for the tenants of
# each node: what Citus would send to another node by itself, what it would not,
# and what it plans in other ways.  The first time the request is begun, then it is
# replayed, there and on another node.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use CitusCluster;
use IPC::Run;
use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

skip_without_citus();

my $cluster = CitusCluster->new;
my @nodes = $cluster->nodes;
my @requests;

# What the shapes below are about.  Each has CALL{tenant|key}, and says what came
# of it: the outcome, and the receipt if there is one.
my %shape = (
	'expression' => q{SELECT said(CALL{TENANT|KEY})},
	'FROM' => q{SELECT said(r) FROM CALL{TENANT|KEY} AS r},
	'FROM, by columns' =>
	  q{SELECT concat_ws(' ', outcome, response->>'receipt') FROM CALL{TENANT|KEY}},
	'subquery in FROM' =>
	  q{SELECT said(r) FROM (SELECT CALL{TENANT|KEY} AS r OFFSET 0) AS s},
	'join with a local table' =>
	  q{SELECT said(r) FROM asked_here, CALL{tenant|key} AS r WHERE key = KEY},
	'LEFT JOIN LATERAL with a local table' =>
	  q{SELECT said(r) FROM asked_here LEFT JOIN LATERAL CALL{tenant|key} AS r ON true WHERE key = KEY},
	'expression over a local table' =>
	  q{SELECT said(CALL{tenant|key}) FROM asked_here WHERE key = KEY},
	'join with a distributed table' =>
	  q{SELECT said(r) FROM asked JOIN LATERAL CALL{tenant|key} AS r ON true WHERE tenant = TENANT AND key = KEY},
	'expression over a distributed table' =>
	  q{SELECT said(CALL{tenant|key}) FROM asked WHERE tenant = TENANT AND key = KEY},
	'expression over all shards' =>
	  q{SELECT said(CALL{tenant|key}) FROM asked WHERE key = KEY},
	'aggregate over all shards, then the call' =>
	  q{SELECT said(CALL{max(tenant)|max(key)}) FROM asked WHERE key = KEY},
	'join with a reference table' =>
	  q{SELECT said(r) FROM asked_everywhere, CALL{tenant|key} AS r WHERE key = KEY},
	'INSERT ... SELECT into a local table' =>
	  q{INSERT INTO told_here SELECT said(r) FROM CALL{TENANT|KEY} AS r RETURNING said},
	'INSERT ... SELECT into a distributed table' =>
	  q{INSERT INTO told SELECT TENANT, said(r) FROM CALL{TENANT|KEY} AS r RETURNING said},
	'INSERT ... SELECT from one distributed table into another' =>
	  q{INSERT INTO told SELECT tenant, said(CALL{tenant|key}) FROM asked WHERE tenant = TENANT AND key = KEY RETURNING said},
	'INSERT ... VALUES into a local table' =>
	  q{INSERT INTO told_here VALUES (said(CALL{TENANT|KEY})) RETURNING said},
	'INSERT ... VALUES into a distributed table' =>
	  q{INSERT INTO told VALUES (TENANT, said(CALL{TENANT|KEY})) RETURNING said},
	'UPDATE of a local table' =>
	  q{UPDATE asked_here SET said = said(CALL{tenant|key}) WHERE key = KEY RETURNING said},
	'trigger of a local table' =>
	  q{INSERT INTO told_by_NAME VALUES (TENANT, KEY) RETURNING said},
	'subqueries as arguments' =>
	  q{SELECT said(CALL{(SELECT TENANT::text)|(SELECT KEY::text)})},
	'subquery over a distributed table as an argument' =>
	  q{SELECT said(CALL{(SELECT tenant FROM asked WHERE key = KEY)|KEY})},
	'CTE' =>
	  q{WITH r AS MATERIALIZED (SELECT CALL{TENANT|KEY} AS r) SELECT said(r) FROM r},
	'CTE that writes a local table' => q{
		WITH r AS (SELECT CALL{TENANT|KEY} AS r),
			written AS (INSERT INTO told_here SELECT said(r) FROM r RETURNING said)
		SELECT said FROM written},
	'CTE that reads a distributed table' => q{
		WITH a AS MATERIALIZED (SELECT tenant, key FROM asked WHERE tenant = TENANT AND key = KEY)
		SELECT said(CALL{tenant|key}) FROM a},
	'VALUES' => q{VALUES (said(CALL{TENANT|KEY}))},
	'UNION ALL' =>
	  q{SELECT said(CALL{TENANT|KEY}) UNION ALL SELECT 'never' WHERE false},
	'ORDER BY and LIMIT' =>
	  q{SELECT said(CALL{TENANT|KEY}) FROM generate_series(1, 3) AS n WHERE n = 2 ORDER BY n LIMIT 1},
	'CASE' =>
	  q{SELECT CASE WHEN KEY = 'other' THEN 'never' ELSE said(CALL{TENANT|KEY}) END},
	'array' =>
	  q{SELECT said(r) FROM unnest(ARRAY[CALL{TENANT|KEY}]) AS r},
	'WHERE' => q{
		SELECT current_setting('test.said')
		WHERE set_config('test.said', said(CALL{TENANT|KEY}), false) <> ''},
	'DO with PERFORM' => q{
		DO $$ BEGIN PERFORM set_config('test.said', said(CALL{TENANT|KEY}), false); END $$;
		SELECT current_setting('test.said')},
	'DO with PERFORM ... FROM' => q{
		DO $$ BEGIN PERFORM set_config('test.said', said(r), false) FROM CALL{TENANT|KEY} AS r; END $$;
		SELECT current_setting('test.said')},
	'DO with an assignment' => q{
		DO $$
		DECLARE
			r idempotency_result;
		BEGIN
			r := CALL{TENANT|KEY};
			PERFORM set_config('test.said', said(r), false);
		END $$;
		SELECT current_setting('test.said')},
	'DO with SELECT INTO' => q{
		DO $$
		DECLARE
			r idempotency_result;
		BEGIN
			SELECT * INTO r FROM CALL{TENANT|KEY};
			PERFORM set_config('test.said', said(r), false);
		END $$;
		SELECT current_setting('test.said')},
	'DO with EXECUTE' => q{
		DO $$
		DECLARE
			said text;
		BEGIN
			EXECUTE $q$SELECT said(CALL{$1|$2})$q$ INTO said USING TENANT, KEY;
			PERFORM set_config('test.said', said, false);
		END $$;
		SELECT current_setting('test.said')},
	'DO with a loop' => q{
		DO $$
		DECLARE
			r record;
		BEGIN
			FOR r IN SELECT said(c) FROM CALL{TENANT|KEY} AS c LOOP
				PERFORM set_config('test.said', r.said, false);
			END LOOP;
		END $$;
		SELECT current_setting('test.said')},
	'PL/pgSQL function' => q{SELECT in_plpgsql_NAME(TENANT, KEY)},
	'PL/pgSQL function in FROM' =>
	  q{SELECT said FROM in_plpgsql_NAME(TENANT, KEY) AS said},
	'PL/pgSQL function with an exception block' =>
	  q{SELECT in_a_block_NAME(TENANT, KEY)},
	'SQL function' => q{SELECT in_sql_NAME(TENANT, KEY)},
	'SECURITY DEFINER function' => q{SELECT as_definer_NAME(TENANT, KEY)},
	'procedure' => q{CALL in_procedure_NAME(TENANT, KEY, NULL)},
	'prepared statement, generic plan' => q{
		SET LOCAL plan_cache_mode = force_generic_plan;
		PREPARE generic_plan (text, text) AS SELECT said(CALL{$1|$2});
		EXECUTE generic_plan(TENANT, KEY);
		DEALLOCATE generic_plan},
	'prepared statement in FROM, generic plan' => q{
		SET LOCAL plan_cache_mode = force_generic_plan;
		PREPARE generic_plan (text, text) AS SELECT said(r) FROM CALL{$1|$2} AS r;
		EXECUTE generic_plan(TENANT, KEY);
		DEALLOCATE generic_plan},
	'prepared statement, custom plan' => q{
		SET LOCAL plan_cache_mode = force_custom_plan;
		PREPARE custom_plan (text, text) AS SELECT said(CALL{$1|$2});
		EXECUTE custom_plan(TENANT, KEY);
		DEALLOCATE custom_plan},
	'PL/pgSQL with generic plans' => q{
		SET LOCAL plan_cache_mode = force_generic_plan;
		SELECT in_plpgsql_NAME(TENANT, KEY);
		SET LOCAL plan_cache_mode = auto},
	'cursor' => q{
		DECLARE a_cursor CURSOR FOR SELECT said(CALL{TENANT|KEY});
		FETCH a_cursor;
		CLOSE a_cursor},
	'CREATE TEMPORARY TABLE AS' => q{
		CREATE TEMPORARY TABLE kept ON COMMIT DROP AS SELECT said(CALL{TENANT|KEY}) AS said;
		SELECT said FROM kept},
	'COPY' => q{COPY (SELECT said(CALL{TENANT|KEY})) TO STDOUT},
	'qualified, with an empty search_path' => q{
		SET LOCAL search_path = '';
		SELECT public.said(idempotency.CALL{TENANT|KEY});
		SET LOCAL search_path = public, idempotency},
	'after reading all shards' => q{
		SELECT FROM payment WHERE key = 'none';
		SELECT said(CALL{TENANT|KEY})},
	'after a savepoint' => q{
		SAVEPOINT s;
		SELECT said(CALL{TENANT|KEY});
		RELEASE SAVEPOINT s});

# In these, Citus has the node of the rows call the function.  Begin is right there, but
# Citus lets no handler write a distributed table then.
my %from_shard = map { $_ => 1 } (
	'CTE that reads a distributed table',
	'INSERT ... SELECT from one distributed table into another',
	'expression over a distributed table',
	'expression over all shards',
	'join with a distributed table');
my $refused =
  'ERROR:  cannot execute a distributed query from a query on a shard';

# The calls that they are tried with: how each is written, given tenant and key; what
# it says at first, and what is to be done then.
my $finish = q{
	INSERT INTO payment VALUES (TENANT, KEY, gen_random_uuid()) RETURNING receipt \gset
	SELECT idempotency_finish(TENANT, 'pay', KEY, 201, json_build_object('receipt', :'receipt'))};
my %call = (
	try_begin => {
		written => q{idempotency_try_begin(%s, 'pay', %s, '{"a": 1}')},
		first => "started\ncompleted",
		then => $finish
	},
	begin => {
		written =>
		  q{idempotency_begin(key => %2$s, tenant => %1$s, action => 'pay', request_hash => sha256('one'))},
		first => "started\ncompleted",
		then => $finish
	},
	run => {
		written =>
		  q{idempotency_run(%1$s, 'pay', %2$s, jsonb_build_object('tenant', %1$s, 'key', %2$s), 'public.pay(jsonb)')},
		first => 'completed RECEIPT',
		then => ''
	});

# What stands in a shape, written out
sub write_out
{
	my ($sql, $name, $tenant, $key) = @_;

	$sql =~ s/CALL\{(.*?)\|(.*?)\}/sprintf $call{$name}{written}, $1, $2/ge;
	$sql =~ s/NAME/$name/g;
	$sql =~ s/TENANT/'$tenant'/g;
	$sql =~ s/KEY/'$key'/g;
	return $sql;
}

# The tables and functions of the shapes
$cluster->on_coordinator(
	q{
	CREATE TABLE asked (tenant text, key text);
	SELECT create_distributed_table('asked', 'tenant', colocate_with => 'payment');
	CREATE TABLE told (tenant text, said text);
	SELECT create_distributed_table('told', 'tenant', colocate_with => 'payment');
	CREATE TABLE asked_everywhere (tenant text, key text);
	SELECT create_reference_table('asked_everywhere');
	GRANT ALL ON asked, told, asked_everywhere TO app;
	CREATE FUNCTION said(result idempotency_result) RETURNS text LANGUAGE plpgsql AS $$
	BEGIN
		RETURN concat_ws(' ', result.outcome, result.response->>'receipt');
	END $$});
foreach my $name (sort keys %call)
{
	$cluster->on_coordinator(write_out($_, $name, '', ''))
	  foreach q{
		CREATE FUNCTION in_plpgsql_NAME(t text, k text) RETURNS text LANGUAGE plpgsql AS $$
		DECLARE
			r idempotency_result;
		BEGIN
			r := CALL{t|k};
			RETURN said(r);
		END $$},
	  q{CREATE FUNCTION in_a_block_NAME(t text, k text) RETURNS text LANGUAGE plpgsql AS $$
		BEGIN
			RETURN said(r) FROM CALL{t|k} AS r;
		EXCEPTION WHEN division_by_zero THEN
			RETURN 'never';
		END $$},
	  q{CREATE FUNCTION in_sql_NAME(t text, k text) RETURNS text LANGUAGE sql AS $$
		SELECT said(CALL{t|k}) $$},
	  q{CREATE FUNCTION as_definer_NAME(t text, k text) RETURNS text LANGUAGE sql SECURITY DEFINER AS $$
		SELECT said(CALL{t|k}) $$},
	  q{CREATE PROCEDURE in_procedure_NAME(t text, k text, INOUT said text) LANGUAGE plpgsql AS $$
		BEGIN
			said := said(CALL{t|k});
		END $$};
}

# Local tables, which each node has for itself
$cluster->everywhere(
	q{
	CREATE TABLE asked_here (tenant text, key text, said text);
	CREATE TABLE told_here (said text);
	GRANT ALL ON asked_here, told_here TO app});
foreach my $name (sort keys %call)
{
	$cluster->everywhere(write_out(q{
		SET citus.enable_ddl_propagation = off;
		CREATE TABLE told_by_NAME (tenant text, key text, said text);
		GRANT ALL ON told_by_NAME TO app;
		CREATE FUNCTION tell_NAME() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN
			new.said := said(CALL{new.tenant|new.key});
			RETURN new;
		END $$;
		CREATE TRIGGER tell BEFORE INSERT ON told_by_NAME FOR EACH ROW EXECUTE FUNCTION tell_NAME()},
		$name, '', ''));
}

# What shapes say on a node, and what is to be done then, by the name of the shape; of
# errors, the first.  Each is a transaction of its own, in a block where wanted or where
# the shape needs one.
sub say
{
	my ($node, $name, $keys, %options) = @_;
	my $script = ($options{before} // '') . "\n";
	my $stdout = '';

	foreach my $shape (sort keys %$keys)
	{
		my $block = $options{block} || $shape{$shape} =~ /LOCAL|DECLARE|SAVEPOINT|ON COMMIT/;
		my ($begin, $commit) = $block ? ('BEGIN;', 'COMMIT;') : ('', '');
		my $then = $options{then} ? "$call{$name}{then};" : '';

		$script .= write_out(<<"PSQL", $name, $options{tenant}, $keys->{$shape});
\\echo == $shape
$begin
$shape{$shape};
$then
$commit
PSQL
	}
	IPC::Run::run(
		[
			'psql', '-XAtq', '-v', 'VERBOSITY=terse',
			'-f', '-', $node->connstr('postgres') . ' user=app'
		],
		'<', \$script, '>&', \$stdout);
	$stdout =~ s/^psql:.*?: (ERROR: .*\n)(psql:.*\n)*/$1/mg;
	return { map { /^(.*?)\n(.*?)\n*\z/s } split /^== /m, $stdout };
}

# The receipts of payments by their keys
sub receipts
{
	return split /[|\n]/,
	  $cluster->on_coordinator('SELECT key, receipt FROM payment');
}

# Try all shapes on a node, with a call and for a tenant; which shapes said something
# wrong is what the test shows.
sub test_shapes
{
	my ($node, $name, $tenant, $test, $before) = @_;
	my $elsewhere = $nodes[ ($node == $nodes[0]) ? 1 : 0 ];
	my %keys = map { $_ => "$test $_" =~ s/\W+/-/gr } keys %shape;
	my $values = join ', ', map { "('$tenant', '$_')" } values %keys;
	my @wrong;

	$cluster->on_coordinator(
		"INSERT INTO asked VALUES $values; INSERT INTO asked_everywhere VALUES $values");
	$_->safe_psql('postgres', "INSERT INTO asked_here VALUES $values")
	  foreach $node, $elsewhere;

	my %options = (tenant => $tenant, before => $before);
	my @said = (
		say($node, $name, \%keys, %options,
			then => 1, block => $call{$name}{then} ne ''),
		say($node, $name, \%keys, %options),
		say($node, $name, \%keys, %options, block => 1),
		say($elsewhere, $name, \%keys, %options));
	my %receipt = receipts();

	foreach my $shape (sort keys %shape)
	{
		my $receipt = $receipt{ $keys{$shape} } // 'RECEIPT';
		my $said = join "\n", map { $_->{$shape} // 'nothing' } @said;
		my $expected = join "\n", $call{$name}{first},
		  ('replayed RECEIPT') x 3;

		if ($name eq 'run' && $from_shard{$shape} && $said eq join "\n", ($refused) x 4)
		{
			# then nothing is left of it
			delete $keys{$shape};
			next;
		}
		push @wrong, "$shape:\n$said\n"
		  if $said ne $expected =~ s/RECEIPT/$receipt/gr;
	}
	is(join("\n", @wrong), '', $test);
	push @requests, map { "$tenant $_" } values %keys;
	return;
}

foreach my $node (@nodes)
{
	my %tenant = (
		'its own tenant' => $cluster->tenants_of($node, 1),
		'a tenant of another node' => $cluster->tenants_of(
			$nodes[ $node == $nodes[2] ? 1 : 2 ], 1));

	foreach my $whose (sort keys %tenant)
	{
		my $where = $node->name . " $whose";

		test_shapes($node, $_, $tenant{$whose}, "$where $_")
		  foreach 'begin', 'try_begin', 'run';
		test_shapes($node, 'run', $tenant{$whose},
			"$where run forwarded", $handler{'on the node of the tenant'});
	}
}

# The messages of drivers: a statement with parameters, once and prepared.  A
# statement that is executed often gets a generic plan.
foreach my $node (@nodes)
{
	foreach my $mode ('extended', 'prepared')
	{
		my $tenant = $cluster->tenants_of($nodes[1], 1);
		my $key = $node->name . "-$mode";
		my $script = $node->basedir . "/$mode.sql";

		append_to_file($script,
			"SELECT idempotency_run(:tenant::text, 'pay', :key::text, jsonb_build_object('tenant', :tenant::text, 'key', :key::text), 'pay(jsonb)');\n"
			  . "SELECT outcome FROM idempotency_run(:tenant::text, 'pay', :key::text, jsonb_build_object('tenant', :tenant::text, 'key', :key::text), 'pay(jsonb)');\n"
		);
		$node->command_ok(
			[
				'pgbench', '-n', '-t', '12', '-M', $mode, '-U', 'app',
				'-D', "tenant=$tenant", '-D', "key=$key", '-f', $script, 'postgres'
			],
			"$key: twelve times with parameters");
		push @requests, "$tenant $key";
	}
}

# A function that Citus sends to the node of the tenant, with everything in it
$cluster->on_coordinator(q{
	CREATE FUNCTION buy(t text, k text) RETURNS text LANGUAGE plpgsql AS $$
	DECLARE
		result idempotency_result;
		r uuid := gen_random_uuid();
	BEGIN
		result := idempotency_begin(t, 'pay', k);
		IF result.outcome = 'started' THEN
			INSERT INTO payment VALUES (t, k, r);
			PERFORM idempotency_finish(t, 'pay', k, 201, json_build_object('receipt', r));
			RETURN r;
		END IF;
		RETURN result.response->>'receipt';
	END $$});
foreach my $force ('none', 'false', 'true')
{
	$cluster->on_coordinator(
		"SELECT create_distributed_function('buy(text, text)', 't', colocate_with => 'payment', force_delegation => $force)"
	) if $force ne 'none';
	foreach my $node (@nodes)
	{
		my $tenant = $cluster->tenants_of($nodes[2], 1);
		my $key = $node->name . "-buy-$force";
		my $receipt = $cluster->app($node, "SELECT buy('$tenant', '$key')");

		is( $cluster->app(
				$_,
				"BEGIN; SELECT buy('$tenant', '$key'); COMMIT;"
				  . "DO \$\$ BEGIN PERFORM set_config('test.said', buy('$tenant', '$key'), false); END \$\$;"
				  . "SELECT current_setting('test.said')"),
			"$receipt\n$receipt",
			$node->name . ' and '
			  . $_->name
			  . ": a function of the application, forced: $force")
		  foreach @nodes;
		push @requests, "$tenant $key";
	}
}

# No tenant is the empty one, wherever it is asked for.
foreach my $node (@nodes)
{
	my $key = $node->name . '-no-tenant';
	my $call =
	  "SELECT concat_ws(' ', outcome, response->>'receipt') FROM idempotency_run(%s, 'pay', '$key', '{\"tenant\": \"\", \"key\": \"$key\"}', 'pay(jsonb)')";
	my $first = $cluster->app($node, sprintf $call, 'NULL');

	like($first, qr/^completed /, $node->name . ': no tenant');
	foreach my $other (@nodes)
	{
		is( $cluster->app($other, sprintf $call, $_),
			$first =~ s/completed/replayed/r,
			$node->name . ': no tenant, replayed as ' . $_ . ' on ' . $other->name)
		  foreach 'NULL', "''", 'NULL::text', '(SELECT NULL::text)';
	}
	push @requests, " $key";
}

$cluster->effects_are(\@requests, undef, 'all of this');

done_testing();
