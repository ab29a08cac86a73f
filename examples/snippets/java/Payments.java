/*
 * Payments.java: a payment that a client can repeat, with the JDBC driver.
 *
 * begin, the work and finish are one transaction, so the payment and its answer
 * are committed together or not at all.  A repeat is answered by begin, with the
 * text that was stored.
 *
 * The server answers the COMMIT of a failed transaction with ROLLBACK, and this
 * driver returns from commit() as if nothing were.  Who swallows an error between
 * finish and COMMIT would tell the client 201, and nothing would be stored.  So
 * nothing stands between the two, and commit looks at the transaction first.
 *
 * The driver sends strings as varchar, and no function takes that for jsonb or
 * json: hence the casts.
 */

import java.sql.Connection;
import java.sql.SQLException;
import java.util.Optional;
import java.util.regex.Pattern;
import org.postgresql.core.TransactionState;
import org.postgresql.jdbc.PgConnection;
import org.postgresql.util.PSQLException;

public final class Payments {

    /** Whose data it is; a service takes it from the log-in, never from the body. */
    private static final String TENANT = "acme";

    private static final String ACTION = "payments.create";

    private static final String CHECK_VIOLATION = "23514";

    private static final String IN_FAILED_TRANSACTION = "25P02";

    private static final Pattern SECONDS = Pattern.compile("\\d+");

    private Payments() {
    }

    /**
     * What to answer a client.
     *
     * @param status the HTTP status
     * @param body a JSON text
     * @param retryAfter the seconds for the header Retry-After, or 0 for no such header
     */
    public record Answer(int status, String body, int retryAfter) {

        public Answer(int status, String body) {
            this(status, body, 0);
        }
    }

    /**
     * Pays once for each key, and answers every repeat with the first answer.
     *
     * @param connection has auto-commit off, and no transaction open; has none open
     *     afterwards
     * @param key what the client sent as Idempotency-Key
     * @param body the text of the request as it came, not what a parser made of it:
     *     parsers round numbers, and two requests would be one
     * @return the answer, which is committed if its status is 201 or 402
     * @throws SQLException after which nothing is kept: answer 500, or 503 where a
     *     repeat may help (40001, 40P01, 08xxx)
     */
    public static Answer pay(Connection connection, String key, String body) throws SQLException {
        try {
            var known = begin(connection, key, body);
            if (known.isPresent()) {
                commit(connection);
                return known.get();
            }
            var answer = workOrRefuse(connection, body);
            finish(connection, key, answer);
            commit(connection);
            return answer;
        } catch (SQLException error) {
            rollBack(connection, error);
            return refusal(error);
        }
    }

    /** Claims the request; or returns its answer, if it has one. */
    public static Optional<Answer> begin(Connection connection, String key, String body)
            throws SQLException {
        try (var statement = connection.prepareStatement("""
                SELECT outcome, status_code, response::text
                FROM idempotency.idempotency_begin(?, ?, ?, ?::jsonb)""")) {
            statement.setString(1, TENANT);
            statement.setString(2, ACTION);
            statement.setString(3, key);
            statement.setString(4, body);
            var row = statement.executeQuery();
            row.next();
            if (row.getString(1).equals("started"))
                return Optional.empty();
            return Optional.of(new Answer(row.getInt(2), row.getString(3)));
        }
    }

    /** Pays; the database reads the body, so that numbers stay as they are. */
    public static Answer work(Connection connection, String body) throws SQLException {
        try (var payment = connection.prepareStatement("""
                INSERT INTO payments (account, amount, invoice)
                SELECT account, amount, invoice
                FROM jsonb_to_record(?::jsonb) AS r (account text, amount numeric, invoice bigint)""");
             var account = connection.prepareStatement("""
                UPDATE accounts SET balance = balance - amount
                FROM jsonb_to_record(?::jsonb) AS r (account text, amount numeric)
                WHERE id = account
                RETURNING json_build_object('account', account, 'paid', amount)::text""")) {
            payment.setString(1, body);
            payment.executeUpdate();
            account.setString(1, body);
            var row = account.executeQuery();
            row.next();
            return new Answer(201, row.getString(1));
        }
    }

    /** Pays, or makes an answer to keep of the failure, whose rows are rolled back. */
    private static Answer workOrRefuse(Connection connection, String body) throws SQLException {
        var savepoint = connection.setSavepoint();
        try {
            return work(connection, body);
        } catch (SQLException error) {
            if (!CHECK_VIOLATION.equals(error.getSQLState()))
                throw error;
            connection.rollback(savepoint);
            return new Answer(402, "{\"error\": \"not enough money\"}");
        }
    }

    /** Stores the answer: the last statement before {@link #commit}. */
    public static void finish(Connection connection, String key, Answer answer) throws SQLException {
        try (var statement = connection.prepareStatement(
                "SELECT idempotency.idempotency_finish(?, ?, ?, ?, ?::json)")) {
            statement.setString(1, TENANT);
            statement.setString(2, ACTION);
            statement.setString(3, key);
            statement.setInt(4, answer.status());
            statement.setString(5, answer.body());
            statement.execute();
        }
    }

    /** Commits; a transaction that failed, which COMMIT would roll back, is an error. */
    public static void commit(Connection connection) throws SQLException {
        var state = connection.unwrap(PgConnection.class).getTransactionState();
        if (state == TransactionState.FAILED)
            throw new SQLException("the transaction has failed", IN_FAILED_TRANSACTION);
        connection.commit();
    }

    private static void rollBack(Connection connection, SQLException error) {
        try {
            connection.rollback();
        } catch (SQLException another) {
            error.addSuppressed(another);   // the first one tells what was wrong
        }
    }

    /** The answer to a request that begin refused; any other error is thrown again. */
    private static Answer refusal(SQLException error) throws SQLException {
        return switch (String.valueOf(error.getSQLState())) {
            case "ID001", "ID002", "22P02", "22P05" ->
                new Answer(400, "{\"error\": \"key or body is malformed\"}");
            case "ID003" ->
                new Answer(409, "{\"error\": \"request is in flight\"}", retryAfter(error));
            case "ID004" ->
                new Answer(422, "{\"error\": \"key was used with a different request\"}");
            case "ID005" ->
                new Answer(409, "{\"error\": \"another request was faster\"}");
            default -> throw error;
        };
    }

    /** The seconds that the hint of ID003 names. */
    private static int retryAfter(SQLException error) {
        var hint = ((PSQLException) error).getServerErrorMessage().getHint();
        return SECONDS.matcher(hint).results().findFirst()
            .map(found -> Integer.parseInt(found.group())).orElse(1);
    }
}
