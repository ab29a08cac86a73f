//! A payment that a client can repeat, with tokio-postgres.
//!
//! begin, the work and finish are one transaction, so the payment and its answer are
//! committed together or not at all.  A repeat is answered by begin, with the text
//! that was stored.
//!
//! `commit` says `Ok` also for a transaction that had failed, which the server rolls
//! back; nothing in this crate tells.  So nothing stands between finish and `commit`,
//! and the result of finish, which fails in a transaction that has, is looked at first.
//!
//! The types of parameters are asked of the server, and a `&str` is none of jsonb and
//! json: hence the casts by way of text.  The answer is a text as well: a
//! `serde_json::Value` would be stored as it prints, with its members in another order.

use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Error, Transaction};

/// Whose data it is; a service takes it from the log-in, never from the body.
const TENANT: &str = "acme";
const ACTION: &str = "payments.create";

/// What to answer a client.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// The HTTP status.
    pub status: i32,
    /// A JSON text.
    pub body: String,
    /// The seconds for the header Retry-After, if there is to be one.
    pub retry_after: Option<u32>,
}

impl Answer {
    pub fn new(status: i32, body: impl Into<String>) -> Answer {
        Answer {
            status,
            body: body.into(),
            retry_after: None,
        }
    }
}

/// Pays once for each key, and answers every repeat with the first answer.
///
/// `key` is what the client sent as Idempotency-Key, and `body` the text of the request
/// as it came, not what a parser made of it: parsers round numbers, and two requests
/// would be one.  The answer is committed if its status is 201 or 402.
///
/// # Errors
///
/// After an error nothing is kept: answer 500, or 503 where a repeat may help (40001,
/// 40P01, a lost connection).
pub async fn pay(client: &mut Client, key: &str, body: &str) -> Result<Answer, Error> {
    match pay_in_transaction(client, key, body).await {
        Ok(answer) => Ok(answer),
        Err(error) => refusal(&error).ok_or(error),
    }
}

async fn pay_in_transaction(client: &mut Client, key: &str, body: &str) -> Result<Answer, Error> {
    let mut transaction = client.transaction().await?; // rolls back when it is dropped
    let answer = match begin(&transaction, key, body).await? {
        Some(answer) => answer,
        None => {
            let answer = work_or_refuse(&mut transaction, body).await?;
            finish(&transaction, key, &answer).await?;
            answer
        }
    };
    transaction.commit().await?;
    Ok(answer)
}

/// Claims the request; or returns its answer, if it has one.
pub async fn begin(
    transaction: &Transaction<'_>,
    key: &str,
    body: &str,
) -> Result<Option<Answer>, Error> {
    let row = transaction
        .query_one(
            "SELECT outcome, status_code, response::text
             FROM idempotency.idempotency_begin($1, $2, $3, $4::text::jsonb)",
            &[&TENANT, &ACTION, &key, &body],
        )
        .await?;
    if row.get::<_, &str>(0) == "started" {
        return Ok(None);
    }
    Ok(Some(Answer::new(row.get(1), row.get::<_, &str>(2))))
}

/// Pays; the database reads the body, so that numbers stay as they are.
pub async fn work(transaction: &Transaction<'_>, body: &str) -> Result<Answer, Error> {
    transaction
        .execute(
            "INSERT INTO payments (account, amount, invoice)
             SELECT account, amount, invoice
             FROM jsonb_to_record($1::text::jsonb)
                  AS r (account text, amount numeric, invoice bigint)",
            &[&body],
        )
        .await?;
    let row = transaction
        .query_one(
            "UPDATE accounts SET balance = balance - amount
             FROM jsonb_to_record($1::text::jsonb) AS r (account text, amount numeric)
             WHERE id = account
             RETURNING json_build_object('account', account, 'paid', amount)::text",
            &[&body],
        )
        .await?;
    Ok(Answer::new(201, row.get::<_, &str>(0)))
}

/// Pays, or makes an answer to keep of the failure, whose rows are rolled back.
async fn work_or_refuse(transaction: &mut Transaction<'_>, body: &str) -> Result<Answer, Error> {
    let savepoint = transaction.savepoint("work").await?;
    match work(&savepoint, body).await {
        Ok(answer) => {
            savepoint.commit().await?;
            Ok(answer)
        }
        Err(error) if error.code() == Some(&SqlState::CHECK_VIOLATION) => {
            savepoint.rollback().await?;
            Ok(Answer::new(402, r#"{"error": "not enough money"}"#))
        }
        Err(error) => Err(error),
    }
}

/// Stores the answer: the last statement before the commit.
pub async fn finish(
    transaction: &Transaction<'_>,
    key: &str,
    answer: &Answer,
) -> Result<(), Error> {
    transaction
        .query_one(
            "SELECT idempotency.idempotency_finish($1, $2, $3, $4, $5::text::json)",
            &[&TENANT, &ACTION, &key, &answer.status, &answer.body],
        )
        .await?;
    Ok(())
}

/// The answer to a request that begin refused, or nothing for any other error.
fn refusal(error: &Error) -> Option<Answer> {
    let answer = match error.code()?.code() {
        "ID001" | "ID002" | "22P02" | "22P05" => {
            Answer::new(400, r#"{"error": "key or body is malformed"}"#)
        }
        "ID003" => Answer {
            retry_after: Some(retry_after(error)),
            ..Answer::new(409, r#"{"error": "request is in flight"}"#)
        },
        "ID004" => Answer::new(422, r#"{"error": "key was used with a different request"}"#),
        "ID005" => Answer::new(409, r#"{"error": "another request was faster"}"#),
        _ => return None,
    };
    Some(answer)
}

/// The seconds that the hint of ID003 names.
fn retry_after(error: &Error) -> u32 {
    let hint = error
        .as_db_error()
        .and_then(|error| error.hint())
        .unwrap_or("");
    hint.split_whitespace()
        .find_map(|word| word.parse().ok())
        .unwrap_or(1)
}
