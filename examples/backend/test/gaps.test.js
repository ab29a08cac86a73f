// "Persistence models", "Implementations" and "Scope & gaps" of the audit: what
// was missing, and that it is there.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { after, before, describe, test } from 'node:test'
import { until } from '../../harness/index.js'
import { startBackend } from './backend.js'

const expense = { amount: 12.5, currency: 'EUR' }

let backend, alice
before(async () => {
  backend = await startBackend()
  alice = backend.as('acme:alice')
})
after(async () => await backend.stop())

describe('Scope', () => {
  test('each tenant has keys of its own', async () => {
    const key = randomUUID()
    const [one, two] = [await alice.post('/expenses', expense, { key }), await backend.as('umbrella:alice').post('/expenses', expense, { key })]
    assert.deepEqual([one.status, two.status], [201, 201])
    assert.notEqual(one.json.id, two.json.id)
  })

  test('userId is included: two users of a tenant may choose the same key', async () => {
    const key = randomUUID()
    const [one, two] = [await alice.post('/expenses', expense, { key }), await backend.as('acme:bob').post('/expenses', expense, { key })]
    assert.deepEqual([one.json.createdBy, two.json.createdBy], ['alice', 'bob'])
    assert.equal(two.headers['idempotent-replayed'], undefined)
  })

  test('the action is included: one key on two routes is two requests', async () => {
    const key = randomUUID()
    assert.equal((await alice.post('/expenses', expense, { key })).status, 201)
    assert.equal((await alice.post('/tax/lock-tax-snapshot', { year: 2019 }, { key })).status, 201)
  })

  test('tenantId null lets no two rows in', async () => {
    const columns = await backend.database.query(`
      SELECT attname, attnotnull FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = ANY (indkey)
       WHERE indrelid = 'idempotency.idempotency_key'::regclass AND indisunique`)
    assert.deepEqual(columns.map(column => column.attname).sort(), ['action', 'actor', 'key', 'tenant'])
    assert.ok(columns.every(column => column.attnotnull))
  })
})

describe('Request hash and mismatch', () => {
  test('another body under the same key is 422', async () => {
    const key = randomUUID()
    await alice.post('/expenses', expense, { key })
    const answer = await alice.post('/expenses', { ...expense, amount: 13 }, { key })
    assert.equal(answer.status, 422)
    assert.match(answer.headers['content-type'], /^application\/problem\+json/)
    assert.equal(answer.json.code, 'IDEMPOTENCY_KEY_REUSED')
  })

  test('also while the first is still at work', async () => {
    const key = randomUUID()
    const blocker = await backend.block('expenses')
    const first = alice.post('/expenses', expense, { key })
    await until(async () => await blocker.isWaitedFor())
    const answer = await alice.post('/expenses', { ...expense, amount: 13 }, { key })
    await blocker.release()
    assert.equal(answer.status, 422)
    assert.equal((await first).status, 201)
  })

  test('numbers that JavaScript rounds to the same are different', async () => {
    const key = randomUUID()
    const body = '{"currency": "EUR", "amount": 1.00000000000000001}'
    assert.equal((await alice.post('/expenses', body, { key })).status, 201)
    assert.equal((await alice.post('/expenses', body.replace('01}', '02}'), { key })).status, 422)
  })

  test('white space and the order of members are not a difference', async () => {
    const key = randomUUID()
    const first = await alice.post('/expenses', '{"amount":7,"currency":"EUR"}', { key })
    const again = await alice.post('/expenses', '{ "currency": "EUR", "amount": 7 }', { key })
    assert.equal(again.text, first.text)
  })
})

describe('In-progress signaling', () => {
  test('a duplicate while the first is at work is 409 with Retry-After, not 200', async () => {
    const key = randomUUID()
    const blocker = await backend.block('expenses')
    const first = alice.post('/expenses', expense, { key })
    await until(async () => await blocker.isWaitedFor())
    const meanwhile = await alice.post('/expenses', expense, { key })
    await blocker.release()
    assert.equal(meanwhile.status, 409)
    assert.equal(meanwhile.json.code, 'DUPLICATE_IN_PROGRESS')
    assert.ok(Number(meanwhile.headers['retry-after']) >= 1)
    const done = await first
    const again = await alice.post('/expenses', expense, { key })
    assert.deepEqual([again.status, again.text], [201, done.text])
  })
})

describe('Guard that nobody uses', () => {
  test('every route that changes something is protected unless it says otherwise', async () => {
    for (const [method, path] of [['POST', '/expenses'], ['POST', '/tax/lock-tax-snapshot'], ['POST', '/customization/custom-fields'],
      ['PUT', '/customization/custom-fields'], ['PUT', '/customization/layouts/a'], ['POST', '/invoices/1/send'], ['POST', '/copilot/chat']]) {
      const body = { ...expense, year: 2020, name: 'a', fields: [], prompt: 'a' }
      const { status, json } = await alice.request(method, path, body)
      assert.deepEqual([path, status, json.code], [path, 400, 'IDEMPOTENCY_KEY_MISSING'])
    }
  })

  test('reading needs no key', async () => {
    assert.equal((await alice.get('/invoices/1/deliveries')).status, 200)
  })
})

describe('TTL and cleanup', () => {
  let short, bob
  before(async () => {
    short = await startBackend({ settings: ["idempotency.min_ttl = '1 s'", "idempotency.ttl = '1 s'"] })
    bob = short.as('acme:bob')
  })
  after(async () => await short.stop())

  test('an answer that has expired is not given any more', async () => {
    const key = randomUUID()
    const first = await bob.post('/expenses', expense, { key })
    const later = await until(async () => {
      const answer = await bob.post('/expenses', expense, { key })
      return answer.text !== first.text && answer
    }, { what: 'the answer to expire' })
    assert.equal(later.status, 201)
    assert.equal(later.headers['idempotent-replayed'], undefined)
  })

  test('records that have expired are removed by CALL idempotency_sweep(), and others stay', async () => {
    const [old, young] = [randomUUID(), randomUUID()]
    await bob.post('/expenses', expense, { key: old })
    await alice.post('/expenses', expense, { key: young })
    await until(async () => {
      const [{ expired }] = await short.database.query('SELECT bool_and(expires_at < clock_timestamp()) AS expired FROM idempotency.idempotency_key')
      return expired ?? true
    }, { what: 'the record to expire' })
    for (const { database } of [short, backend]) await database.query('CALL idempotency.idempotency_sweep()')
    assert.equal(await short.record(old), undefined)
    assert.equal((await backend.record(young)).state, 'completed')
  })

  test('a sign-up can be sent again when its record has gone, and makes no second account', async () => {
    const email = `${randomUUID()}@example.com`
    const key = randomUUID()
    const send = async () => await short.as().post('/auth/sign-up', { email }, { key })
    assert.equal((await send()).status, 201)
    await until(async () => (await send()).status === 409, { what: 'the record to expire' })
    assert.equal(await short.count('accounts', `email = '${email}'`), 1)
  })
})

describe('In-memory store', () => {
  test('answers outlive the process', async () => {
    const key = randomUUID()
    const first = await alice.post('/expenses', expense, { key })
    await backend.service.restart()
    const again = await alice.post('/expenses', expense, { key })
    assert.equal(again.headers['idempotent-replayed'], 'true')
    assert.equal(again.text, first.text)
  })
})
