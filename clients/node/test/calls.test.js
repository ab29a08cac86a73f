// What is not `run` and `lease`: begin and finish in a transaction of one's own, store, status, firstSeen.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { after, before, describe, test } from 'node:test'
import pg from 'pg'
import {
  InFlightError, KeyMissingError, MismatchError, OutOfOrderError, asIdempotencyError, createIdempotency, sqlStateOf
} from 'pg-idempotency'
import { createDatabase } from './support/database.js'

let database, idempotency, client
before(async () => {
  database = await createDatabase()
  idempotency = createIdempotency({ pool: database.pool })
  client = new pg.Client(database.url)
  await client.connect()
})
after(async () => {
  await client.end()
  await database.drop()
})

function scopeOf (key = randomUUID()) {
  return { tenant: 'acme', action: 'orders.create', key }
}

describe('begin and finish', () => {
  test('work in a transaction that was opened by somebody else', async () => {
    const scope = scopeOf()
    await client.query('BEGIN')
    assert.deepEqual(await idempotency.begin(client, scope, { a: 1 }), { started: true, result: null })
    assert.equal((await idempotency.finish(client, scope, { status: 201, json: 1 })).outcome, 'completed')
    await client.query('COMMIT')

    await client.query('BEGIN')
    const { started, result } = await idempotency.begin(client, scope, { a: 1 })
    await client.query('COMMIT')
    assert.deepEqual([started, result.status, result.rawJson], [false, 201, '1'])
  })

  test('leave no way to commit work that is not finished', async () => {
    await client.query('BEGIN')
    await idempotency.begin(client, scopeOf(), null)
    const error = await client.query('COMMIT').catch(error => error)
    assert.equal(sqlStateOf(error), 'ID006')
    assert.deepEqual([asIdempotencyError(error).name, asIdempotencyError(error).status], ['UnfinishedError', 500])
  })

  test('throw by class', async () => {
    const scope = scopeOf()
    await idempotency.run(scope, { a: 1 }, () => {})
    await assert.rejects(idempotency.begin(client, scope, { a: 2 }), MismatchError)
    await assert.rejects(idempotency.begin(client, scopeOf(''), null), KeyMissingError)
    await assert.rejects(idempotency.finish(client, scope, {}), error => error instanceof OutOfOrderError && error.sqlState === 'ID008')
    await idempotency.run(scopeOf('held'), null, async () => {
      await assert.rejects(idempotency.begin(client, scopeOf('held'), null), InFlightError)
    })
  })
})

describe('store', () => {
  test('keeps the first answer', async () => {
    const scope = scopeOf()
    assert.equal((await idempotency.store(scope, { a: 1 }, { status: 404, json: 'first' })).outcome, 'errored')
    const second = await idempotency.store(scope, { a: 1 }, { status: 201, json: 'second' })
    assert.deepEqual([second.outcome, second.status, second.json], ['replayed', 404, 'first'])
    await assert.rejects(idempotency.store(scope, { a: 2 }, { status: 201 }), MismatchError)
  })

  test('takes digests, bytes, headers and lifetimes', async () => {
    const scope = scopeOf()
    const digest = new Uint8Array(16)
    await idempotency.store(scope, digest, { status: 200, body: new Uint8Array([0, 255]), headers: { 'content-type': 'x/y' }, ttl: '2 hours' })
    const { outcome, result, finishedAt, expiresAt } = await idempotency.status(scope, digest)
    assert.deepEqual([outcome, [...result.body], result.headers], ['replayed', [0, 255], { 'content-type': 'x/y' }])
    assert.equal(expiresAt - finishedAt, 2 * 60 * 60 * 1000)
  })
})

describe('status', () => {
  test('says nothing of what is not known', async () => {
    const status = await idempotency.status(scopeOf())
    assert.deepEqual([status.outcome, status.result, status.retryAfter], [null, null, null])
  })

  test('sees a transaction at work, and tells a different request', async () => {
    const scope = scopeOf()
    let goOn
    const started = new Promise(resolve => {
      idempotency.run(scope, { a: 1 }, async () => {
        resolve()
        await new Promise(_resolve => { goOn = _resolve })
      })
    })
    await started
    const status = await idempotency.status(scope, { a: 1 })
    assert.equal(status.outcome, 'in_flight')
    assert.ok(status.retryAfter >= 1)
    goOn()
    while ((await idempotency.status(scope)).outcome !== 'replayed');
    await assert.rejects(idempotency.status(scope, { a: 2 }), MismatchError)
  })
})

describe('firstSeen', () => {
  test('returns each id once, whatever is in it', async () => {
    const ids = ['a', 'b"c', 'd\\e', 'f,g', '{h}', 'NULL', "i'j", 'a']
    await idempotency.run(scopeOf(), null, async tx => {
      assert.deepEqual((await idempotency.firstSeen(tx, 'shipping', ids)).sort(), [...new Set(ids)].sort())
    })
    assert.deepEqual(await idempotency.firstSeen(client, 'shipping', [...ids, 'new']), ['new'])
    assert.deepEqual(await idempotency.firstSeen(client, 'billing', ['a']), ['a'])
    assert.deepEqual(await idempotency.firstSeen(client, 'shipping', ['a'], { tenant: 'acme', ttl: '2 hours' }), ['a'])
    assert.deepEqual(await idempotency.firstSeen(client, 'shipping', []), [])
  })

  test('forgets them with the transaction', async () => {
    await client.query('BEGIN')
    assert.deepEqual(await idempotency.firstSeen(client, 'shipping', ['rolled-back']), ['rolled-back'])
    await client.query('ROLLBACK')
    assert.deepEqual(await idempotency.firstSeen(client, 'shipping', ['rolled-back']), ['rolled-back'])
  })
})
