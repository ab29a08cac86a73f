# The shape of the schema, as test/pgtap/schema.sql checks it with pgTAP.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IPC::Run;
use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_server('main');
$node->start;

plan skip_all => 'pgTAP is not installed for this server'
  if $node->safe_psql('postgres',
	"SELECT count(*) FROM pg_available_extensions WHERE name = 'pgtap'") == 0;

# The answer of pgTAP, test by test.  What follows a failed one tells why.
sub take_over
{
	my ($schema, $lines) = @_;
	my ($planned, $seen) = (undef, 0);

	foreach my $line (split(/\n/, $lines))
	{
		if ($line =~ /^(not )?ok \d+ - (.*)$/)
		{
			ok(!$1, "$schema: $2");
			$seen++;
		}
		elsif ($line =~ /^1\.\.(\d+)$/)
		{
			$planned = $1;
		}
		elsif ($line ne '')
		{
			diag($line);
		}
	}
	is($planned, $seen, "$schema: all tests were run");
	return;
}

$node->safe_psql('postgres', 'CREATE EXTENSION pgtap');
foreach my $schema ('public', 'Idem Potent')
{
	$node->safe_psql('postgres', qq{CREATE SCHEMA IF NOT EXISTS "$schema"});
	$node->safe_psql('postgres',
		qq{CREATE EXTENSION idempotency SCHEMA "$schema"});

	my ($stdout, $stderr);
	my $result = IPC::Run::run(
		[
			'psql', '-XAtq', '-v', "schema=$schema",
			'-f', "$FindBin::RealBin/../pgtap/schema.sql",
			'-d', $node->connstr('postgres')
		],
		'>', \$stdout, '2>', \$stderr);

	ok($result, "$schema: psql succeeds");
	is($stderr, '', "$schema: psql has no errors");
	take_over($schema, $stdout);
	$node->safe_psql('postgres', 'DROP EXTENSION idempotency');
}

done_testing();
