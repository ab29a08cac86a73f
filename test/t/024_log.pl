# The log: one line for an event, whose detail is JSON whatever the names and
# the encoding are, which says of the key no more than it may, and which is there
# for every conflict, also when its transaction is rolled back.

use strict;
use warnings;

use Digest::SHA qw(sha256_hex);
use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use JSON::PP;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_server('main', conf => <<'CONF');
logging_collector = on
log_destination = 'stderr,jsonlog'
log_directory = 'log'
log_filename = 'events.log'
log_rotation_age = 0
log_rotation_size = 0
log_statement = none
idempotency.log_events = 'all'
CONF
$node->start;

my $text_log = $node->data_dir . '/log/events.log';
my $json_log = $node->data_dir . '/log/events.json';
my ($text_offset, $json_offset) = (0, 0);
my $markers = 0;

# What was appended to a file since an offset, up to the line with a marker
sub read_until
{
	my ($file, $offset, $marker) = @_;

	for (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
	{
		my $text = -e $file ? substr(slurp_file($file), $offset) : '';

		return $text if $text =~ /\Q$marker\E.*\n/;
		select(undef, undef, undef, 0.1);
	}
	die "$marker does not come";
}

# What was logged since the last call, as text and as JSON.  The collector writes
# in the order in which processes sent.
sub new_lines
{
	my $marker = sprintf('marker %d.', ++$markers);

	$node->safe_psql('postgres', "DO \$\$BEGIN RAISE LOG '$marker'; END\$\$");
	my $text = read_until($text_log, $text_offset, $marker);
	my $json = read_until($json_log, $json_offset, $marker);
	$text_offset += length $text;
	$json_offset += length $json;
	return ($text, $json);
}

# The events that were logged since then: the detail of each, and its level
sub new_events
{
	my ($text, $json) = new_lines();
	my @events;

	foreach my $line (split /\n/, $json)
	{
		next unless $line =~ /idempotency event/;
		my $entry = JSON::PP->new->utf8->decode($line);
		my $event = JSON::PP->new->decode($entry->{detail});

		die "bad message: $line"
		  unless $entry->{message} eq qq(idempotency event "$event->{event}");
		die "too much is said: $line"
		  if grep { exists $entry->{$_} } 'statement', 'context', 'hint';
		push @events, [ $event, $entry->{error_severity} ];
	}
	return @events;
}

# The details only, with the durations replaced, after a look at them, by
# whether there is one
sub new_details
{
	my @details = map { $_->[0] } new_events();

	foreach my $detail (@details)
	{
		next unless exists $detail->{duration_ms};
		die "bad duration: $detail->{duration_ms}"
		  unless $detail->{duration_ms} =~ /^\d+(\.\d+)?$/;
		$detail->{duration_ms} = 'known';
	}
	return \@details;
}

# A text as an expression, however hostile it is
sub literal
{
	my ($bytes, $encoding) = @_;

	return "convert_from('\\x" . unpack('H*', $bytes) . "', '$encoding')";
}

sub decoded
{
	my ($bytes) = @_;

	utf8::decode($bytes);
	return $bytes;
}

my $e_acute = "\xc3\xa9";
my @names = (
	'plain', 'a"b', 'a\\b', '\\', '"', '\\"', '\\u0041', '\\n', q(';--),
	'{"event": "started"}', '", "key": "', '%s%n%m', '</script>', ' ',
	"Zo$e_acute", "\xc3\xbf\xc2\x80", 'x' x 255);
my @keys = ('plain', 'a"b', 'a\\b', '\\', '"}', '%s%n', '\\u0000', 'k' x 255);

# Names in all encodings.  In UTF8 there are more of them, and bytes that a
# database in SQL_ASCII does not know the meaning of are taken for LATIN1.
foreach my $dbname ('utf8', 'latin1', 'sql_ascii')
{
	my $from = $dbname eq 'sql_ascii' ? 'SQL_ASCII' : 'UTF8';
	my @all = @names;
	my (@sql, @expected);

	push @all, "\xe6\x97\xa5\xe6\x9c\xac", "\xf0\x9f\x98\x80",
	  "\xe2\x80\xa8", "\xef\xbf\xbf"
	  if $dbname eq 'utf8';
	push @all, "\xff\xfe", "\xc3", "\xed\xa0\x80" if $dbname eq 'sql_ascii';
	$node->safe_psql('postgres',
		    "CREATE DATABASE $dbname TEMPLATE template0"
		  . " ENCODING '$dbname' LOCALE 'C'");
	$node->safe_psql($dbname, 'CREATE EXTENSION idempotency');
	new_lines();

	foreach my $n (0 .. $#all)
	{
		my $key = $keys[ $n % @keys ];
		my $name = literal($all[$n], $from);

		push @sql,
		  "SELECT idempotency_try_begin($name, $name, "
		  . literal($key, $from)
		  . ", actor => $name, lease => '1 hour');";
		my $shown =
		  $dbname eq 'sql_ascii' ? $all[$n] : decoded($all[$n]);
		push @expected,
		  {
			event => 'started',
			tenant => $shown,
			action => $shown,
			actor => $shown,
			key => $key,
			outcome => 'started',
			duration_ms => 'known',
			attempt => 1
		  };
	}
	$node->safe_psql($dbname, join("\n", @sql));
	is_deeply(new_details(), \@expected, "$dbname: names of all kinds");
}

# Each class of events: which members it has, and with what in them
$node->safe_psql('postgres', 'CREATE EXTENSION idempotency');
sub event
{
	my ($event, $key, %more) = @_;

	return {
		event => $event,
		tenant => 'shop',
		action => 'pay',
		actor => '',
		key => $key,
		outcome => $event,
		duration_ms => 'known',
		%more
	};
}

sub try_begin
{
	my ($key, $more) = @_;

	return "SELECT outcome FROM idempotency_try_begin('shop', 'pay', '$key'"
	  . ($more // '') . ');';
}

sub finish
{
	my ($key, $more) = @_;

	return "SELECT idempotency_finish('shop', 'pay', '$key', $more);";
}

new_lines();
$node->safe_psql('postgres',
	    'BEGIN;'
	  . try_begin('once', ", '1'")
	  . finish('once', 201)
	  . 'COMMIT;'
	  . try_begin('once', ", '1'")
	  . "SELECT idempotency_replay('shop', 'pay', 'once', '1');"
	  . try_begin('once', ", '2'"));
is_deeply(
	new_details(),
	[
		event('started', 'once', attempt => 1),
		event('completed', 'once', status => 201, attempt => 1),
		event('replayed', 'once', status => 201, attempt => 1),
		event('replayed', 'once', status => 201, attempt => 1),
		event('mismatched', 'once')
	],
	'a claim, a replay and a mismatch');

$node->safe_psql('postgres',
	    try_begin('lease', ", actor => 'zoe', lease => '1 hour'")
	  . try_begin('lease', ", actor => 'zoe'"));
run_out($node, 'lease');
$node->safe_psql('postgres',
	    try_begin('lease', ", actor => 'zoe', lease => '1 hour', claim => '@{[ claim_of(2) ]}'")
	  . finish('lease', "404, actor => 'zoe', claim => '@{[ claim_of(2) ]}'"));
my @zoe = (actor => 'zoe');
is_deeply(
	new_details(),
	[
		event('started', 'lease', @zoe, attempt => 1),
		event('in_flight', 'lease', @zoe, attempt => 1),
		event('started', 'lease', @zoe, attempt => 2),
		event('taken_over', 'lease', @zoe, attempt => 2,
			outcome => 'started'),
		event('errored', 'lease', @zoe, status => 404, attempt => 2)
	],
	'a lease that is taken over, and a final error');

$node->safe_psql('postgres',
	q{UPDATE idempotency_key SET expires_at = clock_timestamp() WHERE key = 'lease'}
);
$node->safe_psql('postgres',
	    'BEGIN;'
	  . try_begin('lease', ", actor => 'zoe'")
	  . finish('lease', "503, actor => 'zoe'")
	  . try_begin('back')
	  . "SELECT idempotency_release('shop', 'pay', 'back');"
	  . 'COMMIT');
is_deeply(
	new_details(),
	[
		event('started', 'lease', @zoe, attempt => 1),
		event('expired', 'lease', @zoe, attempt => 1, outcome => 'started'),
		event('started', 'back', attempt => 1),
		event('released', 'lease', @zoe, status => 503, attempt => 1),
		event('released', 'back', attempt => 1)
	],
	'an expired record, and claims that are given back');

$node->safe_psql('postgres',
	    'BEGIN; SAVEPOINT s;'
	  . try_begin('undone')
	  . finish('undone', 200)
	  . 'ROLLBACK TO s;'
	  . try_begin('prepared')
	  . finish('prepared', 200)
	  . q{PREPARE TRANSACTION 'log'; ROLLBACK PREPARED 'log'; BEGIN;}
	  . try_begin('undone')
	  . finish('undone', 200)
	  . 'ROLLBACK');
is_deeply(
	new_details(),
	[
		event('started', 'undone', attempt => 1),
		event('started', 'prepared', attempt => 1),
		event('completed', 'prepared', status => 200, attempt => 1),
		event('started', 'undone', attempt => 1)
	],
	'what is rolled back did not come to anything');

# The key is said in full, hashed or not at all, and then nowhere in the log
$node->safe_psql(
	'postgres', q{
	CREATE FUNCTION try_pay(key text) RETURNS text LANGUAGE plpgsql AS $$
	DECLARE
		result idempotency_result;
	BEGIN
		result := idempotency_try_begin('shop', 'pay', key, '1');
		IF result.outcome = 'started' THEN
			PERFORM idempotency_finish('shop', 'pay', key);
		END IF;
		RETURN result.outcome;
	END $$});
foreach my $log_key ('full', 'hash', 'none')
{
	my $key = "secret-$log_key";
	my %shown =
		$log_key eq 'full' ? (key => $key)
	  : $log_key eq 'hash' ? (key_sha256 => sha256_hex($key))
	  : ();
	my $set = "SET idempotency.log_key = '$log_key';";
	my @expected = (
		event('started', $key, attempt => 1),
		event('completed', $key, status => 200, attempt => 1),
		event('replayed', $key, status => 200, attempt => 1),
		event('mismatched', $key));

	foreach my $event (@expected)
	{
		delete $event->{key};
		$event->{$_} = $shown{$_} foreach keys %shown;
	}
	new_lines();
	$node->safe_psql('postgres',
		    "$set SELECT try_pay('$key'); SELECT try_pay('$key');"
		  . try_begin($key, ", '2'"));
	my ($text, $json) = new_lines();
	if ($log_key eq 'full')
	{
		like($_, qr/\Q$key\E/, 'log_key full: the log has the key')
		  foreach $text, $json;
	}
	else
	{
		unlike($_, qr/\Q$key\E/,
			"log_key $log_key: the log does not have the key")
		  foreach $text, $json;
	}
	unlike($_, qr/try_pay/,
		"log_key $log_key: nor what it was called from")
	  foreach $text, $json;

	$node->safe_psql('postgres',
		"DELETE FROM idempotency_key WHERE key LIKE 'secret-%'");
	$node->safe_psql('postgres',
		    "$set SELECT try_pay('$key'); SELECT try_pay('$key');"
		  . try_begin($key, ", '2'"));
	is_deeply(new_details(), \@expected,
		"log_key $log_key: what is said of the key");
}

# Conflicts are all logged, and counted, though all of them are rolled back
my ($clients, $transactions) = (6, 20);
my $total = $clients * $transactions;
my $holder = session($node);
$holder->query_safe('BEGIN');
$holder->query_safe(
	q{SELECT idempotency_begin('shop', 'held', 'claim', '1')});
$node->safe_psql('postgres',
	q{SELECT idempotency_begin('shop', 'held', 'lease', '1', lease => '1 hour')}
);
new_lines();
my $call = q{idempotency_%s('shop', 'held', '%s', '1')};
my $catch =
  'DO $$BEGIN PERFORM ' . $call . "; EXCEPTION WHEN SQLSTATE 'ID003' THEN"
  . ' RETURN; END$$;';
$node->pgbench(
	"-n -c $clients -t $transactions",
	0,
	[qr{processed: $total/$total}],
	[],
	'repeats of requests that are in flight',
	{
		'024_log_conflicts' => join("\n",
			'BEGIN;',
			'SELECT ' . sprintf($call, 'try_begin', 'claim') . ';',
			'SELECT ' . sprintf($call, 'try_begin', 'lease') . ';',
			sprintf($catch, 'begin', 'claim'),
			sprintf($catch, 'begin', 'lease'),
			'ROLLBACK;')
	});
foreach my $n (1 .. 10)
{
	$node->psql('postgres', 'SELECT ' . sprintf($call, 'begin', 'claim'));
	$node->psql('postgres',
		"SELECT idempotency_begin('shop', 'held', 'claim', '2')");
}
my %logged;
$logged{"$_->{event} $_->{key}"}++ foreach @{ new_details() };
is_deeply(
	\%logged,
	{
		'in_flight claim' => 2 * $total + 10,
		'in_flight lease' => 2 * $total,
		'mismatched claim' => 10
	},
	'every conflict is logged');
is( $node->safe_psql(
		'postgres',
		q{SELECT in_flight, mismatched FROM idempotency_stats WHERE action = 'held'}
	),
	4 * $total + 10 . '|10',
	'every conflict is counted');
$holder->query_safe('ROLLBACK');
$holder->quit;

# The settings are the administrator's, who has them for the server or for a role
$node->safe_psql(
	'postgres', q{
	CREATE ROLE app LOGIN;
	CREATE ROLE audited LOGIN;
	GRANT EXECUTE ON FUNCTION idempotency_try_begin TO app, audited;
	ALTER ROLE audited SET idempotency.log_key = 'hash';
	ALTER ROLE audited SET idempotency.log_events = 'replayed';
	ALTER SYSTEM SET idempotency.log_level = 'warning'});
$node->reload;
$node->poll_query_until('postgres',
	q{SELECT current_setting('idempotency.log_level') = 'warning'});
my %values =
  (log_events => 'none', log_key => 'full', log_level => 'debug5');
foreach my $name (sort keys %values)
{
	foreach my $command ('SET', 'ALTER ROLE app SET', 'ALTER ROLE audited SET')
	{
		like(
			error_of($node, 'postgres',
				"SET ROLE app; $command idempotency.$name = '$values{$name}'"),
			qr/ERROR:  42501: /,
			"a role may not: $command idempotency.$name");
	}
}
new_lines();
$node->safe_psql('postgres', try_begin('once', ", '1'"),
	extra_params => [ '-U', $_ ])
  foreach 'app', 'audited';
$node->safe_psql('postgres', try_begin('once', ", '2'"),
	extra_params => [ '-U', 'audited' ]);
my @events = new_events();
is(scalar(@events), 2, 'classes of events can be set for a role');
is_deeply([ map { $_->[1] } @events ],
	[ 'WARNING', 'WARNING' ], 'the level can be set for the server');
is($events[0][0]{key}, 'once', 'one role has its keys logged');
is($events[1][0]{key_sha256},
	sha256_hex('once'), 'another one a hash of them');

# A client gets nothing of the detail, at whatever level, and nothing at all of
# what is logged after the commit
foreach my $level ('debug5', 'log', 'notice', 'warning')
{
	my $key = "hidden-$level";
	my ($rc, $stdout, $stderr) = $node->psql(
		'postgres', "
		SET log_min_messages = 'debug5';
		SET client_min_messages = 'debug5';
		SET idempotency.log_level = '$level';
		SELECT try_pay('$key');
		SELECT try_pay('$key');"
		  . try_begin($key, ", '2'"),
		extra_params => [ '-v', 'VERBOSITY=verbose', '-v',
			'SHOW_CONTEXT=always' ]);

	is($stdout, "started\nreplayed\nmismatched", "$level: calls work");
	is_deeply(
		[ $stderr =~ /idempotency event "(\w+)"/g ],
		[ 'started', 'replayed', 'mismatched' ],
		"$level: the client gets the message");
	unlike($stderr, qr/duration_ms|\Q$key\E/,
		"$level: the client gets nothing of the detail");
}
is(scalar(grep { $_->[0]{key} =~ /^hidden-/ } new_events()),
	4 * 4, 'the log has it all');

# The client's encoding has no equivalent for where it was called from
my ($rc, $stdout, $stderr) = $node->psql(
	'postgres', <<'SQL');
SET client_encoding = 'LATIN1';
SET client_min_messages = 'log';
SET idempotency.log_level = 'log';
CREATE PROCEDURE U&"\65E5\672C"() LANGUAGE plpgsql AS $$
BEGIN
	PERFORM idempotency_begin('shop', 'pay', 'nowhere');
	PERFORM idempotency_finish('shop', 'pay', 'nowhere');
	COMMIT;
END $$;
CALL U&"\65E5\672C"();
SELECT outcome FROM idempotency_try_begin('shop', 'pay', 'nowhere');
SQL
is($stdout, 'replayed', 'an event is logged in the middle of a procedure');
is_deeply(
	[ map { "$_->{event} $_->{key}" } @{ new_details() } ],
	[ 'started nowhere', 'completed nowhere', 'replayed nowhere' ],
	'with all of its lines');

my ($text, $json) = (slurp_file($text_log), slurp_file($json_log));
unlike($text, qr/PANIC|TRAP|terminated by signal/, 'no crash');
is( scalar(() = $text =~ /idempotency event "/g),
	scalar(() = $json =~ /"message":"idempotency event /g),
	'the log in text has the same lines');

$node->stop;
done_testing();
