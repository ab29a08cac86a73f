# What a request writes: one row and its index entries, which are not touched
# again, and nothing before it is finished.

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

# Rows that were inserted, updated and deleted, and those that are dead; and
# what the table and its indexes take
my $rows = 'SELECT n_tup_ins, n_tup_upd, n_tup_del, n_dead_tup'
  . " FROM pg_stat_user_tables WHERE relname = 'idempotency_key'";
my $size = "SELECT pg_total_relation_size('idempotency_key')";

# Statements in one transaction, and how many bytes of WAL it wrote
sub wal_of
{
	my ($statements) = @_;
	my @lines = split /\n/, $node->safe_psql('postgres', qq{
		SELECT pg_current_wal_insert_lsn() AS before \\gset
		$statements
		SELECT pg_current_wal_insert_lsn() - :'before'});

	return $lines[-1];
}

# The first time, reading the catalogs may tidy up their pages
$node->safe_psql('postgres', "BEGIN; $begin; ROLLBACK") for 1 .. 2;
my $empty = $node->safe_psql('postgres', $size);

is( wal_of("BEGIN; $begin; ROLLBACK;"),
	'0', 'a rollback before finish has written no WAL');
is($node->safe_psql('postgres', $size), $empty, '... and no page');
is( $node->safe_psql('postgres',
		"BEGIN; $begin; SELECT pg_current_xact_id_if_assigned() IS NULL; ROLLBACK"),
	"$requests\nt", 'a claim has no transaction ID');

$node->safe_psql('postgres', "BEGIN; $begin; $finish; COMMIT");
is($node->safe_psql('postgres', $rows),
	"$requests|0|0|0", 'a request that is finished is one insert, and no more');

# once, so that the pages have been pruned and their hint bits are set
$node->safe_psql('postgres', "VACUUM idempotency_key");
$node->safe_psql('postgres', $begin);
is(wal_of("BEGIN; $begin; COMMIT;"), '0', 'replays write no WAL');
is($node->safe_psql('postgres', $rows), "$requests|0|0|0", '... and no row');

$node->safe_psql('postgres', "BEGIN; $begin; ROLLBACK");
is($node->safe_psql('postgres', $count_userlocks), '0', 'no lock is left');

$node->stop;
done_testing();
