# Pays by Payments.pm, and checks each promise.
#
# PGHOST, PGPORT, PGUSER and PGDATABASE name a database with the extension and the
# tables of tables.sql, anew.  A line for each promise says whether it was kept; the
# first that was not ends the program with status 1.

use strict;
use warnings;
use utf8;

use DBI;
use FindBin;
use lib $FindBin::Bin;
use Payments;

binmode STDOUT, ':encoding(UTF-8)';

my $BODY = '{"account": "zoë", "amount": 20, "invoice": 9007199254740993}';

# the service's own handle says nothing of errors, as handles do by default
my $service = DBI->connect('dbi:Pg:', undef, undef, { RaiseError => 0, PrintError => 0 });
my $other = DBI->connect('dbi:Pg:', undef, undef, { RaiseError => 1, PrintError => 0 });
my $observer = DBI->connect('dbi:Pg:', undef, undef, { RaiseError => 1, PrintError => 0 });

sub pay
{
	return Payments::pay($service, @_);
}

sub request
{
	return sprintf '{"account": "zoë", "amount": %d, "invoice": %d}', @_;
}

sub query
{
	my ($sql, @values) = @_;

	return scalar $observer->selectrow_array($sql, undef, @values);
}

sub state_of_things
{
	return query(q{
		SELECT format('payments %s, balance %s', (SELECT count(*) FROM payments), balance)
		FROM accounts
	});
}

sub what_is_known_of
{
	return query(q{
		SELECT coalesce(outcome, 'nothing')
		FROM idempotency.idempotency_replay('acme', 'payments.create', ?)
	}, @_);
}

# The SQLSTATE of the error that something dies with, on a handle
sub error_of
{
	my ($dbh, $code) = @_;

	return 'no error' if eval { $code->(); 1 };
	return Payments::error_of($dbh, $@)->{state};
}

sub expect
{
	my ($expected, $found) = @_;

	die "expected $expected, found $found\n" if $expected ne $found;
}

sub promise
{
	my ($what, $step) = @_;

	if (!eval { $step->(); 1 })
	{
		chomp(my $why = "$@");
		print "failed: $what: $why\n";
		exit 1;
	}
	print "ok: $what\n";
}

promise 'a payment is made once, and committed with its answer', sub {
	my $answer = pay('key-1', $BODY);
	expect 201, $answer->{status};
	expect '{"account" : "zoë", "paid" : 20}', $answer->{body};
	expect 'payments 1, balance 80', state_of_things();
};

promise 'a repeat gets the same bytes, and pays nothing', sub {
	my $answer = pay('key-1', '{"invoice":9007199254740993,"amount":20.0,"account":"zo\u00eb"}');
	expect 201, $answer->{status};
	expect '{"account" : "zoë", "paid" : 20}', $answer->{body};
	expect 'payments 1, balance 80', state_of_things();
};

promise 'a malformed key or body is answered with 400', sub {
	expect 400, pay('', $BODY)->{status};
	expect 400, pay('key-0', '{"account": "zo')->{status};
	expect 400, pay('key-0', '{"account": "\u0000"}')->{status};
};

# pairs of numbers that a parser of JSON with 64 bits for a number makes one
promise 'another request under the key is answered with 422', sub {
	expect 422, pay('key-1', $BODY =~ s/993/992/r)->{status};
	expect 422, pay('key-1', $BODY =~ s/20/20.00000000000000000001/r)->{status};
	expect 'payments 1, balance 80', state_of_things();
};

promise 'a request in flight is answered with 409 and Retry-After', sub {
	my $body = request(10, 2);
	$other->begin_work;
	Payments::begin($other, 'key-2', $body);
	my $answer = pay('key-2', $body);
	expect 409, $answer->{status};
	expect 1, $answer->{retry_after} >= 1;
	expect 'payments 1, balance 80', state_of_things();

	$other->rollback;
	expect 201, pay('key-2', $body)->{status};
	expect 'payments 2, balance 70', state_of_things();
};

promise 'a commit without finish is refused, and leaves no row', sub {
	my $body = request(10, 3);
	$other->begin_work;
	Payments::begin($other, 'key-3', $body);
	Payments::work($other, $body);
	expect 'ID006', error_of($other, sub { Payments::commit($other) });
	$other->rollback;
	expect 'payments 2, balance 70', state_of_things();
	expect 'nothing', what_is_known_of('key-3');

	expect 201, pay('key-3', $body)->{status};
	expect 'payments 3, balance 60', state_of_things();
};

promise 'a 402 is kept, and its rows are not', sub {
	my $body = request(900, 4);
	my $first = pay('key-4', $body);
	expect 402, $first->{status};
	expect 'payments 3, balance 60', state_of_things();

	query('UPDATE accounts SET balance = balance + 1000 RETURNING id');
	my $again = pay('key-4', $body);
	expect 402, $again->{status};
	expect $first->{body}, $again->{body};
	expect 'payments 3, balance 1060', state_of_things();
};

# another key pays an invoice again, and the deferred constraint fails in COMMIT
promise 'an answer whose commit fails is not given', sub {
	expect '23505', error_of($service, sub { pay('key-5', $BODY) });
	expect 'payments 3, balance 1060', state_of_things();
	expect 'nothing', what_is_known_of('key-5');
	expect 201, pay('key-1', $BODY)->{status};
};

promise 'an answer whose error was swallowed is not given', sub {
	my $body = request(10, 6);
	$other->begin_work;
	Payments::begin($other, 'key-6', $body);
	Payments::finish($other, 'key-6', Payments::work($other, $body));
	expect '42P01', error_of($other, sub { $other->do('INSERT INTO audit_log_that_is_missing VALUES (1)') });
	expect '25P02', error_of($other, sub { Payments::commit($other) });
	expect 1, $other->{AutoCommit};
	expect 'payments 3, balance 1060', state_of_things();
	expect 'nothing', what_is_known_of('key-6');
};

promise 'an answer that cannot be kept is not given', sub {
	expect 'ID007', error_of($service, sub { pay('key-7', request(10, 14)) });
	expect 'payments 3, balance 1060', state_of_things();
	expect 'nothing', what_is_known_of('key-7');
};

promise 'bytes are replayed as they were', sub {
	my $bytes = "%PDF\x00\\101\xff\n";
	$other->begin_work;
	Payments::begin($other, 'key-9', $BODY);
	Payments::finish($other, 'key-9', Payments::answer(201, $bytes, type => 'application/pdf'));
	Payments::commit($other);
	my $answer = pay('key-9', $BODY);
	expect 'application/pdf', $answer->{type};
	expect unpack('H*', $bytes), unpack('H*', $answer->{body});
};

promise 'a connection lost in COMMIT is an error, and a repeat pays once', sub {
	my $body = request(10, 13);
	eval { pay('key-8', $body) };
	expect 'Payments::Error', ref $@;
	expect 'payments 3, balance 1060', state_of_things();

	$service = $other;
	expect 201, pay('key-8', $body)->{status};
	expect 'payments 4, balance 1050', state_of_things();
};
