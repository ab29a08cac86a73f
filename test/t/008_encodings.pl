# A request has the same fingerprint in every database, whatever the encoding,
# so that records can be moved from one to another.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_server('main');
$node->start;
foreach my $encoding ('UTF8', 'LATIN1', 'WIN1252', 'SQL_ASCII')
{
	$node->safe_psql('postgres',
		    "CREATE DATABASE $encoding TEMPLATE template0"
		  . " ENCODING '$encoding' LOCALE 'C'");
	create_shop($node, lc $encoding);
}

# The bytes of a request as a client would send them in UTF-8; a database in
# SQL_ASCII takes them as they are, the others convert them.
sub hash_in
{
	my ($dbname, $request) = @_;
	my $hex = unpack('H*', $request);
	my $to = $dbname eq 'sql_ascii' ? 'SQL_ASCII' : 'UTF8';

	return $node->safe_psql($dbname,
		"SELECT idempotency_request_hash(convert_from('\\x$hex', '$to')::jsonb)"
	);
}

# Requests in UTF-8, and the databases that can hold them.  In the order of
# jsonb shorter keys come first, and then the bytes decide.
my ($e_acute, $y_diaeresis, $euro) =
  ("\xc3\xa9", "\xc3\xbf", "\xe2\x82\xac");
my @all = ('latin1', 'win1252', 'sql_ascii');
my @cases = (
	[ 'ASCII', '{"b": [1, "x", null], "a": {"c": true}}', @all ],
	[ 'value', "{\"name\": \"Andr$e_acute\"}", @all ],
	[ 'lone string', "\"$e_acute\"", @all ],
	[ 'key', "{\"$e_acute\": 1}", @all ],
	[ 'key of one byte, or two', "{\"zz\": 1, \"$e_acute\": 2, \"a\": 3}", @all ],
	[
		'key as long as another one, or longer',
		"{\"ab$e_acute\": 1, \"abc\": 2, \"abcd\": 3}", @all
	],
	[
		'nested keys',
		"[{\"x\": {\"$e_acute\": {\"zz\": 1}, \"zz\": \"$e_acute\"}}]", @all
	],
	[
		'keys whose bytes are in another order',
		"{\"$euro\": 1, \"$y_diaeresis$y_diaeresis\": 2, \"$y_diaeresis\": 3,"
		  . " \"zzz\": 4}",
		'win1252', 'sql_ascii'
	]);

my %seen;
foreach my $case (@cases)
{
	my ($name, $request, @databases) = @$case;
	my $hash = hash_in('utf8', $request);

	like($hash, qr/^\\x[0-9a-f]{64}$/, "$name: there is a fingerprint");
	ok(!$seen{$hash}++, "$name: no other request has it");
	is(hash_in($_, $request), $hash, "$name: the same in $_")
	  foreach @databases;
}

# The form is fixed: the version; an object of one member; a key of two bytes,
# in UTF-8; a number of one digit
my $form = join('',
	'01', '7b00000001', '00000002c3a9', '23' . '00000003316530');
is( hash_in('latin1', "{\"$e_acute\": 1}"),
	$node->safe_psql('postgres', "SELECT sha256('\\x$form')"),
	'the fingerprint is made of UTF-8');

# Names that are not ASCII, by a client that speaks UTF-8
my $request = "{\"name\": \"Andr$e_acute\", \"$e_acute\": 1, \"zz\": 2}";
foreach my $dbname ('utf8', 'latin1', 'win1252', 'sql_ascii')
{
	my $begin = "idempotency_begin('M\xc3\xbcller', 'pay', 'k',"
	  . " '$request', 'Zo$e_acute')";

	is( $node->safe_psql(
			$dbname, qq{
			BEGIN;
			SELECT outcome FROM $begin;
			SELECT idempotency_finish('M\xc3\xbcller', 'pay', 'k', 201,
				'{"name" :  "Andr$e_acute"}', actor => 'Zo$e_acute');
			COMMIT;
			SELECT outcome, response FROM $begin}),
		qq(started\ncompleted\nreplayed|{"name" :  "Andr$e_acute"}),
		"$dbname: names and answer");
}

# Records move to another encoding, and repeats are still known
foreach my $dbname ('latin1', 'win1252')
{
	my $dump = $node->basedir . "/$dbname.dump";

	$node->safe_psql('postgres', 'CREATE DATABASE moved TEMPLATE template0'
		  . " ENCODING 'UTF8' LOCALE 'C'");
	command_ok([ 'pg_dump', '-Fc', '-f', $dump, $node->connstr($dbname) ],
		"$dbname: dumped");
	command_ok([ 'pg_restore', '-e', '-d', $node->connstr('moved'), $dump ],
		"$dbname: restored in UTF8");
	is( $node->safe_psql(
			'moved',
			"SELECT outcome, response FROM idempotency_begin("
			  . "'M\xc3\xbcller', 'pay', 'k', '$request', 'Zo$e_acute')"),
		qq(replayed|{"name" :  "Andr$e_acute"}),
		"$dbname: a repeat is known after the move");
	like(
		error_of(
			$node, 'moved',
			"SELECT idempotency_begin("
			  . "'M\xc3\xbcller', 'pay', 'k', '{\"zz\": 2}', 'Zo$e_acute')"),
		qr/ERROR:  ID004: /,
		"$dbname: so is a different request");
	$node->safe_psql('postgres', 'DROP DATABASE moved');
}

done_testing();
