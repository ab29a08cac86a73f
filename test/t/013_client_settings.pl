# A client that sends settings of the administrator's with its connection
# options does not get them, whether the library is preloaded or not: it is
# turned away before it could call anything.  What anyone may set it gets.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_server('main', preload => 0);
$node->start;
create_shop($node);
$node->safe_psql(
	'postgres', q{
	CREATE ROLE app LOGIN;
	GRANT EXECUTE ON FUNCTION idempotency_begin, idempotency_finish,
		idempotency_replay TO app;
	ALTER ROLE app SET idempotency.tenant = 'acme';
	BEGIN;
	SELECT idempotency_begin('other', 'a', 'k');
	SELECT idempotency_finish('other', 'a', 'k', 200, '"of another tenant"');
	SELECT idempotency_begin('acme', 'a', 'k');
	SELECT idempotency_finish('acme', 'a', 'k', 200, '"own"');
	COMMIT});

# What a role is told that calls replay for a tenant; options go with the
# connection.  A session that is turned away is gone before it could read a
# statement, so this one is an argument.
sub replay_as
{
	my ($role, $tenant, $options) = @_;
	my ($rc, $stdout, $stderr) = $node->psql(
		'postgres', '',
		extra_params => [
			'-c', "SELECT response FROM idempotency_replay('$tenant', 'a', 'k')"
		],
		connstr => $node->connstr('postgres')
		  . " user=$role options='$options'");

	return $rc == 0 ? $stdout : $stderr;
}

foreach my $preload (0, 1)
{
	my $how = $preload ? 'preloaded' : 'not preloaded';

	if ($preload)
	{
		$node->append_conf('postgresql.conf',
			"shared_preload_libraries = 'idempotency'");
		$node->restart;
	}

	# the pin works at all
	is(replay_as('app', 'acme', ''), '"own"', "$how: a pinned role");
	like(replay_as('app', 'other', ''),
		qr/pins calls to tenant "acme"/, "$how: and another tenant");

	# neither another tenant, nor none, nor the same one again
	foreach my $value ('other', '', 'acme')
	{
		foreach my $tenant ('other', 'acme')
		{
			like(
				replay_as('app', $tenant, "-c idempotency.tenant=$value"),
				qr/permission denied to set parameter "idempotency\.tenant"/,
				"$how: tenant \"$value\" is refused, for a call to $tenant");
		}
	}
	like(
		replay_as('app', 'acme', "-c IDEMPOTENCY.Tenant=other"),
		qr/permission denied to set parameter "idempotency\.tenant"/i,
		"$how: in any spelling");

	# so are the other settings of the administrator's
	foreach my $setting (
		'max_ttl=100h', 'min_ttl=1s', 'key_format=slug',
		'key_min_length=2', 'key_max_length=10',
		'max_response_size=10MB', 'commit_guard=off',
		'sweep_batch_size=1')
	{
		my ($name) = split /=/, $setting;

		like(
			replay_as('app', 'acme', "-c idempotency.$setting"),
			qr/permission denied to set parameter "idempotency\.$name"/,
			"$how: $name is refused");
	}

	# those of an application are not, and the pin is still there
	foreach my $setting ('ttl=1h', 'error_ttl=10s', 'wait=1s',
		'retry_after=2s', 'retryable_status=503')
	{
		is(replay_as('app', 'acme', "-c idempotency.$setting"),
			'"own"', "$how: $setting is accepted");
		like(
			replay_as('app', 'other', "-c idempotency.$setting"),
			qr/pins calls to tenant "acme"/,
			"$how: and does not pull the pin");
	}
}

# A session that was turned away has done nothing
is($node->safe_psql('postgres', 'SELECT count(*) FROM idempotency_key'),
	'2', 'no record came or went');

done_testing();
