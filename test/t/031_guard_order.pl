# A claim that was not finished is refused before anything is committed on another
# server, whatever was loaded or used first, and however the transaction ends.

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
plan skip_all => 'postgres_fdw is not installed'
  if $node->safe_psql('postgres',
	"SELECT count(*) FROM pg_available_extensions WHERE name = 'postgres_fdw'")
  eq '0';

# The other server is another database of this one.  It is written through the
# foreign table "charge".
my ($host, $port) = ($node->host, $node->port);
$node->safe_psql('postgres', 'CREATE DATABASE remote');
$node->safe_psql('remote', 'CREATE TABLE charge (key text NOT NULL)');
$node->safe_psql(
	'postgres', qq{
	CREATE EXTENSION idempotency;
	CREATE EXTENSION postgres_fdw;
	CREATE SERVER remote FOREIGN DATA WRAPPER postgres_fdw
		OPTIONS (host '$host', port '$port', dbname 'remote');
	CREATE USER MAPPING FOR CURRENT_USER SERVER remote;
	CREATE FOREIGN TABLE charge (key text) SERVER remote} . q{;
	CREATE TABLE later (key text);
	CREATE TABLE later_pay (key text);
	CREATE FUNCTION charge(key text) RETURNS text LANGUAGE plpgsql AS $$
	BEGIN
		INSERT INTO charge VALUES (key);
		RETURN key;
	END $$;
	-- an assignment is evaluated without the executor
	CREATE FUNCTION claim(key text) RETURNS text LANGUAGE plpgsql AS $$
	DECLARE
		result idempotency_result;
	BEGIN
		result := idempotency_begin('shop', 'pay', key);
		RETURN result.outcome;
	END $$;
	CREATE FUNCTION charge_later() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		INSERT INTO charge VALUES (new.key);
		RETURN NULL;
	END $$;
	CREATE FUNCTION claim_later() RETURNS trigger LANGUAGE plpgsql AS $$
	DECLARE
		result idempotency_result;
	BEGIN
		result := idempotency_begin('shop', 'pay', new.key);
		RETURN NULL;
	END $$;
	CREATE CONSTRAINT TRIGGER later AFTER INSERT ON later
		DEFERRABLE INITIALLY DEFERRED
		FOR EACH ROW EXECUTE FUNCTION charge_later();
	CREATE CONSTRAINT TRIGGER later AFTER INSERT ON later_pay
		DEFERRABLE INITIALLY DEFERRED
		FOR EACH ROW EXECUTE FUNCTION claim_later();
	CREATE PROCEDURE pay_and_commit(key text) LANGUAGE plpgsql AS $$
	DECLARE
		result idempotency_result;
	BEGIN
		result := idempotency_begin('shop', 'pay', key);
		INSERT INTO charge VALUES (key);
		COMMIT;
	END $$;
	CREATE PROCEDURE charge_claim_and_commit(key text) LANGUAGE plpgsql AS $$
	DECLARE
		result idempotency_result;
	BEGIN
		INSERT INTO charge VALUES (key);
		result := idempotency_begin('shop', 'pay', key);
		COMMIT;
	END $$});

# Transactions that leave the claim on a key unfinished; CLAIM begins it, and
# CHARGE writes to the other server.
my %unfinished = (
	'transaction block' => 'BEGIN; CLAIM; CHARGE; COMMIT',
	'transaction block, charged first' => 'BEGIN; CHARGE; CLAIM; COMMIT',
	'COMMIT AND CHAIN' => 'BEGIN; CLAIM; CHARGE; COMMIT AND CHAIN',
	'one statement' =>
	  q{INSERT INTO charge SELECT 'KEY' FROM idempotency_begin('shop', 'pay', 'KEY')},
	'one statement with WITH' => q{
		WITH claim AS (SELECT idempotency_begin('shop', 'pay', 'KEY')),
			charged AS (INSERT INTO charge SELECT 'KEY' FROM claim)
		SELECT FROM claim},
	'one statement that calls functions' => q{SELECT charge('KEY'), claim('KEY')},
	'one message of several statements' => 'CLAIM\; CHARGE',
	'one message, charged first' => 'CHARGE\; CLAIM',
	'prepared statements' => q{
		PREPARE claim AS SELECT outcome FROM idempotency_begin('shop', 'pay', $1);
		PREPARE charge AS INSERT INTO charge VALUES ($1);
		BEGIN; EXECUTE claim('KEY'); EXECUTE charge('KEY'); COMMIT},
	'procedure that commits' => q{CALL pay_and_commit('KEY')},
	'procedure that charges first and commits' =>
	  q{CALL charge_claim_and_commit('KEY')},
	'DO with COMMIT' => q{
		DO $$
		BEGIN
			PERFORM idempotency_begin('shop', 'pay', 'KEY');
			INSERT INTO charge VALUES ('KEY');
			COMMIT;
		END $$},
	'DO with COMMIT, charged first' => q{
		DO $$
		DECLARE
			result idempotency_result;
		BEGIN
			INSERT INTO charge VALUES ('KEY');
			result := idempotency_begin('shop', 'pay', 'KEY');
			COMMIT;
		END $$},
	'DO that fetches' => q{
		DO $$
		DECLARE
			charges CURSOR FOR SELECT charge('KEY');
		BEGIN
			PERFORM claim('KEY');
			OPEN charges;
			MOVE charges;
			COMMIT;
		END $$},
	'COPY' => "BEGIN; CLAIM; COPY charge FROM STDIN;\nKEY\n\\.\nCOMMIT",
	'trigger that charges at commit' =>
	  q{BEGIN; CLAIM; INSERT INTO later VALUES ('KEY'); COMMIT},
	'trigger that claims at commit' =>
	  q{BEGIN; CHARGE; INSERT INTO later_pay VALUES ('KEY'); COMMIT},
	'triggers at commit of one statement' => q{
		WITH claimed AS (INSERT INTO later_pay VALUES ('KEY'))
		INSERT INTO later VALUES ('KEY')},
	'constraints made immediate' => q{
		BEGIN; INSERT INTO later VALUES ('KEY');
		INSERT INTO later_pay VALUES ('KEY');
		SET CONSTRAINTS ALL IMMEDIATE; COMMIT},
	'cursor left open' => q{
		BEGIN; CLAIM; DECLARE charges CURSOR FOR SELECT charge('KEY') FROM generate_series(1, 2);
		FETCH charges; COMMIT},
	'cursor WITH HOLD, read at commit' => q{
		BEGIN; CLAIM; DECLARE charges CURSOR WITH HOLD FOR SELECT charge('KEY'); COMMIT},
	'cursor WITH HOLD that claims at commit' => q{
		BEGIN; CHARGE; DECLARE claims CURSOR WITH HOLD FOR SELECT claim('KEY'); COMMIT},
	'cursor that claims, left open' => q{
		BEGIN; CHARGE; DECLARE claims CURSOR FOR SELECT claim('KEY') FROM generate_series(1, 2);
		FETCH claims; COMMIT},
	'savepoint' =>
	  'BEGIN; CLAIM; SAVEPOINT s; CHARGE; RELEASE SAVEPOINT s; COMMIT',
	'claim in a savepoint' =>
	  'BEGIN; CHARGE; SAVEPOINT s; CLAIM; RELEASE SAVEPOINT s; COMMIT',
	'finish that is rolled back' => q{
		BEGIN; CLAIM; SAVEPOINT s; FINISH; SELECT count(*) FROM charge;
		ROLLBACK TO s; CHARGE; COMMIT},
	'finish that is rolled back after the charge' =>
	  'BEGIN; CLAIM; CHARGE; SAVEPOINT s; FINISH; ROLLBACK TO s; COMMIT',
	'finish in a block that fails' => q{
		DO $$
		DECLARE
			answer text;
			result idempotency_result;
		BEGIN
			INSERT INTO charge VALUES ('KEY');
			result := idempotency_begin('shop', 'pay', 'KEY');
			BEGIN
				answer := idempotency_finish('shop', 'pay', 'KEY', 200);
				RAISE division_by_zero;
			EXCEPTION WHEN division_by_zero THEN
				answer := 'none';
			END;
			COMMIT;
		END $$},
	'charge in a block that fails' => q{
		DO $$
		BEGIN
			PERFORM claim('KEY');
			BEGIN
				INSERT INTO charge VALUES (NULL);
			EXCEPTION WHEN not_null_violation THEN
				NULL;
			END;
			INSERT INTO charge VALUES ('KEY');
			COMMIT;
		END $$},
	'PREPARE TRANSACTION' =>
	  q{BEGIN; CLAIM; CHARGE; PREPARE TRANSACTION 'KEY'},
	'PREPARE TRANSACTION, charged first' =>
	  q{BEGIN; CHARGE; CLAIM; PREPARE TRANSACTION 'KEY'});

# Those that are committed, here and there
my %finished = (
	'transaction block' => 'BEGIN; CLAIM; CHARGE; FINISH; COMMIT',
	'transaction block, charged first' => 'BEGIN; CHARGE; CLAIM; FINISH; COMMIT',
	'one message of several statements' => 'CLAIM\; CHARGE\; FINISH',
	'trigger that charges at commit' =>
	  q{BEGIN; CLAIM; INSERT INTO later VALUES ('KEY'); FINISH; COMMIT},
	'DO with COMMIT' => q{
		DO $$
		BEGIN
			PERFORM idempotency_begin('shop', 'pay', 'KEY');
			INSERT INTO charge VALUES ('KEY');
			PERFORM idempotency_finish('shop', 'pay', 'KEY', 201);
			COMMIT;
		END $$},
	'claim that was released' => q{
		BEGIN; CLAIM; CHARGE; SELECT idempotency_release('shop', 'pay', 'KEY'); COMMIT},
	'leased claim' => q{
		BEGIN; SELECT idempotency_begin('shop', 'pay', 'KEY', lease => '1 hour'); CHARGE; COMMIT});

# What a session does before.  When the server has loaded postgres_fdw makes no
# difference to that.
my %sessions = (
	'new session' => '',
	'charged before' => 'SELECT FROM charge',
	'claimed before' => q{SELECT idempotency_replay('shop', 'pay', 'KEY')});

# Who comes first, when the server starts and when a session does
my %loads = (
	'not preloaded' => "shared_preload_libraries = ''",
	'preloaded' => "shared_preload_libraries = 'idempotency'",
	'preloaded first' => "shared_preload_libraries = 'idempotency, postgres_fdw'",
	'preloaded last' => "shared_preload_libraries = 'postgres_fdw, idempotency'",
	'loaded by the session' =>
	  "shared_preload_libraries = ''\nsession_preload_libraries = 'idempotency'");

# Run something in a session of its own, for a key that is made of its name, and
# return what it complains of.
sub complaint
{
	my ($name, @sql) = @_;
	my $sql = with_key($name, @sql);
	my ($rc, $stdout, $stderr) = $node->psql('postgres', "$sql;\n",
		extra_params => [ '-v', 'VERBOSITY=sqlstate' ]);

	return join("\n", $stderr =~ /(?:ERROR|WARNING):  \S+/g);
}

sub with_key
{
	my ($name, @sql) = @_;
	my $key = key_of($name);
	my %calls = (
		CLAIM => "SELECT idempotency_begin('shop', 'pay', '$key')",
		CHARGE => "INSERT INTO charge VALUES ('$key')",
		FINISH => "SELECT idempotency_finish('shop', 'pay', '$key', 201)",
		KEY => $key);

	return join(";\n", @sql) =~ s/\b(CLAIM|CHARGE|FINISH|KEY)\b/$calls{$1}/gr;
}

sub key_of
{
	my ($name) = @_;

	return $name =~ s/[^\w:]+/-/gr;
}

# What was committed on the other server since the last time
sub charges
{
	return join("\n",
		sort split(/\n/,
			$node->safe_psql('remote', 'DELETE FROM charge RETURNING key')));
}

# What else the transactions may have left
my $left = q{
	SELECT (SELECT count(*) FROM idempotency_key),
		(SELECT count(*) FROM later) + (SELECT count(*) FROM later_pay),
		(SELECT count(*) FROM pg_prepared_xacts)};

foreach my $load (sort keys %loads)
{
	my @sessions =
	  $load =~ /first|last/ ? 'new session' : sort keys %sessions;
	my @finished;
	my @warned;

	$node->append_conf('postgresql.conf', "session_preload_libraries = ''");
	$node->append_conf('postgresql.conf', $loads{$load});
	$node->restart;

	foreach my $session (@sessions)
	{
		foreach my $case (sort keys %unfinished)
		{
			my $name = "$load: $session: $case";

			is(complaint($name, $sessions{$session}, $unfinished{$case}),
				'ERROR:  ID006', "$name: refused");
		}
	}
	is(charges(), '', "$load: and nothing is charged");
	is($node->safe_psql('postgres', $left), '0|0|0', "$load: nothing is left");

	foreach my $session (@sessions)
	{
		foreach my $case (sort keys %finished)
		{
			my $name = "$load: $session: $case";

			is(complaint($name, $sessions{$session}, $finished{$case}),
				'', "$name: finished");
			push @finished, key_of($name);
		}
	}
	is(charges(), join("\n", sort @finished), "$load: each is charged once");
	$node->safe_psql('postgres', 'TRUNCATE idempotency_key, later');

	# As a warning, it keeps nobody from anything
	foreach my $case (
		'transaction block',
		'transaction block, charged first',
		'one message of several statements',
		'procedure that charges first and commits')
	{
		my $name = "$load: off: $case";

		is( complaint(
				$name, 'SET idempotency.commit_guard = off', $unfinished{$case}),
			'WARNING:  ID006',
			"$name: warned of");
		push @warned, key_of($name);
	}
	is(charges(), join("\n", sort @warned), "$load: and what was warned of is charged");
}

# The same by the extended protocol, where a transaction without BEGIN goes to the
# end of a message, or of a pipeline
my %scripts = (
	'transaction block' => "BEGIN;\nCLAIM;\nCHARGE;\nCOMMIT;\n",
	'transaction block, charged first' => "BEGIN;\nCHARGE;\nCLAIM;\nCOMMIT;\n",
	'one statement' => "$unfinished{'one statement'};\n",
	'one statement that calls functions' =>
	  "$unfinished{'one statement that calls functions'};\n",
	'pipeline' => "\\startpipeline\nCLAIM;\nCHARGE;\n\\endpipeline\n",
	'pipeline, charged first' =>
	  "\\startpipeline\nCHARGE;\nCLAIM;\n\\endpipeline\n",
	'pipeline of functions' => q{\startpipeline
SELECT charge('KEY');
SELECT claim('KEY');
\endpipeline
});
foreach my $mode ('extended', 'prepared')
{
	foreach my $case (sort keys %scripts)
	{
		my $name = "$mode: $case";
		my $script = $node->basedir . '/' . key_of($name);

		append_to_file($script, with_key($name, $scripts{$case}));
		my ($stdout, $stderr) = run_command(
			[
				'pgbench', '-n', '-t', 1, '-M', $mode, '-f', $script,
				'-h', $host, '-p', $port, 'postgres'
			]);
		like(
			$stderr,
			qr/ERROR:  transaction has a claim that was not finished/,
			"$name: refused");
	}
}
is(charges(), '', 'extended protocol: and nothing is charged');
is($node->safe_psql('postgres', $left), '0|0|0', 'extended protocol: nothing is left');

is($node->safe_psql('postgres', $count_userlocks), '0', 'no lock is left');
is(complaints_of($node) =~ s/^.*WARNING:  transaction has a claim.*\n?//mgr,
	'', 'no crash');
$node->stop;
done_testing();
