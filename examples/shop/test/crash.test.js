// The service and the database are killed at work: nothing is doubled, and nothing is lost.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { after, before, test } from 'node:test'
import pg from 'pg'
import { client, crashDatabase, restartDatabase, retry, startDatabase, until } from '../../harness/index.js'
import { openShop } from './support.js'

let shop
before(async () => { shop = await openShop({ IDEMPOTENCY_LEASE: '1 s' }) })
after(async () => await shop.close())

/** Send a request until it is answered, and remember its answer. */
async function send (user, path, body, answers) {
  const key = randomUUID()
  const { status, text, json } = await retry(async () => await user.post(path, body, { key }))
  assert.equal(status, 200, text)
  answers.push({ path, body, key, text })
  return json
}

/** One after the other: an order, its payment, the refund, and a reservation. */
async function shopping (user, rounds, answers) {
  for (let round = 0; round < rounds; round++) {
    const { id: orderId } = await send(user, '/api/orders', { items: [{ sku: 'tea', quantity: 1 }] }, answers)
    const { id: paymentId } = await send(user, '/api/payments', { orderId, amount: 10 }, answers)
    await send(user, '/api/refunds', { paymentId }, answers)
    await send(user, '/api/reservations', { sku: 'tea', quantity: 1 }, answers)
  }
}

async function survives (tenant, crash) {
  const [users, rounds] = [4, 6]
  const user = shop.as('alice', tenant)
  const answers = []
  const load = Promise.all(Array.from({ length: users }, async () => await shopping(user, rounds, answers)))
  for (const part of [1, 2, 3]) {
    await Promise.race([load, until(() => answers.length >= users * rounds * part)])
    await crash()
  }
  await load

  const ids = new Set(answers.map(({ text }) => JSON.parse(text).id))
  assert.equal(ids.size, users * rounds * 4, 'each request was answered')
  for (const table of ['orders', 'payments', 'refunds', 'reservations']) {
    const rows = await shop.database.query(`SELECT id FROM ${table} WHERE tenant = $1`, [tenant])
    assert.equal(rows.length, users * rounds, `${table}: none is doubled`)
    assert.ok(rows.every(({ id }) => ids.has(id)), `${table}: none is lost`)
  }
  const [{ available }] = await shop.database.query('SELECT available FROM stock WHERE tenant = $1', [tenant])
  assert.equal(available, 100 - users * rounds)
  const operations = `id IN (SELECT charge FROM payments WHERE tenant = '${tenant}' UNION ALL
    SELECT refund FROM refunds WHERE tenant = '${tenant}')`
  assert.equal(await shop.count('provider_operations', operations), 2 * users * rounds)
  assert.equal(await shop.count('provider_operations', `key LIKE '%"${tenant}"%'`), users * rounds, 'no card was charged without a payment')

  for (const { path, body, key, text } of answers) {
    const repeat = await user.post(path, body, { key })
    assert.equal(repeat.text, text)
    assert.equal(repeat.headers['idempotent-replayed'], 'true')
  }
}

test('kill -9 of the service during load', async () => {
  await survives('service', async () => await shop.service.restart())
})

test('kill -9 of PostgreSQL during load', async () => {
  await survives('postgresql', restartDatabase)
})

test('while the database is away, the service says so, shows its own metrics, and goes on afterwards', async () => {
  const user = shop.as(randomUUID())
  const { get } = client(shop.service.url)
  const [key, body] = [randomUUID(), { items: [{ sku: 'tea', quantity: 1 }] }]
  await crashDatabase()
  try {
    const answer = await user.post('/api/orders', body, { key })
    assert.equal(answer.status, 503, answer.text)
    assert.equal(answer.headers['retry-after'], '1')
    assert.equal((await get('/health')).status, 503)
    const metrics = await get('/metrics')
    assert.equal(metrics.status, 200)
    assert.match(metrics.text, /^idempotency_database_up 0$/m)
    assert.match(metrics.text, /^idempotency_replay_count\{/m)
  } finally {
    await startDatabase()
  }
  assert.equal((await retry(async () => await user.post('/api/orders', body, { key }))).status, 200)
  assert.match((await get('/metrics')).text, /^idempotency_database_up 1$/m)
})

for (const [where, table, calls] of [['while the card is charged', 'provider_operations', 2], ['after the card was charged', 'payments', 1]]) {
  test(`kill -9 of the service ${where}: the next attempt goes on, and the card is charged once`, async () => {
    const user = shop.as(randomUUID())
    const { id: orderId } = await send(user, '/api/orders', { items: [{ sku: 'tea', quantity: 1 }] }, [])
    const [key, body] = [randomUUID(), { orderId, amount: 10 }]
    const point = calls === 2 ? 'charging' : 'charged'

    const connection = new pg.Client(shop.database.url)
    await connection.connect()
    await connection.query(`BEGIN; LOCK TABLE ${table} IN SHARE MODE`)
    const interrupted = assert.rejects(user.post('/api/payments', body, { key }), { code: 'ECONNRESET' })
    await until(async () => await shop.count('pg_locks', `NOT granted AND relation = '${table}'::regclass`) > 0)
    await shop.service.restart()
    await interrupted
    const [{ recovery_point: reached }] = await shop.database.query('SELECT recovery_point FROM idempotency.idempotency_key WHERE key = $1', [key])
    assert.equal(reached, point)
    await connection.query('ROLLBACK')
    await connection.end()

    const answer = await retry(async () => await user.post('/api/payments', body, { key }))
    assert.equal(answer.status, 200, answer.text)
    assert.equal(await shop.count('payments', 'order_id = $1', [orderId]), 1)
    const operations = await shop.database.query('SELECT id, calls FROM provider_operations WHERE id = $1 OR key LIKE $2', [answer.json.charge, `%${key}%`])
    assert.deepEqual(operations, [{ id: answer.json.charge, calls }])
  })
}
