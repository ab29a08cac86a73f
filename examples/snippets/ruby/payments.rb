# frozen_string_literal: true

# A payment that a client can repeat, with the gem pg.
#
# begin, the work and finish are one transaction, so the payment and its answer are
# committed together or not at all.  A repeat is answered by begin, with the text
# that was stored.
#
# Two things pass here without an error.  The server answers the COMMIT of a failed
# transaction with ROLLBACK, and the block of `transaction` returns as if nothing
# were: an error that somebody rescued would become a 201 of which nothing is stored.
# And exec_params takes a Hash for a description of a parameter: a request given as
# one is sent as NULL, and every other request under the key gets the first answer.

require 'pg'

module Payments
  # Whose data it is; a service takes it from the log-in, never from the body
  TENANT = 'acme'
  ACTION = 'payments.create'

  # What to answer a client: an HTTP status, a JSON text, and the seconds for the
  # header Retry-After, or nil for no such header
  Answer = Struct.new(:status, :body, :retry_after)

  # The transaction had failed before its COMMIT
  class RolledBack < StandardError; end

  module_function

  # Pays once for each key, and answers every repeat with the first answer.
  #
  # No transaction may be open on the connection.  key is what the client sent as
  # Idempotency-Key, and body the text of the request as it came, not what a parser
  # made of it.  The answer is committed if its status is 201 or 402.  After an error
  # nothing is kept: answer 500, or 503 where a repeat may help (40001, 40P01, a lost
  # connection).
  def pay(connection, key, body)
    transaction(connection) do
      answer = start(connection, key, body)
      next answer if answer

      answer = work_or_refuse(connection, body)
      finish(connection, key, answer)
      answer
    end
  rescue PG::Error => e
    refusal(e) or raise
  end

  # Commits after the block, and returns what it returns; a transaction that failed,
  # which COMMIT would roll back, is an error.  Leave the block with next: a return
  # or break commits as well, but passes over this check.
  def transaction(connection)
    raise ArgumentError, 'a transaction is open' unless connection.transaction_status == PG::PQTRANS_IDLE

    connection.transaction do
      value = yield
      raise RolledBack, 'the transaction has failed' if connection.transaction_status == PG::PQTRANS_INERROR

      value
    end
  end

  # Claims the request, and returns nil; or its answer, if it has one.
  def start(connection, key, body)
    raise TypeError, 'the request has to be a text' unless body.is_a?(String)

    outcome, status, response = connection.exec_params(<<~SQL, [TENANT, ACTION, key, body]).values.first
      SELECT outcome, status_code, response::text
      FROM idempotency.idempotency_begin($1, $2, $3, $4)
    SQL
    Answer.new(Integer(status), response) unless outcome == 'started'
  end

  # Pays; the database reads the body, so that numbers stay as they are.
  def work(connection, body)
    connection.exec_params(<<~SQL, [body])
      INSERT INTO payments (account, amount, invoice)
      SELECT account, amount, invoice
      FROM jsonb_to_record($1) AS r (account text, amount numeric, invoice bigint)
    SQL
    Answer.new(201, connection.exec_params(<<~SQL, [body]).getvalue(0, 0))
      UPDATE accounts SET balance = balance - amount
      FROM jsonb_to_record($1) AS r (account text, amount numeric)
      WHERE id = account
      RETURNING json_build_object('account', account, 'paid', amount)::text
    SQL
  end

  # Pays, or makes an answer to keep of the failure, whose rows are rolled back.
  def work_or_refuse(connection, body)
    connection.exec('SAVEPOINT work')
    work(connection, body)
  rescue PG::CheckViolation
    connection.exec('ROLLBACK TO SAVEPOINT work')
    Answer.new(402, '{"error": "not enough money"}')
  end

  # Stores the answer: the last statement of the transaction.
  def finish(connection, key, answer)
    connection.exec_params('SELECT idempotency.idempotency_finish($1, $2, $3, $4, $5)',
                           [TENANT, ACTION, key, answer.status, answer.body])
  end

  # The SQLSTATE of an error, or nil if the server did not send it.
  def sqlstate(error)
    error.result&.error_field(PG::PG_DIAG_SQLSTATE)
  end

  # The answer to a request that begin refused, or nil for any other error.
  def refusal(error)
    case sqlstate(error)
    when 'ID001', 'ID002', '22P02', '22P05' then Answer.new(400, '{"error": "key or body is malformed"}')
    when 'ID003' then Answer.new(409, '{"error": "request is in flight"}', retry_after(error))
    when 'ID004' then Answer.new(422, '{"error": "key was used with a different request"}')
    when 'ID005' then Answer.new(409, '{"error": "another request was faster"}')
    end
  end

  # The seconds that the hint of ID003 names.
  def retry_after(error)
    Integer(error.result.error_field(PG::PG_DIAG_MESSAGE_HINT)[/\d+/] || 1)
  end
end
