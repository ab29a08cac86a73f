# Consumers of one queue that get the same messages at the same time, in
# batches of ten thousand, and some of whose transactions fail: among those that
# commit, each message is handed out once.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $consumers = 16;
my $batches = 3;		# of each of them
my $batch_size = 10_000;
my $messages = 3 * $batch_size;

# A claim for each id would not find room in the lock table
my $node = new_server('main', conf => <<'CONF');
max_connections = 30
max_locks_per_transaction = 10
deadlock_timeout = 10ms
log_lock_waits = on
CONF
$node->start;
$node->safe_psql(
	'postgres', q{
	CREATE EXTENSION idempotency;
	CREATE SEQUENCE rolled_back;
	CREATE TABLE handed_out (consumer text, id text, client int);
	CREATE TABLE batch (consumer text, client int, first int, new int);
	CREATE TABLE held (locks int, userlocks int);

	-- the ids of a batch, in any order, one of them twice
	CREATE FUNCTION make_batch(first int, size int) RETURNS text[]
	LANGUAGE sql AS $$
		SELECT array_agg('message-' || n ORDER BY random())
		FROM (SELECT generate_series(first, first + size - 2)
			  UNION ALL SELECT first) AS id (n)
	$$;});

# A batch whose transaction fails, and then is delivered again, or one that
# succeeds at once
my $hand_out = <<'SQL';
BEGIN ISOLATION LEVEL :isolation;
WITH new AS (
	INSERT INTO handed_out
	SELECT ':consumer', id, :client_id
	FROM idempotency_first_seen('t', ':consumer', make_batch(:first, :size)) AS id
	RETURNING 1)
INSERT INTO batch SELECT ':consumer', :client_id, :first, count(*) FROM new;
INSERT INTO held SELECT count(*), count(*) FILTER (WHERE locktype = 'userlock') FROM pg_locks WHERE pid = pg_backend_pid();
SQL
my $script = $node->basedir . '/consumer.sql';
append_to_file($script, <<"SQL");
\\set first random(1, $messages - :size + 2)
\\set fails random(1, 3)
\\if :fails = 1
${hand_out}SELECT nextval('rolled_back');
ROLLBACK;
\\endif
${hand_out}COMMIT;
SQL

foreach my $isolation ('READ COMMITTED', 'REPEATABLE READ')
{
	my $consumer = lc($isolation =~ s/ /_/r);
	my $log = -s $node->logfile;

	$node->safe_psql('postgres', 'TRUNCATE held');
	$node->safe_psql('postgres', 'ALTER SEQUENCE rolled_back RESTART');
	$node->command_checks_all(
		[
			'pgbench', '-n', '-c', $consumers, '-j', '2', '-t', $batches,
			'-D', "isolation=$isolation", '-D', "consumer=$consumer",
			'-D', "size=$batch_size", '-f', $script, 'postgres'
		],
		0,
		[
			qr{number of transactions actually processed: (\d+)/\1\n},
			qr/number of failed transactions: 0 /
		],
		[qr/^(?!.*(ERROR|aborted))/s],
		"$isolation: $consumers consumers at once");

	is( $node->safe_psql(
			'postgres', qq{
			SELECT id, count(*) FROM handed_out WHERE consumer = '$consumer'
			GROUP BY id HAVING count(*) > 1}),
		'',
		"$isolation: no message was handed out twice");
	is( $node->safe_psql(
			'postgres', qq{
			SELECT count(*), sum(new) = (
				SELECT count(*) FROM handed_out WHERE consumer = '$consumer')
			FROM batch WHERE consumer = '$consumer'}),
		$consumers * $batches . '|t',
		"$isolation: all batches were worked on");
	is( $node->safe_psql(
			'postgres', qq{
			SELECT id
			FROM (SELECT DISTINCT 'message-' || n AS id
				  FROM batch,
					   generate_series(first, first + $batch_size - 2) AS n
				  WHERE consumer = '$consumer') AS delivered
				 FULL JOIN (SELECT id FROM handed_out
							WHERE consumer = '$consumer') AS new USING (id)
				 FULL JOIN (SELECT key AS id FROM idempotency_key
							WHERE action = '$consumer' AND state = 'completed'
							  AND attempt = 1) AS record USING (id)
			WHERE delivered IS NULL OR new IS NULL OR record IS NULL}),
		'',
		"$isolation: what was delivered, handed out and recorded is the same");

	# It was a test
	like(substr(slurp_file($node->logfile), $log),
		qr/still waiting for ShareLock on transaction/,
		"$isolation: consumers waited for each other");
	is( $node->safe_psql(
			'postgres', qq{
			SELECT count(DISTINCT client) > 1 FROM handed_out
			WHERE consumer = '$consumer'}),
		't',
		"$isolation: messages were handed out to many");
	is( $node->safe_psql(
			'postgres', qq{
			SELECT count(*) >= $batch_size - 1
			FROM idempotency_key WHERE action = '$consumer'}),
		't',
		"$isolation: batches were as large as they should be");
	is( $node->safe_psql(
			'postgres', qq{
			SELECT count(*) > 0 FROM batch
			WHERE consumer = '$consumer' AND new < $batch_size - 1}),
		't',
		"$isolation: batches overlapped");
	is( $node->safe_psql('postgres', 'SELECT is_called FROM rolled_back'),
		't', "$isolation: some transactions failed");

	# No lock was taken for an id
	is( $node->safe_psql(
			'postgres', 'SELECT count(*) > 0, max(userlocks), max(locks) < 40 FROM held'
		),
		't|0|t',
		"$isolation: an id takes no lock");
}
is($node->safe_psql('postgres', $count_userlocks), '0', 'no lock is left');
is($node->safe_psql('postgres', $tracked),
	'0', 'no entry in shared memory is left');
is(complaints_of($node, deadlocks => 1), '',
	'the server has nothing to complain of');

# A repeat of everything, in one call
is( $node->safe_psql(
		'postgres', qq{
		SELECT count(*), count(DISTINCT id)
		FROM idempotency_first_seen('t', 'read_committed',
									make_batch(1, 2 * $messages)) AS id
		WHERE id IN (SELECT id FROM handed_out WHERE consumer = 'read_committed')}
	),
	'0|0',
	'nothing is handed out again');

$node->stop;
done_testing();
