# A crash between begin and commit leaves nothing: no record, no claim, no
# business row, and a repeat runs.  A crash after commit loses nothing: a
# repeat gets the answer.  So does a repeat after the crash of a server that
# had the request in a prepared transaction.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_server('main', conf => 'restart_after_crash = on');
$node->start;
create_shop($node);

my %accident = accidents($node);

my $begin = "SELECT outcome FROM idempotency_try_begin("
  . "'shop', 'pay', '%1\$s', '{\"key\": \"%1\$s\"}')";
my $work = "INSERT INTO payment VALUES ('%s') RETURNING 1";
my $finish = "SELECT idempotency_finish("
  . "'shop', 'pay', '%s', 201, '{\"by\" :\"hand\"}')";

# How far a request got, and what it had done until then.
my @points = (
	[ 'before the work', $begin ],
	[ 'before finish', $begin, $work ],
	[ 'before commit', $begin, $work, $finish ]);

my $n = 0;
foreach my $name (sort keys %accident)
{
	foreach my $point (@points)
	{
		my ($where, @statements) = @$point;
		my $key = 'open-' . ++$n;
		my $session = session($node);

		subtest "$name $where" => sub {
			my $pid = $session->query_safe('SELECT pg_backend_pid()');

			$session->query_safe('BEGIN');
			$session->query_safe(sprintf($_, $key)) foreach @statements;
			is($node->safe_psql('postgres', sprintf($begin, $key)),
				'in_flight', 'claim is held');

			$accident{$name}->($pid);
			end_session($session);

			is($node->safe_psql('postgres', $count_userlocks),
				'0', 'no lock is left');
			is($node->safe_psql('postgres', $tracked),
				'0', 'no entry in shared memory is left');
			is( $node->safe_psql('postgres',
					"SELECT count(*) FROM idempotency_key WHERE key = '$key'"
				),
				'0',
				'there is no record');
			is( $node->safe_psql('postgres', "SELECT pay('$key')"),
				qq(started {"paid" :  "$key"}),
				'a repeat runs');
			is( $node->safe_psql('postgres', "SELECT pay('$key')"),
				qq(replayed {"paid" :  "$key"}),
				'the next one gets the answer');
			is( $node->safe_psql(
					'postgres',
					"SELECT count(*) FROM payment WHERE key = '$key'"),
				'1',
				'one payment was made');
		};
	}

	# What the client of a committed request was told stays true
	my $key = "committed-$n";
	my $session = session($node);
	my $pid = $session->query_safe('SELECT pg_backend_pid()');

	$session->query_safe('BEGIN');
	$session->query_safe(sprintf($_, $key)) foreach $begin, $work, $finish;
	$session->query_safe('COMMIT');
	$accident{$name}->($pid);
	end_session($session);

	is($node->safe_psql('postgres', "SELECT pay('$key')"),
		'replayed {"by" :"hand"}', "$name after commit: the answer is kept");
	is( $node->safe_psql(
			'postgres', "SELECT count(*) FROM payment WHERE key = '$key'"),
		'1',
		"$name after commit: one payment was made");
}

# A prepared transaction holds its claim over a crash, until it is resolved
foreach my $resolution ('COMMIT', 'ROLLBACK')
{
	my $key = "prepared-$resolution";

	$node->safe_psql('postgres',
		"BEGIN; SELECT pay('$key'); PREPARE TRANSACTION '$key'");
	like(
		error_of($node, 'postgres', "SELECT pay('$key')"),
		qr/ERROR:  ID003: .*\nDETAIL:  A prepared transaction has held the claim for \d+\.\d{3} s\.\n/,
		"$resolution PREPARED: in flight before the crash");
	is( $node->safe_psql(
			'postgres', 'SELECT pid IS NULL, key FROM idempotency_in_flight'),
		"t|$key",
		"$resolution PREPARED: shown without a process");

	$accident{'postmaster killed'}->();

	is($node->safe_psql('postgres', sprintf($begin, $key)),
		'in_flight', "$resolution PREPARED: in flight after the crash");
	like(
		error_of($node, 'postgres', "SELECT pay('$key')"),
		qr/ERROR:  ID003: [^\n]*\nHINT:  Retry after 1 s\.\n/,
		"$resolution PREPARED: nothing more is known after the crash");
	is(count_swept($node), 0, "$resolution PREPARED: a sweep finds nothing");

	$node->safe_psql('postgres', "$resolution PREPARED '$key'");
	is($node->safe_psql('postgres', $count_userlocks),
		'0', "$resolution PREPARED: no lock is left");
	is( $node->safe_psql('postgres', "SELECT pay('$key')"),
		($resolution eq 'COMMIT' ? 'replayed' : 'started')
		  . qq( {"paid" :  "$key"}),
		"$resolution PREPARED: what a repeat gets");
	is( $node->safe_psql(
			'postgres', "SELECT count(*) FROM payment WHERE key = '$key'"),
		'1',
		"$resolution PREPARED: one payment was made");
}

done_testing();
