# A payment that a client can repeat, with DBD::Pg.
#
# begin, the work and finish are one transaction, so the payment and its answer are
# committed together or not at all.  A repeat is answered by begin, with what was
# stored.
#
# Errors pass here without a word in three ways.  A handle without RaiseError only
# returns false.  $dbh->commit returns true for a transaction that had failed, which
# the server rolls back.  And $dbh->rollback clears $dbh->state.  So RaiseError is
# switched on here, COMMIT is a statement whose tag is looked at, and the state is
# read before the rollback.
#
# Text is characters and not bytes: a body is decoded from UTF-8 before it is given,
# or every letter beyond ASCII becomes two.  What really is bytes is bound as PG_BYTEA;
# as text it would end at its first NUL, and its backslashes would be read.

package Payments;

use strict;
use warnings;

use DBD::Pg qw(:pg_types);

# Whose data it is; a service takes it from the log-in, never from the body
my $TENANT = 'acme';
my $ACTION = 'payments.create';

my $CHECK_VIOLATION = '23514';
my $IN_FAILED_TRANSACTION = '25P02';

# An answer is a hash: status, body, type, which is the Content-Type, and retry_after,
# the seconds for the header Retry-After if there is to be one.
sub answer
{
	my ($status, $body, %more) = @_;

	return { status => $status, body => $body, type => 'application/json', %more };
}

# pay($dbh, $key, $body): pays once for each key, and answers every repeat with the
# first answer.
#
# No transaction may be open.  The key is what the client sent as Idempotency-Key,
# and the body the text of the request as it came, not what a parser made of it:
# parsers round numbers, and two requests would be one.  The answer is committed if
# its status is 201 or 402.  Dies with a Payments::Error after which nothing is kept:
# answer 500, or 503 where a repeat may help (40001, 40P01, a lost connection).
sub pay
{
	my ($dbh, $key, $body) = @_;
	my $answer;

	local @$dbh{qw(RaiseError PrintError)} = (1, 0);
	$dbh->begin_work;
	return $answer if eval {
		$answer = begin($dbh, $key, $body);
		if (!$answer)
		{
			$answer = work_or_refuse($dbh, $body);
			finish($dbh, $key, $answer);
		}
		commit($dbh);
		1;
	};
	my $error = error_of($dbh, $@);
	eval { $dbh->rollback } unless $dbh->{AutoCommit};    # the first error tells what was wrong
	return refusal($error) || die $error;
}

# Claims the request, and returns nothing; or its answer, if it has one
sub begin
{
	my ($dbh, $key, $body) = @_;

	my ($outcome, $status, $response, $type, $bytes) = $dbh->selectrow_array(q{
		SELECT outcome, status_code, response::text, headers->>'Content-Type', body
		FROM idempotency.idempotency_begin(?, ?, ?, ?)
	}, undef, $TENANT, $ACTION, $key, $body);
	return if $outcome eq 'started';
	return defined $bytes ? answer($status, $bytes, type => $type) : answer($status, $response);
}

# Pays; the database reads the body, so that numbers stay as they are
sub work
{
	my ($dbh, $body) = @_;

	$dbh->do(q{
		INSERT INTO payments (account, amount, invoice)
		SELECT account, amount, invoice
		FROM jsonb_to_record(?) AS r (account text, amount numeric, invoice bigint)
	}, undef, $body);
	my ($response) = $dbh->selectrow_array(q{
		UPDATE accounts SET balance = balance - amount
		FROM jsonb_to_record(?) AS r (account text, amount numeric)
		WHERE id = account
		RETURNING json_build_object('account', account, 'paid', amount)::text
	}, undef, $body);
	return answer(201, $response);
}

# Pays, or makes an answer to keep of the failure, whose rows are rolled back
sub work_or_refuse
{
	my ($dbh, $body) = @_;
	my $answer;

	$dbh->pg_savepoint('work');
	return $answer if eval { $answer = work($dbh, $body); 1 };
	die $@ if $dbh->state ne $CHECK_VIOLATION;
	$dbh->pg_rollback_to('work');
	return answer(402, '{"error": "not enough money"}');
}

# Stores the answer: the last statement before COMMIT
sub finish
{
	my ($dbh, $key, $answer) = @_;
	my $is_json = $answer->{type} eq 'application/json';

	my $finish = $dbh->prepare(q{
		SELECT idempotency.idempotency_finish(
			?, ?, ?, ?, response => ?, body => ?, headers => jsonb_build_object('Content-Type', ?::text))
	});
	$finish->bind_param(1, $TENANT);
	$finish->bind_param(2, $ACTION);
	$finish->bind_param(3, $key);
	$finish->bind_param(4, $answer->{status});
	$finish->bind_param(5, $is_json ? $answer->{body} : undef);
	$finish->bind_param(6, $is_json ? undef : $answer->{body}, { pg_type => PG_BYTEA });
	$finish->bind_param(7, $answer->{type});
	$finish->execute;
	$finish->finish;
}

# Commits; a transaction that failed, which COMMIT rolls back, is an error.  DBD::Pg
# notices that the transaction is over, as it does after $dbh->commit.
sub commit
{
	my ($dbh) = @_;

	my $commit = $dbh->prepare('COMMIT');
	$commit->execute;
	return if $commit->{pg_cmd_status} eq 'COMMIT';
	die Payments::Error->new($IN_FAILED_TRANSACTION, 'the transaction has failed');
}

# What went wrong, as long as the handle knows
sub error_of
{
	my ($dbh, $error) = @_;

	return $error if ref $error;
	return Payments::Error->new($dbh->state, $error, $dbh->pg_error_field('hint'));
}

# The answer to a request that begin refused, or nothing for any other error
sub refusal
{
	my ($error) = @_;
	my $state = $error->{state};

	return answer(400, '{"error": "key or body is malformed"}') if $state =~ /^(ID001|ID002|22P02|22P05)$/;
	return answer(409, '{"error": "request is in flight"}', retry_after => retry_after($error->{hint}))
		if $state eq 'ID003';
	return answer(422, '{"error": "key was used with a different request"}') if $state eq 'ID004';
	return answer(409, '{"error": "another request was faster"}') if $state eq 'ID005';
	return;
}

# The seconds that the hint of ID003 names
sub retry_after
{
	my ($hint) = @_;

	return $hint =~ /(\d+)/ ? $1 : 1;
}

# An error of the database: state, which is its SQLSTATE, message and hint
package Payments::Error;

use overload '""' => sub { $_[0]->{message} }, fallback => 1;

sub new
{
	my ($class, $state, $message, $hint) = @_;

	return bless { state => $state, message => $message, hint => $hint }, $class;
}

1;
