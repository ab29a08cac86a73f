# A synchronous standby is promoted under load, four times in a row.  Clients make
# requests with few keys, which they meet at: in a transaction, with a lease, and
# prepared.  When the primary is gone they go on at the standby, with the very
# request that they got no answer to.
#
# A client is a psql that gets no error until its server is gone.  It writes down
# what it was told, which is all that it knows afterwards:
#
#	number kind key answer
#
# where the kind is that of the request whose answer this is; or "begun" or
# "charged", with a claim id, when a lease was begun, and when a checkpoint was saved
# and a card charged then.  What was written down by anybody must be true on the
# promoted server.
#
# Table effect has the work.  Nothing but the extension keeps it from having a key
# twice, and no two answers are the same.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IPC::Run;
use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $clients = 6;

# What it takes until the primary is stopped: so many effects of each kind
my $enough = 25;

my $primary = new_server(
	'server0',
	init => [ allows_streaming => 1 ],
	conf => "max_prepared_transactions = 30\nmax_connections = 40");
$primary->start;
$primary->safe_psql(
	'postgres', q{
	CREATE EXTENSION idempotency;
	CREATE TABLE effect (kind text NOT NULL, key text NOT NULL, answer text NOT NULL);

	-- The request that a client makes.  The ids of claim and transaction are its own.
	CREATE FUNCTION make_request(client int, n int, OUT kind text, OUT key text,
								 OUT claim uuid, OUT gid text, OUT gives_up boolean,
								 OUT is_transaction boolean, OUT is_leased boolean)
	LANGUAGE sql AS $$
		SELECT kind, 'k' || n / 4 + n * client % 2,
			   format('00000000-0000-0000-%s-%s', to_char(client, 'FM0000'),
					  to_char(n, 'FM000000000000'))::uuid,
			   format('request %s of client %s', n, client),
			   n % 5 = 0, kind = 'transaction', kind = 'lease'
		FROM (SELECT (ARRAY['transaction', 'lease', 'prepared'])[1 + (n + client) % 3])
			 AS request (kind)
	$$;

	CREATE FUNCTION pay(kind text, key text, wait interval = NULL) RETURNS text
	LANGUAGE plpgsql AS $$
	DECLARE
		answer json := format('{"by" :  "%s"}', gen_random_uuid());
		result idempotency_result;
	BEGIN
		result := idempotency_try_begin('shop', kind, key, to_jsonb(key), wait => wait);
		IF result.outcome = 'started' THEN
			INSERT INTO effect VALUES (kind, key, answer);
			PERFORM idempotency_finish('shop', kind, key, 201, answer);
			RETURN answer;
		END IF;
		RETURN coalesce(result.response::text, result.outcome);
	END $$;

	-- Who asks again for a claim may learn that it had been released
	CREATE FUNCTION begin_lease(key text, claim uuid, OUT outcome text, OUT answer text,
								OUT started boolean, OUT is_charged boolean)
	LANGUAGE plpgsql AS $$
	DECLARE
		result idempotency_result;
	BEGIN
		result := idempotency_try_begin('shop', 'lease', key, to_jsonb(key),
										lease => '1 hour', claim => claim);
		outcome := result.outcome;
		answer := coalesce(result.response::text, outcome);
		started := outcome = 'started';
		is_charged := result.recovery_point IS NOT NULL;
	EXCEPTION WHEN SQLSTATE 'ID005' THEN
		answer := 'released';
		started := false;
	END $$;

	CREATE FUNCTION finish_lease(key text, claim uuid) RETURNS text
	LANGUAGE plpgsql AS $$
	DECLARE
		answer json := format('{"by" :  "%s"}', claim);
	BEGIN
		INSERT INTO effect VALUES ('lease', key, answer);
		PERFORM idempotency_finish('shop', 'lease', key, 201, answer, claim => claim);
		RETURN answer;
	END $$;

	-- What all clients together have written down
	CREATE TABLE told (client int, n int, kind text, key text, answer text);

	CREATE VIEW record AS
		SELECT action AS kind, * FROM idempotency_key WHERE tenant = 'shop';});

my $request = <<'SQL';
SELECT :n + 1 AS n \gset
SELECT * FROM make_request(:client, :n) \gset
\if :is_transaction
	SELECT pay(:'kind', :'key', '1 min') AS answer \gset
\elif :is_leased
	SELECT * FROM begin_lease(:'key', :'claim') \gset
	\if :started
		\echo :n begun :key :claim
		\if :is_charged
		\else
			SELECT idempotency_checkpoint('shop', 'lease', :'key', :'claim', 'charged',
										  to_jsonb(:n), '1 hour') AS until \gset
			\echo :n charged :key :claim
		\endif
		\if :gives_up
			SELECT idempotency_release('shop', 'lease', :'key', claim => :'claim') AS ended \gset
		\else
			SELECT finish_lease(:'key', :'claim') AS answer \gset
		\endif
	\endif
\else
	SELECT count(*) > 0 AS is_prepared FROM pg_prepared_xacts WHERE gid = :'gid' \gset
	\if :is_prepared
	\else
		BEGIN;
		SELECT pay(:'kind', :'key') AS answer \gset
		PREPARE TRANSACTION :'gid';
	\endif
	\if :gives_up
		ROLLBACK PREPARED :'gid';
	\else
		COMMIT PREPARED :'gid';
	\endif
	SELECT coalesce(response::text, outcome, 'nothing') AS answer
	FROM idempotency_replay('shop', :'kind', :'key') \gset
\endif
\echo :n :kind :key :answer
SQL
my $dir = $primary->basedir;
append_to_file("$dir/on_and_on.sql", $request x 5_000);
append_to_file("$dir/last.sql", $request x 9);

my @running;

# Have all clients go on with what they got no answer to.
sub start_clients
{
	my ($server, $script) = @_;
	local $ENV{PGAPPNAME} = 'client';
	my %answered = map { ($_->[0] => $_->[1]) }
	  grep { $_->[2] !~ /^(begun|charged)$/ } told();

	foreach my $client (1 .. $clients)
	{
		push @running,
		  IPC::Run::start(
			[
				'psql', '-X', '-q', '-A', '-t',
				'-v', 'ON_ERROR_STOP=1', '-v', "client=$client",
				'-v', 'n=' . ($answered{$client} // 0),
				'-f', "$dir/$script", '-d', $server->connstr('postgres')
			],
			'>>', "$dir/client.$client.out",
			'2>>', "$dir/client.$client.err");
	}
	return;
}

sub on
{
	my ($server, $sql) = @_;

	return $server->safe_psql('postgres', $sql);
}

# Wait until all clients have ended; returns how many of them reached the end of
# their script.
sub finish_clients
{
	my $finished = grep { $_->finish } @running;

	@running = ();
	return $finished;
}

# What the clients have written down: client, number, kind, key and answer
sub told
{
	my @told;

	foreach my $client (1 .. $clients)
	{
		my $file = "$dir/client.$client.out";

		next unless -e $file;
		push @told,
		  map { [ $client, split(/ /, $_, 4) ] } split(/\n/, slurp_file($file));
	}
	return @told;
}


# Test that all clients come to wait, for a standby or for each other.
sub all_wait
{
	my ($server, $test) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return eventually($server,
		"count(*) = $clients FROM pg_stat_activity WHERE application_name = 'client'"
		  . " AND wait_event IN ('SyncRep', 'userlock')",
		$test);
}

# What must be true on a server that was promoted
my %never = (
	'an answer that a client was told is another one now' => q{
		SELECT *
		FROM told LEFT JOIN record USING (kind, key)
		WHERE answer LIKE '{%}' AND answer IS DISTINCT FROM response::text},
	'a lease that a client was told of is not there' => q{
		SELECT *
		FROM told JOIN make_request(client, n) AS request USING (key)
			 LEFT JOIN record USING (key, claim)
		WHERE told.kind = 'begun' AND NOT gives_up AND state IS NULL},
	'a checkpoint that a client was told of is not there' => q{
		SELECT *
		FROM told LEFT JOIN record ON record.kind = 'lease' AND record.key = told.key
		WHERE told.kind = 'charged'
		  AND (state = 'completed' OR recovery_point = 'charged') IS NOT true},
	'a card was charged twice' => q{
		SELECT key FROM told WHERE kind = 'charged' GROUP BY key HAVING count(*) > 1},
	'the work of a request was done twice' => q{
		SELECT kind, key FROM effect GROUP BY kind, key HAVING count(*) > 1},
	'the work of a request is there without its answer, or the answer alone' => q{
		SELECT *
		FROM effect FULL JOIN (SELECT * FROM record WHERE state = 'completed') AS answered
			 USING (kind, key)
		WHERE answer IS DISTINCT FROM response::text});

sub check
{
	my ($server, $test) = @_;
	my $file = "$dir/told";

	unlink $file;
	append_to_file($file, join('', map { join("\t", @$_) . "\n" } told()));
	on($server, "TRUNCATE told;\n\\copy told FROM '$file'\nANALYZE");
	is(on($server, $never{$_}), '', "$test: never: $_") foreach sort keys %never;
	return;
}

# In each round a lease is begun and two transactions are prepared, which are not
# ended before all is over.
my @held;

sub hold
{
	my ($server, $round) = @_;
	my %held = (
		claim => claim_of($round),
		lease => "lease$round",
		commit => "commit$round",
		rollback => "rollback$round");
	my $begun =
	  on($server, "SELECT outcome FROM begin_lease('$held{lease}', '$held{claim}')");

	is($begun, 'started', "$held{lease}: begun");
	on($server,
		"SELECT idempotency_checkpoint('shop', 'lease', '$held{lease}',"
		  . " '$held{claim}', 'charged', to_jsonb($round), '1 hour')");
	$held{record} = record_of($server, $held{lease});
	foreach my $key ($held{commit}, $held{rollback})
	{
		$held{answer}{$key} = on($server,
			"BEGIN; SELECT pay('prepared', '$key'); PREPARE TRANSACTION '$key'");
	}
	push @held, \%held;
	return;
}

sub record_of
{
	my ($server, $key) = @_;

	return on($server, "SELECT r FROM record AS r WHERE key = '$key'");
}

sub begin_as_other
{
	my ($server, $key) = @_;

	return on($server,
		"SELECT outcome, answer FROM begin_lease('$key', '@{[ claim_of(0) ]}')");
}

# What was held on the server before is held here.
sub check_held
{
	my ($server, $held, $test) = @_;

	is(record_of($server, $held->{lease}),
		$held->{record}, "$test: $held->{lease}: the record is as it was");
	is(begin_as_other($server, $held->{lease}),
		'in_flight|in_flight', "$test: $held->{lease}: in flight for others");
	foreach my $key ($held->{commit}, $held->{rollback})
	{
		is( on($server, "SELECT count(*) FROM pg_prepared_xacts WHERE gid = '$key'"),
			'1', "$test: $key: still prepared");
		is(on($server, "SELECT pay('prepared', '$key')"),
			'in_flight', "$test: $key: in flight");
	}
	return;
}

# It can be ended here, by who knows the claim id or the name of the transaction.
sub end_held
{
	my ($server, $held) = @_;
	my ($lease, $commit, $rollback) = @$held{qw(lease commit rollback)};

	is( on($server,
			"SELECT outcome, is_charged FROM begin_lease('$lease', '$held->{claim}')"),
		'started|t', "$lease: its holder gets it with the recovery point");
	my $answer = on($server, "SELECT finish_lease('$lease', '$held->{claim}')");
	is(begin_as_other($server, $lease), "replayed|$answer", "$lease: and finishes it");

	on($server, "COMMIT PREPARED '$commit'; ROLLBACK PREPARED '$rollback'");
	is(on($server, "SELECT pay('prepared', '$commit')"),
		$held->{answer}{$commit}, "$commit: the answer was prepared");
	my $again = on($server, "SELECT pay('prepared', '$rollback')");
	like($again, qr/^\{/, "$rollback: a repeat runs");
	isnt($again, $held->{answer}{$rollback}, "$rollback: and has an answer of its own");
	return;
}

# How many effects there are of the kind that has the fewest
my $effects = q{
	SELECT least(count(*) FILTER (WHERE kind = 'transaction'),
				 count(*) FILTER (WHERE kind = 'lease'),
				 count(*) FILTER (WHERE kind = 'prepared'))
	FROM effect};

my @rounds = (
	[ 'on', 'stopped at once' ],
	[ 'remote_apply', 'cut off and killed' ],
	[ 'on', 'cut off and stopped at once' ],
	[ 'remote_apply', 'killed' ]);
my $server = $primary;
foreach my $round (1 .. @rounds)
{
	my ($synchronous_commit, $end) = @{ $rounds[ $round - 1 ] };
	my $test = "round $round, $synchronous_commit, $end";
	my $standby = new_standby("server$round", $server);

	# While the standby does not run, nobody is told of a commit.
	set_conf($server, 'synchronous_commit', $synchronous_commit);
	set_conf($server, 'synchronous_standby_names', "'*'");
	start_clients($server, 'on_and_on.sql');
	all_wait($server, "$test: all clients wait for a standby");
	$standby->start;
	hold($server, $round);
	my $goal = $enough + on($server, $effects);
	eventually($server, "($effects) >= $goal", "$test: there are requests of each kind");

	if ($end =~ /cut off/)
	{
		cut_off($standby);
		all_wait($server, "$test: all clients wait for the standby again");
	}
	$end =~ /killed/ ? $server->kill9 : $server->stop('immediate');
	is(finish_clients(), 0, "$test: all clients are in the middle of it");
	$standby->promote;
	$server = $standby;
	check($server, $test);
	check_held($server, $_, $test) foreach @held;
}

# Each client gets an answer to all that it had begun, and to some more
start_clients($server, 'last.sql');
is(finish_clients(), $clients, 'all clients get to the end');
end_held($server, $_) foreach @held;
check($server, 'in the end');
note on($server, 'SELECT kind, count(*), count(DISTINCT key) FROM told GROUP BY kind');

# The work that everybody began has been ended by somebody
is( on( $server,
		q{SELECT key FROM record WHERE state = 'pending' AND lease_expires_at IS NOT NULL}),
	'',
	'no lease is left');
is(on($server, 'SELECT count(*) FROM idempotency_in_flight'),
	'0', 'nothing is in flight');
is(on($server, 'SELECT count(*) FROM pg_prepared_xacts'),
	'0', 'no prepared transaction is left');
is(on($server, $count_userlocks), '0', 'no lock is left');
is(on($server, $tracked), '0', 'no entry in shared memory is left');

# Nobody met an error but the end of a server
foreach my $client (1 .. $clients)
{
	unlike(slurp_file("$dir/client.$client.err"),
		qr/ERROR|WARNING:  (?!terminating)/, "client $client met no error");
}
is(complaints_of($server, deadlocks => 1), '', 'the server has nothing to complain of');

done_testing();
