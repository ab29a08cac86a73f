# The key of an event is the one that any other maker of version 5 UUIDs gives
# for its name.  Here that is Python's uuid module, on names with characters of
# all kinds, and in databases of other encodings.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IPC::Run;
use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my ($out, $err);
plan skip_all => 'python3 with its uuid module is not installed'
  unless eval { IPC::Run::run([ 'python3', '-c', 'import uuid' ], '>', \$out, '2>', \$err) };

my $default_namespace = 'ce796568-8e76-4f6e-b458-7e151e9ab823';

# Python reads lines of hexadecimal UTF-8: namespace, type, aggregate, sequence
my $python = <<'PYTHON';
import sys, uuid
for line in sys.stdin:
    namespace, kind, aggregate, sequence = line.rstrip("\n").split(",")
    name = ":".join([bytes.fromhex(kind).decode("utf-8"),
                     bytes.fromhex(aggregate).decode("utf-8"),
                     sequence])
    print(uuid.uuid5(uuid.UUID(namespace), name))
PYTHON

my $node = new_server('main');
$node->start;
$node->safe_psql('postgres',
	q{CREATE DATABASE latin1 TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'});
$node->safe_psql($_, 'CREATE EXTENSION idempotency')
  foreach 'postgres', 'latin1';

# Random events; a seed that is told, so that a failure can be had again
my $seed = $ENV{IDEMPOTENCY_TEST_SEED} // int(rand(2**31));
note "IDEMPOTENCY_TEST_SEED=$seed";
srand($seed);

sub random_text
{
	my ($forbidden, @ranges) = @_;
	my $text = '';

	for (1 .. 1 + int(rand(rand() < 0.1 ? 300 : 12)))
	{
		my ($first, $last) = @{ $ranges[ rand(@ranges) ] };
		my $char = chr($first + int(rand($last - $first + 1)));

		redo if index($forbidden, $char) >= 0;
		$text .= $char;
	}
	utf8::encode($text);
	return $text;
}

sub random_sequence
{
	my @extremes = (
		'0', '1', '-1', '9223372036854775807', '-9223372036854775808',
		'2147483648');

	return $extremes[ rand(@extremes) ] if rand() < 0.2;
	return (rand() < 0.3 ? '-' : '') . (1 + int(rand(10**int(rand(15)))));
}

sub random_namespace
{
	return join('-',
		map { join('', map { sprintf '%x', rand(16) } 1 .. $_ ) } 8, 4, 4, 4, 12);
}

# Characters by their code points: ASCII with spaces, colons, quotes and
# control characters; those that LATIN1 has as well; those of the basic plane
# that are no surrogates; and the others
my @ascii = ([ 0x20, 0x7e ], [ 0x01, 0x1f ], [ 0x27, 0x27 ], [ 0x3a, 0x3a ]);
my @latin1 = (@ascii, [ 0xa0, 0xff ]);
my @any = (@latin1, [ 0x100, 0xd7ff ], [ 0xe000, 0xfffd ], [ 0x10000, 0x10ffff ]);
my @ranges = (\@ascii, \@latin1, \@any);

my @events;
foreach my $n (1 .. 600)
{
	my @characters = @{ $ranges[ $n % 3 ] };

	push @events,
	  {
		latin1 => $n % 3 != 2,
		namespace => $n % 2 ? $default_namespace : random_namespace(),
		type => random_text(':', @characters),
		aggregate => random_text('', @characters),
		sequence => random_sequence()
	  };
}

# and some that are known to be hard
my @hard = (
	[ 'order.paid', '42', '7' ],
	[ 'a', 'b:c', '1' ],
	[ 'a', 'b:', '1' ],
	[ 'a', ':', '0' ],
	[ ' a ', ' b ', '-1' ],
	[ "it's", '"x"\\n', '9223372036854775807' ],
	[ "\xc3\xa9", "e\xcc\x81", '-9223372036854775808' ],
	[ "\xf0\x9f\x92\xb3", "\xe2\x82\xac:\xe2\x82\xac", '1' ]);
push @events,
  map {
	{
		namespace => $default_namespace,
		type => $_->[0],
		aggregate => $_->[1],
		sequence => $_->[2]
	}
  } @hard;

# What Python says
my $input = join('',
	map {
		join(',',
			$_->{namespace}, unpack('H*', $_->{type}),
			unpack('H*', $_->{aggregate}), $_->{sequence})
		  . "\n"
	} @events);
($out, $err) = ('', '');
ok(IPC::Run::run([ 'python3', '-c', $python ], '<', \$input, '>', \$out, '2>', \$err),
	'python3 makes the keys')
  or diag $err;
my @expected = split /\n/, $out;
is(scalar(@expected), scalar(@events), 'one for each event');

# What we say, given the same bytes
sub keys_in
{
	my ($dbname, @some) = @_;
	my $values = join(",\n",
		map {
			my ($type, $aggregate) =
			  map { "convert_from('\\x" . unpack('H*', $_) . "', 'UTF8')" }
			  $_->{type}, $_->{aggregate};

			"($_->{n}, $type, $aggregate, '$_->{sequence}'::bigint, '$_->{namespace}'::uuid)"
		} @some);

	return split /\n/, $node->safe_psql(
		$dbname, qq{
		SELECT CASE WHEN namespace = '$default_namespace'
					THEN idempotency_event_key(type, aggregate, sequence)
					ELSE idempotency_event_key(type, aggregate, sequence,
											   namespace)
			   END
		FROM (VALUES $values) AS event (n, type, aggregate, sequence, namespace)
		ORDER BY n});
}

# The names of events whose keys are not as expected
sub differing
{
	my ($some, @keys) = @_;

	return join("\n",
		map {
			my $event = $some->[$_];

			join(' ',
				unpack('H*', $event->{type}), unpack('H*', $event->{aggregate}),
				$event->{sequence}, $event->{namespace},
				$keys[$_] // 'none', 'instead of', $expected[ $event->{n} ])
		}
		grep { ($keys[$_] // '') ne $expected[ $some->[$_]{n} ] }
		  0 .. $#$some);
}

$events[$_]{n} = $_ foreach 0 .. $#events;
my @latin1_events = grep { $_->{latin1} } @events;
cmp_ok(scalar(@latin1_events), '>=', 300, 'many events have a name in LATIN1');
is(differing(\@events, keys_in('postgres', @events)), '', 'UTF8: the same keys');
is(differing(\@latin1_events, keys_in('latin1', @latin1_events)),
	'', 'LATIN1: the same keys');

my %events = map {
	join("\0", @$_{qw(namespace type aggregate sequence)}) => 1
} @events;
my %keys = map { $_ => 1 } @expected;
is(scalar(keys %keys), scalar(keys %events), 'different events, different keys');
is(scalar(grep { !/^[0-9a-f]{8}-[0-9a-f]{4}-5[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/ } @expected),
	0, 'all of version 5');

# An example that never changes
is( $node->safe_psql(
		'postgres', q{SELECT idempotency_event_key('order.paid', '42', 7)}),
	'2a0752f5-10f1-5791-bdfa-8817395e3d7b',
	'the key of an event is the same for ever');

$node->stop;
done_testing();
