# A cluster of Citus for the tests in test/citus: a coordinator and two workers, all of
# which take queries, and an application on it that makes payments.
#
# The nodes find each other by their sockets.  The application is a role that may
# call the functions and use its own tables, and nothing else.  Each payment has a
# receipt of its own, a uuid, which is also its answer; so an answer says which
# payment it is about.
#
# All tests end in the same question (effects_are).  The payments that were made, the
# records that are kept and the answers that clients got must be the same receipts,
# one a key.  All are read through the coordinator, as anybody would.  Besides, the
# table that Citus leaves where a distributed one was must have nothing in it on
# any node: what is written there is seen by nobody else.
package CitusCluster;

use strict;
use warnings;

use Exporter 'import';
use IdempotencyTest;
use IPC::Run;
use List::Util qw(first shuffle);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More ();

our @EXPORT = qw(
  skip_without_citus
  $begin_and_finish
  $lease
  $run
  %handler
);

# A request of a client, until it is answered: psql variables say what it is about,
# and "answered" and "receipt" become true and the answer.  Whoever begins it takes
# its own answer for one only when COMMIT has succeeded.
our $begin_and_finish = <<'PSQL';
\set started false
\set finished false
SELECT gen_random_uuid() AS new_receipt \gset
BEGIN;
SELECT outcome = 'started' AS started, outcome = 'replayed' AS answered, response->>'receipt' AS receipt
FROM idempotency_try_begin(:'tenant', 'pay', :'key', json_build_object('key', :'key')::jsonb, wait => '1 s') \gset
\if :started
INSERT INTO payment VALUES (:'tenant', :'key', :'new_receipt');
SELECT idempotency_finish(:'tenant', 'pay', :'key', 201, json_build_object('receipt', :'new_receipt')) = 'completed' AS finished \gset
\endif
COMMIT;
\if :ERROR
\set answered false
\elif :finished
\set answered true
\set receipt :new_receipt
\endif
PSQL

# The same under a leased claim, with the work in the second transaction
our $lease = <<'PSQL';
\set started false
\set finished false
SELECT outcome = 'started' AS started, outcome = 'replayed' AS answered, response->>'receipt' AS receipt,
	claim, gen_random_uuid() AS new_receipt
FROM idempotency_try_begin(:'tenant', 'pay', :'key', json_build_object('key', :'key')::jsonb,
	wait => '1 s', lease => '5 s') \gset
\if :started
BEGIN;
INSERT INTO payment VALUES (:'tenant', :'key', :'new_receipt');
SELECT idempotency_finish(:'tenant', 'pay', :'key', 201, json_build_object('receipt', :'new_receipt'),
	claim => :'claim') = 'completed' AS finished \gset
COMMIT;
\if :ERROR
\elif :finished
\set answered true
\set receipt :new_receipt
\endif
\endif
PSQL

# Where the handler of a run does its work, and what makes it so
our %handler = (
	'on the node of the client' => 'SET idempotency.forward_handlers = off;',
	'on the node of the tenant' => 'SET idempotency.forward_handlers = on;');

# The same in one call
our $run = <<'PSQL';
SELECT outcome IN ('completed', 'replayed') AS answered, response->>'receipt' AS receipt
FROM idempotency_try_run(:'tenant', 'pay', :'key', json_build_object('tenant', :'tenant', 'key', :'key')::jsonb,
	'pay(jsonb)', wait => '1 s') \gset
PSQL

# Pass over a test where Citus is not installed; Debian does not have it.
sub skip_without_citus
{
	my ($folder) = run_command([ 'pg_config', '--sharedir' ]);
	my $file = "$folder/extension/citus.control";

	Test::More::plan(skip_all => "Citus is not installed: there is no $file")
	  unless -e $file;
	return;
}

# A cluster that runs.  These may be given:
#
# name: what the names of its nodes begin with
# preload: the libraries, in their order
# schema: that of the extension, by default "idempotency"
# conf: what to add to the configuration of each node
# coordinator_shards => 0: keep no shards on the coordinator
# distribute => 0: leave the records where they are
sub new
{
	my ($class, %options) = @_;
	my $self = bless {
		name => '',
		preload => 'citus,idempotency',
		schema => 'idempotency',
		conf => '',
		coordinator_shards => 1,
		distribute => 1,
		nodes => [],
		clients => 0,
		%options
	}, $class;

	$self->add_node($_) foreach 'coordinator', 'worker1', 'worker2';
	$self->_let_coordinator_have_shards if $self->{coordinator_shards};
	$self->_create_application;
	$self->distribute if $self->{distribute};
	return $self;
}

# Start a server, and make it a node; the first one is the coordinator.  SQL that is
# given is run on it before.
sub add_node
{
	my ($self, $name, $sql) = @_;
	my $node = $self->_start_server($name);
	my $add =
	  @{ $self->{nodes} } ? 'citus_add_node' : 'citus_set_coordinator_host';

	$node->safe_psql('postgres', $sql) if defined $sql;
	push @{ $self->{nodes} }, $node;
	$self->on_coordinator("SELECT $add(" . $self->address($node) . ')');
	return $node;
}

sub _start_server
{
	my ($self, $name) = @_;
	my $node = new_server(
		$self->{name} . $name,
		preload => 0,
		init => [ allows_streaming => 'logical' ]);
	my $host = $node->host;

	$node->append_conf('postgresql.conf', <<"CONF");
shared_preload_libraries = '$self->{preload}'
search_path = 'public, $self->{schema}'
restart_after_crash = on
shared_buffers = 32MB
max_connections = 200
max_prepared_transactions = 200
max_worker_processes = 40
max_wal_senders = 30
max_replication_slots = 30
citus.local_hostname = '$host'
citus.shard_count = 8
citus.recover_2pc_interval = 200ms
citus.distributed_deadlock_detection_factor = 2
citus.defer_shard_delete_interval = 100ms
citus.enable_statistics_collection = off
$self->{conf}
CONF
	$node->start;
	$node->safe_psql('postgres', 'CREATE EXTENSION citus');
	return $node;
}

sub _let_coordinator_have_shards
{
	my ($self) = @_;

	$self->on_coordinator('SELECT citus_set_node_property('
		  . $self->address($self->coordinator)
		  . ", 'shouldhaveshards', true)");
	return;
}

# The application: payments by tenant, a handler that makes one, and the role "app".
sub _create_application
{
	my ($self) = @_;

	$self->on_coordinator(
		q{
		CREATE ROLE app LOGIN;
		CREATE TABLE payment (tenant text NOT NULL, key text NOT NULL, receipt uuid NOT NULL);
		SELECT create_distributed_table('payment', 'tenant');
		GRANT SELECT, INSERT, UPDATE, DELETE ON payment TO app;
		CREATE FUNCTION pay(request jsonb) RETURNS json LANGUAGE plpgsql AS $$
		DECLARE
			receipt uuid := gen_random_uuid();
		BEGIN
			INSERT INTO public.payment VALUES (request->>'tenant', request->>'key', receipt);
			RETURN json_build_object('receipt', receipt);
		END $$});
	$self->create_extension;
	return;
}

# The extension, with the rights of the application
sub create_extension
{
	my ($self) = @_;

	create_extension_on($self->coordinator, $self->{schema});
	return;
}

# The same on any server
sub create_extension_on
{
	my ($node, $schema) = @_;

	$node->safe_psql(
		'postgres', "
		CREATE SCHEMA IF NOT EXISTS $schema;
		CREATE EXTENSION idempotency SCHEMA $schema;
		GRANT USAGE ON SCHEMA $schema TO app;
		GRANT USAGE ON TYPE idempotency_result, idempotency_response TO app;
		GRANT EXECUTE ON FUNCTION idempotency_begin, idempotency_try_begin, idempotency_finish,
			idempotency_replay, idempotency_release, idempotency_store, idempotency_checkpoint,
			idempotency_run, idempotency_try_run, idempotency_first_seen, idempotency_forget TO app");
	return;
}

sub distribute
{
	my ($self) = @_;

	$self->on_coordinator("SELECT idempotency_distribute('payment')");
	return;
}

sub coordinator
{
	my ($self) = @_;

	return $self->{nodes}[0];
}

sub nodes
{
	my ($self) = @_;

	return @{ $self->{nodes} };
}

# Host and port of a node, as arguments of Citus' functions
sub address
{
	my ($self, $node) = @_;

	return sprintf "'%s', %d", $node->host, $node->port;
}

# Run SQL on the coordinator, as its superuser.
sub on_coordinator
{
	my ($self, $sql) = @_;

	return $self->coordinator->safe_psql('postgres', $sql);
}

# Run SQL on each node, as its superuser, and get what all say.
sub everywhere
{
	my ($self, $sql) = @_;

	return map { $_->safe_psql('postgres', $sql) } $self->nodes;
}

# Run SQL on a node as the application does, and get what it says.
sub app
{
	my ($self, $node, $sql) = @_;

	return $node->safe_psql('postgres', $sql, extra_params => [ '-U', 'app' ]);
}

# The error that the application gets for a statement on a node
sub error_of_app
{
	my ($self, $node, $sql) = @_;
	my ($rc, $stdout, $stderr) = $node->psql('postgres', $sql,
		extra_params => [ '-U', 'app', '-v', 'VERBOSITY=verbose' ]);

	return "no error, but: $stdout" if $rc == 0;
	return $stderr =~ s/^LOCATION:.*\n?//mgr;
}

# A session of the application on a node
sub app_session
{
	my ($self, $node) = @_;

	return $node->background_psql(
		'postgres',
		on_error_stop => 0,
		extra_params => [ '-U', 'app' ]);
}

# The node that has the records of a tenant
sub owner_of
{
	my ($self, $tenant, $table) = @_;
	my $port = $self->on_coordinator(
		"SELECT nodeport FROM citus_shards WHERE shardid = get_shard_id_for_distribution_column('payment', '$tenant')"
	);

	return first { $_->port == $port } $self->nodes;
}

# Tenants that a node has, as many as are wanted
sub tenants_of
{
	my ($self, $node, $count) = @_;
	my $port = $node->port;

	return split /\n/, $self->on_coordinator(
		"SELECT tenant FROM (SELECT 'tenant-' || n AS tenant FROM generate_series(1, 1000) AS n) AS t
		 JOIN citus_shards ON shardid = get_shard_id_for_distribution_column('payment', tenant)
		 WHERE nodeport = $port LIMIT $count");
}

# Move the shards of a tenant, those of its payments and of its records, to another
# node, unless they are there.  Moving is tried again where it meets writers who hold
# what it needs, and need what it holds.
sub move_tenant
{
	my ($self, $tenant, $to, $mode) = @_;

	for (1 .. 100)
	{
		return if $self->owner_of($tenant) == $to;

		my ($rc, $stdout, $stderr) = $self->coordinator->psql('postgres',
			$self->move_sql($tenant, $to, $mode));
		die $stderr if $rc != 0 && $stderr !~ /distributed deadlock/;
	}
	die "$tenant cannot be moved";
}

# The statement that does this
sub move_sql
{
	my ($self, $tenant, $to, $mode) = @_;
	my $addresses = join ', ',
	  map { $self->address($_) } $self->owner_of($tenant), $to;

	$mode //= 'force_logical';
	return
	  "SELECT citus_move_shard_placement(get_shard_id_for_distribution_column('payment', '$tenant'), $addresses, '$mode')";
}

#
# Clients
#

# Start clients, each of which makes all requests in an order of its own and prints
# what it was answered.  A client is a psql that is started again whenever it loses
# its connection, and then begins anew.  These must be given:
#
# request: a script that makes one request, such as $begin_and_finish
# requests: what they are about, each as "tenant key"
# count: how many clients; they are dealt out over all nodes
#
# "before" may be SQL that each of them runs first.
sub start_clients
{
	my ($self, %options) = @_;
	my $folder = PostgreSQL::Test::Utils::tempdir();
	my @nodes = $self->nodes;
	my @clients;

	# what was not answered is asked for again, but not for ever
	append_to_file("$folder/request.sql", <<"PSQL");
\\set answered false
\\set receipt none
$options{request}
\\if :answered
\\echo :tenant :key :receipt
\\else
SELECT :attempt + 1 AS attempt, :attempt < 400 AS go_on FROM pg_sleep(0.05 * random()) \\gset
\\if :go_on
\\ir request.sql
\\endif
\\endif
PSQL
	foreach my $number (1 .. $options{count})
	{
		my $node = $nodes[ $number % @nodes ];
		my $script = "$folder/client-$number.sql";
		my $log = "$folder/client-$number";

		append_to_file($script, ($options{before} // '') . "\n");
		foreach my $request (shuffle @{ $options{requests} })
		{
			my ($tenant, $key) = split / /, $request;

			append_to_file($script, <<"PSQL");
\\set tenant '$tenant'
\\set key '$key'
\\set attempt 1
\\ir request.sql
PSQL
		}
		push @clients,
		  {
			log => $log,
			run => IPC::Run::start(
				[
					'timeout',
					5 * $PostgreSQL::Test::Utils::timeout_default,
					'sh',
					'-c',
					'until psql "$@"; do [ $? = 2 ] || exit 1; sleep 0.1; done',
					'psql',
					'-XAtq',
					'-v',
					'VERBOSITY=verbose',
					'-f',
					$script,
					$node->connstr('postgres') . ' user=app'
				],
				'<', \'', '>', "$log.out", '2>', "$log.err")
		  };
	}
	return \@clients;
}

# Wait for clients, and get the answers that they got: a hash that has, for each
# request, the receipts that were ever answered, which should be one.
sub answers_of
{
	my ($self, $clients) = @_;
	my %answers;

	foreach my $client (@$clients)
	{
		Test::More::diag("a client did not end well:\n"
			  . substr(slurp_file("$client->{log}.err"), -2000))
		  unless $client->{run}->finish;
		foreach my $line (split /\n/, slurp_file("$client->{log}.out"))
		{
			my ($tenant, $key, $receipt) = split / /, $line;

			$answers{"$tenant $key"}{$receipt}++;
		}
	}
	return \%answers;
}

# The SQLSTATEs of the errors that clients got, but for those that say that the
# request should be made again.
sub surprises_of
{
	my ($self, $clients) = @_;
	my %surprises;

	foreach my $client (@$clients)
	{
		foreach (slurp_file("$client->{log}.err") =~ /^.*(?:ERROR|FATAL): .*$/mg)
		{
			$surprises{s/^psql:[^ ]* //r}++ unless /: +(40001|40P01|25P02): /;
		}
	}
	return join "\n", sort keys %surprises;
}

# Test that requests, each as "tenant key", have had exactly one effect each, which
# has a record with that answer; and that nobody was ever answered anything else, if
# answers are given.
sub effects_are
{
	my ($self, $requests, $answers, $test) = @_;
	my @payments = sort split /\n/,
	  $self->on_coordinator(
		"SELECT concat_ws(' ', tenant, key, receipt) FROM payment");
	my @records = sort split /\n/, $self->on_coordinator(
		"SELECT concat_ws(' ', tenant, key, response->>'receipt') FROM $self->{schema}.idempotency_key
		 WHERE state = 'completed'");

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	Test::More::is_deeply([ map { s/ [^ ]+$//r } @payments ],
		[ sort @$requests ], "$test: one payment for each request");
	Test::More::is_deeply(\@records, \@payments,
		"$test: one record for each payment, with its answer");
	Test::More::is_deeply(
		[
			sort map { my $request = $_; map { "$request $_" } keys %{ $answers->{$request} } }
			  keys %$answers
		],
		\@payments,
		"$test: all answers are about these payments") if defined $answers;
	Test::More::is_deeply(
		[
			$self->everywhere(
				"SELECT pg_relation_size('$self->{schema}.idempotency_key')")
		],
		[ map { 0 } $self->nodes ],
		"$test: no record is where Citus does not look");
	return;
}

# Wait until no node has a prepared transaction any more, as after a crash, when
# Citus has to find out what became of them.
sub wait_for_recovery
{
	my ($self) = @_;

	foreach my $node ($self->nodes)
	{
		$node->poll_query_until('postgres',
			'SELECT count(*) = 0 FROM pg_prepared_xacts')
		  or die 'prepared transactions are not resolved';
	}
	return;
}

sub stop
{
	my ($self) = @_;

	$_->stop foreach $self->nodes;
	return;
}

# Take away payments and records.
sub forget_everything
{
	my ($self) = @_;

	$self->on_coordinator(
		"DELETE FROM payment; DELETE FROM $self->{schema}.idempotency_key");
	return;
}

1;
