<?php

/**
 * A payment that a client can repeat, with PDO.
 *
 * begin, the work and finish are one transaction, so the payment and its answer are
 * committed together or not at all.  A repeat is answered by begin, with what was
 * stored.
 *
 * Two habits lose something here.  After a commit() that failed there is no
 * transaction, and a rollBack() throws "There is no active transaction" over the error
 * that tells what was wrong; on a lost connection it throws as well.  And bytes that are
 * bound as a string end at their first NUL, and their backslashes are read: they are
 * bound as PDO::PARAM_LOB.
 *
 * commit() returns true also for a transaction that had failed, which the server
 * rolls back; nothing in PDO tells.  Nothing stands between finish and commit(), and
 * finish itself fails in a transaction that has.
 */

declare(strict_types=1);

/** What to answer a client. */
final class Answer
{
    /**
     * @param int    $status     the HTTP status
     * @param string $body       a JSON text, or bytes of another type
     * @param string $type       the Content-Type
     * @param int    $retryAfter the seconds for the header Retry-After, or 0 for no such header
     */
    public function __construct(
        public readonly int $status,
        public readonly string $body,
        public readonly string $type = Payments::JSON,
        public readonly int $retryAfter = 0,
    ) {
    }
}

final class Payments
{
    public const JSON = 'application/json';

    /** Whose data it is; a service takes it from the log-in, never from the body. */
    private const TENANT = 'acme';
    private const ACTION = 'payments.create';

    private const CHECK_VIOLATION = '23514';

    /**
     * Pays once for each key, and answers every repeat with the first answer.
     *
     * @param PDO    $db   throws exceptions, and has no transaction open
     * @param string $key  what the client sent as Idempotency-Key
     * @param string $body the text of the request as it came, not what json_decode
     *                     made of it: numbers are rounded, and two requests would be one
     *
     * @return Answer which is committed if its status is 201 or 402
     *
     * @throws PDOException after which nothing is kept: answer 500, or 503 where a
     *                      repeat may help (40001, 40P01, a lost connection)
     */
    public static function pay(PDO $db, string $key, string $body): Answer
    {
        $db->beginTransaction();
        try {
            $answer = self::begin($db, $key, $body);
            if ($answer === null) {
                $answer = self::workOrRefuse($db, $body);
                self::finish($db, $key, $answer);
            }
            $db->commit();
            return $answer;
        } catch (Throwable $error) {
            self::rollBack($db);
            return self::refusal($error) ?? throw $error;
        }
    }

    /** Claims the request, and returns null; or its answer, if it has one. */
    public static function begin(PDO $db, string $key, string $body): ?Answer
    {
        $statement = $db->prepare(<<<'SQL'
            SELECT outcome, status_code, response::text, headers->>'Content-Type', body
            FROM idempotency.idempotency_begin(?, ?, ?, ?)
            SQL);
        $statement->execute([self::TENANT, self::ACTION, $key, $body]);
        [$outcome, $status, $response, $type, $bytes] = $statement->fetch(PDO::FETCH_NUM);
        if ($outcome === 'started') {
            return null;
        }
        return $bytes === null
            ? new Answer($status, $response)
            : new Answer($status, stream_get_contents($bytes), $type);
    }

    /** Pays; the database reads the body, so that numbers stay as they are. */
    public static function work(PDO $db, string $body): Answer
    {
        $db->prepare(<<<'SQL'
            INSERT INTO payments (account, amount, invoice)
            SELECT account, amount, invoice
            FROM jsonb_to_record(?) AS r (account text, amount numeric, invoice bigint)
            SQL)->execute([$body]);
        $account = $db->prepare(<<<'SQL'
            UPDATE accounts SET balance = balance - amount
            FROM jsonb_to_record(?) AS r (account text, amount numeric)
            WHERE id = account
            RETURNING json_build_object('account', account, 'paid', amount)::text
            SQL);
        $account->execute([$body]);
        return new Answer(201, $account->fetchColumn());
    }

    /** Stores the answer: the last statement before commit(). */
    public static function finish(PDO $db, string $key, Answer $answer): void
    {
        $isJson = $answer->type === self::JSON;
        $statement = $db->prepare(<<<'SQL'
            SELECT idempotency.idempotency_finish(
                ?, ?, ?, ?, response => ?, body => ?, headers => jsonb_build_object('Content-Type', ?::text))
            SQL);
        $statement->bindValue(1, self::TENANT);
        $statement->bindValue(2, self::ACTION);
        $statement->bindValue(3, $key);
        $statement->bindValue(4, $answer->status, PDO::PARAM_INT);
        $statement->bindValue(5, $isJson ? $answer->body : null);
        $statement->bindValue(6, $isJson ? null : $answer->body, PDO::PARAM_LOB);
        $statement->bindValue(7, $answer->type);
        $statement->execute();
    }

    /** The SQLSTATE of an error. */
    public static function sqlState(PDOException $error): string
    {
        return $error->errorInfo[0] ?? '';
    }

    /** Pays, or makes an answer to keep of the failure, whose rows are rolled back. */
    private static function workOrRefuse(PDO $db, string $body): Answer
    {
        $db->exec('SAVEPOINT work');
        try {
            return self::work($db, $body);
        } catch (PDOException $error) {
            if (self::sqlState($error) !== self::CHECK_VIOLATION) {
                throw $error;
            }
            $db->exec('ROLLBACK TO SAVEPOINT work');
            return new Answer(402, '{"error": "not enough money"}');
        }
    }

    /** Rolls back what is open, in silence: the first error tells what was wrong. */
    private static function rollBack(PDO $db): void
    {
        try {
            if ($db->inTransaction()) {
                $db->rollBack();
            }
        } catch (PDOException) {
            // the connection is lost, and the transaction with it
        }
    }

    /** The answer to a request that begin refused, or null for any other error. */
    private static function refusal(Throwable $error): ?Answer
    {
        if (!$error instanceof PDOException) {
            return null;
        }
        return match (self::sqlState($error)) {
            'ID001', 'ID002', '22P02', '22P05' => new Answer(400, '{"error": "key or body is malformed"}'),
            'ID003' => new Answer(409, '{"error": "request is in flight"}', retryAfter: self::retryAfter($error)),
            'ID004' => new Answer(422, '{"error": "key was used with a different request"}'),
            'ID005' => new Answer(409, '{"error": "another request was faster"}'),
            default => null,
        };
    }

    /** The seconds that the hint of ID003 names, which PDO has in the text of the error. */
    private static function retryAfter(PDOException $error): int
    {
        return preg_match('/Retry after (\d+) s/', $error->getMessage(), $found) ? (int) $found[1] : 1;
    }
}
