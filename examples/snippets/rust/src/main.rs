//! Pays by payments.rs, and checks each promise.
//!
//! DATABASE_URL names a database with the extension and the tables of tables.sql, anew.
//! A line for each promise says whether it was kept; the first that was not ends the
//! program with status 1.

mod payments;

use std::fmt::Debug;
use std::process::exit;

use payments::{begin, finish, pay, work};
use tokio_postgres::{Client, Error, NoTls};

const BODY: &str = r#"{"account": "zoë", "amount": 20, "invoice": 9007199254740993}"#;
const PAID_20: &str = r#"{"account" : "zoë", "paid" : 20}"#;

/// What is wrong, if a promise is not kept.
#[derive(Debug)]
struct Broken(String);

impl From<Error> for Broken {
    fn from(error: Error) -> Broken {
        Broken(error.to_string())
    }
}

type Kept = Result<(), Broken>;

/// The connections of a service, of somebody who is in its way, and of one who looks.
struct Clients {
    service: Client,
    other: Client,
    observer: Client,
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let mut clients = Clients {
        service: connect().await,
        other: connect().await,
        observer: connect().await,
    };
    let clients = &mut clients;
    report(
        "a payment is made once, and committed with its answer",
        pays_once(clients).await,
    );
    report(
        "a repeat gets the same bytes, and pays nothing",
        replays(clients).await,
    );
    report(
        "a malformed key or body is answered with 400",
        refuses_malformed(clients).await,
    );
    report(
        "another request under the key is answered with 422",
        refuses_mismatch(clients).await,
    );
    report(
        "a request in flight is answered with 409 and Retry-After",
        tells_in_flight(clients).await,
    );
    report(
        "a commit without finish is refused, and leaves no row",
        cannot_forget_finish(clients).await,
    );
    report(
        "a 402 is kept, and its rows are not",
        keeps_refusal(clients).await,
    );
    report(
        "an answer whose commit fails is not given",
        reports_failed_commit(clients).await,
    );
    report(
        "an answer whose error was swallowed is not given",
        reports_swallowed_error(clients).await,
    );
    report(
        "an answer that cannot be kept is not given",
        reports_failed_finish(clients).await,
    );
    report(
        "a connection lost in COMMIT is an error, and a repeat pays once",
        loses_connection(clients).await,
    );
}

async fn pays_once(clients: &mut Clients) -> Kept {
    let answer = pay(&mut clients.service, "key-1", BODY).await?;
    expect(201, answer.status)?;
    expect(PAID_20, &answer.body)?;
    expect("payments 1, balance 80", &state(clients).await?)
}

async fn replays(clients: &mut Clients) -> Kept {
    let spelled_anew = r#"{"invoice":9007199254740993,"amount":20.0,"account":"zo\u00eb"}"#;
    let answer = pay(&mut clients.service, "key-1", spelled_anew).await?;
    expect(201, answer.status)?;
    expect(PAID_20, &answer.body)?;
    expect("payments 1, balance 80", &state(clients).await?)
}

async fn refuses_malformed(clients: &mut Clients) -> Kept {
    let service = &mut clients.service;
    expect(400, pay(service, "", BODY).await?.status)?;
    expect(
        400,
        pay(service, "key-0", r#"{"account": "zo"#).await?.status,
    )?;
    expect(
        400,
        pay(service, "key-0", r#"{"account": "\u0000"}"#)
            .await?
            .status,
    )
}

/// Pairs of numbers that a parser of JSON with 64 bits for a number makes one.
async fn refuses_mismatch(clients: &mut Clients) -> Kept {
    let service = &mut clients.service;
    let other_invoice = BODY.replace("993", "992");
    expect(422, pay(service, "key-1", &other_invoice).await?.status)?;
    let other_amount = BODY.replace("20", "20.00000000000000000001");
    expect(422, pay(service, "key-1", &other_amount).await?.status)?;
    expect("payments 1, balance 80", &state(clients).await?)
}

async fn tells_in_flight(clients: &mut Clients) -> Kept {
    let body = request(10, 2);
    let transaction = clients.other.transaction().await?;
    begin(&transaction, "key-2", &body).await?;
    let answer = pay(&mut clients.service, "key-2", &body).await?;
    expect(409, answer.status)?;
    expect(true, answer.retry_after >= Some(1))?;

    transaction.rollback().await?;
    expect("payments 1, balance 80", &state(clients).await?)?;
    expect(201, pay(&mut clients.service, "key-2", &body).await?.status)?;
    expect("payments 2, balance 70", &state(clients).await?)
}

async fn cannot_forget_finish(clients: &mut Clients) -> Kept {
    let body = request(10, 3);
    let transaction = clients.service.transaction().await?;
    begin(&transaction, "key-3", &body).await?;
    work(&transaction, &body).await?;
    expect("ID006", sql_state(transaction.commit().await))?;
    expect("payments 2, balance 70", &state(clients).await?)?;
    expect(None, what_is_known_of(clients, "key-3").await?)?;

    expect(201, pay(&mut clients.service, "key-3", &body).await?.status)?;
    expect("payments 3, balance 60", &state(clients).await?)
}

async fn keeps_refusal(clients: &mut Clients) -> Kept {
    let body = request(900, 4);
    let answer = pay(&mut clients.service, "key-4", &body).await?;
    expect(402, answer.status)?;
    expect("payments 3, balance 60", &state(clients).await?)?;

    clients
        .observer
        .execute("UPDATE accounts SET balance = balance + 1000", &[])
        .await?;
    expect(answer, pay(&mut clients.service, "key-4", &body).await?)?;
    expect("payments 3, balance 1060", &state(clients).await?)
}

/// Another key pays an invoice again, and the deferred constraint fails in COMMIT.
async fn reports_failed_commit(clients: &mut Clients) -> Kept {
    expect(
        "23505",
        sql_state(pay(&mut clients.service, "key-5", BODY).await),
    )?;
    expect("payments 3, balance 1060", &state(clients).await?)?;
    expect(None, what_is_known_of(clients, "key-5").await?)?;
    expect(201, pay(&mut clients.service, "key-1", BODY).await?.status)
}

async fn reports_swallowed_error(clients: &mut Clients) -> Kept {
    let body = request(10, 6);
    let transaction = clients.service.transaction().await?;
    begin(&transaction, "key-6", &body).await?;
    let answer = work(&transaction, &body).await?;
    let swallowed = transaction
        .execute("INSERT INTO audit_log_that_is_missing VALUES (1)", &[])
        .await;
    expect("42P01", sql_state(swallowed))?;
    expect(
        "25P02",
        sql_state(finish(&transaction, "key-6", &answer).await),
    )?;
    transaction.rollback().await?;
    expect("payments 3, balance 1060", &state(clients).await?)?;
    expect(None, what_is_known_of(clients, "key-6").await?)
}

async fn reports_failed_finish(clients: &mut Clients) -> Kept {
    let result = pay(&mut clients.service, "key-7", &request(10, 14)).await;
    expect("ID007", sql_state(result))?;
    expect("payments 3, balance 1060", &state(clients).await?)?;
    expect(None, what_is_known_of(clients, "key-7").await?)
}

async fn loses_connection(clients: &mut Clients) -> Kept {
    let body = request(10, 13);
    expect(
        true,
        pay(&mut clients.service, "key-8", &body).await.is_err(),
    )?;
    expect("payments 3, balance 1060", &state(clients).await?)?;

    expect(201, pay(&mut clients.other, "key-8", &body).await?.status)?;
    expect("payments 4, balance 1050", &state(clients).await?)
}

fn request(amount: u32, invoice: u64) -> String {
    format!(r#"{{"account": "zoë", "amount": {amount}, "invoice": {invoice}}}"#)
}

async fn state(clients: &Clients) -> Result<String, Error> {
    let row = clients
        .observer
        .query_one(
            "SELECT format('payments %s, balance %s', (SELECT count(*) FROM payments), balance)
             FROM accounts",
            &[],
        )
        .await?;
    Ok(row.get(0))
}

async fn what_is_known_of(clients: &Clients, key: &str) -> Result<Option<String>, Error> {
    let row = clients
        .observer
        .query_one(
            "SELECT outcome
             FROM idempotency.idempotency_replay('acme', 'payments.create', $1)",
            &[&key],
        )
        .await?;
    Ok(row.get(0))
}

/// The SQLSTATE of an error, or what is there instead.
fn sql_state<T>(result: Result<T, Error>) -> String {
    match result {
        Ok(_) => "no error".to_string(),
        Err(error) => error
            .code()
            .map_or(error.to_string(), |code| code.code().to_string()),
    }
}

fn expect<E: Debug + PartialEq<F>, F: Debug>(expected: E, found: F) -> Kept {
    if expected == found {
        return Ok(());
    }
    Err(Broken(format!("expected {expected:?}, found {found:?}")))
}

fn report(what: &str, kept: Kept) {
    if let Err(Broken(why)) = kept {
        println!("failed: {what}: {why}");
        exit(1);
    }
    println!("ok: {what}");
}

async fn connect() -> Client {
    let url = std::env::var("DATABASE_URL").expect("DATABASE_URL names the database");
    let (client, connection) = tokio_postgres::connect(&url, NoTls)
        .await
        .expect("a connection");
    tokio::spawn(connection);
    client
}
