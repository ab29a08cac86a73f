# frozen_string_literal: true

# Pays by payments.rb, and checks each promise.
#
# DATABASE_URL names a database with the extension and the tables of tables.sql,
# anew.  A line for each promise says whether it was kept; the first that was not
# ends the program with status 1.

require_relative 'payments'

BODY = '{"account": "zoë", "amount": 20, "invoice": 9007199254740993}'

def connect
  PG.connect(ENV.fetch('DATABASE_URL'))
end

SERVICE = connect
OTHER = connect
OBSERVER = connect

def pay(key, body)
  Payments.pay(SERVICE, key, body)
end

def request(amount, invoice)
  format('{"account": "zoë", "amount": %d, "invoice": %d}', amount, invoice)
end

def query(sql, values = [])
  OBSERVER.exec_params(sql, values).getvalue(0, 0)
end

def state
  query(<<~SQL)
    SELECT format('payments %s, balance %s', (SELECT count(*) FROM payments), balance)
    FROM accounts
  SQL
end

def what_is_known_of(key)
  query("SELECT outcome FROM idempotency.idempotency_replay('acme', 'payments.create', $1)", [key])
end

# The SQLSTATE, or else the class, of the error that a block fails with
def error_of
  yield
  nil
rescue PG::Error => e
  Payments.sqlstate(e) || e.class
rescue StandardError => e
  e.class
end

def expect(expected, found)
  raise "expected #{expected.inspect}, found #{found.inspect}" unless expected == found
end

def promise(what)
  yield
  puts "ok: #{what}"
rescue StandardError => e
  puts "failed: #{what}: #{e.message}"
  exit 1
end

promise 'a payment is made once, and committed with its answer' do
  answer = pay('key-1', BODY)
  expect 201, answer.status
  expect '{"account" : "zoë", "paid" : 20}', answer.body
  expect 'payments 1, balance 80', state
end

promise 'a repeat gets the same bytes, and pays nothing' do
  answer = pay('key-1', '{"invoice":9007199254740993,"amount":20.0,"account":"zo\u00eb"}')
  expect 201, answer.status
  expect '{"account" : "zoë", "paid" : 20}', answer.body
  expect 'payments 1, balance 80', state
end

promise 'a malformed key or body is answered with 400' do
  expect 400, pay('', BODY).status
  expect 400, pay('key-0', '{"account": "zo').status
  expect 400, pay('key-0', '{"account": "\u0000"}').status
end

# Pairs of numbers that a parser of JSON with 64 bits for a number makes one
promise 'another request under the key is answered with 422' do
  expect 422, pay('key-1', BODY.sub('993', '992')).status
  expect 422, pay('key-1', BODY.sub('20', '20.00000000000000000001')).status
  expect 'payments 1, balance 80', state
end

promise 'a request in flight is answered with 409 and Retry-After' do
  body = request(10, 2)
  OTHER.exec('BEGIN')
  Payments.start(OTHER, 'key-2', body)
  answer = pay('key-2', body)
  expect 409, answer.status
  expect true, answer.retry_after >= 1
  expect 'payments 1, balance 80', state

  OTHER.exec('ROLLBACK')
  expect 201, pay('key-2', body).status
  expect 'payments 2, balance 70', state
end

promise 'a commit without finish is refused, and leaves no row' do
  body = request(10, 3)
  forgetful = lambda do
    Payments.transaction(SERVICE) do
      Payments.start(SERVICE, 'key-3', body)
      Payments.work(SERVICE, body)
    end
  end
  expect 'ID006', error_of(&forgetful)
  expect 'payments 2, balance 70', state
  expect nil, what_is_known_of('key-3')

  expect 201, pay('key-3', body).status
  expect 'payments 3, balance 60', state
end

promise 'a 402 is kept, and its rows are not' do
  body = request(900, 4)
  answer = pay('key-4', body)
  expect 402, answer.status
  expect 'payments 3, balance 60', state

  query('UPDATE accounts SET balance = balance + 1000 RETURNING id')
  expect answer, pay('key-4', body)
  expect 'payments 3, balance 1060', state
end

# Another key pays an invoice again, and the deferred constraint fails in COMMIT
promise 'an answer whose commit fails is not given' do
  expect '23505', error_of { pay('key-5', BODY) }
  expect 'payments 3, balance 1060', state
  expect nil, what_is_known_of('key-5')
  expect 201, pay('key-1', BODY).status
end

promise 'an answer whose error was swallowed is not given' do
  body = request(10, 6)
  swallowing = lambda do
    Payments.transaction(SERVICE) do
      Payments.start(SERVICE, 'key-6', body)
      Payments.finish(SERVICE, 'key-6', Payments.work(SERVICE, body))
      expect '42P01', error_of { SERVICE.exec('INSERT INTO audit_log_that_is_missing VALUES (1)') }
    end
  end
  expect Payments::RolledBack, error_of(&swallowing)
  expect 'payments 3, balance 1060', state
  expect nil, what_is_known_of('key-6')
end

promise 'an answer that cannot be kept is not given' do
  expect 'ID007', error_of { pay('key-7', request(10, 14)) }
  expect 'payments 3, balance 1060', state
  expect nil, what_is_known_of('key-7')
end

promise 'a request that is a Hash is refused' do
  expect TypeError, error_of { pay('key-9', { 'account' => 'zoë', 'amount' => 10, 'invoice' => 7 }) }
  expect nil, what_is_known_of('key-9')
  expect 'payments 3, balance 1060', state
end

promise 'a connection lost in COMMIT is an error, and a repeat pays once' do
  body = request(10, 13)
  expect PG::ConnectionBad, error_of { pay('key-8', body) }
  expect 'payments 3, balance 1060', state

  expect 201, Payments.pay(OTHER, 'key-8', body).status
  expect 'payments 4, balance 1050', state
end
