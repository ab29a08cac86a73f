# Twenty workers on leases that are too short for them.  They sleep past their
# lease and come back as if nothing had happened, roll back, give up, release,
# ask again, are terminated; and a sweep runs.
#
# Each does its work in table effect, in the transaction of its finish, so that
# it vanishes when finish is refused.  Tables begun, step and freed say, each in
# the transaction of the call, who began an attempt and with what recovery
# point, who made a checkpoint, and who let the next one run from the beginning;
# their numbers are given out after the call, when it holds its row.  Table told
# has, in a transaction of its own, what clients were told.
#
# In the end each key must have one effect, which is its answer.

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

my $workers = 20;
my $seconds = 10;

my $node = new_server('main', conf => <<'CONF');
max_connections = 60
deadlock_timeout = 10ms
autovacuum_naptime = 1s
CONF
$node->start;
$node->safe_psql(
	'postgres', q{
	CREATE EXTENSION idempotency;
	CREATE SEQUENCE number;
	CREATE TABLE begun (number bigint DEFAULT nextval('number'), key text,
						attempt int, leased boolean, recovery_point text,
						recovery_state jsonb);
	CREATE TABLE step (number bigint DEFAULT nextval('number'), key text,
					   attempt int, recovery_point text, recovery_state jsonb);
	CREATE TABLE freed (number bigint DEFAULT nextval('number'), key text,
						attempt int);
	CREATE TABLE effect (key text, attempt int, status int, response text,
						 request int);
	CREATE TABLE replay (key text, attempt int, status int, response text);
	CREATE TABLE told (call text, key text, attempt int, outcome text,
					   sqlstate text);
	CREATE TABLE swept (count bigint);
	CREATE TABLE terminated (pid int);

	-- What a worker is going to do: mostly on one of the first keys that nobody
	-- has finished, so that the same few are worked on by all
	CREATE FUNCTION make_plan(OUT key text, OUT request int, OUT lease text,
							  OUT wait text, OUT use_checkpoint boolean,
							  OUT begin_end text, OUT checkpoint_end text,
							  OUT ending int, OUT work_end text,
							  OUT isolation text, OUT pause1 float,
							  OUT pause2 float, OUT pause3 float,
							  OUT pause4 float, OUT use_repeat boolean,
							  OUT status int, OUT response text)
	LANGUAGE sql AS $$
		SELECT 'k' || CASE WHEN random() < 0.15
						   THEN (random() * 5)::int
						   ELSE (SELECT n
								 FROM generate_series(0, 5000) AS n
								 WHERE NOT EXISTS (SELECT FROM effect
												   WHERE effect.key = 'k' || n)
								 OFFSET floor(random() * 7) LIMIT 1) END,
			   1 + (random() < 0.04)::int,
			   quote_literal((20 + random() * 300)::int || ' ms'),
			   CASE WHEN random() < 0.3 THEN '100 ms' ELSE '0 ms' END,
			   random() < 0.5,
			   CASE WHEN random() < 0.9 THEN 'COMMIT' ELSE 'ROLLBACK' END,
			   CASE WHEN random() < 0.8 THEN 'COMMIT' ELSE 'ROLLBACK' END,
			   floor(random() * 100),
			   CASE WHEN random() < 0.8 THEN 'COMMIT' ELSE 'ROLLBACK' END,
			   (ARRAY['READ COMMITTED', 'READ COMMITTED', 'REPEATABLE READ',
					  'SERIALIZABLE'])[1 + floor(random() * 4)],
			   (random() < 0.7)::int * random() * 0.3,
			   (random() < 0.5)::int * random() * 0.3,
			   (random() < 0.3)::int * random() * 0.2,
			   (random() < 0.3)::int * random() * 0.1,
			   random() < 0.3,
			   CASE WHEN random() < 0.9 THEN 201 ELSE 402 END,
			   format('{"n" :  %s}', nextval('number'));
	$$;

	-- Duels are about key d1, then d2 and so on: the next one when a key has its
	-- answer.  The attempt is 0 for who does not get one.
	CREATE SEQUENCE duel;
	CREATE FUNCTION duel_begin(OUT n bigint, OUT attempt int)
	LANGUAGE plpgsql AS $$
	DECLARE
		result idempotency_result;
	BEGIN
		n := (SELECT last_value FROM duel);
		attempt := 0;
		result := idempotency_try_begin('t', 'work', 'd' || n, lease => '1 ms');
		IF result.outcome = 'started' THEN
			attempt := result.attempt;
			INSERT INTO begun (key, attempt, leased) VALUES ('d' || n, attempt, true);
		ELSIF result.outcome = 'replayed' THEN
			PERFORM setval('duel', n + 1);
		END IF;
	END $$;
	CREATE FUNCTION duel_finish(n bigint, attempt int) RETURNS void
	LANGUAGE plpgsql AS $$
	DECLARE
		answer text := format('{"n" :  %s}', nextval('number'));
	BEGIN
		INSERT INTO effect VALUES ('d' || n, attempt, 201, answer);
		PERFORM idempotency_finish('t', 'work', 'd' || n, 201, answer::json,
								   attempt => attempt);
		INSERT INTO told VALUES ('finish', 'd' || n, attempt, 'COMMIT', '00000');
	EXCEPTION WHEN SQLSTATE 'ID005' THEN
		INSERT INTO told VALUES ('finish', 'd' || n, attempt, 'COMMIT', sqlstate);
	END $$;});

# What a worker does: an attempt with a lease, or now and then a transaction
# claim
my $begin = <<'SQL';
SELECT * FROM make_plan() \gset
\set outcome error
\set started false
\set replayed false
BEGIN ISOLATION LEVEL :isolation;
SELECT outcome, attempt, coalesce(recovery_point, '') AS recovery_point, coalesce(recovery_state::text, '') AS recovery_state, status_code, response AS stored, outcome = 'started' AS started, outcome = 'replayed' AS replayed FROM idempotency_try_begin('t', 'work', :'key', to_jsonb(:request), wait => :'wait', lease => :lease) \gset
\if :started
	INSERT INTO begun (key, attempt, leased, recovery_point, recovery_state) VALUES (:'key', :attempt, :lease IS NOT NULL, NULLIF(:'recovery_point', ''), NULLIF(:'recovery_state', '')::jsonb);
	\if :ERROR
		\set started false
	\endif
\endif
SQL
my $attempt = <<'SQL';
\if :replayed
	INSERT INTO replay VALUES (:'key', :attempt, :status_code, :'stored');
	\set begin_end COMMIT
\endif
:begin_end;
\if :ERROR
	\set started false
\endif
INSERT INTO told VALUES ('begin', :'key', NULL, :'outcome', NULL);
SELECT :'begin_end' = 'COMMIT' AND :'started'::boolean AS has_lease \gset
\if :has_lease
	SELECT pg_sleep(:pause1);
	\if :use_checkpoint
		BEGIN ISOLATION LEVEL :isolation;
		SELECT idempotency_checkpoint('t', 'work', :'key', :attempt, 'charged', :'response', :lease);
		\set code :SQLSTATE
		INSERT INTO step (key, attempt, recovery_point, recovery_state) VALUES (:'key', :attempt, 'charged', :'response');
		SELECT pg_sleep(:pause4);
		:checkpoint_end;
		INSERT INTO told VALUES ('checkpoint', :'key', :attempt, NULL, :'code');
		SELECT pg_sleep(:pause2);
	\endif
	SELECT :ending < 70 AS finishes, :ending BETWEEN 70 AND 79 AS releases, :ending BETWEEN 80 AND 89 AS fails \gset
	\if :finishes
		BEGIN ISOLATION LEVEL :isolation;
		INSERT INTO effect VALUES (:'key', :attempt, :status, :'response', :request);
		SELECT pg_sleep(:pause3);
		SELECT idempotency_finish('t', 'work', :'key', :status, :'response', attempt => :attempt);
		\set code :SQLSTATE
		SELECT pg_sleep(:pause4);
		:work_end;
		\if :ERROR
			\set code :SQLSTATE
		\endif
		INSERT INTO told VALUES ('finish', :'key', :attempt, :'work_end', :'code');
		\if :use_repeat
			SELECT pg_sleep(:pause2);
			BEGIN;
			SELECT idempotency_finish('t', 'work', :'key', :status, :'response', attempt => :attempt);
			\set again :SQLSTATE
			ROLLBACK;
			SELECT :'code' = '00000' AND :'work_end' = 'COMMIT' AS was_finished \gset
			\if :was_finished
				INSERT INTO told VALUES ('finish again', :'key', :attempt, NULL, :'again');
			\endif
		\endif
	\elif :releases
		BEGIN ISOLATION LEVEL :isolation;
		SELECT idempotency_release('t', 'work', :'key', attempt => :attempt);
		\set code :SQLSTATE
		INSERT INTO freed (key, attempt) VALUES (:'key', :attempt);
		SELECT pg_sleep(:pause4);
		:work_end;
		INSERT INTO told VALUES ('release', :'key', :attempt, :'work_end', :'code');
	\elif :fails
		BEGIN ISOLATION LEVEL :isolation;
		SELECT idempotency_finish('t', 'work', :'key', 503, attempt => :attempt);
		\set code :SQLSTATE
		INSERT INTO freed (key, attempt) VALUES (:'key', :attempt);
		SELECT pg_sleep(:pause4);
		:work_end;
		INSERT INTO told VALUES ('finish for a repeat', :'key', :attempt, :'work_end', :'code');
	\endif
\endif
SQL
my $transaction_claim = <<'SQL';
\if :started
	SELECT :attempt > 1 AND :ending >= 80 AS releases \gset
	SELECT pg_sleep(:pause3);
	\if :releases
		SELECT idempotency_release('t', 'work', :'key');
	\else
		INSERT INTO effect VALUES (:'key', :attempt, :status, :'response', :request);
		SELECT idempotency_finish('t', 'work', :'key', :status, :'response');
	\endif
	SELECT pg_sleep(:pause4);
\endif
:work_end;
SQL

# Beside them records of another action expire, and are swept, and some of the
# workers die
my $sweep = <<'SQL';
SELECT count(*) FROM generate_series(1, 5), LATERAL idempotency_begin('t', 'other', gen_random_uuid()::text, lease => '1 ms');
UPDATE idempotency_key SET expires_at = created_at WHERE action = 'other';
CALL idempotency_sweep(3) \gset
INSERT INTO swept VALUES (:swept);
SELECT pg_sleep(0.02);
SQL
my $terminate = <<'SQL';
INSERT INTO terminated
SELECT pid
FROM (SELECT pid FROM pg_stat_activity
	  WHERE application_name = 'torture'
	  ORDER BY random() LIMIT 1) AS victim
WHERE pg_terminate_backend(pid);
SELECT pg_sleep(0.3);
SQL

# What a client does in a duel
my $duel = <<'SQL';
\set us random(300, 1300)
SELECT n, attempt FROM duel_begin() \gset
\if :attempt > 0
\sleep :us us
SELECT duel_finish(:n, :attempt);
\endif
SQL

my $dir = $node->basedir;
my $go_on = "$dir/torture.on";
append_to_file($go_on, '');
append_to_file("$dir/worker.sql",
	(($begin . $attempt) x 4
		. ($begin =~ s/:lease/NULL::interval/gr) . $transaction_claim) x 5);
append_to_file("$dir/duel.sql", $duel);
append_to_file("$dir/sweep.sql", $sweep x 20);
append_to_file("$dir/terminate.sql", $terminate x 3);

# also when a test dies
END
{
	unlink $go_on if defined $go_on;
}

# Clients that lose their connection are replaced.  Each loop has a file of its
# own for what its client prints, which is not a line at a time.
my @background;
my @errors;

sub run_in_loop
{
	my ($name, $script) = @_;

	my $errors = "$dir/torture." . scalar(@errors) . '.err';
	local $ENV{PGAPPNAME} = $name;
	push @errors, $errors;
	push @background,
	  IPC::Run::start(
		[
			'sh', '-c',
			"while [ -e '$go_on' ]; do"
			  . " psql -X -q -v VERBOSITY=verbose -f '$dir/$script.sql'"
			  . " >/dev/null 2>>'$errors'; done"
		]);
	return;
}

local $ENV{PGHOST} = $node->host;
local $ENV{PGPORT} = $node->port;
local $ENV{PGDATABASE} = 'postgres';

run_in_loop('torture', 'worker') for 1 .. $workers;
run_in_loop('torture_sweep', 'sweep');
run_in_loop('torture_terminate', 'terminate');

# What must have happened for this to be torture
my %happened = (
	'workers finished' => 'SELECT count(*) FROM effect',
	'final errors were kept' => 'SELECT count(*) FROM effect WHERE status >= 400',
	'leases were taken over' => q{
		SELECT count(*) FROM begun
		WHERE leased AND attempt > 1
		  AND NOT EXISTS (SELECT FROM freed
						  WHERE freed.key = begun.key
							AND freed.attempt = begun.attempt - 1)},
	'leases were taken over with a recovery point' =>
	  'SELECT count(recovery_point) FROM begun WHERE leased',
	'transaction claims took over' =>
	  'SELECT count(*) FROM begun WHERE NOT leased AND attempt > 1',
	'a transaction claim that took over finished' =>
	  'SELECT count(*) FROM begun JOIN effect USING (key, attempt)'
	  . ' WHERE NOT leased AND attempt > 1',
	'later attempts finished' => 'SELECT count(*) FROM effect WHERE attempt > 2',
	'workers made checkpoints' => 'SELECT count(*) FROM step',
	'workers let the next one run' => 'SELECT count(*) FROM freed',
	'answers were replayed' => 'SELECT count(*) FROM replay',
	'requests were in flight' =>
	  q{SELECT count(*) FROM told WHERE outcome = 'in_flight'},
	'requests were mismatched' =>
	  q{SELECT count(*) FROM told WHERE outcome = 'mismatched'},
	'zombies were refused a finish' =>
	  q{SELECT count(*) FROM told WHERE call = 'finish' AND sqlstate = 'ID005'},
	'zombies were refused a checkpoint' =>
	  q{SELECT count(*) FROM told WHERE call = 'checkpoint' AND sqlstate = 'ID005'},
	'zombies were refused a release' =>
	  q{SELECT count(*) FROM told WHERE call = 'release' AND sqlstate = 'ID005'},
	'zombies were refused a finish for a repeat' =>
	  q{SELECT count(*) FROM told
		WHERE call = 'finish for a repeat' AND sqlstate = 'ID005'},
	'finish was repeated' =>
	  q{SELECT count(*) FROM told WHERE call = 'finish again'},
	'records of another action were swept' =>
	  'SELECT coalesce(sum(count), 0) FROM swept',
	'workers were terminated' => 'SELECT count(*) FROM terminated');

# On a slow machine it takes longer
my $all_happened =
  'SELECT ' . join(' AND ', map { "($happened{$_}) > 0" } sort keys %happened);
my $start = time();
usleep(200_000)
  until time() > $start + $seconds
  && ($node->safe_psql('postgres', $all_happened) eq 't'
	|| time() > $start + $PostgreSQL::Test::Utils::timeout_default);
unlink $go_on;
$_->finish foreach @background;
ok( $node->poll_query_until(
		'postgres',
		q{SELECT count(*) = 0 FROM pg_stat_activity
		  WHERE application_name LIKE 'torture%'}),
	'all clients are gone');

# Duels
$node->command_checks_all(
	[
		'pgbench', '-n', '-c', '8', '-j', '2', '-T', '4',
		'-f', "$dir/duel.sql", 'postgres'
	],
	0,
	[qr/number of failed transactions: 0 /],
	[qr/^(?!.*(ERROR|aborted))/s],
	'duels');
$happened{'duels were fought'} = q{
	SELECT count(*)
	FROM told JOIN effect USING (key)
	WHERE key LIKE 'd%' AND told.sqlstate = 'ID005'
	  AND told.attempt < effect.attempt};

foreach my $what (sort keys %happened)
{
	my $count = $node->safe_psql('postgres', $happened{$what});

	cmp_ok($count, '>', 0, $what);
	note "$what: $count";
}

# Nothing went wrong but what was made to
my @unexpected = grep {
	/error|fatal|panic|warning/i
	  && !/ERROR:  ID005: no such claim$/
	  && !/ERROR:  25P02: /
	  && !/ERROR:  40001: could not serialize access due to concurrent work on the same request$/
	  && !/ERROR:  40001: could not serialize access due to read\/write dependencies/
	  && !/FATAL:  (57P01: )?terminating connection due to administrator command$/
	  && !/error: connection to server was lost$/
	  && !/WARNING:  01000: PID \d+ is not a PostgreSQL (backend|server) process$/
} map { split(/\n/, slurp_file($_)) } @errors;
is(join("\n", @unexpected), '', 'clients got no other errors');
is(complaints_of($node, deadlocks => 1), '',
	'the server has nothing to complain of');

# Leases that are left are taken over by one more worker, which finishes all
is($node->safe_psql('postgres', $count_userlocks), '0', 'no lock is left');
is($node->safe_psql('postgres', $tracked),
	'0', 'no entry in shared memory is left');
$node->safe_psql(
	'postgres', q{
	DO $$
	DECLARE
		k text;
		result idempotency_result;
	BEGIN
		FOR k IN SELECT key FROM idempotency_key
				 WHERE action = 'work' AND state = 'pending'
		LOOP
			result := idempotency_begin('t', 'work', k, wait => '10 min',
										lease => '1 hour');
			INSERT INTO begun (key, attempt, leased, recovery_point,
							   recovery_state)
			VALUES (k, result.attempt, true, result.recovery_point,
					result.recovery_state);
			INSERT INTO effect VALUES (k, result.attempt, 200, '{}', NULL);
			PERFORM idempotency_finish('t', 'work', k, 200, '{}',
									   attempt => result.attempt);
		END LOOP;
	END $$});

# And this is what must be true all the same
my %never = (
	'a key has another number of effects than one' => q{
		SELECT key, count(effect)
		FROM (SELECT key FROM begun
			  UNION SELECT key FROM idempotency_key WHERE action = 'work') AS keys
			 LEFT JOIN effect USING (key)
		GROUP BY key HAVING count(effect) <> 1},
	'an effect is not that of the stored answer' => q{
		SELECT *
		FROM effect
			 FULL JOIN (SELECT * FROM idempotency_key WHERE action = 'work')
			 AS record USING (key)
		WHERE (effect.attempt, effect.status, effect.response)
			  IS DISTINCT FROM
			  (record.attempt, record.status_code, record.response::text)
		   OR record.state::text <>
			  CASE WHEN effect.status < 400 THEN 'completed' ELSE 'errored' END
		   OR record.request_hash <>
			  idempotency_request_hash(to_jsonb(effect.request))},
	'an attempt was given out twice' => q{
		SELECT key, attempt FROM begun
		GROUP BY key, attempt HAVING count(*) > 1},
	'an attempt was left out or counted back' => q{
		SELECT *
		FROM (SELECT key, attempt,
					 row_number() OVER (PARTITION BY key ORDER BY number) AS n
			  FROM begun) AS numbered
		WHERE attempt <> n},
	'an effect is of an attempt that was not begun' => q{
		SELECT * FROM effect LEFT JOIN begun USING (key, attempt)
		WHERE begun IS NULL},
	'an attempt was begun after the one that finished' => q{
		SELECT * FROM effect JOIN begun USING (key)
		WHERE begun.attempt > effect.attempt},
	'an attempt wrote when a later one had begun' => q{
		SELECT *
		FROM (SELECT number, key, attempt FROM step
			  UNION ALL
			  SELECT number, key, attempt FROM freed) AS written
			 JOIN begun AS later USING (key)
		WHERE later.attempt > written.attempt AND later.number < written.number},
	'an attempt went on with another recovery point than the last one' => q{
		SELECT *
		FROM begun
			 LEFT JOIN LATERAL (
				SELECT *
				FROM (SELECT number, key, recovery_point, recovery_state
					  FROM step
					  UNION ALL
					  SELECT number, key, NULL, NULL FROM freed) AS saved
				WHERE saved.key = begun.key AND saved.number < begun.number
				ORDER BY saved.number DESC LIMIT 1) AS last ON true
		WHERE (begun.recovery_point, begun.recovery_state)
			  IS DISTINCT FROM (last.recovery_point, last.recovery_state)},
	'a finish that succeeded has no effect' => q{
		SELECT * FROM told LEFT JOIN effect USING (key, attempt)
		WHERE call = 'finish' AND outcome = 'COMMIT' AND sqlstate = '00000'
		  AND effect IS NULL},
	'a finish that was refused has an effect' => q{
		SELECT * FROM told JOIN effect USING (key, attempt)
		WHERE call = 'finish' AND (outcome = 'ROLLBACK' OR sqlstate <> '00000')},
	'a finish could not be repeated' => q{
		SELECT * FROM told
		WHERE call = 'finish again' AND sqlstate <> '00000'},
	'a replay was of another answer' => q{
		SELECT * FROM replay
		WHERE NOT EXISTS (
			SELECT FROM effect
			WHERE (effect.key, effect.attempt, effect.status, effect.response) =
				  (replay.key, replay.attempt, replay.status, replay.response))},
	'a lock is left' => q{
		SELECT * FROM pg_locks WHERE locktype = 'userlock'},
	'a claim is still shown in flight' =>
	  q{SELECT * FROM idempotency_in_flight WHERE action = 'work'},
	'a claim is still shown as stalled' =>
	  q{SELECT * FROM idempotency_stalled WHERE action = 'work'});
foreach my $what (sort keys %never)
{
	is($node->safe_psql('postgres', $never{$what}), '', "never: $what");
}

# The record is what decides: every zombie that is left is refused
is( $node->safe_psql(
		'postgres', q{
		CREATE FUNCTION try_finish(key text, attempt int) RETURNS text
		LANGUAGE plpgsql AS $$
		BEGIN
			RETURN idempotency_finish('t', 'work', key, 200, '{"late": 1}',
									  attempt => attempt);
		EXCEPTION WHEN OTHERS THEN
			RETURN sqlstate;
		END $$;
		SELECT try_finish(key, attempt), count(*) > 0 FROM begun GROUP BY 1}),
	'ID005|t',
	'no attempt can be finished with another answer');

done_testing();
