# pg_cron sweeps a database where it is asked to, and an error says how to ask
# where it cannot be.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IPC::Run;
use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

# Sharp names, so that all quoting is seen
my $home = q{o'clock "cron"};
my $away = q{a 'way\\};
my $qualified = '"Idem; Potent"';

my $node = new_server('main');
$node->start;

plan skip_all => 'pg_cron is not installed for this server'
  if $node->safe_psql('postgres',
	"SELECT count(*) FROM pg_available_extensions WHERE name = 'pg_cron'") == 0;

# Roles that a job can run as.  Background workers run it without logging in.
$node->safe_psql('postgres', $_)
  foreach 'CREATE ROLE boss LOGIN SUPERUSER', 'CREATE ROLE sweeper LOGIN',
  'CREATE ROLE stranger LOGIN';

sub conninfo
{
	my ($dbname, $role) = @_;

	$dbname =~ s/(['\\])/\\$1/g;
	return sprintf("host=%s port=%s dbname='%s' user=%s",
		$node->host, $node->port, $dbname, $role // 'boss');
}

# Run statements in a database, as a role; gives output and errors
sub run_as
{
	my ($dbname, $role, $sql) = @_;
	my ($stdout, $stderr);

	IPC::Run::run(
		[
			'psql', '-XAtq', '-v', 'ON_ERROR_STOP=1', '-v', 'VERBOSITY=verbose',
			'-d', conninfo($dbname, $role), '-f', '-'
		],
		'<', \$sql, '>', \$stdout, '2>', \$stderr);
	chomp $stdout;
	$stderr =~ s/^psql:<stdin>:\d+: //mg;
	$stderr =~ s/^(LOCATION|CONTEXT):.*\n?//mg;
	return ($stdout, $stderr);
}

sub on
{
	my ($dbname, $sql, $role) = @_;
	my ($stdout, $stderr) = run_as($dbname, $role, $sql);

	die "$sql: $stderr" if $stderr =~ /ERROR|FATAL/;
	return $stdout;
}

sub error_on
{
	my ($dbname, $sql, $role) = @_;
	my ($stdout, $stderr) = run_as($dbname, $role, $sql);

	return $stderr eq '' ? "no error, but: $stdout" : $stderr;
}

sub schedule
{
	my ($schedule) = @_;

	return sprintf('SELECT %s.idempotency_schedule(%s)',
		$qualified, defined $schedule ? "'$schedule'" : '');
}
my $unschedule = "SELECT $qualified.idempotency_unschedule()";

# What pg_cron knows of our jobs
my $jobs =
  'SELECT jobname, schedule, command, database, username, active FROM cron.job ORDER BY jobid';

# Records that expired a day ago
my $fill = "INSERT INTO $qualified.idempotency_key (tenant, action, key, actor,"
  . ' state, request_hash, status_code, attempt, created_at, finished_at, expires_at)'
  . " SELECT 't', 'a', 'expired-' || gen_random_uuid(), '', 'completed',"
  . " '\\x00', 200, 1, now() - interval '2 days', now() - interval '2 days',"
  . " now() - interval '1 day' FROM generate_series(1, 100)";
my $expired = "SELECT count(*) FROM $qualified.idempotency_key";

sub is_swept
{
	my ($dbname, $test) = @_;

	for (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
	{
		last if on($dbname, $expired) eq '0';
		select(undef, undef, undef, 0.1);
	}
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return is(on($dbname, $expired), '0', $test);
}

# Wait for a job to succeed, and tell what it did
sub success_of
{
	my ($job) = @_;
	my $done =
	  "SELECT database, username, command FROM cron.job_run_details WHERE jobid = $job AND status = 'succeeded' LIMIT 1";

	for (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
	{
		last if on($home, $done) ne '';
		select(undef, undef, undef, 0.1);
	}
	return on($home, $done);
}

$node->safe_psql('postgres', sprintf('CREATE DATABASE "%s"', s/"/""/gr))
  foreach $home, $away;
foreach my $dbname ($home, $away)
{
	on($dbname, "CREATE SCHEMA $qualified");
	on($dbname, "CREATE EXTENSION idempotency SCHEMA $qualified");
}

# Installed, and not loaded
my $not_loaded =
    "ERROR:  55000: pg_cron is not loaded\n"
  . qq(DETAIL:  It runs jobs only when it is in "shared_preload_libraries".\n)
  . qq(HINT:  Install pg_cron and add it there. Or add "idempotency" and turn "idempotency.worker" on, which needs no pg_cron.\n);
is(error_on($home, $_), $not_loaded, "not loaded: $_")
  foreach schedule(), $unschedule;

# The setting alone does not load it
my $conf = $home =~ s/'/''/gr;
$node->append_conf('postgresql.conf', "cron.database_name = '$conf'");
$node->restart;
is(error_on($_, schedule()), $not_loaded, "not loaded, but set: $_")
  foreach $home, $away;

# Loaded, and not created: a schema that somebody else calls cron is not used
$node->append_conf('postgresql.conf', <<'CONF');
shared_preload_libraries = 'pg_cron, idempotency'
cron.use_background_workers = on
CONF
$node->restart;
on($home, q{
	CREATE SCHEMA cron;
	CREATE TABLE cron.job (jobid bigint, jobname text, username text, database text, active boolean);
	INSERT INTO cron.job VALUES (1, 'idempotency sweep', 'boss', current_database(), true);
	CREATE FUNCTION cron.schedule(text, text, text) RETURNS bigint LANGUAGE plpgsql
		AS $$ BEGIN RAISE EXCEPTION 'trapped'; END $$;
	CREATE FUNCTION cron.unschedule(bigint) RETURNS boolean LANGUAGE plpgsql
		AS $$ BEGIN RAISE EXCEPTION 'trapped'; END $$;});
is( error_on($home, $_),
	qq(ERROR:  42704: extension "pg_cron" does not exist\n)
	  . "HINT:  Use CREATE EXTENSION pg_cron to create it in this database.\n",
	"not created: $_") foreach schedule(), $unschedule;
on($home, 'DROP SCHEMA cron CASCADE; CREATE EXTENSION pg_cron');

# In another database: the hints are statements that work
my $hint = qr/\nHINT:  Run there: (.*)\n$/;
my $elsewhere =
  qq(ERROR:  55000: pg_cron does not keep its jobs in this database\nDETAIL:  It keeps them in database "$home".);
my $finest =
  on($home, "SELECT extversion !~ '^1\\.[0-4]' FROM pg_extension WHERE extname = 'pg_cron'") eq 't'
  ? '1 second' : '* * * * *';
my $error = error_on($away, schedule($finest));
my ($there) = $error =~ $hint;
is( $error =~ s/$hint//r, $elsewhere, 'elsewhere: an error');
is( $there,
	qq{SELECT cron.schedule_in_database(E'idempotency sweep of a ''way\\\\', '$finest', 'CALL "Idem; Potent".idempotency_sweep()', E'a ''way\\\\')},
	'elsewhere: schedule');
($there) = error_on($away, schedule()) =~ $hint;
like($there, qr/, '\* \* \* \* \*', 'CALL /, 'elsewhere: schedule by default');
($there) = error_on($away, schedule($finest)) =~ $hint;
my $away_job = on($home, $there);
is( on($home, $jobs),
	qq(idempotency sweep of $away|$finest|CALL $qualified.idempotency_sweep()|$away|boss|t),
	'elsewhere: a job is scheduled there');
on($away, $fill);

# A schedule
like(error_on($home, 'SELECT ' . $qualified . '.idempotency_schedule(NULL)'),
	qr/^ERROR:  22004: schedule is missing$/, 'no schedule');
like(error_on($home, schedule('often')),
	qr/^ERROR:  22023: invalid schedule: often$/m, 'not a schedule');
like(error_on($home, "BEGIN READ ONLY; $_"),
	qr/^ERROR:  25006: cannot execute idempotency_(un)?schedule\(\) in a read-only transaction$/,
	"read-only: $_") foreach schedule(), $unschedule;
is(on($home, $unschedule), 'f', 'there is no job to unschedule');
my $job = on($home, schedule());
like($job, qr/^\d+$/, 'a job is scheduled');
my $away_line = on($home, "$jobs LIMIT 1");
my $line =
  "idempotency sweep|%s|CALL $qualified.idempotency_sweep()|$home|boss|t";
is( on($home, $jobs),
	join("\n", $away_line, sprintf($line, '* * * * *')),
	'each minute, beside that of the other database');
is(on($home, schedule('*/5 1 * * *')),
	$job, 'scheduled again, it is the same job');
is( on($home, $jobs),
	join("\n", $away_line, sprintf($line, '*/5 1 * * *')),
	'with the new schedule');

# A job that would not run here is not taken over
foreach my $change ('active = false', "database = 'postgres'")
{
	on($home, "UPDATE cron.job SET $change WHERE jobid = $job");
	my $next = on($home, schedule($finest));
	isnt($next, $job, "$change: another job");
	is( on($home, $jobs),
		join("\n", $away_line, sprintf($line, $finest)),
		"$change: which replaces it");
	$job = $next;
}
on($home, $fill);

# With the rights of the caller only
like(error_on($home, $_, 'sweeper'),
	qr/^ERROR:  42501: permission denied for schema/, "no right: $_")
  foreach schedule(), $unschedule;
on( $home, "GRANT USAGE ON SCHEMA $qualified TO sweeper, stranger;
	GRANT EXECUTE ON FUNCTION $qualified.idempotency_schedule, $qualified.idempotency_unschedule
		TO sweeper, stranger;
	GRANT EXECUTE ON PROCEDURE $qualified.idempotency_sweep TO sweeper");
like(error_on($home, $_, 'sweeper'),
	qr/^ERROR:  42501: permission denied for schema cron$/m,
	"no right on pg_cron: $_")
  foreach schedule(), $unschedule;
on($home, 'GRANT USAGE ON SCHEMA cron TO sweeper, stranger');
is(on($home, $unschedule, 'stranger'),
	'f', 'the job of another role is not unscheduled');

# whatever the search_path
on($home, 'CREATE SCHEMA evil; GRANT USAGE ON SCHEMA evil TO sweeper;
	CREATE FUNCTION evil.trap(text, name) RETURNS boolean LANGUAGE plpgsql AS
		$$ BEGIN RAISE EXCEPTION $_$trapped$_$; END $$;
	CREATE FUNCTION evil.trap(name, text) RETURNS boolean LANGUAGE plpgsql AS
		$$ BEGIN RAISE EXCEPTION $_$trapped$_$; END $$;
	CREATE FUNCTION evil.trap(text, text) RETURNS boolean LANGUAGE plpgsql AS
		$$ BEGIN RAISE EXCEPTION $_$trapped$_$; END $$;
	CREATE OPERATOR evil.= (FUNCTION = evil.trap, LEFTARG = text, RIGHTARG = name);
	CREATE OPERATOR evil.= (FUNCTION = evil.trap, LEFTARG = name, RIGHTARG = text);
	CREATE OPERATOR evil.= (FUNCTION = evil.trap, LEFTARG = text, RIGHTARG = text);
	CREATE FUNCTION evil.current_database() RETURNS name LANGUAGE plpgsql AS
		$$ BEGIN RAISE EXCEPTION $_$trapped$_$; END $$;
	CREATE FUNCTION evil.trap(bigint, boolean) RETURNS bigint LANGUAGE plpgsql AS
		$$ BEGIN RAISE EXCEPTION $_$trapped$_$; END $$;
	CREATE AGGREGATE evil.count(boolean) (SFUNC = evil.trap, STYPE = bigint);
	CREATE DOMAIN evil.text AS int;');
my $evil = 'SET search_path = evil, pg_catalog';
like(error_on($home, "$evil; SELECT 'a'::pg_catalog.text = 'a'::pg_catalog.text", 'sweeper'),
	qr/trapped/, 'the traps work');
my $sweeper_job = on($home, "$evil; " . schedule($finest), 'sweeper');
is(on($home, "$evil; " . schedule($finest), 'sweeper'),
	$sweeper_job, 'a role without rights schedules, whatever the search_path');
is( on($home, $jobs, 'sweeper'),
	sprintf($line, $finest) =~ s/boss/sweeper/r,
	'as itself');

# They run
is_swept($home, 'pg_cron sweeps the database that it is in');
is_swept($away, 'and another one');
is( success_of($job),
	"$home|boss|CALL $qualified.idempotency_sweep()",
	'the job succeeds');
is( success_of($away_job),
	"$away|boss|CALL $qualified.idempotency_sweep()",
	'the job of the other database succeeds');
is( success_of($sweeper_job),
	"$home|sweeper|CALL $qualified.idempotency_sweep()",
	'the job of a role without rights on the table succeeds');

# They stop
is(on($home, $unschedule), 't', 'unschedule');
is(on($home, $unschedule), 'f',
	'unschedule again, which leaves the job of another role alone');
is(on($home, "$evil; $unschedule", 'sweeper'),
	't', 'the other role unschedules it, whatever the search_path');
$error = error_on($away, $unschedule);
($there) = $error =~ $hint;
is( $error =~ s/$hint//r, $elsewhere, 'elsewhere: unschedule is an error, too');
is($there, "SELECT cron.unschedule(E'idempotency sweep of a ''way\\\\')",
	'elsewhere: unschedule');
is(on($home, $there), 't', 'elsewhere: it is unscheduled');
is(on($home, 'SELECT count(*) FROM cron.job'), '0', 'no job is left');

# pg_cron is here, but keeps its jobs in another database now
$node->append_conf('postgresql.conf', "cron.database_name = 'postgres'");
$node->restart;
like(error_on($home, schedule()),
	qr/^ERROR:  55000: .*\nDETAIL:  It keeps them in database "postgres"\./,
	'moved away');
is(on($home, 'SELECT count(*) FROM cron.job'), '0', 'moved away: no job');

$node->stop;
unlike(slurp_file($node->logfile), qr/TRAP|PANIC|terminated by signal/,
	'no crash');
done_testing();
