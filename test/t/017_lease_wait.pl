# Waiting for a leased claim: a repeat that waits is woken when the claim ends,
# takes over when its lease runs out, and is told "in flight" when its own time
# is up.  Meanwhile it sleeps, and is in nobody's way.  All of that with and
# without preload.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node;

# How often a waiter looks while it waits a second and a half.  It may look
# less often on a busy machine, never much more.
my %looks = (0 => 60, 1 => 15);

sub scope
{
	my ($key) = @_;

	return "'shop', 'charge', '$key'";
}

sub begin_sql
{
	my ($key, %arguments) = @_;
	my $named = join('',
		map { ", $_ => '$arguments{$_}'" }
		grep { defined $arguments{$_} } sort keys %arguments);

	return 'SELECT outcome, attempt, recovery_point, response'
	  . ' FROM idempotency_try_begin(' . scope($key) . "$named)";
}

# The arguments of a begin that asks for a lease, with the claim id of an attempt
sub leased
{
	my ($attempt) = @_;

	return (lease => '1 hour', claim => claim_of($attempt));
}

sub finish_sql
{
	my ($key, $attempt, $status) = @_;

	$status //= 201;
	return 'SELECT idempotency_finish(' . scope($key)
	  . ", $status, '{\"by\" :  $attempt}', claim => '@{[ claim_of($attempt) ]}')";
}

# The same for a transaction claim, which has no id
sub finish_own_sql
{
	my ($key, $attempt) = @_;

	return 'SELECT idempotency_finish(' . scope($key)
	  . ", 201, '{\"by\" :  $attempt}')";
}

sub release_sql
{
	my ($key, $attempt) = @_;

	return 'SELECT idempotency_release(' . scope($key)
	  . ", claim => '@{[ claim_of($attempt) ]}')";
}

sub checkpoint_sql
{
	my ($key, $attempt) = @_;

	return 'SELECT idempotency_checkpoint(' . scope($key)
	  . ", '@{[ claim_of($attempt) ]}', 'charged', lease => '1 hour') > now()";
}

sub ask
{
	my ($sql) = @_;

	return $node->safe_psql('postgres', $sql);
}

# Begin a lease of an hour, as the first attempt
sub lease
{
	my ($key) = @_;

	die "cannot begin $key"
	  unless ask(begin_sql($key, leased(1))) eq 'started|1||';
	return;
}

# A session that runs a statement, which waits.  The answer is read later.
sub start_waiter
{
	my ($sql, @before) = @_;
	my $session = session($node);

	$session->{server_pid} = $session->query_safe('SELECT pg_backend_pid()');
	$session->query_safe($_) foreach @before;
	send_to($session, $sql);
	return $session;
}

sub send_to
{
	my ($session, $sql) = @_;

	$session->query_until(qr/^asked$/m, "\\echo asked\n$sql;\n");
	return;
}

sub answer_to
{
	my ($session) = @_;

	return $session->query_safe('');
}

# Come back when a waiter sleeps, for a lease or for a lock
sub await_sleep
{
	my ($session, $type) = @_;

	$type //= 'Extension';
	$node->poll_query_until(
		'postgres',
		"SELECT wait_event_type = '$type' AND state = 'active'"
		  . " FROM pg_stat_activity WHERE pid = $session->{server_pid}")
	  or die "no wait for $type";
	return;
}

# A waiter asks while another session holds the lease.  Returns it when it
# sleeps.
sub sleeper
{
	my ($name, $sql, @before) = @_;
	my $session = start_waiter($sql, @before);

	await_sleep($session);
	is(ask($count_userlocks), '0', "$name: a waiter has no lock");
	return $session;
}

sub is_answer
{
	my ($session, $answer, $name) = @_;

	is(answer_to($session), $answer, $name);
	$session->quit;
	return;
}

# What ends a wait, and what the waiter is told then; the waiter asks for a
# lease or for a transaction claim
my %end = (
	'finish' => [ sub { finish_sql($_[0], 1) }, 'replayed|1||{"by" :  1}' ],
	'final error' =>
	  [ sub { finish_sql($_[0], 1, 402) }, 'replayed|1||{"by" :  1}' ],
	'finish for a repeat' => [ sub { finish_sql($_[0], 1, 503) }, 'started|2||' ],
	'release' => [ sub { release_sql($_[0], 1) }, 'started|2||' ]);

sub test_ends
{
	foreach my $end (sort keys %end)
	{
		my ($sql, $answer) = @{ $end{$end} };
		my $key = $end =~ s/ /-/gr;

		lease($key);
		my $waiter = sleeper($end, begin_sql($key, wait => '10 min', leased(2)));
		ask($sql->($key));
		is_answer($waiter, $answer, "$end: a waiter is answered");

		# a transaction claim takes over as well
		$key .= '-without-lease';
		lease($key);
		$waiter = sleeper("$end, without lease",
			begin_sql($key, wait => '10 min'), 'BEGIN');
		ask($sql->($key));
		is(answer_to($waiter), $answer,
			"$end: a waiter that wants no lease is answered");
		if ($answer =~ /started/)
		{
			is(ask(begin_sql($key)),
				'in_flight|||', "$end: and holds the claim then");
			$waiter->query_safe(finish_own_sql($key, 2));
		}
		$waiter->query_safe('COMMIT');
		$waiter->quit;
		is(ask(begin_sql($key)),
			$answer =~ /started/ ? 'replayed|2||{"by" :  2}' : $answer,
			"$end: the next one gets the answer");
	}
	return;
}

# What does not end the claim does not end the wait, in one transaction or in
# one after another
sub test_goes_on
{
	lease('goes-on');
	my $waiter = sleeper('goes on',
		begin_sql('goes-on', wait => '10 min', leased(2)));
	foreach my $sql (
		finish_sql('goes-on', 1), release_sql('goes-on', 1),
		checkpoint_sql('goes-on', 1))
	{
		ask("BEGIN; $sql; ROLLBACK");
		await_sleep($waiter);
		is(ask(begin_sql('goes-on')),
			'in_flight|1||', 'goes on: nothing has happened by a rollback');
	}
	ask(checkpoint_sql('goes-on', 1));
	await_sleep($waiter);
	is(ask(begin_sql('goes-on', leased(1))),
		'started|1|charged|', 'goes on: the claim asks for itself again');
	await_sleep($waiter);

	# who sleeps has no page pinned, which a vacuum would wait for
	is( ask(
			"SET statement_timeout = '60 s';\n"
			  . 'VACUUM (FREEZE, DISABLE_PAGE_SKIPPING) idempotency_key;'
			  . " SELECT 'vacuumed'"),
		'vacuumed',
		'goes on: a vacuum does not wait for a waiter');
	await_sleep($waiter);
	like(
		error_of($node, 'postgres', finish_sql('goes-on', 2)),
		qr/ERROR:  ID005: /,
		'goes on: another claim is refused');
	await_sleep($waiter);

	# not even when the row is locked for a while
	my $session = session($node);
	$session->query_safe('BEGIN');
	$session->query_safe(finish_sql('goes-on', 1));
	await_sleep($waiter);
	is(ask($count_userlocks), '0', 'goes on: a waiter has no lock');
	$session->query_safe('COMMIT');
	$session->quit;
	is_answer($waiter, 'replayed|1||{"by" :  1}',
		'goes on: a waiter is answered at last');
	return;
}

# A lease that runs out is taken over, with its recovery point
sub test_runs_out
{
	ask(begin_sql('short', lease => '700 ms'));
	is(ask(begin_sql('short', lease => '1 hour', wait => '10 min')),
		'started|2||', 'runs out: a waiter takes over');

	# when its end changes while somebody waits
	lease('ended');
	ask(checkpoint_sql('ended', 1));
	my $waiter = sleeper('runs out',
		begin_sql('ended', wait => '10 min', leased(2)));
	run_out($node, 'ended');
	is_answer($waiter, 'started|2|charged|',
		'runs out: a waiter takes over with the recovery point');
	like(
		error_of($node, 'postgres', finish_sql('ended', 1)),
		qr/ERROR:  ID005: /,
		'runs out: the old claim is fenced off');

	# a short lease that is renewed goes on
	ask(begin_sql('renewed', leased(1), lease => '700 ms'));
	$waiter = start_waiter(begin_sql('renewed', wait => '10 min', leased(2)));
	my ($rc) = $node->psql('postgres', checkpoint_sql('renewed', 1));
	if ($rc == 0)
	{
		await_sleep($waiter);
		ask(finish_sql('renewed', 1));
		is_answer($waiter, 'replayed|1||{"by" :  1}',
			'runs out: not when it was renewed');
	}
	else
	{
		# this machine was too slow, and the waiter was faster
		is_answer($waiter, 'started|2||', 'runs out: before it was renewed');
	}
	return;
}

# A waiter whose time is up is told so, and when to come again
sub test_time_out
{
	my ($preload) = @_;
	my $in_flight = "SELECT outcome, attempt,"
	  . ' retry_after > 3000 AND retry_after <= 3600'
	  . ' FROM idempotency_try_begin(' . scope('long') . ", wait => '%s')";

	lease('long');
	foreach my $wait ('1 ms', '40 ms', '1300 ms')
	{
		is(ask(sprintf($in_flight, $wait)),
			'in_flight|1|t', "time-out: after $wait");
	}
	like(
		error_of($node, 'postgres',
			'SELECT idempotency_begin(' . scope('long') . ", wait => '40 ms')"),
		qr/ERROR:  ID003: [^\n]*\nDETAIL:  The lease of attempt 1 runs out in \d+\.\d{3} s\.\nHINT:  Retry after \d+ s\.\n/,
		'time-out: raised as an error');
	is( ask("SET idempotency.wait = '40 ms'; " . begin_sql('long')),
		'in_flight|1||', 'time-out: by the setting');

	# the transaction goes on, and the waiter has looked now and then
	my ($outcome, $looks) = split /\n/, ask(
		'BEGIN; '
		  . begin_sql('long', wait => '1500 ms')
		  . q{; SELECT idx_scan FROM pg_stat_xact_user_tables
				WHERE relname = 'idempotency_key';}
		  . 'COMMIT');
	is($outcome, 'in_flight|1||', 'time-out: in a transaction');
	cmp_ok($looks, '>=', 2, 'time-out: a waiter looks again');
	cmp_ok($looks, '<=', $looks{$preload}, 'time-out: but is not busy');

	# what is wrong at once is not waited for
	is( ask(
			begin_sql('long', request_hash => '\\x0123456789abcdef0123456789abcdef')
		),
		'in_flight|1||',
		'time-out: what was begun without a request matches any');
	ask(begin_sql('other', request => '{"n": 1}', lease => '1 hour'));
	is( ask(begin_sql('other', request => '{"n": 2}', wait => '1 hour')),
		'mismatched|||', 'time-out: a different request does not wait');
	return;
}

# A waiter can be cancelled and terminated, and leaves nothing behind
sub test_cancel
{
	lease('cancelled');
	my $begin = begin_sql('cancelled', wait => '10 min', lease => '1 hour');
	my $other = sleeper('cancel', $begin);
	my $waiter = sleeper('cancel', $begin);

	ask("SELECT pg_cancel_backend($waiter->{server_pid})");
	$waiter->query('');
	like(
		$waiter->{stderr},
		qr/ERROR:  canceling statement due to user request/,
		'cancel: by a request');
	$waiter->{stderr} = '';

	$waiter->query_safe('BEGIN');
	$waiter->query_safe("SET LOCAL statement_timeout = '300 ms'");
	$waiter->query($begin);
	like(
		$waiter->{stderr},
		qr/ERROR:  canceling statement due to statement timeout/,
		'cancel: by statement_timeout');
	$waiter->{stderr} = '';
	$waiter->query_safe('ROLLBACK');

	# in a savepoint the transaction survives, and can wait again
	$waiter->query_safe('BEGIN');
	$waiter->query_safe('SAVEPOINT s');
	send_to($waiter, $begin);
	await_sleep($waiter);
	ask("SELECT pg_cancel_backend($waiter->{server_pid})");
	$waiter->query('');
	like(
		$waiter->{stderr},
		qr/ERROR:  canceling statement due to user request/,
		'cancel: in a savepoint');
	$waiter->{stderr} = '';
	$waiter->query_safe('ROLLBACK TO s');
	send_to($waiter, $begin);
	await_sleep($waiter);

	my $victim = sleeper('cancel', $begin);
	ask("SELECT pg_terminate_backend($victim->{server_pid})");
	wait_for_end_of($node, $victim->{server_pid});
	end_session($victim);

	ask(finish_sql('cancelled', 1));
	is(answer_to($waiter), 'replayed|1||{"by" :  1}',
		'cancel: who waits again is answered');
	$waiter->query_safe('COMMIT');
	$waiter->quit;
	is_answer($other, 'replayed|1||{"by" :  1}', 'cancel: so is the other one');
	return;
}

# A waiter is woken, and does not only look now and then: it has looked again at
# many of the ends of transactions that could have changed something.  That more
# than one of them can be seen in one look makes less of no more than a few.
sub test_wake
{
	my $rounds = 60;
	my $waiter;

	lease('woken');
	$waiter = sleeper('wake', begin_sql('woken', wait => '10 min'), 'BEGIN');
	ask('BEGIN; ' . finish_sql('woken', 1) . '; ROLLBACK') for 1 .. $rounds;
	ask(finish_sql('woken', 1));
	is(answer_to($waiter), 'replayed|1||{"by" :  1}', 'wake: a waiter is answered');
	my $looks = $waiter->query_safe(
		'SELECT idx_scan FROM pg_stat_xact_user_tables'
		  . " WHERE relname = 'idempotency_key'");
	cmp_ok($looks, '>=', $rounds / 4, 'wake: and was woken many times');
	cmp_ok($looks, '<=', 10 * $rounds, 'wake: for a reason each');
	note "wake: $looks looks in $rounds rounds";
	$waiter->query_safe('COMMIT');
	$waiter->quit;
	return;
}

# Of several waiters exactly one takes over; the others wait for that one then.
# Each has a claim id of its own.
sub test_many
{
	my $holder = 1;
	my %held;

	lease('many');
	my @waiters = map {
		sleeper("many: $_", begin_sql('many', wait => '10 min', leased(10 + $_)))
	} 1 .. 6;
	my $left = scalar @waiters;
	foreach my $attempt (1, 2, 3)
	{
		my $next = $attempt + 1;

		# by release, by a retryable finish, and by the end of the lease
		if ($attempt == 1) { ask(release_sql('many', $holder)) }
		elsif ($attempt == 2) { ask(finish_sql('many', $holder, 503)) }
		else { run_out($node, 'many') }
		$node->poll_query_until('postgres',
			"SELECT attempt = $next FROM idempotency_key WHERE key = 'many'")
		  or die 'nobody takes over';

		# the others sleep again, and whoever does not has the claim
		$left--;
		my $pids = join(', ', map { $_->{server_pid} } @waiters);
		ok( $node->poll_query_until(
				'postgres', qq{
				SELECT count(*) FILTER (WHERE state = 'idle') = 6 - $left
				   AND count(*) FILTER (WHERE state = 'active'
										AND wait_event_type = 'Extension') = $left
				FROM pg_stat_activity WHERE pid IN ($pids)}),
			"many: attempt $next is one waiter's, and the others go on waiting");
		is( ask("SELECT attempt FROM idempotency_in_flight WHERE key = 'many'"),
			$next, "many: there is no attempt after $next");
		is(ask($count_userlocks), '0', "many: nobody has a lock");
		$holder = ask(
			"SELECT right(claim::text, 12)::int FROM idempotency_key WHERE key = 'many'"
		);
		$held{$holder} = 1;
	}
	is(scalar(grep { $_ > 10 && $_ <= 16 } keys %held),
		3, 'many: the claims are those of three waiters');
	ask(finish_sql('many', $holder));

	my @answers = sort map { answer_to($_) } @waiters;
	is_deeply(
		\@answers,
		[
			("replayed|4||{\"by\" :  $holder}") x 3, 'started|2||',
			'started|3||', 'started|4||'
		],
		'many: three got an attempt each, three the answer');
	$_->quit foreach @waiters;
	return;
}

# A waiter for what is not a lease yet, or is being taken over
sub test_changes
{
	# the lease of a transaction that is still open
	foreach my $end ('COMMIT', 'ROLLBACK')
	{
		my $key = lc "begin-$end";
		my $session = session($node);
		my $waiter;

		$session->query_safe('BEGIN');
		$session->query_safe(begin_sql($key, leased(1)));
		$waiter = start_waiter(begin_sql($key, wait => '10 min', leased(2)));
		await_sleep($waiter, 'Lock');
		$session->query_safe($end);
		$session->quit;
		if ($end eq 'ROLLBACK')
		{
			is_answer($waiter, 'started|1||', 'begin rolled back: a waiter begins');
			next;
		}
		await_sleep($waiter);
		is(ask($count_userlocks), '0', 'begin committed: a waiter has no lock');
		ask(finish_sql($key, 1));
		is_answer($waiter, 'replayed|1||{"by" :  1}',
			'begin committed: a waiter waits for the lease');
	}

	# a takeover in an open transaction
	foreach my $end ('COMMIT', 'ROLLBACK')
	{
		my $key = lc "takeover-$end";
		my $session = session($node);
		my $waiter;

		lease($key);
		$waiter = sleeper("takeover $end",
			begin_sql($key, wait => '10 min', leased(3)));
		# nobody who waits gets it, as it runs out under the lock of this session
		$session->query_safe('BEGIN');
		$session->query_safe(
			'UPDATE idempotency_key SET lease_expires_at = clock_timestamp()'
			  . " WHERE key = '$key'");
		is($session->query_safe(begin_sql($key, leased(2))),
			'started|2||', "takeover $end: it runs");
		$session->query_safe($end);
		$session->quit;
		await_sleep($waiter);
		ask(finish_sql($key, $end eq 'COMMIT' ? 2 : 1));
		is_answer(
			$waiter,
			$end eq 'COMMIT' ? 'replayed|2||{"by" :  2}' : 'replayed|1||{"by" :  1}',
			"takeover $end: a waiter gets the answer of the attempt that is left");
	}

	# a transaction claim on a stalled lease, which is released before its
	# transaction ends
	my $session = session($node);
	lease('released-early');
	run_out($node, 'released-early');
	$session->query_safe('BEGIN');
	$session->query_safe(begin_sql('released-early'));
	my $waiter =
	  start_waiter(begin_sql('released-early', wait => '10 min', lease => '1 hour'));
	await_sleep($waiter, 'Lock');
	$session->query_safe(
		'SELECT idempotency_release(' . scope('released-early') . ')');
	await_sleep($waiter);
	# each time it looks, it has the lock for a moment
	ok($node->poll_query_until('postgres', "SELECT ($count_userlocks) = 0"),
		'released early: nobody keeps a lock');
	$session->query_safe('COMMIT');
	$session->quit;
	is_answer($waiter, 'started|3||', 'released early: a waiter has the next attempt');
	return;
}

# Who asks again for its own claim waits while its first call, or the end of its
# claim, is under way
sub test_again
{
	my $begin = sub { begin_sql($_[0], leased(1), wait => '10 min') };

	foreach my $end ('COMMIT', 'ROLLBACK')
	{
		my $key = lc "again-$end";
		my $session = session($node);

		$session->query_safe('BEGIN');
		is($session->query_safe(begin_sql($key, leased(1))),
			'started|1||', "again $end: it is begun");
		is(ask(begin_sql($key, leased(1))),
			'in_flight|||', "again $end: in flight while it is begun");
		my $waiter = start_waiter($begin->($key));
		await_sleep($waiter, 'Lock');
		$session->query_safe($end);
		is_answer($waiter, 'started|1||', "again $end: a waiter gets the claim");

		$session->query_safe('BEGIN');
		$session->query_safe(finish_sql($key, 1));
		is(ask(begin_sql($key, leased(1))),
			'in_flight|||', "again $end: in flight while it is finished");
		$waiter = sleeper("again $end", $begin->($key));
		$session->query_safe($end);
		is_answer($waiter,
			$end eq 'COMMIT' ? 'replayed|1||{"by" :  1}' : 'started|1||',
			"again $end: a waiter gets the answer, or the claim");
		$session->quit;
	}
	return;
}

# A finish, a release and a takeover that are prepared
sub test_prepared
{
	my %prepared = (
		'finish-COMMIT' => [ finish_sql('finish-COMMIT', 1), 'replayed|1||{"by" :  1}' ],
		'release-COMMIT' => [ release_sql('release-COMMIT', 1), 'started|2||' ],
		'finish-ROLLBACK' => [ finish_sql('finish-ROLLBACK', 1) ],
		'release-ROLLBACK' => [ release_sql('release-ROLLBACK', 1) ]);

	foreach my $key (sort keys %prepared)
	{
		my ($sql, $answer) = @{ $prepared{$key} };
		my ($end) = $key =~ /-(.*)/;

		lease($key);
		my $waiter =
		  sleeper($key, begin_sql($key, wait => '10 min', lease => '1 hour'));
		ask("BEGIN; $sql; PREPARE TRANSACTION '$key'");
		await_sleep($waiter);
		is(ask(begin_sql($key)), 'in_flight|1||', "$key: in flight when prepared");
		ask("$end PREPARED '$key'");
		if ($end eq 'ROLLBACK')
		{
			await_sleep($waiter);
			ask(finish_sql($key, 1));
			$answer = 'replayed|1||{"by" :  1}';
		}
		is_answer($waiter, $answer, "$key: a waiter is answered");
	}
	return;
}

# Whatever the snapshot of the waiter's transaction
sub test_isolation
{
	foreach my $isolation ('REPEATABLE READ', 'SERIALIZABLE')
	{
		foreach my $end ('finish', 'release')
		{
			my ($sql, $answer) = @{ $end{$end} };
			my $key = "$end-" . lc($isolation =~ s/ /-/r);
			my $session = start_waiter('SELECT 1',
				"BEGIN ISOLATION LEVEL $isolation",
				'SELECT count(*) FROM pg_class');
			answer_to($session);

			# neither the lease nor its end is in the snapshot
			lease($key) if $isolation eq 'REPEATABLE READ';
			if ($isolation eq 'SERIALIZABLE')
			{
				$session->query_safe('COMMIT');
				lease($key);
				$session->query_safe("BEGIN ISOLATION LEVEL $isolation");
				$session->query_safe('SELECT count(*) FROM pg_class');
			}
			send_to($session,
				begin_sql($key, wait => '10 min', lease => '1 hour'));
			await_sleep($session);
			ask($sql->($key));
			if ($isolation eq 'SERIALIZABLE')
			{
				$session->query('');
				like(
					$session->{stderr},
					qr/ERROR:  could not serialize access due to concurrent work on the same request/,
					"$isolation: $end is too new for a waiter");
				$session->{stderr} = '';
				$session->query_safe('ROLLBACK');
				is( $session->query_safe(begin_sql($key, lease => '1 hour')),
					$answer, "$isolation: $end: retried");
			}
			else
			{
				is(answer_to($session), $answer,
					"$isolation: $end: a waiter is answered");
				$session->query_safe('COMMIT');
			}
			$session->quit;
		}
	}
	return;
}

foreach my $preload (0, 1)
{
	$node = new_server("preload_$preload", preload => $preload);
	$node->start;
	$node->safe_psql('postgres', 'CREATE EXTENSION idempotency');

	subtest($preload ? 'preloaded' : 'not preloaded' => sub {
		test_ends();
		test_goes_on();
		test_runs_out();
		test_time_out($preload);
		test_cancel();
		test_wake() if $preload;
		test_many();
		test_changes();
		test_again();
		test_prepared();
		test_isolation();

		is(ask($count_userlocks), '0', 'no lock is left');
		is(ask($tracked), $preload ? '0' : '', 'nothing is left in shared memory');
		is(complaints_of($node, deadlocks => 1), '',
			'the server has nothing to complain of');
	});
	$node->stop;
}

done_testing();
