# What a request writes: one row and its index entries, which are not touched
# again, and nothing before it is finished.  With a lease, the row when it is
# begun, and another version of it at each checkpoint and at finish, with no new
# index entries.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_server('main', conf => 'autovacuum = off');
$node->start;
create_shop($node);

my $requests = 1000;
my $begin = "SELECT count(*) FROM generate_series(1, $requests) AS n,"
  . " LATERAL idempotency_begin('shop', 'pay', 'key-' || n, '{\"n\": 1}')";
my $finish = "SELECT count(*) FROM generate_series(1, $requests) AS n,"
  . " LATERAL idempotency_finish('shop', 'pay', 'key-' || n)";

# Rows that were inserted, updated and deleted, and those that are dead, as far
# as sessions have reported them; and what the table and its indexes take
my $rows = 'SELECT n_tup_ins, n_tup_upd, n_tup_del, n_dead_tup'
  . " FROM pg_stat_user_tables WHERE relname = 'idempotency_key'";
my $flush = 'SELECT FROM pg_stat_force_next_flush()';
my $size = "SELECT pg_total_relation_size('idempotency_key')";

# Statements in one transaction, and how many bytes of WAL it wrote
sub wal_of
{
	my ($statements) = @_;
	my @lines = split /\n/, $node->safe_psql('postgres', qq{
		SELECT pg_current_wal_insert_lsn() AS before \\gset
		$statements
		SELECT pg_current_wal_insert_lsn() - :'before';
		$flush \\g /dev/null});

	return $lines[-1];
}

# Reading the catalogs may tidy up their pages, as soon as nobody else's snapshot
# needs what is there
$node->safe_psql('postgres', "BEGIN; $begin; ROLLBACK") for 1 .. 2;
my $empty = $node->safe_psql('postgres', $size);

my ($least) =
  sort { $a <=> $b } map { wal_of("BEGIN; $begin; ROLLBACK;") } 1 .. 5;
is($least, '0', 'a rollback before finish has written no WAL');
is($node->safe_psql('postgres', $size), $empty, '... and no page');
is( $node->safe_psql('postgres',
		"BEGIN; $begin; SELECT pg_current_xact_id_if_assigned() IS NULL; ROLLBACK"),
	"$requests\nt", 'a claim has no transaction ID');

$node->safe_psql('postgres', "BEGIN; $begin; $finish; COMMIT; $flush");
is($node->safe_psql('postgres', $rows),
	"$requests|0|0|0", 'a request that is finished is one insert, and no more');

# once, so that the pages have been pruned and their hint bits are set
$node->safe_psql('postgres', "VACUUM idempotency_key");
$node->safe_psql('postgres', $begin);
is(wal_of("BEGIN; $begin; COMMIT;"), '0', 'replays write no WAL');
is($node->safe_psql('postgres', $rows), "$requests|0|0|0", '... and no row');

$node->safe_psql('postgres', "BEGIN; $begin; ROLLBACK");
is($node->safe_psql('postgres', $count_userlocks), '0', 'no lock is left');

# Leases, each call in a transaction of its own, on a table with nothing else
sub lease
{
	my ($from, $calls) = @_;
	my $scope = "'shop', 'charge', 'key-' || n";
	my $claim = claim_of(1);
	my %call = (
		'begin' => "idempotency_try_begin($scope, '{\"n\": 1}', lease => '1 hour', claim => '$claim')",
		'repeat' => "idempotency_try_begin($scope, '{\"n\": 1}', lease => '1 hour')",
		'begin other' => "idempotency_try_begin($scope, '{}', lease => '1 hour')",
		'begin and wait' =>
		  "idempotency_try_begin($scope, lease => '1 hour', wait => '1 ms')",
		'checkpoint' => "idempotency_checkpoint($scope, '$claim', 'charged', '{}', '1 hour')",
		'finish' => "idempotency_finish($scope, 201, '{}', claim => '$claim')",
		'release' => "idempotency_release($scope, claim => '$claim')");
	my $to = $from + 99;

	$node->safe_psql('postgres', join("\n",
		"DO \$\$ BEGIN FOR n IN $from .. $to LOOP",
		(map { "PERFORM $call{$_}; COMMIT;" } @$calls),
		'END LOOP; END $$;',
		$flush));
	return;
}

# Rows inserted, updated, deleted; updates that needed no new index entries
sub lease_rows
{
	return $node->safe_psql('postgres',
		    'SELECT n_tup_ins, n_tup_upd, n_tup_del, n_tup_hot_upd'
		  . " FROM pg_stat_user_tables WHERE relname = 'idempotency_key'");
}

sub forget_rows
{
	$node->safe_psql(
		'postgres', qq{
		TRUNCATE idempotency_key;
		$flush;
		SELECT pg_stat_reset_single_table_counters('idempotency_key'::regclass)});
	return;
}

foreach my $case (
	[ 100, 0, 'begin' ],
	[ 100, 100, 'begin', 'finish' ],
	[ 100, 300, 'begin', 'checkpoint', 'checkpoint', 'finish' ],
	[ 100, 100, 'begin', 'release' ],
	[ 100, 100, 'begin', 'finish', 'finish', 'begin', 'begin other' ],
	[ 100, 100, 'begin', 'release', 'release' ],
	[ 100, 0, 'begin', 'repeat', 'begin other', 'begin and wait' ])
{
	my ($inserted, $updated, @calls) = @$case;
	my $calls = join(', ', @calls);

	forget_rows();
	lease(1, \@calls);
	my ($ins, $upd, $del, $hot) = split /\|/, lease_rows();
	is("$ins|$upd|$del", "$inserted|$updated|0", "lease: $calls: rows");
	cmp_ok($hot, '>=', 0.9 * $updated, "lease: $calls: HOT") if $updated > 0;
	note "lease: $calls: $hot of $upd are HOT";
}

# Who asks again for its own claim renews its lease
forget_rows();
lease(1, [ 'begin', 'begin' ]);
like(lease_rows(), qr/^100\|100\|0\|/, 'lease: begin again, by its id: rows');

# Replays and answers "in flight" write nothing, whatever their outcome
forget_rows();
lease(1, [ 'begin', 'finish' ]);
lease(101, ['begin']);
$node->safe_psql('postgres', 'VACUUM idempotency_key');
my $ask = sub {
	my ($arguments) = @_;

	return "SELECT outcome, count(*) FROM generate_series(1, 200) AS n,"
	  . " LATERAL idempotency_try_begin('shop', 'charge', 'key-' || n, $arguments)"
	  . ' GROUP BY 1 ORDER BY 1';
};
foreach my $arguments (
	q('{"n": 1}'),
	q('{"n": 1}', lease => '1 hour'),
	q('{"n": 1}', lease => '1 hour', wait => '1 ms'),
	q('{"n": 2}', lease => '1 hour'))
{
	my $sql = $ask->($arguments);

	is( $node->safe_psql('postgres', $sql),
		$arguments =~ /2/ ? 'mismatched|200' : "in_flight|100\nreplayed|100",
		"lease: asked with $arguments");
	is(wal_of("BEGIN; $sql; COMMIT;"), '0', '... which writes no WAL');
	is( $node->safe_psql(
			'postgres',
			"BEGIN; $sql \\g /dev/null\nSELECT pg_current_xact_id_if_assigned() IS NULL; COMMIT"
		),
		't', '... and has no transaction ID');
}
is($node->safe_psql('postgres', $count_userlocks), '0', 'no lock is left');

$node->stop;
done_testing();
