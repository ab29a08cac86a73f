# A million expired records are swept in the background while clients go on:
# with new requests, with repeats, and with keys whose records have expired and
# are about to be swept.  Nobody is told anything because of that, and nothing is
# slower than a batch: begin waits for no lock at all, and finish only where
# it replaces a record that a batch is just deleting.
#
# What was swept is counted by the server itself, in its WAL: a transaction that
# deletes records and inserts none is a batch.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $records = 1_000_000;
my $batch_size = 1000;

# Each wait for a lock that lasts for a millisecond is logged
my $node = new_server('main', worker => 1, conf => <<"CONF");
idempotency.worker = off
idempotency.sweep_interval = 100ms
idempotency.sweep_batch_size = $batch_size
idempotency.metrics_interval = 1s
idempotency.log_events = ''
deadlock_timeout = 1ms
log_lock_waits = on
log_line_prefix = '%m [%p] %b '
autovacuum = off
autovacuum_naptime = 1s
autovacuum_vacuum_cost_delay = 0
shared_buffers = 256MB
full_page_writes = off
max_wal_size = 8GB
checkpoint_timeout = 1h
CONF
$node->start;

sub query
{
	my ($sql) = @_;

	return $node->safe_psql('postgres', $sql);
}

# Each client has an action of its own, so that none of its requests is in flight
# by another one's doing, and there is one more that nobody asks for again.
my $clients = 8;
my $forgotten = "action-$clients";
query(
	qq{
	CREATE EXTENSION idempotency;
	CREATE TABLE effect (action text, key text);
	INSERT INTO idempotency_key (tenant, action, key, actor, state, status_code,
		response, attempt, created_at, finished_at, expires_at)
	SELECT 't', 'action-' || i % ($clients + 1), i / ($clients + 1), '',
		'completed', 200, '"expired"', 1,
		now() - interval '2 days', now() - interval '2 days',
		now() - interval '1 day' + i * interval '1 ms'
	FROM generate_series(1, $records) AS i});
my $start_lsn = query('SELECT pg_current_wal_insert_lsn()');

# An old key or a new one; what is replayed must not be what has expired
my $request = $node->basedir . '/request.sql';
append_to_file($request, <<"SQL");
\\set old random(0, @{[ int($records / ($clients + 1)) ]})
\\set new random_zipfian(1, 100000, 1.1)
\\set is_old random(0, 1)
\\if :is_old
\\set n :old
\\else
\\set n $records + :new
\\endif
BEGIN;
SELECT (outcome = 'started')::int AS started,
	   1 / (outcome = 'started' OR outcome = 'replayed' AND response::text = '"new"')::int AS is_right
FROM idempotency_try_begin('t', 'action-' || :client_id, :n::text) \\gset
\\if :started
INSERT INTO effect VALUES ('action-' || :client_id, :n);
SELECT idempotency_finish('t', 'action-' || :client_id, :n::text, 201, '"new"');
\\endif
COMMIT;
SQL

my $expired =
  'SELECT count(*) FROM idempotency_key WHERE expires_at <= clock_timestamp()';
my @pgbench = (
	'pgbench', '-n', '-c', $clients, '-j', 2, '-T', 2, '-f', $request,
	'-h', $node->host, '-p', $node->port, 'postgres');
my ($failed, $complaints, $rounds) = (0, '', 0);

set_conf($node, 'idempotency.worker', 'on');
do
{
	my ($stdout, $stderr) = run_command(\@pgbench);

	$failed++ if $stdout !~ /^number of failed transactions: 0 /m;
	$complaints .= $stderr;
	$rounds++;
} while (query($expired) > 0
	&& $rounds < $PostgreSQL::Test::Utils::timeout_default);
set_conf($node, 'idempotency.worker', 'off');
$node->poll_query_until('postgres',
	"SELECT count(*) = 0 FROM pg_stat_activity WHERE backend_type = 'idempotency worker'"
) or die 'workers go on';
is( query(
		'CALL idempotency_sweep(); SELECT swept FROM idempotency_worker_status()'),
	'0', 'nothing is left to sweep, but metrics to flush');
my $end_lsn = query('SELECT pg_switch_wal()');

# Requests: nothing is lost, nothing is done twice
is($failed, 0, 'no request failed or was told anything unexpected');
is($complaints, '', 'clients saw no error');
is(query($expired), '0', 'no expired record is left');
is( query(
		q{
		SELECT count(*)
		FROM effect FULL JOIN idempotency_key USING (action, key)
		WHERE effect IS NULL OR idempotency_key IS NULL OR response::text <> '"new"'}),
	'0',
	'every effect has its record, and every record its effect');
is(query('SELECT count(*) - count(DISTINCT (action, key)) FROM effect'),
	'0', 'one effect for each key');
my $stats = q{
	SELECT sum(started) = sum(completed) AND sum(started) = (SELECT count(*) FROM effect),
		sum(in_flight), sum(mismatched), sum(errored), sum(released),
		sum(replayed) > 0, sum(expired) > 0
	FROM };
is(query($stats . $_), 't|0|0|0|0|t|t', "$_ has what clients were told")
  foreach 'idempotency_stats', 'idempotency_metric';

# Batches, as the WAL has them
my $relation = query(
	q{
	SELECT concat_ws('/', dattablespace, oid,
					 pg_relation_filenode('idempotency_key'))
	FROM pg_database WHERE datname = current_database()});
my (%deleted, %inserted);
open my $wal, '-|', 'pg_waldump', '--rmgr=Heap', "--relation=$relation",
  '--path=' . $node->data_dir . '/pg_wal',
  "--start=$start_lsn", "--end=$end_lsn"
  or die "could not run pg_waldump: $!";
while (my $line = <$wal>)
{
	next unless $line =~ /tx: +(\d+),.* desc: (DELETE|INSERT)/;
	($2 eq 'DELETE' ? $deleted{$1} : $inserted{$1})++;
}
close $wal or die 'pg_waldump failed';

my ($swept, $replaced, $largest, $batches) = (0, 0, 0, 0);
foreach my $xid (keys %deleted)
{
	if ($inserted{$xid})
	{
		$replaced += $deleted{$xid};
		next;
	}
	$batches++;
	$swept += $deleted{$xid};
	$largest = $deleted{$xid} if $deleted{$xid} > $largest;
}
note "$swept records swept in $batches batches, $replaced replaced, $rounds rounds";
is($swept + $replaced, $records, 'every expired record was deleted once');
is($largest, $batch_size, 'no transaction deletes more than a batch');

# Metrics and statistics have the same numbers
foreach my $table ('idempotency_stats', 'idempotency_metric')
{
	is(query("SELECT sum(swept) FROM $table"), $swept, "$table: what was swept");
	is( query("SELECT sum(swept) FROM $table WHERE action = '$forgotten'"),
		int($records / ($clients + 1)),
		"$table: records that nobody asked for again");
}
ok( $node->poll_query_until(
		'postgres', qq{
		SELECT n_tup_del = $records
		FROM pg_stat_user_tables WHERE relname = 'idempotency_key'}),
	'statistics of the table have every deletion');

# Waiting for locks, as the log has it: what waited, and for what.  New rows wait
# for each other when a table grows.
my (%waiting, @waits);
foreach my $line (split /\n/, slurp_file($node->logfile))
{
	my ($pid, $type, $text) =
	  $line =~ /^\S+ \S+ \S+ \[(\d+)\] (.+?) ([A-Z]+:  .*)$/
	  or next;

	$waiting{$pid} = "$type: $1" if $text =~ /still waiting for (.*) after/;
	push @waits, delete($waiting{$pid}) . ": $1"
	  if $waiting{$pid} && $text =~ /^STATEMENT:  (.*)/;
}
push @waits, values %waiting;
note "waited: $_" foreach @waits;
is( join(
		"\n",
		grep {
			!/^client backend: ShareLock on transaction \d+: SELECT idempotency_finish\(/
			  && !/ on extension of relation /
		} @waits),
	'',
	'nobody but finish waits for a lock, and no worker does');

# Autovacuum sees what is to be done
set_conf($node, 'autovacuum', 'on');
ok( $node->poll_query_until(
		'postgres', q{
		SELECT autovacuum_count > 0 AND n_dead_tup = 0
		FROM pg_stat_user_tables WHERE relname = 'idempotency_key'}),
	'autovacuum sees to the table');

is(complaints_of($node, deadlocks => 1),
	'', 'the server has nothing to complain of');
$node->stop;
done_testing();
