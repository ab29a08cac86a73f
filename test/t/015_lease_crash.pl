# After a crash a leased claim is what the last commit left of it, and belongs to
# whoever knows its id.  What was not committed has not happened, and what
# was can be asked for again by a caller who did not get to know.

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
$node->safe_psql(
	'postgres', q{
	CREATE EXTENSION idempotency;
	CREATE TABLE effect (key text, attempt int)});

my %accident = accidents($node);

# Calls on a key, with the claim id of an attempt; begin makes one for attempt 0.
# The answer of an attempt is that attempt's alone.
sub call
{
	my ($what, $key, $attempt) = @_;
	my $scope = "'shop', 'charge', '$key'";
	my $claim = "claim => '@{[ claim_of($attempt) ]}'";
	my $begin = 'SELECT outcome, attempt, recovery_point, recovery_state, response'
	  . " FROM idempotency_try_begin($scope, '{\"key\": \"$key\"}'";

	return {
		'begin' => "$begin, lease => '1 hour'" . ($attempt ? ", $claim)" : ')'),
		'begin without lease' => "$begin)",
		'try without lease' =>
		  "BEGIN; $begin); SELECT idempotency_release($scope); COMMIT",
		'begin other' => "SELECT outcome FROM idempotency_try_begin($scope, '{}')",
		'checkpoint 1' => "SELECT idempotency_checkpoint("
		  . "$scope, $claim, recovery_point => 'charged',"
		  . " recovery_state => '{\"id\": 1}', lease => '1 hour') IS NOT NULL",
		'checkpoint 2' => "SELECT idempotency_checkpoint("
		  . "$scope, $claim, recovery_point => 'mailed',"
		  . " recovery_state => '{\"id\": 2}', lease => '2 hours') IS NOT NULL",
		'work' => "INSERT INTO effect VALUES ('$key', $attempt)",
		'finish' => "SELECT idempotency_finish("
		  . "$scope, 201, '{\"by\" :  $attempt}', $claim)",
		'finish otherwise' => "SELECT idempotency_finish("
		  . "$scope, 200, '{\"by\" :  $attempt}', $claim)",
		'finish for a repeat' => "SELECT idempotency_finish($scope, 503, $claim)",
		'release' => "SELECT idempotency_release($scope, $claim)"
	}->{$what} // die "no such call: $what";
}

# The record of a key, and when its lease ends
sub record_of
{
	my ($key) = @_;

	return $node->safe_psql('postgres',
		    'SELECT state, attempt, status_code, response, recovery_point,'
		  . ' recovery_state, lease_expires_at, expires_at, xmin'
		  . " FROM idempotency_key WHERE key = '$key'");
}

# Expectations of those that ask after a crash
sub is_answer
{
	my ($what, $key, $attempt, $answer, $name) = @_;

	is($node->safe_psql('postgres', call($what, $key, $attempt)),
		$answer, "$key: $name");
	return;
}

# The claim of an attempt is fenced off
sub is_fenced
{
	my ($key, $attempt) = @_;

	my $before = record_of($key);
	foreach my $what ('checkpoint 1', 'finish', 'finish for a repeat', 'release')
	{
		like(
			error_of($node, 'postgres', call($what, $key, $attempt)),
			qr/ERROR:  ID005: claim was lost\n/,
			"$key: attempt $attempt is refused: $what");
	}
	is(record_of($key), $before, "$key: and has changed nothing");
	return;
}

# The same while a later attempt has the claim, which is then in flight for it as
# for everybody
sub is_refused
{
	my ($key, $attempt, $holder) = @_;

	is_fenced($key, $attempt);
	is_answer('begin', $key, $attempt, "in_flight|$holder|||",
		"attempt $attempt does not get its claim back");
	return;
}

# The claim is that of this attempt, also if it asks again, and after its answer
# everybody gets it
sub is_owned
{
	my ($key, $attempt, $recovery) = @_;

	$recovery //= '|';
	is_answer('begin', $key, 0, "in_flight|$attempt|||",
		'a repeat is in flight');
	is_answer('begin', $key, $attempt, "started|$attempt|$recovery|",
		'the attempt gets its claim back');
	is_answer('begin other', $key, $attempt, 'mismatched',
		'a different request is known for one');
	is( $node->safe_psql(
			'postgres',
			"SELECT pid IS NULL, attempt FROM idempotency_in_flight WHERE key = '$key'"
		),
		"t|$attempt",
		"$key: the view shows it, without a process");
	is_finished_by($key, $attempt);
	return;
}

sub is_finished_by
{
	my ($key, $attempt) = @_;

	is_answer('finish', $key, $attempt, 'completed',
		"attempt $attempt can be finished");
	is_replayed($key, $attempt);
	return;
}

sub is_replayed
{
	my ($key, $attempt) = @_;

	is_answer('begin', $key, $attempt, qq(replayed|$attempt|||{"by" :  $attempt}),
		'a repeat gets the answer');
	return;
}

# The next one to ask after the lease ran out goes on from a recovery point
sub is_taken_over
{
	my ($key, $attempt, $recovery) = @_;

	run_out($node, $key);
	is( $node->safe_psql(
			'postgres',
			"SELECT attempt, recovery_point FROM idempotency_stalled WHERE key = '$key'"
		),
		join('|', $attempt, $recovery =~ s/\|.*//r),
		"$key: the lease runs out");
	my $next = $attempt + 1;
	is_answer('begin', $key, $next, "started|$next|$recovery|",
		'a repeat takes it over');
	is_refused($key, $attempt, $next);
	is_finished_by($key, $next);
	return;
}

# What a session does with a key before the crash: the calls that it commits,
# and those that it has open; and what is true afterwards.  "run out" is not a
# call.
my %story = (
	'begun' => {
		committed => [ [ 'begin', 1 ] ],
		afterwards => sub { is_owned($_[0], 1) }
	},
	'begun-then-stalled' => {
		committed => [ [ 'begin', 1 ] ],
		afterwards => sub { is_taken_over($_[0], 1, '|') }
	},
	'begin-open' => {
		open => [ [ 'begin', 1 ] ],
		afterwards => sub {
			is(record_of($_[0]), '', "$_[0]: there is no record");
			is_answer('begin', $_[0], 1, 'started|1|||', 'who asks again runs');
			is_owned($_[0], 1);
		}
	},
	'checkpoint' => {
		committed => [ [ 'begin', 1 ], [ 'checkpoint 1', 1 ] ],
		afterwards => sub { is_taken_over($_[0], 1, 'charged|{"id": 1}') }
	},
	'checkpoint-open' => {
		committed => [ [ 'begin', 1 ], [ 'checkpoint 1', 1 ] ],
		open => [ [ 'checkpoint 2', 1 ] ],
		afterwards => sub { is_taken_over($_[0], 1, 'charged|{"id": 1}') }
	},
	'finish-open' => {
		committed => [ [ 'begin', 1 ] ],
		open => [ [ 'work', 1 ], [ 'finish otherwise', 1 ] ],
		afterwards => sub { is_owned($_[0], 1) }
	},
	'finished' => {
		committed => [ [ 'begin', 1 ], [ 'finish', 1 ] ],
		afterwards => sub {
			# whoever did not get to know asks again
			is_answer('finish', $_[0], 1, 'completed', 'finish can be repeated');
			like(
				error_of(
					$node, 'postgres', call('finish otherwise', $_[0], 1)),
				qr/ERROR:  ID005: claim was lost\nDETAIL:  It has already ended, in another way\.\n/,
				"$_[0]: but not with another answer");
			like(
				error_of($node, 'postgres', call('release', $_[0], 1)),
				qr/ERROR:  ID005: claim was lost\nDETAIL:  It has already ended, in another way\.\n/,
				"$_[0]: nor can it be released");
			is_replayed($_[0], 1);
		}
	},
	'release-open' => {
		committed => [ [ 'begin', 1 ], [ 'checkpoint 1', 1 ] ],
		open => [ [ 'release', 1 ] ],
		afterwards => sub { is_owned($_[0], 1, 'charged|{"id": 1}') }
	},
	'released' => {
		committed => [ [ 'begin', 1 ], [ 'checkpoint 1', 1 ], [ 'release', 1 ] ],
		afterwards => sub {
			is_answer('release', $_[0], 1, 'f', 'release can be repeated');
			is_answer('finish for a repeat', $_[0], 1, 'released',
				'so can what has the same effect');
			like(
				error_of($node, 'postgres', call('begin', $_[0], 1)),
				qr/ERROR:  ID005: claim was lost\nDETAIL:  It was released\.\n/,
				"$_[0]: but its claim cannot be had again");
			is_answer('begin other', $_[0], 0, 'mismatched',
				'a different request is known for one');
			is_answer('begin', $_[0], 2, 'started|2|charged|{"id": 1}|',
				'a repeat runs, from the recovery point');
			is_refused($_[0], 1, 2);
			is_owned($_[0], 2, 'charged|{"id": 1}');
		}
	},
	'retryable-open' => {
		committed => [ [ 'begin', 1 ] ],
		open => [ [ 'finish for a repeat', 1 ] ],
		afterwards => sub { is_owned($_[0], 1) }
	},
	'takeover-open' => {
		committed => [ [ 'begin', 1 ], [ 'checkpoint 1', 1 ], [ 'run out' ] ],
		open => [ [ 'begin', 2 ], [ 'checkpoint 2', 2 ] ],
		afterwards => sub { is_taken_over($_[0], 1, 'charged|{"id": 1}') }
	},
	'takeover-open-old-finishes' => {
		committed => [ [ 'begin', 1 ], [ 'run out' ] ],
		open => [ [ 'begin', 2 ], [ 'work', 2 ], [ 'finish', 2 ] ],
		afterwards => sub { is_finished_by($_[0], 1) }
	},
	'takeover-without-lease-open' => {
		committed => [ [ 'begin', 1 ], [ 'checkpoint 1', 1 ], [ 'run out' ] ],
		open => [ [ 'begin without lease', 2 ], [ 'work', 2 ] ],
		afterwards => sub { is_taken_over($_[0], 1, 'charged|{"id": 1}') }
	},
	'taken-over-without-lease' => {
		committed => [
			[ 'begin', 1 ], [ 'checkpoint 1', 1 ],
			[ 'run out' ], [ 'try without lease', 0 ]
		],
		afterwards => sub {
			is_fenced($_[0], 1);
			is_answer('begin', $_[0], 3, 'started|3|charged|{"id": 1}|',
				'a repeat takes it over');
			is_owned($_[0], 3, 'charged|{"id": 1}');
		}
	},
	'taken-over' => {
		committed => [
			[ 'begin', 1 ], [ 'checkpoint 1', 1 ],
			[ 'run out' ], [ 'begin', 2 ]
		],
		afterwards => sub {
			is_refused($_[0], 1, 2);
			is_owned($_[0], 2, 'charged|{"id": 1}');
		}
	},
	'taken-over-twice' => {
		committed => [
			[ 'begin', 1 ], [ 'run out' ],
			[ 'begin', 2 ], [ 'checkpoint 2', 2 ],
			[ 'run out' ], [ 'begin', 3 ]
		],
		afterwards => sub {
			is_refused($_[0], $_, 3) foreach 1, 2;
			is_taken_over($_[0], 3, 'mailed|{"id": 2}');
		}
	});

foreach my $accident (sort keys %accident)
{
	subtest $accident => sub {
		my (%session, %before, @pids);

		foreach my $key (sort keys %story)
		{
			my $session = $session{$key} = session($node);

			push @pids, $session->query_safe('SELECT pg_backend_pid()');
			foreach my $call (@{ $story{$key}{committed} // [] })
			{
				my ($what, $attempt) = @$call;

				if ($what eq 'run out') { run_out($node, $key) }
				else { $session->query_safe(call($what, $key, $attempt)) }
			}
			$before{$key} = record_of($key);
			next unless defined $story{$key}{open};

			$session->query_safe('BEGIN');
			$session->query_safe(call($_->[0], $key, $_->[1]))
			  foreach @{ $story{$key}{open} };
		}

		$accident{$accident}->(@pids);
		end_session($_) foreach values %session;

		is($node->safe_psql('postgres', $count_userlocks),
			'0', 'no lock is left');
		is($node->safe_psql('postgres', $tracked),
			'0', 'no entry in shared memory is left');
		foreach my $key (sort keys %story)
		{
			is(record_of($key), $before{$key},
				"$key: the record is as the last commit left it");
			$story{$key}{afterwards}->($key);
		}
		is(record_of('finished'), $before{finished},
			'finished: none of this has changed the answer');
		is($node->safe_psql('postgres', 'SELECT * FROM effect'),
			'', 'no work that was not committed is left');
		is( $node->safe_psql(
				'postgres', 'SELECT count(*) FROM idempotency_in_flight'),
			'0',
			'no claim is left');

		$node->safe_psql('postgres',
			'UPDATE idempotency_key SET expires_at = created_at');
		is(count_swept($node), scalar(keys %story), 'a sweep takes them all');
	};
}

# A prepared transaction keeps what it did with the claim over a crash
sub is_prepared
{
	my ($key, $statements, $resolution, $holder) = @_;
	my $in_flight = "in_flight|$holder|||";

	$node->safe_psql('postgres', "BEGIN; $statements; PREPARE TRANSACTION '$key'");
	my $before = record_of($key);
	is_answer('begin', $key, 0, $in_flight, 'in flight before the crash');
	$accident{'postmaster killed'}->();
	is_answer('begin', $key, 0, $in_flight, 'in flight after it');
	is_answer('begin', $key, 1, 'in_flight||||', 'also for who asks again');
	is(record_of($key), $before, "$key: the record is as it was");
	$node->safe_psql('postgres', "$resolution PREPARED '$key'");
	is($node->safe_psql('postgres', $count_userlocks),
		'0', "$key: no lock is left");
	return;
}

foreach my $resolution ('COMMIT', 'ROLLBACK')
{
	my $key = lc "begin-$resolution-prepared";

	is_prepared($key, call('begin', $key, 1), $resolution, '');
	is_answer('begin', $key, 1, 'started|1|||', 'a repeat runs')
	  if $resolution eq 'ROLLBACK';
	is_owned($key, 1);

	$key = lc "finish-$resolution-prepared";
	$node->safe_psql('postgres', call('begin', $key, 1));
	is_prepared($key, call('finish', $key, 1), $resolution, 1);
	is_owned($key, 1) if $resolution eq 'ROLLBACK';
	is_answer('finish', $key, 1, 'completed', 'finish can be repeated');
	is_replayed($key, 1);

	$key = lc "takeover-$resolution-prepared";
	$node->safe_psql('postgres', call('begin', $key, 1));
	$node->safe_psql('postgres', call('checkpoint 1', $key, 1));
	run_out($node, $key);
	is_prepared($key, call('begin', $key, 2), $resolution, '');
	if ($resolution eq 'COMMIT')
	{
		is_refused($key, 1, 2);
		is_owned($key, 2, 'charged|{"id": 1}');
	}
	else
	{
		is_taken_over($key, 1, 'charged|{"id": 1}');
	}
}

done_testing();
