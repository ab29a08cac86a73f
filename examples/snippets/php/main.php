<?php

/**
 * Pays by Payments.php, and checks each promise.
 *
 * PGHOST, PGPORT, PGUSER and PGDATABASE name a database with the extension and the
 * tables of tables.sql, anew.  A line for each promise says whether it was kept; the
 * first that was not ends the program with status 1.
 */

declare(strict_types=1);

require __DIR__ . '/Payments.php';

const BODY = '{"account": "zoë", "amount": 20, "invoice": 9007199254740993}';

function connect(): PDO
{
    return new PDO('pgsql:', options: [PDO::ATTR_ERRMODE => PDO::ERRMODE_EXCEPTION]);
}

$service = connect();
$other = connect();
$observer = connect();

function pay(string $key, string $body): Answer
{
    return Payments::pay($GLOBALS['service'], $key, $body);
}

function request(int $amount, int $invoice): string
{
    return sprintf('{"account": "zoë", "amount": %d, "invoice": %d}', $amount, $invoice);
}

function query(string $sql, string ...$values): mixed
{
    $statement = $GLOBALS['observer']->prepare($sql);
    $statement->execute($values);
    return $statement->fetchColumn();
}

function state(): string
{
    return query(<<<'SQL'
        SELECT format('payments %s, balance %s', (SELECT count(*) FROM payments), balance)
        FROM accounts
        SQL);
}

function whatIsKnownOf(string $key): ?string
{
    return query("SELECT outcome FROM idempotency.idempotency_replay('acme', 'payments.create', ?)", $key);
}

/** The error that a function fails with. */
function failureOf(callable $function): PDOException
{
    try {
        $function();
    } catch (PDOException $error) {
        return $error;
    }
    throw new UnexpectedValueException('expected an error, found none');
}

/** The SQLSTATE of that error. */
function errorOf(callable $function): string
{
    $error = failureOf($function);
    return Payments::sqlState($error) ?: $error->getMessage();
}

function expect(mixed $expected, mixed $found): void
{
    if ($expected !== $found) {
        throw new UnexpectedValueException(
            'expected ' . var_export($expected, true) . ', found ' . var_export($found, true)
        );
    }
}

function promise(string $what, callable $step): void
{
    try {
        $step();
        echo "ok: $what\n";
    } catch (Throwable $error) {
        echo "failed: $what: {$error->getMessage()}\n";
        exit(1);
    }
}

promise('a payment is made once, and committed with its answer', function () {
    $answer = pay('key-1', BODY);
    expect(201, $answer->status);
    expect('{"account" : "zoë", "paid" : 20}', $answer->body);
    expect('payments 1, balance 80', state());
});

promise('a repeat gets the same bytes, and pays nothing', function () {
    $answer = pay('key-1', '{"invoice":9007199254740993,"amount":20.0,"account":"zo\u00eb"}');
    expect(201, $answer->status);
    expect('{"account" : "zoë", "paid" : 20}', $answer->body);
    expect('payments 1, balance 80', state());
});

promise('a malformed key or body is answered with 400', function () {
    expect(400, pay('', BODY)->status);
    expect(400, pay('key-0', '{"account": "zo')->status);
    expect(400, pay('key-0', '{"account": "\u0000"}')->status);
});

// pairs of numbers that a parser of JSON with 64 bits for a number makes one
promise('another request under the key is answered with 422', function () {
    expect(422, pay('key-1', str_replace('993', '992', BODY))->status);
    expect(422, pay('key-1', str_replace('20,', '20.00000000000000000001,', BODY))->status);
    expect('payments 1, balance 80', state());
});

promise('a request in flight is answered with 409 and Retry-After', function () use ($other) {
    $body = request(10, 2);
    $other->beginTransaction();
    Payments::begin($other, 'key-2', $body);
    $answer = pay('key-2', $body);
    expect(409, $answer->status);
    expect(true, $answer->retryAfter >= 1);
    expect('payments 1, balance 80', state());

    $other->rollBack();
    expect(201, pay('key-2', $body)->status);
    expect('payments 2, balance 70', state());
});

promise('a commit without finish is refused, and leaves no row', function () use ($service) {
    $body = request(10, 3);
    $service->beginTransaction();
    Payments::begin($service, 'key-3', $body);
    Payments::work($service, $body);
    expect('ID006', errorOf(fn () => $service->commit()));
    expect(false, $service->inTransaction());
    expect('payments 2, balance 70', state());
    expect(null, whatIsKnownOf('key-3'));

    expect(201, pay('key-3', $body)->status);
    expect('payments 3, balance 60', state());
});

promise('a 402 is kept, and its rows are not', function () {
    $body = request(900, 4);
    $first = pay('key-4', $body);
    expect(402, $first->status);
    expect('payments 3, balance 60', state());

    query('UPDATE accounts SET balance = balance + 1000 RETURNING id');
    $again = pay('key-4', $body);
    expect([$first->status, $first->body], [$again->status, $again->body]);
    expect('payments 3, balance 1060', state());
});

// another key pays an invoice again, and the deferred constraint fails in COMMIT
promise('an answer whose commit fails is not given', function () {
    expect('23505', errorOf(fn () => pay('key-5', BODY)));
    expect('payments 3, balance 1060', state());
    expect(null, whatIsKnownOf('key-5'));
    expect(201, pay('key-1', BODY)->status);
});

promise('an answer whose error was swallowed is not given', function () use ($service) {
    $body = request(10, 6);
    $service->beginTransaction();
    Payments::begin($service, 'key-6', $body);
    $answer = Payments::work($service, $body);
    expect('42P01', errorOf(fn () => $service->exec('INSERT INTO audit_log_that_is_missing VALUES (1)')));
    expect('25P02', errorOf(fn () => Payments::finish($service, 'key-6', $answer)));
    $service->rollBack();
    expect('payments 3, balance 1060', state());
    expect(null, whatIsKnownOf('key-6'));
});

promise('an answer that cannot be kept is not given', function () {
    expect('ID007', errorOf(fn () => pay('key-7', request(10, 14))));
    expect('payments 3, balance 1060', state());
    expect(null, whatIsKnownOf('key-7'));
});

promise('bytes are replayed as they were', function () use ($service) {
    $bytes = "%PDF\x00\\101\xff\n";
    $service->beginTransaction();
    Payments::begin($service, 'key-9', BODY);
    Payments::finish($service, 'key-9', new Answer(201, $bytes, 'application/pdf'));
    $service->commit();
    $answer = pay('key-9', BODY);
    expect('application/pdf', $answer->type);
    expect(bin2hex($bytes), bin2hex($answer->body));
});

promise('a connection lost in COMMIT is an error, and a repeat pays once', function () use ($other) {
    $body = request(10, 13);
    $error = failureOf(fn () => pay('key-8', $body));
    expect(true, str_contains($error->getMessage(), 'terminating connection'));
    expect('payments 3, balance 1060', state());

    $GLOBALS['service'] = $other;
    expect(201, pay('key-8', $body)->status);
    expect('payments 4, balance 1050', state());
});
