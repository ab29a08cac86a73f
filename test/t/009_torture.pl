# Everything at once on few keys: requests of every isolation level, with and
# without a wait, rolled back, undone by savepoints and exception blocks,
# prepared, forgotten and terminated, while records expire and are swept.
#
# Each answer that is given is written to table effect by the transaction that
# gives it, and each replay to table replay by the transaction that gets it.  In
# the end the effects must be exactly the lifetimes of records: those that
# expired, which table aged knows, and those that are still there.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IPC::Run;
use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time usleep);

my $seconds = 8;

my $node = new_server('main', conf => <<'CONF');
max_connections = 60
max_prepared_transactions = 100
deadlock_timeout = 10ms
autovacuum_naptime = 1s
CONF
$node->start;
$node->safe_psql(
	'postgres', q{
	CREATE EXTENSION idempotency;
	CREATE SEQUENCE answer;
	CREATE TABLE effect (key text, created_at timestamptz, request int,
						 status int, response text);
	CREATE TABLE replay (LIKE effect);
	CREATE TABLE told (outcome text);
	CREATE TABLE aged (key text, created_at timestamptz, expires_at timestamptz);
	CREATE TABLE terminated (pid int);

	-- begin, and note what was told; whether the work is to be done
	CREATE FUNCTION begin_it(key text, request int DEFAULT 1,
							 wait interval DEFAULT NULL) RETURNS int
	LANGUAGE plpgsql AS $$
	DECLARE
		result idempotency_result;
	BEGIN
		result := idempotency_try_begin('t', 'work', key, to_jsonb(request),
										wait => wait);
		IF result.outcome = 'started' THEN
			PERFORM set_config('torture.key', key, true),
					set_config('torture.created_at', result.created_at::text, true),
					set_config('torture.request', request::text, true);
			RETURN 1;
		ELSIF result.outcome = 'replayed' THEN
			INSERT INTO replay VALUES (key, result.created_at, request,
									   result.status_code, result.response);
		ELSE
			INSERT INTO told VALUES (result.outcome);
		END IF;
		RETURN 0;
	END $$;

	-- do the work of the request begun last
	CREATE FUNCTION do_it(status int) RETURNS void LANGUAGE sql AS $$
		INSERT INTO effect VALUES (
			current_setting('torture.key'),
			current_setting('torture.created_at')::timestamptz,
			current_setting('torture.request')::int,
			status,
			set_config('torture.response',
					   format('{"n" :  %s}', nextval('answer')), true));
	$$;

	-- finish it
	CREATE FUNCTION finish_it(status int) RETURNS text LANGUAGE sql AS $$
		SELECT idempotency_finish('t', 'work', current_setting('torture.key'),
								  status,
								  current_setting('torture.response')::json);
	$$;

	-- all of that, undone by exception blocks and done again
	CREATE FUNCTION undo_and_do_it(key text) RETURNS void
	LANGUAGE plpgsql AS $$
	BEGIN
		BEGIN
			IF begin_it(key) = 1 THEN
				PERFORM do_it(201);
				PERFORM finish_it(201);
			END IF;
			RAISE EXCEPTION 'undo';
		EXCEPTION WHEN raise_exception THEN
			NULL;
		END;
		IF begin_it(key) = 1 THEN
			BEGIN
				PERFORM do_it(201);
				PERFORM finish_it(201);
				RAISE EXCEPTION 'undo';
			EXCEPTION WHEN raise_exception THEN
				PERFORM do_it(402);
				PERFORM finish_it(402);
			END;
		END IF;
	END $$;});

# What clients do, and how often among 100
my %scripts = (
	'plain' => [ 30, <<'SQL' ],
\set n random(1, 8)
BEGIN;
SELECT begin_it('k' || :n) AS started \gset
\if :started
SELECT do_it(201);
SELECT finish_it(201);
\endif
COMMIT;
SQL
	'slow' => [ 8, <<'SQL' ],
\set n random(1, 8)
BEGIN;
SELECT begin_it('k' || :n) AS started \gset
\if :started
SELECT do_it(200);
\sleep 3 ms
SELECT finish_it(200);
\endif
\sleep 3 ms
COMMIT;
SQL
	'repeatable_read' => [ 8, <<'SQL' ],
\set n random(1, 8)
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT count(*) FROM told;
SELECT begin_it('k' || :n, wait => '40 ms') AS started \gset
\if :started
SELECT do_it(201);
SELECT finish_it(201);
\endif
COMMIT;
SQL
	'serializable' => [ 8, <<'SQL' ],
\set n random(1, 8)
BEGIN ISOLATION LEVEL SERIALIZABLE;
SELECT begin_it('k' || :n, wait => '40 ms') AS started \gset
\if :started
SELECT do_it(201);
SELECT finish_it(201);
\endif
COMMIT;
SQL
	'two_keys' => [ 8, <<'SQL' ],
\set a random(1, 8)
\set b 1 + (:a + random(0, 6)) % 8
BEGIN;
SELECT begin_it('k' || :a, wait => '40 ms') AS started \gset
\if :started
SELECT do_it(201);
SELECT finish_it(201);
\endif
\sleep 1 ms
SELECT begin_it('k' || :b, wait => '40 ms') AS started \gset
\if :started
SELECT do_it(201);
SELECT finish_it(201);
\endif
COMMIT;
SQL
	'rolled_back' => [ 5, <<'SQL' ],
\set n random(1, 8)
BEGIN;
SELECT begin_it('k' || :n) AS started \gset
\if :started
SELECT do_it(201);
SELECT finish_it(201);
\endif
ROLLBACK;
SQL
	'begun_in_savepoint' => [ 5, <<'SQL' ],
\set n random(1, 8)
BEGIN;
SAVEPOINT s;
SELECT begin_it('k' || :n) AS started \gset
\if :started
SELECT do_it(201);
SELECT finish_it(201);
\endif
ROLLBACK TO s;
SELECT begin_it('k' || :n) AS started \gset
\if :started
SELECT do_it(201);
SELECT finish_it(201);
\endif
COMMIT;
SQL
	'finished_in_savepoint' => [ 5, <<'SQL' ],
\set n random(1, 8)
BEGIN;
SELECT begin_it('k' || :n) AS started \gset
\if :started
SAVEPOINT s;
SELECT do_it(201);
SELECT finish_it(201);
ROLLBACK TO s;
SELECT do_it(202);
SELECT finish_it(202);
RELEASE s;
\endif
COMMIT;
SQL
	'exception_block' => [ 5, <<'SQL' ],
\set n random(1, 8)
SELECT undo_and_do_it('k' || :n);
SQL
	'final_error' => [ 3, <<'SQL' ],
\set n random(1, 8)
BEGIN;
SELECT begin_it('k' || :n) AS started \gset
\if :started
SAVEPOINT s;
SELECT do_it(201);
ROLLBACK TO s;
SELECT do_it(422);
SELECT finish_it(422);
\endif
COMMIT;
SQL
	'unavailable' => [ 3, <<'SQL' ],
\set n random(1, 8)
BEGIN;
SELECT begin_it('k' || :n) AS started \gset
\if :started
SAVEPOINT s;
SELECT do_it(201);
ROLLBACK TO s;
SELECT idempotency_finish('t', 'work', 'k' || :n, 503);
\endif
COMMIT;
SQL
	'released' => [ 3, <<'SQL' ],
\set n random(1, 8)
BEGIN;
SELECT begin_it('k' || :n) AS started \gset
\if :started
SELECT idempotency_release('t', 'work', 'k' || :n);
\endif
COMMIT;
SQL
	'different_requests' => [ 5, <<'SQL' ],
\set n random(1, 2)
\set request random(1, 2)
BEGIN;
SELECT begin_it('m' || :n, :request) AS started \gset
\if :started
SELECT do_it(201);
SELECT finish_it(201);
\endif
COMMIT;
SQL
	'prepared' => [ 4, <<'SQL' ],
\set n random(1, 3)
\set gid random(1, 1000000000)
\set commit random(0, 1)
BEGIN;
SELECT begin_it('p' || :n, wait => '10 ms') AS started \gset
\if :started
SELECT do_it(201);
SELECT finish_it(201);
\endif
PREPARE TRANSACTION 'torture-:gid';
\if :commit
COMMIT PREPARED 'torture-:gid';
\else
ROLLBACK PREPARED 'torture-:gid';
\endif
SQL
	# These run beside the clients
	'age' => [ 0, <<'SQL' ],
WITH now_aged AS (
	UPDATE idempotency_key SET expires_at = clock_timestamp()
	WHERE expires_at > clock_timestamp() AND random() < 0.4
	RETURNING key, created_at, expires_at)
INSERT INTO aged SELECT * FROM now_aged;
\sleep 5 ms
SQL
	'sweep' => [ 0, <<'SQL' ],
\set batch_size random(1, 4)
CALL idempotency_sweep(:batch_size);
\sleep 5 ms
SQL
	'terminate' => [ 0, <<'SQL' ]);
INSERT INTO terminated
SELECT pid
FROM (SELECT pid FROM pg_stat_activity
	  WHERE application_name IN ('torture', 'torture_sweep')
	  ORDER BY random() LIMIT 1) AS victim
WHERE pg_terminate_backend(pid);
\sleep 120 ms
SQL

my $dir = $node->basedir;
my $go_on = "$dir/torture.on";
append_to_file($go_on, '');

# also when a test dies
END
{
	unlink $go_on if defined $go_on;
}

append_to_file("$dir/$_.sql", $scripts{$_}[1]) foreach keys %scripts;

# Clients that lose their connection are replaced when their pgbench ends,
# which is each second.  Each loop has a file of its own for what its clients
# print, which is not a line at a time.
my @background;
my @errors;

sub run_in_loop
{
	my ($name, $command) = @_;

	my $errors = "$dir/torture." . scalar(@errors) . '.err';
	local $ENV{PGAPPNAME} = $name;
	push @errors, $errors;
	push @background,
	  IPC::Run::start(
		[
			'sh', '-c',
			"while [ -e '$go_on' ]; do $command >/dev/null 2>>'$errors'; done"
		]);
	return;
}

local $ENV{PGHOST} = $node->host;
local $ENV{PGPORT} = $node->port;
local $ENV{PGDATABASE} = 'postgres';
my $pgbench = 'pgbench -n -T 1';
my $mix = join(' ',
	map { "-f '$dir/$_.sql\@$scripts{$_}[0]'" }
	grep { $scripts{$_}[0] > 0 } sort keys %scripts);

run_in_loop('torture', "$pgbench -c 4 $mix") for 1 .. 6;
run_in_loop('torture_sweep', "$pgbench -c 2 -f '$dir/sweep.sql'");
run_in_loop('torture_age', "$pgbench -f '$dir/age.sql'");
run_in_loop('torture_terminate', "$pgbench -f '$dir/terminate.sql'");

# Meanwhile some requests are begun and never finished, and transactions whose
# client was terminated between PREPARE and COMMIT PREPARED are resolved.
my $forgotten = 0;
my $resolve = sub {
	my ($age) = @_;

	return $node->psql(
		'postgres',
		"SELECT format('COMMIT PREPARED %L', gid) FROM pg_prepared_xacts"
		  . " WHERE prepared < now() - interval '$age' \\gexec",
		on_error_stop => 0);
};
my $end = time() + $seconds;
while (time() < $end)
{
	my ($rc, $stdout, $stderr) = $node->psql(
		'postgres',
		'BEGIN;'
		  . " SELECT begin_it(CASE WHEN random() < 0.5 THEN 'f'"
		  . " ELSE 'k' || (1 + random() * 7)::int END, wait => '1 s');"
		  . ' SELECT do_it(201); COMMIT',
		on_error_stop => 0,
		extra_params => [ '-v', 'VERBOSITY=verbose' ]);
	$forgotten++ if $stderr =~ /ERROR:  ID006: /;
	$resolve->('200 ms');
	usleep(20_000);
}
unlink $go_on;
$_->finish foreach @background;
ok( $node->poll_query_until(
		'postgres',
		q{SELECT count(*) = 0 FROM pg_stat_activity
		  WHERE application_name LIKE 'torture%'}),
	'all clients are gone');
$resolve->('0 s');

# It was torture
my %happened = (
	'work was done' => 'SELECT count(*) FROM effect WHERE status < 300',
	'final errors were kept' => 'SELECT count(*) FROM effect WHERE status >= 400',
	'answers were replayed' => 'SELECT count(*) FROM replay',
	'prepared work was done' => q{SELECT count(*) FROM effect WHERE key LIKE 'p%'},
	'requests were in flight' =>
	  q{SELECT count(*) FROM told WHERE outcome = 'in_flight'},
	'requests were mismatched' =>
	  q{SELECT count(*) FROM told WHERE outcome = 'mismatched'},
	'records expired' => 'SELECT count(*) FROM aged',
	'processes were terminated' => 'SELECT count(*) FROM terminated');
foreach my $what (sort keys %happened)
{
	my $count = $node->safe_psql('postgres', $happened{$what});

	cmp_ok($count, '>', 0, $what);
	note "$what: $count";
}
cmp_ok($forgotten, '>', 0, 'unfinished claims were refused');
note "unfinished claims were refused: $forgotten";

# Nothing went wrong but what was made to: a client may be terminated while it
# connects, too.
my @unexpected = grep {
	/error|fatal|panic|warning/i
	  && !/FATAL:  terminating connection due to administrator command$/
	  && !/perhaps the backend died while processing$/
	  && !/could not create connection for (client \d+|setup)$/
	  && !/WARNING:  PID \d+ is not a PostgreSQL (backend|server) process$/
	  && !/Run was aborted; the above results are incomplete\.$/
	  && !/CONTEXT:  SQL statement "INSERT INTO \S+idempotency_metric /
	  && !/ERROR:  prepared transaction with identifier "torture-\d+" (does not exist|is busy)$/
} map { split(/\n/, slurp_file($_)) } @errors;
is(join("\n", @unexpected), '', 'clients got no other errors');
is(complaints_of($node), '', 'the server has nothing to complain of');

# And this is what must be true all the same
my $lifetimes = q{
	(SELECT key, created_at, expires_at FROM aged
	 UNION ALL
	 SELECT key, created_at, expires_at FROM idempotency_key
	 WHERE expires_at > clock_timestamp()) AS lifetime};
my %never = (
	'work was done twice for a record' => q{
		SELECT key, created_at FROM effect
		GROUP BY key, created_at HAVING count(*) > 1},
	'work was done without a record, or a record made without work' => qq{
		SELECT * FROM effect FULL JOIN $lifetimes USING (key, created_at)
		WHERE effect IS NULL OR lifetime IS NULL},
	'work was done while a record was live' => qq{
		SELECT *
		FROM (SELECT key, created_at,
					 lag(expires_at) OVER (PARTITION BY key ORDER BY created_at)
					 AS expired_at
			  FROM $lifetimes) AS succession
		WHERE created_at < expired_at},
	'a record has another answer than was given' => q{
		SELECT *
		FROM idempotency_key AS record JOIN effect USING (key, created_at)
		WHERE (record.status_code, record.response::text, record.request_hash)
			IS DISTINCT FROM
			(effect.status, effect.response,
			 idempotency_request_hash(to_jsonb(effect.request)))},
	'a replay was of another answer than was given' => q{
		SELECT * FROM replay
		WHERE NOT EXISTS (SELECT FROM effect WHERE effect = replay)},
	'a lock is left' => q{
		SELECT * FROM pg_locks WHERE locktype = 'userlock'},
	'a claim is still shown in flight' => 'TABLE idempotency_in_flight');
foreach my $what (sort keys %never)
{
	is($node->safe_psql('postgres', $never{$what}), '', "never: $what");
}

# The entries of prepared transactions stay until their room is needed or their
# scope is claimed again; no others may be there.
$node->safe_psql(
	'postgres', q{
	BEGIN;
	UPDATE idempotency_key SET expires_at = created_at;
	SELECT outcome FROM generate_series(1, 3) AS n,
						LATERAL idempotency_begin('t', 'work', 'p' || n);
	ROLLBACK});
is($node->safe_psql('postgres', 'SELECT used FROM idempotency_tracking()'),
	'0', 'no entry in shared memory is left');

$node->safe_psql('postgres', 'UPDATE idempotency_key SET expires_at = created_at');
$node->safe_psql('postgres', 'CALL idempotency_sweep()');
is($node->safe_psql('postgres', 'SELECT count(*) FROM idempotency_key'),
	'0', 'a last sweep takes everything');

done_testing();
