/*
 * Main.java: pays by Payments.java, and checks each promise.
 *
 * DATABASE_URL names a database with the extension and the tables of tables.sql,
 * anew.  A line for each promise says whether it was kept; the first that was not
 * ends the program with status 1.
 */

import java.net.URI;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.SQLException;

public final class Main {

    private static final String BODY =
        "{\"account\": \"zo\u00eb\", \"amount\": 20, \"invoice\": 9007199254740993}";

    private final Connection service = connect();
    private final Connection other = connect();
    private final Connection observer = connect();

    private Main() throws SQLException {
        observer.setAutoCommit(true);
    }

    public static void main(String[] arguments) throws SQLException {
        var main = new Main();
        promise("a payment is made once, and committed with its answer", main::paysOnce);
        promise("a repeat gets the same bytes, and pays nothing", main::replays);
        promise("a malformed key or body is answered with 400", main::refusesMalformed);
        promise("another request under the key is answered with 422", main::refusesMismatch);
        promise("a request in flight is answered with 409 and Retry-After", main::tellsInFlight);
        promise("a commit without finish is refused, and leaves no row", main::cannotForgetFinish);
        promise("a 402 is kept, and its rows are not", main::keepsRefusal);
        promise("an answer whose commit fails is not given", main::reportsFailedCommit);
        promise("an answer whose error was swallowed is not given", main::reportsSwallowedError);
        promise("an answer that cannot be kept is not given", main::reportsFailedFinish);
        promise("a connection lost in COMMIT is an error, and a repeat pays once", main::losesConnection);
    }

    private void paysOnce() throws SQLException {
        var answer = Payments.pay(service, "key-1", BODY);
        expect(201, answer.status());
        expect("{\"account\" : \"zo\u00eb\", \"paid\" : 20}", answer.body());
        expect("payments 1, balance 80", state());
    }

    private void replays() throws SQLException {
        var spelledAnew = "{\"invoice\":9007199254740993,\"amount\":20.0,\"account\":\"zo\\u00eb\"}";
        expect(Payments.pay(service, "key-1", BODY), Payments.pay(service, "key-1", spelledAnew));
        expect("{\"account\" : \"zo\u00eb\", \"paid\" : 20}",
            Payments.pay(service, "key-1", spelledAnew).body());
        expect("payments 1, balance 80", state());
    }

    private void refusesMalformed() throws SQLException {
        expect(400, Payments.pay(service, "", BODY).status());
        expect(400, Payments.pay(service, "key-0", "{\"account\": \"zo").status());
        expect(400, Payments.pay(service, "key-0", "{\"account\": \"\\u0000\"}").status());
    }

    /** Pairs of numbers that a parser of JSON with 64 bits for a number makes one. */
    private void refusesMismatch() throws SQLException {
        expect(422, Payments.pay(service, "key-1", BODY.replace("993", "992")).status());
        expect(422, Payments.pay(service, "key-1", BODY.replace("20", "20.00000000000000000001")).status());
        expect("payments 1, balance 80", state());
    }

    private void tellsInFlight() throws SQLException {
        var body = request(10, 2);
        Payments.begin(other, "key-2", body);
        var answer = Payments.pay(service, "key-2", body);
        expect(409, answer.status());
        expect(true, answer.retryAfter() >= 1);
        expect("payments 1, balance 80", state());

        other.rollback();
        expect(201, Payments.pay(service, "key-2", body).status());
        expect("payments 2, balance 70", state());
    }

    private void cannotForgetFinish() throws SQLException {
        var body = request(10, 3);
        Payments.begin(service, "key-3", body);
        Payments.work(service, body);
        expect("ID006", errorOf(() -> Payments.commit(service)));
        expect("payments 2, balance 70", state());
        expect(null, whatIsKnownOf("key-3"));

        expect(201, Payments.pay(service, "key-3", body).status());
        expect("payments 3, balance 60", state());
    }

    private void keepsRefusal() throws SQLException {
        var body = request(900, 4);
        var answer = Payments.pay(service, "key-4", body);
        expect(402, answer.status());
        expect("payments 3, balance 60", state());

        query("UPDATE accounts SET balance = balance + 1000 RETURNING id");
        expect(answer, Payments.pay(service, "key-4", body));
        expect("payments 3, balance 1060", state());
    }

    /** Another key pays an invoice again, and the deferred constraint fails in COMMIT. */
    private void reportsFailedCommit() throws SQLException {
        expect("23505", errorOf(() -> Payments.pay(service, "key-5", BODY)));
        expect("payments 3, balance 1060", state());
        expect(null, whatIsKnownOf("key-5"));
        expect(201, Payments.pay(service, "key-1", BODY).status());
    }

    private void reportsSwallowedError() throws SQLException {
        var body = request(10, 6);
        Payments.begin(service, "key-6", body);
        Payments.finish(service, "key-6", Payments.work(service, body));
        try (var statement = service.createStatement()) {
            statement.execute("INSERT INTO audit_log_that_is_missing VALUES (1)");
        } catch (SQLException swallowed) {
            expect("42P01", swallowed.getSQLState());
        }
        expect("25P02", errorOf(() -> Payments.commit(service)));
        service.rollback();
        expect("payments 3, balance 1060", state());
        expect(null, whatIsKnownOf("key-6"));
    }

    private void reportsFailedFinish() throws SQLException {
        expect("ID007", errorOf(() -> Payments.pay(service, "key-7", request(10, 14))));
        expect("payments 3, balance 1060", state());
        expect(null, whatIsKnownOf("key-7"));
    }

    private void losesConnection() throws SQLException {
        var body = request(10, 13);
        expect(true, errorOf(() -> Payments.pay(service, "key-8", body)) != null);
        expect("payments 3, balance 1060", state());

        expect(201, Payments.pay(other, "key-8", body).status());
        expect("payments 4, balance 1050", state());
    }

    private static String request(int amount, int invoice) {
        return "{\"account\": \"zo\u00eb\", \"amount\": %d, \"invoice\": %d}".formatted(amount, invoice);
    }

    private String state() throws SQLException {
        return query("""
            SELECT format('payments %s, balance %s', (SELECT count(*) FROM payments), balance)
            FROM accounts""");
    }

    private String whatIsKnownOf(String key) throws SQLException {
        return query("""
            SELECT outcome
            FROM idempotency.idempotency_replay('acme', 'payments.create', '%s')""".formatted(key));
    }

    private String query(String sql) throws SQLException {
        try (var statement = observer.createStatement(); var row = statement.executeQuery(sql)) {
            row.next();
            return row.getString(1);
        }
    }

    private static Connection connect() throws SQLException {
        var url = URI.create(System.getenv("DATABASE_URL"));
        var connection = DriverManager.getConnection("jdbc:postgresql://%s:%d%s?user=%s".formatted(
            url.getHost(), url.getPort(), url.getPath(), url.getUserInfo()));
        connection.setAutoCommit(false);
        return connection;
    }

    /** What can be checked, or fail. */
    private interface Step {
        void run() throws SQLException;
    }

    private static void promise(String what, Step step) {
        try {
            step.run();
            System.out.println("ok: " + what);
        } catch (AssertionError | SQLException error) {
            System.out.println("failed: " + what + ": " + error.getMessage());
            System.exit(1);
        }
    }

    private static void expect(Object expected, Object found) {
        if (expected == null ? found != null : !expected.equals(found))
            throw new AssertionError("expected " + expected + ", found " + found);
    }

    /** The SQLSTATE that a step fails with. */
    private static String errorOf(Step step) {
        try {
            step.run();
            return null;
        } catch (SQLException error) {
            return error.getSQLState();
        }
    }
}
