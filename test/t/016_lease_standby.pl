# A lease is a record, so a standby has it: promoted, it goes on with the leases
# that were open, stalled or released, and knows their claim ids.  Before that, it
# shows what became of a request.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $primary = new_server('primary', init => [ allows_streaming => 1 ]);
$primary->start;
$primary->safe_psql(
	'postgres', q{
	CREATE EXTENSION idempotency;
	CREATE FUNCTION charge(request jsonb) RETURNS jsonb LANGUAGE sql AS
		'SELECT request'});
$primary->backup('base');

my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($primary, 'base', has_streaming => 1);
$standby->start;

sub begin_sql
{
	my ($key, $attempt) = @_;
	my $claim = defined $attempt ? ", claim => '@{[ claim_of($attempt) ]}'" : '';

	return 'SELECT outcome, attempt, recovery_point, recovery_state, response'
	  . " FROM idempotency_try_begin('shop', 'charge', '$key', '{\"key\": \"$key\"}', lease => '1 hour'$claim)";
}

sub checkpoint_sql
{
	my ($key, $attempt, $point) = @_;

	return "SELECT idempotency_checkpoint('shop', 'charge', '$key',"
	  . " '@{[ claim_of($attempt) ]}', '$point', '{\"by\": $attempt}', '1 hour') > now()";
}

sub finish_sql
{
	my ($key, $attempt) = @_;

	return "SELECT idempotency_finish('shop', 'charge', '$key', 201,"
	  . " '{\"by\" :  $attempt}', claim => '@{[ claim_of($attempt) ]}')";
}

sub release_sql
{
	my ($key, $attempt) = @_;

	return "SELECT idempotency_release('shop', 'charge', '$key',"
	  . " claim => '@{[ claim_of($attempt) ]}')";
}

sub on
{
	my ($node, $sql) = @_;

	return $node->safe_psql('postgres', $sql);
}

sub is_fenced
{
	my ($key, $attempt) = @_;

	foreach my $sql (
		finish_sql($key, $attempt),
		checkpoint_sql($key, $attempt, 'late'),
		release_sql($key, $attempt))
	{
		like(
			error_of($standby, 'postgres', $sql),
			qr/ERROR:  ID005: claim was lost\n/,
			"promoted: $key: attempt $attempt is fenced off: $sql");
	}
	return;
}

# Leases that are open, stalled, taken over, released and finished; one that
# has a recovery point; and two that a prepared transaction is at
my @keys = (
	'finished', 'open', 'open-with-point', 'prepared-begin', 'prepared-finish',
	'released', 'stalled', 'stalled-late', 'taken-over');
on($primary, begin_sql($_, 1)) foreach grep { $_ ne 'prepared-begin' } @keys;
on($primary, checkpoint_sql($_, 1, 'charged'))
  foreach 'open-with-point', 'released', 'stalled', 'stalled-late', 'taken-over';
run_out($primary, $_) foreach 'stalled', 'stalled-late', 'taken-over';
on($primary, begin_sql('taken-over', 2));
on($primary, release_sql('released', 1));
on($primary, finish_sql('finished', 1));
on($primary, 'BEGIN; ' . begin_sql('prepared-begin', 1) . "; PREPARE TRANSACTION 'b'");
on($primary,
	'BEGIN; ' . finish_sql('prepared-finish', 1) . "; PREPARE TRANSACTION 'f'");
$primary->wait_for_catchup($standby);

# A hot standby shows them, and tells what became of each request as far as that
# is in the table
my $in_flight =
  'SELECT key, attempt, pid FROM idempotency_in_flight ORDER BY key';
is( on($standby, $in_flight),
	"open|1|\nopen-with-point|1|\nprepared-finish|1|\ntaken-over|2|",
	'standby: the leases in flight');
my $stalled =
  'SELECT key, attempt, recovery_point FROM idempotency_stalled ORDER BY key';
is( on($standby, $stalled),
	"stalled|1|charged\nstalled-late|1|charged",
	'standby: the stalled ones');
my %replay = (
	'finished' => 'replayed|1|||{"by" :  1}|t|f',
	'never-begun' => '|||||f|f',
	'open' => 'in_flight|1||||t|t',
	'open-with-point' => 'in_flight|1|charged|||t|t',
	'prepared-begin' => '|||||f|f',
	'prepared-finish' => 'in_flight|1||||t|t',
	'released' => '|||||f|f',
	'stalled' => 'stalled|1|charged|||t|t',
	'stalled-late' => 'stalled|1|charged|||t|t',
	'taken-over' => 'in_flight|2|charged|||t|t');
foreach my $key (sort keys %replay)
{
	foreach my $request (", '{\"key\": \"$key\"}'", '')
	{
		is( on( $standby,
				'SELECT outcome, attempt, recovery_point, recovery_state, response,'
				  . ' created_at IS NOT NULL,'
				  . " coalesce(retry_after = 1 AND outcome = 'stalled'"
				  . " OR retry_after BETWEEN 2 AND 3600 AND outcome = 'in_flight', false)"
				  . " FROM idempotency_replay('shop', 'charge', '$key'$request)"),
			$replay{$key},
			"standby: replay: $key" . ($request eq '' ? ', any request' : ''));
	}

	# whoever has a record, also a released one, knows a different request
	my $other = "SELECT idempotency_replay('shop', 'charge', '$key', '{}')";
	if ($key eq 'never-begun' || $key eq 'prepared-begin')
	{
		is(on($standby, $other), '(,,,,,,,,,,,,)',
			"standby: replay: $key: nothing is known of another request");
		next;
	}
	like(
		error_of($standby, 'postgres', $other),
		qr/ERROR:  ID004: idempotency key was used with a different request\n/,
		"standby: replay: $key: a different request");
}

my $read_only = 'in a read-only transaction';
my $use_replay =
  'HINT:  Use idempotency_replay to get an answer that is stored already\.\n';
foreach my $key ('open', 'stalled', 'never-begun', 'finished')
{
	foreach my $begin ('idempotency_begin', 'idempotency_try_begin')
	{
		like(
			error_of(
				$standby, 'postgres',
				begin_sql($key) =~ s/idempotency_try_begin/$begin/r),
			qr/ERROR:  25006: cannot execute $begin\(\) $read_only\n$use_replay/,
			"standby: $begin is refused: $key");
	}
	like(
		error_of($standby, 'postgres', finish_sql($key, 1)),
		qr/ERROR:  25006: cannot execute idempotency_finish\(\) $read_only\n/,
		"standby: idempotency_finish is refused: $key");
	like(
		error_of($standby, 'postgres', release_sql($key, 1)),
		qr/ERROR:  25006: cannot execute idempotency_release\(\) $read_only\n/,
		"standby: idempotency_release is refused: $key");
	like(
		error_of($standby, 'postgres', checkpoint_sql($key, 1, 'late')),
		qr/ERROR:  25006: cannot execute idempotency_checkpoint\(\) $read_only\n/,
		"standby: idempotency_checkpoint is refused: $key");
	like(
		error_of(
			$standby, 'postgres',
			"SELECT idempotency_store('shop', 'charge', '$key', NULL, 402)"),
		qr/ERROR:  25006: cannot execute idempotency_store\(\) $read_only\n/,
		"standby: idempotency_store is refused: $key");
	like(
		error_of(
			$standby, 'postgres',
			"SELECT idempotency_forget('shop', 'charge', '$key')"),
		qr/ERROR:  25006: cannot execute idempotency_forget\(\) $read_only\n/,
		"standby: idempotency_forget is refused: $key");
}
like(
	error_of($standby, 'postgres',
		q{SELECT idempotency_first_seen('shop', 'mailer', '{a,b}')}),
	qr/ERROR:  25006: cannot execute idempotency_first_seen\(\) $read_only\n/,
	'standby: idempotency_first_seen is refused');
foreach my $run ('idempotency_run', 'idempotency_try_run')
{
	like(
		error_of(
			$standby, 'postgres',
			"SELECT $run('shop', 'charge', 'new', '{}', 'charge(jsonb)')"),
		qr/ERROR:  25006: cannot execute $run\(\) $read_only\n/,
		"standby: $run is refused");
}
is( on($standby, q{SELECT idempotency_event_key('order.paid', '42', 7)}),
	on($primary, q{SELECT idempotency_event_key('order.paid', '42', 7)}),
	'standby: the key of an event can be made');

# What comes later reaches the standby too; what is open is not there
on($primary, checkpoint_sql('open', 1, 'late'));
my $session = session($primary);
$session->query_safe('BEGIN');
$session->query_safe(checkpoint_sql('open', 1, 'lost'));
$session->query_safe(begin_sql('lost', 1));
$session->query_safe(begin_sql('stalled', 2));
on($primary, 'SELECT pg_switch_wal()');
$primary->wait_for_catchup($standby);
is(on($standby, $in_flight),
	"open|1|\nopen-with-point|1|\nprepared-finish|1|\ntaken-over|2|",
	'standby: what is not committed is not shown');

# The standby takes over in the middle of that
$primary->stop('immediate');
end_session($session);
$standby->promote;

is(on($standby, $stalled),
	"stalled|1|charged\nstalled-late|1|charged",
	'promoted: the same are stalled');
foreach my $key ('open', 'open-with-point', 'prepared-begin', 'prepared-finish',
	'taken-over')
{
	is( on($standby, begin_sql($key)),
		$key eq 'prepared-begin' ? 'in_flight||||'
		: $key eq 'taken-over' ? 'in_flight|2|||'
		: 'in_flight|1|||',
		"promoted: $key: in flight");
}

# Who began an attempt goes on with it, also when it has to ask for it again
is(on($standby, begin_sql('open', 1)),
	'started|1|late|{"by": 1}|', 'promoted: open: its claim can be had again');
is(on($standby, checkpoint_sql('open', 1, 'mailed')),
	't', 'promoted: open: its attempt goes on');
is(on($standby, finish_sql('open', 1)),
	'completed', 'promoted: open: and finishes');
is(on($standby, finish_sql('open', 1)),
	'completed', 'promoted: open: and finishes again');
is(on($standby, begin_sql('open')),
	'replayed|1|||{"by" :  1}', 'promoted: open: a repeat gets the answer');

run_out($standby, 'open-with-point');
is(on($standby, begin_sql('open-with-point', 2)),
	'started|2|charged|{"by": 1}|',
	'promoted: open-with-point: taken over when its lease runs out');
is_fenced('open-with-point', 1);
is(on($standby, finish_sql('open-with-point', 2)),
	'completed', 'promoted: open-with-point: the new attempt finishes');

# A late attempt finishes where nobody has taken over, and only there
is(on($standby, finish_sql('stalled-late', 1)),
	'completed', 'promoted: stalled-late: its attempt comes late, and finishes');
is(on($standby, begin_sql('stalled-late')),
	'replayed|1|||{"by" :  1}',
	'promoted: stalled-late: a repeat gets the answer');

is(on($standby, begin_sql('stalled', 2)),
	'started|2|charged|{"by": 1}|', 'promoted: stalled: taken over');
is_fenced('stalled', 1);
is(on($standby, release_sql('stalled', 2)),
	't', 'promoted: stalled: the new attempt releases it');
is(on($standby, begin_sql('stalled', 3)),
	'started|3|charged|{"by": 1}|', 'promoted: stalled: and the next one runs');
is_fenced('stalled', $_) foreach 1, 2;
is(on($standby, finish_sql('stalled', 3)),
	'completed', 'promoted: stalled: and finishes');

is_fenced('taken-over', 1);
is(on($standby, finish_sql('taken-over', 2)),
	'completed', 'promoted: taken-over: the second attempt finishes');

is(on($standby, release_sql('released', 1)),
	'f', 'promoted: released: it is released already');
is(on($standby, begin_sql('released', 2)),
	'started|2|charged|{"by": 1}|',
	'promoted: released: the next attempt runs from the recovery point');
is_fenced('released', 1);
is(on($standby, finish_sql('released', 2)),
	'completed', 'promoted: released: and finishes');

is(on($standby, finish_sql('finished', 1)),
	'completed', 'promoted: finished: it can be finished again');
is(on($standby, begin_sql('finished')),
	'replayed|1|||{"by" :  1}', 'promoted: finished: a repeat gets the answer');

is(on($standby, begin_sql('lost', 1)),
	'started|1|||', 'promoted: lost: what was not committed runs');
is(on($standby, finish_sql('lost', 1)),
	'completed', 'promoted: lost: and finishes');

# What was prepared can be resolved
on($standby, "COMMIT PREPARED '$_'") foreach 'b', 'f';
is(on($standby, begin_sql('prepared-begin')),
	'in_flight|1|||', 'promoted: prepared-begin: a lease when committed');
is(on($standby, finish_sql('prepared-begin', 1)),
	'completed', 'promoted: prepared-begin: which can be finished');
is(on($standby, begin_sql('prepared-finish')),
	'replayed|1|||{"by" :  1}',
	'promoted: prepared-finish: an answer when committed');

is(on($standby, $in_flight), '', 'promoted: nothing is in flight at last');
is(on($standby, $stalled), '', 'promoted: nor stalled');
is(on($standby, $count_userlocks), '0', 'promoted: no lock is left');
is(on($standby, $tracked), '0', 'promoted: no entry in shared memory is left');

done_testing();
