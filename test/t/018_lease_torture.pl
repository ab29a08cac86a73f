# Twenty workers on leases that are too short for them.  They sleep past their
# lease and come back as if nothing had happened, roll back, give up, release,
# ask again, lose their connection, are terminated.  Some bring the ids of their
# claims, and then bring the same one again when they do not know what became of
# their begin; table wish has those.  Meanwhile some of the records expire, so that
# their keys are begun anew, with attempts that count from 1 again; and a sweep
# runs.
#
# Each does its work in table effect, in the transaction of its finish, so that
# it vanishes when finish is refused.  Tables start, step, freed and finished say,
# each in the transaction of the call, who began an attempt and with what recovery
# point, who made a checkpoint, who let the next one run, and who finished; their
# numbers are given out after the call, when it holds its row.  Table told has, in
# a transaction of its own, what clients were told, and table aged which records
# expired, and with what in them.
#
# A record is that of a key since it was created, which is when it was born.  In
# the end each must have had one effect, which is its answer.

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
	CREATE TABLE start (number bigint DEFAULT nextval('number'), key text,
						born timestamptz, attempt int, claim uuid,
						brought boolean, leased boolean, recovery_point text,
						recovery_state jsonb);
	CREATE TABLE step (number bigint DEFAULT nextval('number'), key text,
					   born timestamptz, attempt int, recovery_point text,
					   recovery_state jsonb);
	CREATE TABLE freed (number bigint DEFAULT nextval('number'), key text,
						born timestamptz, attempt int);
	CREATE TABLE finished (LIKE freed INCLUDING DEFAULTS);
	CREATE TABLE effect (key text, born timestamptz, attempt int, claim uuid,
						 status int, response text, request int);
	CREATE TABLE replay (key text, born timestamptz, attempt int, status int,
						 response text);
	CREATE TABLE told (number bigint DEFAULT nextval('number'), call text,
					   key text, born timestamptz, attempt int, outcome text,
					   sqlstate text);
	CREATE TABLE wish (client int PRIMARY KEY, key text, request int,
					   claim uuid);
	CREATE TABLE aged (LIKE idempotency_key);
	CREATE TABLE swept (count bigint);
	CREATE TABLE terminated (pid int);

	-- An attempt is begun once; whoever has the id of its claim can get it again
	CREATE VIEW begun AS
		SELECT DISTINCT ON (key, born, attempt, coalesce(claim::text, number::text)) *
		FROM start
		ORDER BY key, born, attempt, coalesce(claim::text, number::text), number;
	CREATE VIEW regained AS
		SELECT * FROM start WHERE number NOT IN (SELECT number FROM begun);

	-- The records that there were, and those that are live
	CREATE VIEW record AS
		SELECT *, created_at AS born
		FROM (TABLE aged
			  UNION ALL
			  SELECT * FROM idempotency_key
			  WHERE expires_at > clock_timestamp()) AS kept
		WHERE action = 'work';

	-- What a worker is going to do: what it does not know whether it has begun, or
	-- else mostly on one of the first keys that nobody has finished, so that the
	-- same few are worked on by all, or on one of those whose records expire; then
	-- some sleep for so long that it has expired when they come back
	CREATE FUNCTION make_plan(for_client int, OUT key text, OUT request int,
							  OUT id text, OUT lost boolean, OUT lease text,
							  OUT wait text, OUT use_checkpoint boolean,
							  OUT undone boolean,
							  OUT begin_end text, OUT checkpoint_end text,
							  OUT ending int, OUT work_end text,
							  OUT isolation text, OUT pause1 float,
							  OUT pause2 float, OUT pause3 float,
							  OUT pause4 float, OUT use_repeat boolean,
							  OUT status int, OUT response text)
	LANGUAGE sql AS $$
		INSERT INTO wish
		SELECT for_client,
			   CASE WHEN random() < 0.1
					THEN 'k' || (random() * 5)::int
					WHEN random() < 0.5
					THEN 'e' || floor(random() * 6)
					ELSE 'k' || (SELECT n
								 FROM generate_series(0, 5000) AS n
								 WHERE NOT EXISTS (SELECT FROM effect
												   WHERE effect.key = 'k' || n)
								 OFFSET floor(random() * 7) LIMIT 1) END,
			   1 + (random() < 0.04)::int,
			   CASE WHEN random() < 0.6 THEN gen_random_uuid() END
		ON CONFLICT (client) DO NOTHING;
		SELECT key, request,
			   coalesce(claim::text, ''),
			   claim IS NOT NULL AND random() < 0.2,
			   quote_literal((20 + random() * CASE WHEN expires THEN 50
													ELSE 300 END)::int || ' ms'),
			   CASE WHEN random() < 0.3 THEN '100 ms' ELSE '0 ms' END,
			   random() < 0.5,
			   random() < 0.15,
			   CASE WHEN random() < 0.9 THEN 'COMMIT' ELSE 'ROLLBACK' END,
			   CASE WHEN random() < 0.8 THEN 'COMMIT' ELSE 'ROLLBACK' END,
			   floor(random() * 100),
			   CASE WHEN random() < 0.8 THEN 'COMMIT' ELSE 'ROLLBACK' END,
			   (ARRAY['READ COMMITTED', 'READ COMMITTED', 'REPEATABLE READ',
					  'SERIALIZABLE'])[1 + floor(random() * 4)],
			   (random() < 0.7)::int * random() * 0.3
			   + (expires AND random() < 0.2)::int,
			   (random() < 0.5)::int * random() * 0.3,
			   (random() < 0.3)::int * random() * 0.2,
			   (random() < 0.3)::int * random() * 0.1,
			   random() < 0.3,
			   CASE WHEN random() < 0.9 THEN 201 ELSE 402 END,
			   format('{"n" :  %s}', nextval('number'))
		FROM wish, LATERAL (SELECT key LIKE 'e%') AS nap (expires)
		WHERE client = for_client;
	$$;

	-- Duels are about key d1, then d2 and so on: the next one when a key has its
	-- answer.  The attempt is 0 for who does not get one.
	CREATE SEQUENCE duel;
	CREATE FUNCTION duel_begin(OUT n bigint, OUT attempt int, OUT claim uuid,
							   OUT born timestamptz)
	LANGUAGE plpgsql AS $$
	DECLARE
		result idempotency_result;
	BEGIN
		n := (SELECT last_value FROM duel);
		attempt := 0;
		result := idempotency_try_begin('t', 'work', 'd' || n, lease => '1 ms');
		claim := coalesce(result.claim, gen_random_uuid());
		born := coalesce(result.created_at, now());
		IF result.outcome = 'started' THEN
			attempt := result.attempt;
			INSERT INTO start (key, born, attempt, claim, leased)
			VALUES ('d' || n, born, attempt, claim, true);
		ELSIF result.outcome = 'replayed' THEN
			PERFORM setval('duel', n + 1);
		END IF;
	END $$;
	CREATE FUNCTION duel_finish(n bigint, attempt int, claim uuid,
								born timestamptz) RETURNS void
	LANGUAGE plpgsql AS $$
	DECLARE
		key text := 'd' || n;
		answer text := format('{"n" :  %s}', nextval('number'));
		code text := '00000';
	BEGIN
		BEGIN
			INSERT INTO effect VALUES (key, born, attempt, claim, 201, answer);
			PERFORM idempotency_finish('t', 'work', key, 201, answer::json,
									   claim => claim);
			INSERT INTO finished (key, born, attempt) VALUES (key, born, attempt);
		EXCEPTION WHEN SQLSTATE 'ID005' THEN
			code := sqlstate;
		END;
		INSERT INTO told (call, key, born, attempt, outcome, sqlstate)
		VALUES ('finish', key, born, attempt, 'COMMIT', code);
	END $$;});

# What a worker does: an attempt with a lease, or now and then a transaction
# claim
my $begin = <<'SQL';
SELECT * FROM make_plan(:client) \gset
\set outcome error
\set started false
\set replayed false
BEGIN ISOLATION LEVEL :isolation;
SELECT outcome, attempt, created_at AS born, coalesce(claim::text, '') AS claim, coalesce(recovery_point, '') AS recovery_point, coalesce(recovery_state::text, '') AS recovery_state, status_code, response AS stored, outcome = 'started' AS started, outcome = 'replayed' AS replayed FROM idempotency_try_begin('t', 'work', :'key', to_jsonb(:request), wait => :'wait', lease => :lease, claim => NULLIF(:'id', '')::uuid) \gset
\if :started
	INSERT INTO start (key, born, attempt, claim, brought, leased, recovery_point, recovery_state) VALUES (:'key', :'born', :attempt, NULLIF(:'claim', '')::uuid, :'id' <> '', :lease IS NOT NULL, NULLIF(:'recovery_point', ''), NULLIF(:'recovery_state', '')::jsonb);
	\if :ERROR
		\set started false
	\endif
\endif
SQL
my $attempt = <<'SQL';
\if :replayed
	INSERT INTO replay VALUES (:'key', :'born', :attempt, :status_code, :'stored');
	\set begin_end COMMIT
\endif
:begin_end;
\if :ERROR
	\set started false
\endif
INSERT INTO told (call, key, outcome) VALUES ('begin', :'key', :'outcome');
SELECT :'begin_end' = 'COMMIT' AND :'started'::boolean AND NOT :'lost'::boolean AS has_lease \gset
\if :lost
	\connect
\else
	DELETE FROM wish WHERE client = :client;
\endif
\if :has_lease
	SELECT pg_sleep(:pause1);
	\if :use_checkpoint
		BEGIN ISOLATION LEVEL :isolation;
		\if :undone
			SELECT idempotency_checkpoint('t', 'work', :'key', :'claim', '', lease => :lease);
			\set code :SQLSTATE
			INSERT INTO step (key, born, attempt) VALUES (:'key', :'born', :attempt);
		\else
			SELECT idempotency_checkpoint('t', 'work', :'key', :'claim', 'charged', :'response', :lease);
			\set code :SQLSTATE
			INSERT INTO step (key, born, attempt, recovery_point, recovery_state) VALUES (:'key', :'born', :attempt, 'charged', :'response');
		\endif
		SELECT pg_sleep(:pause4);
		:checkpoint_end;
		INSERT INTO told (call, key, born, attempt, sqlstate) VALUES ('checkpoint', :'key', :'born', :attempt, :'code');
		SELECT pg_sleep(:pause2);
	\endif
	SELECT :ending < 70 AS finishes, :ending BETWEEN 70 AND 79 AS releases, :ending BETWEEN 80 AND 89 AS fails \gset
	\if :finishes
		BEGIN ISOLATION LEVEL :isolation;
		INSERT INTO effect VALUES (:'key', :'born', :attempt, :'claim', :status, :'response', :request);
		SELECT pg_sleep(:pause3);
		SELECT idempotency_finish('t', 'work', :'key', :status, :'response', claim => :'claim');
		\set code :SQLSTATE
		INSERT INTO finished (key, born, attempt) VALUES (:'key', :'born', :attempt);
		SELECT pg_sleep(:pause4);
		:work_end;
		\if :ERROR
			\set code :SQLSTATE
		\endif
		INSERT INTO told (call, key, born, attempt, outcome, sqlstate) VALUES ('finish', :'key', :'born', :attempt, :'work_end', :'code');
		\if :use_repeat
			SELECT pg_sleep(:pause2);
			BEGIN;
			SELECT idempotency_finish('t', 'work', :'key', :status, :'response', claim => :'claim');
			\set again :SQLSTATE
			ROLLBACK;
			SELECT :'code' = '00000' AND :'work_end' = 'COMMIT' AS was_finished \gset
			\if :was_finished
				INSERT INTO told (call, key, born, attempt, sqlstate) VALUES ('finish again', :'key', :'born', :attempt, :'again');
			\endif
		\endif
	\elif :releases
		BEGIN ISOLATION LEVEL :isolation;
		SELECT idempotency_release('t', 'work', :'key', claim => :'claim');
		\set code :SQLSTATE
		INSERT INTO freed (key, born, attempt) VALUES (:'key', :'born', :attempt);
		SELECT pg_sleep(:pause4);
		:work_end;
		INSERT INTO told (call, key, born, attempt, outcome, sqlstate) VALUES ('release', :'key', :'born', :attempt, :'work_end', :'code');
	\elif :fails
		BEGIN ISOLATION LEVEL :isolation;
		SELECT idempotency_finish('t', 'work', :'key', 503, claim => :'claim');
		\set code :SQLSTATE
		INSERT INTO freed (key, born, attempt) VALUES (:'key', :'born', :attempt);
		SELECT pg_sleep(:pause4);
		:work_end;
		INSERT INTO told (call, key, born, attempt, outcome, sqlstate) VALUES ('finish for a repeat', :'key', :'born', :attempt, :'work_end', :'code');
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
		INSERT INTO effect VALUES (:'key', :'born', :attempt, NULL, :status, :'response', :request);
		SELECT idempotency_finish('t', 'work', :'key', :status, :'response');
		INSERT INTO finished (key, born, attempt) VALUES (:'key', :'born', :attempt);
	\endif
	SELECT pg_sleep(:pause4);
\endif
:work_end;
DELETE FROM wish WHERE client = :client;
SQL

# Beside them records expire, of some of the keys and of another action, and are
# swept, and some of the workers die
my $age = <<'SQL';
WITH now_aged AS (
	UPDATE idempotency_key SET expires_at = clock_timestamp()
	WHERE action = 'work' AND key LIKE 'e%' AND state <> 'pending'
	  AND expires_at > clock_timestamp() AND random() < 0.5
	RETURNING *)
INSERT INTO aged SELECT * FROM now_aged;
SELECT pg_sleep(0.01);
SQL
my $sweep = <<'SQL';
SELECT count(*) FROM generate_series(1, 5), LATERAL idempotency_begin('t', 'other', gen_random_uuid()::text, lease => '1 ms');
UPDATE idempotency_key SET expires_at = created_at WHERE action = 'other';
CALL idempotency_sweep(3);
INSERT INTO swept SELECT swept FROM idempotency_worker_status();
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
SELECT n, attempt, claim, born FROM duel_begin() \gset
\if :attempt > 0
\sleep :us us
SELECT duel_finish(:n, :attempt, ':claim', ':born');
\endif
SQL

my $dir = $node->basedir;
my $go_on = "$dir/torture.on";
append_to_file($go_on, '');
append_to_file("$dir/worker.sql",
	(($begin . $attempt) x 4
		. ($begin =~ s/:lease/NULL::interval/gr =~ s/:'id'/''/gr)
		. $transaction_claim) x 5);
append_to_file("$dir/duel.sql", $duel);
append_to_file("$dir/age.sql", $age x 50);
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
			  . " psql -X -q -v VERBOSITY=verbose -v client=$#errors -f '$dir/$script.sql'"
			  . " >/dev/null 2>>'$errors'; done"
		]);
	return;
}

local $ENV{PGHOST} = $node->host;
local $ENV{PGPORT} = $node->port;
local $ENV{PGDATABASE} = 'postgres';

run_in_loop('torture', 'worker') for 1 .. $workers;
run_in_loop('torture_age', 'age');
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
						  WHERE (freed.key, freed.born, freed.attempt) =
								(begun.key, begun.born, begun.attempt - 1))},
	'leases were taken over with a recovery point' =>
	  'SELECT count(recovery_point) FROM begun WHERE leased',
	'transaction claims took over' =>
	  'SELECT count(*) FROM begun WHERE NOT leased AND attempt > 1',
	'a transaction claim that took over finished' =>
	  'SELECT count(*) FROM begun JOIN effect USING (key, born, attempt)'
	  . ' WHERE NOT leased AND attempt > 1',
	'claims were begun with an id that was brought, and with one that was made' =>
	  'SELECT least(count(*) FILTER (WHERE brought), count(*) FILTER (WHERE NOT brought))'
	  . ' FROM begun WHERE leased',
	'claims were had again by their id' => 'SELECT count(*) FROM regained',
	'claims were had again with a recovery point' =>
	  'SELECT count(recovery_point) FROM regained',
	'later attempts finished' => 'SELECT count(*) FROM effect WHERE attempt > 2',
	'workers made checkpoints' => 'SELECT count(*) FROM step',
	'workers said that all was undone' =>
	  'SELECT count(*) FROM step WHERE recovery_point IS NULL',
	'workers let the next one run' => 'SELECT count(*) FROM freed',
	'who let the next one run left it a recovery point' => q{
		SELECT count(*)
		FROM begun
		WHERE recovery_point IS NOT NULL
		  AND EXISTS (SELECT FROM freed
					  WHERE (freed.key, freed.born, freed.attempt) =
							(begun.key, begun.born, begun.attempt - 1))},
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
	'zombies were refused whose attempt was that of a later claim' => q{
		SELECT count(*)
		FROM told
		WHERE key LIKE 'e%' AND sqlstate = 'ID005'
		  AND (SELECT last.born > told.born AND last.attempt = told.attempt
			   FROM begun AS last
			   WHERE last.key = told.key AND last.number < told.number
			   ORDER BY last.number DESC LIMIT 1)},
	'finish was repeated' =>
	  q{SELECT count(*) FROM told WHERE call = 'finish again'},
	'records expired' => 'SELECT count(*) FROM aged',
	'keys were begun anew' =>
	  'SELECT count(DISTINCT (key, born)) - count(DISTINCT key) FROM begun',
	'records were swept' => 'SELECT coalesce(sum(count), 0) FROM swept',
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
	FROM told JOIN effect USING (key, born)
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
	  && !/ERROR:  ID005: claim was lost$/
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
			INSERT INTO start (key, born, attempt, claim, leased,
							   recovery_point, recovery_state)
			VALUES (k, result.created_at, result.attempt, result.claim, true,
					result.recovery_point, result.recovery_state);
			INSERT INTO effect
			VALUES (k, result.created_at, result.attempt, result.claim, 200, '{}');
			PERFORM idempotency_finish('t', 'work', k, 200, '{}',
									   claim => result.claim);
		END LOOP;
	END $$});

# And this is what must be true all the same
my %never = (
	'a record has another number of effects than one' => q{
		SELECT key, born, count(effect)
		FROM (SELECT key, born FROM begun
			  UNION SELECT key, born FROM record) AS born
			 LEFT JOIN effect USING (key, born)
		GROUP BY key, born HAVING count(effect) <> 1},
	'an effect is not that of the stored answer' => q{
		SELECT *
		FROM effect FULL JOIN record USING (key, born)
		WHERE (effect.attempt, effect.claim, effect.status, effect.response)
			  IS DISTINCT FROM
			  (record.attempt, record.claim, record.status_code,
			   record.response::text)
		   OR record.state::text <>
			  CASE WHEN effect.status < 400 THEN 'completed' ELSE 'errored' END
		   OR record.request_hash <>
			  idempotency_request_hash(to_jsonb(effect.request))},
	'an attempt was given out twice' => q{
		SELECT key, born, attempt FROM begun
		GROUP BY key, born, attempt HAVING count(*) > 1},
	'an attempt was left out or counted back' => q{
		SELECT *
		FROM (SELECT key, born, attempt,
					 row_number() OVER (PARTITION BY key, born ORDER BY number) AS n
			  FROM begun) AS numbered
		WHERE attempt <> n},
	'a claim without an id was had again' => q{
		SELECT * FROM regained WHERE claim IS NULL OR NOT brought},
	'a claim was had again when a later one had begun' => q{
		SELECT *
		FROM regained JOIN begun AS later USING (key)
		WHERE (later.born, later.attempt) > (regained.born, regained.attempt)
		  AND later.number < regained.number},
	'an effect is of a claim that was not begun' => q{
		SELECT *
		FROM effect
		WHERE NOT EXISTS (
			SELECT FROM begun
			WHERE (begun.key, begun.born, begun.attempt) =
				  (effect.key, effect.born, effect.attempt)
			  AND begun.claim IS NOT DISTINCT FROM effect.claim)},
	'an attempt was begun after the one that finished' => q{
		SELECT * FROM effect JOIN begun USING (key, born)
		WHERE begun.attempt > effect.attempt},
	'a claim wrote when a later one had begun' => q{
		SELECT *
		FROM (SELECT number, key, born, attempt FROM step
			  UNION ALL
			  TABLE freed
			  UNION ALL
			  TABLE finished) AS written
			 JOIN begun AS later USING (key)
		WHERE (later.born, later.attempt) > (written.born, written.attempt)
		  AND later.number < written.number},
	'a claim went on with another recovery point than the last one' => q{
		SELECT *
		FROM start
			 LEFT JOIN LATERAL (
				SELECT *
				FROM step
				WHERE (step.key, step.born) = (start.key, start.born)
				  AND step.number < start.number
				ORDER BY step.number DESC LIMIT 1) AS last ON true
		WHERE (start.recovery_point, start.recovery_state)
			  IS DISTINCT FROM (last.recovery_point, last.recovery_state)},
	'a finish that succeeded has no effect' => q{
		SELECT * FROM told LEFT JOIN effect USING (key, born, attempt)
		WHERE call = 'finish' AND outcome = 'COMMIT' AND sqlstate = '00000'
		  AND effect IS NULL},
	'a finish that was refused has an effect' => q{
		SELECT * FROM told JOIN effect USING (key, born, attempt)
		WHERE call = 'finish' AND (outcome = 'ROLLBACK' OR sqlstate <> '00000')},
	'a finish could not be repeated while its record was there' => q{
		SELECT * FROM told
		WHERE call = 'finish again' AND sqlstate <> '00000'
		  AND NOT EXISTS (SELECT FROM aged
						  WHERE (aged.key, aged.created_at) = (told.key, told.born))},
	'a replay was of another answer' => q{
		SELECT * FROM replay
		WHERE NOT EXISTS (
			SELECT FROM effect
			WHERE (effect.key, effect.born, effect.attempt, effect.status,
				   effect.response) =
				  (replay.key, replay.born, replay.attempt, replay.status,
				   replay.response))},
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
		CREATE FUNCTION try_finish(key text, claim uuid) RETURNS text
		LANGUAGE plpgsql AS $$
		BEGIN
			RETURN idempotency_finish('t', 'work', key, 200, '{"late": 1}',
									  claim => claim);
		EXCEPTION WHEN OTHERS THEN
			RETURN sqlstate;
		END $$;
		SELECT try_finish(key, claim), count(*) > 0
		FROM begun WHERE claim IS NOT NULL GROUP BY 1}),
	'ID005|t',
	'no claim can be finished with another answer');

done_testing();
