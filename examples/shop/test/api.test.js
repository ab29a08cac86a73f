// The routes, by the criteria of the ticket "Idempotency Key & Request Replay Safety Layer".
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { after, before, describe, test } from 'node:test'
import pg from 'pg'
import { client, retry, until } from '../../harness/index.js'
import { openShop } from './support.js'

const items = [{ sku: 'tea', quantity: 2 }]

let shop, alice
before(async () => {
  shop = await openShop()
  alice = shop.as('alice')
})
after(async () => await shop.close())

async function newOrder (user = alice) {
  return (await user.post('/api/orders', { items }, { key: randomUUID() })).json
}

async function newPayment (user = alice) {
  const { id: orderId } = await newOrder(user)
  return (await user.post('/api/payments', { orderId, amount: 10 }, { key: randomUUID() })).json
}

/** For each of the four routes: a request, another one, and its table. */
const routes = [
  { path: '/api/orders', table: 'orders', make: async () => ({ items }), other: async () => ({ items: [{ sku: 'tea', quantity: 3 }] }) },
  { path: '/api/payments', table: 'payments', make: async () => ({ orderId: (await newOrder()).id, amount: 10 }), other: async body => ({ ...body, amount: 11 }) },
  { path: '/api/refunds', table: 'refunds', make: async () => ({ paymentId: (await newPayment()).id }), other: async () => ({ paymentId: (await newPayment()).id }) },
  { path: '/api/reservations', table: 'reservations', make: async () => ({ sku: randomUUID(), quantity: 2 }), other: async body => ({ ...body, quantity: 3 }) }
]

/** Hold a lock until `work` has ended, so that requests wait where it suits the test. */
async function whileLocked (statement, work) {
  const connection = new pg.Client(shop.database.url)
  await connection.connect()
  await connection.query(`BEGIN; ${statement}`)
  try {
    return await work(async () => await connection.query('ROLLBACK'))
  } finally {
    await connection.end()
  }
}

for (const { path, table, make, other } of routes) {
  describe(`POST ${path}`, () => {
    test('acceptance: duplicate POST with identical body and Idempotency-Key returns 200 with identical payload, no additional side effects', async () => {
      const [key, body] = [randomUUID(), await make()]
      const before = await shop.count(table)
      const first = await alice.post(path, body, { key })
      const operations = await shop.count('provider_operations')
      const duplicate = await alice.post(path, body, { key })

      assert.equal(first.status, 200, first.text)
      assert.equal(duplicate.status, 200)
      assert.equal(duplicate.text, first.text)
      assert.equal(first.headers['idempotent-replayed'], undefined)
      assert.equal(duplicate.headers['idempotent-replayed'], 'true')
      assert.equal(await shop.count(table), before + 1)
      assert.equal(await shop.count('provider_operations'), operations)
      assert.equal(await shop.count('provider_operations', 'calls > 1'), 0)
    })

    test('acceptance: concurrent identical POST produces a single side effect', async () => {
      const [key, body] = [randomUUID(), await make()]
      const before = await shop.count(table)
      const answers = await Promise.all(Array.from({ length: 10 }, async () =>
        await retry(async () => await alice.post(path, body, { key }))))

      assert.deepEqual(answers.map(answer => answer.status), Array(10).fill(200))
      assert.equal(new Set(answers.map(answer => answer.text)).size, 1)
      assert.equal(await shop.count(table), before + 1)
      assert.equal(await shop.count('provider_operations', 'calls > 1'), 0)
    })

    test('acceptance: conflicting body with same key returns 409 and an explanatory error', async () => {
      const [key, body] = [randomUUID(), await make()]
      const { text } = await alice.post(path, body, { key })
      const conflicting = await other(body)
      const before = await shop.count(table)
      const conflict = await alice.post(path, conflicting, { key })

      assert.equal(conflict.status, 409)
      assert.match(conflict.headers['content-type'], /^application\/problem\+json/)
      assert.equal(conflict.json.code, 'IDEMPOTENCY_KEY_REUSED')
      assert.equal(conflict.json.detail, 'The idempotency key was used with a different request')
      assert.equal(conflict.headers['retry-after'], undefined)
      assert.equal(await shop.count(table), before)
      assert.equal((await alice.post(path, body, { key })).text, text)
    })

    test('acceptance: the structured log has key, route, status and duration of each request', async () => {
      const [key, body] = [randomUUID(), await make()]
      await alice.post(path, body, { key })
      await alice.post(path, body, { key })
      await alice.post(path, await other(body), { key })
      const lines = await until(() => shop.logOf(key).length === 3 && shop.logOf(key))

      assert.deepEqual(lines.map(({ status, outcome }) => [status, outcome]), [[200, 'completed'], [200, 'replayed'], [409, 'mismatched']])
      for (const line of lines) {
        assert.equal(line.route, `POST ${path}`)
        assert.ok(line.duration > 0)
        assert.equal(line.tenant, 'acme')
        assert.equal(line.actor, 'alice')
      }
    })

    test('acceptance: metrics count replays and conflicts', async () => {
      const names = ['idempotency_replay_count', 'idempotency_conflict_count', 'idempotency_database_replay_count', 'idempotency_database_conflict_count']
      const metrics = async () => await Promise.all(names.map(async name => await shop.metric(name, { route: `POST ${path}` })))
      const [key, body] = [randomUUID(), await make()]
      const before = await metrics()
      await alice.post(path, body, { key })
      await alice.post(path, body, { key })
      await alice.post(path, body, { key })
      await alice.post(path, await other(body), { key })
      assert.deepEqual((await metrics()).map((value, i) => value - before[i]), [2, 1, 2, 1])
    })

    test('scope: the key has to be there, and be a uuid or slug', async () => {
      const body = await make()
      for (const [key, code] of [
        [undefined, 'IDEMPOTENCY_KEY_MISSING'], ['', 'IDEMPOTENCY_KEY_MISSING'], ['a b', 'IDEMPOTENCY_KEY_INVALID'],
        ['a/b', 'IDEMPOTENCY_KEY_INVALID'], ['a'.repeat(256), 'IDEMPOTENCY_KEY_INVALID'], [['a', 'b'], 'IDEMPOTENCY_KEY_INVALID']
      ]) {
        const { status, json } = await alice.post(path, body, { key })
        assert.deepEqual([status, json.code], [400, code], String(key))
      }
      assert.equal((await alice.post(path, body, { key: `order-${randomUUID()}_a` })).status, 200)
    })

    test('who is not logged in gets 401, with or without a key, and no replay', async () => {
      const [key, body] = [randomUUID(), await make()]
      await alice.post(path, body, { key })
      const stranger = client(shop.service.url)
      assert.equal((await stranger.post(path, body, { key })).status, 401)
      assert.equal((await stranger.post(path, body)).status, 401)
      assert.equal((await stranger.get(path)).status, 401)
    })

    test('a request that makes no sense is 400, and GET lists what was made', async () => {
      assert.equal((await alice.post(path, {}, { key: randomUUID() })).status, 400)
      assert.equal((await alice.post(path, '{"', { key: randomUUID() })).status, 400)
      assert.equal((await alice.post(path, '[]', { key: randomUUID() })).status, 400)
      const { json: made } = await alice.post(path, await make(), { key: randomUUID() })
      const { status, json } = await alice.get(path)
      assert.equal(status, 200)
      assert.deepEqual(json.at(-1), made)
      assert.deepEqual((await shop.as('nobody').get(path)).json, [])
    })
  })
}

test('scope: a key belongs to one route and one actor', async () => {
  const key = randomUUID()
  const { json: order } = await alice.post('/api/orders', { items }, { key })
  assert.equal((await alice.post('/api/reservations', { sku: 'tea', quantity: 1 }, { key })).status, 200)
  for (const user of [shop.as('bob'), shop.as('alice', 'umbrella')]) {
    const { status, json } = await user.post('/api/orders', { items }, { key })
    assert.equal(status, 200)
    assert.notEqual(json.id, order.id)
    assert.equal((await user.get('/api/orders')).json.length, 1)
  }
})

test('scope: block if in-flight; testing checklist: duplicate POST returns the cached response once it is there', async () => {
  const key = randomUUID()
  const before = await shop.count('orders')
  const [first, second] = await whileLocked('LOCK TABLE orders IN SHARE MODE', async unlock => {
    const first = alice.post('/api/orders', { items }, { key })
    await until(async () => (await alice.get(`/api/idempotency/${key}`)).status === 200)

    const second = await alice.post('/api/orders', { items }, { key })
    assert.equal(await shop.metric('idempotency_inflight_gauge'), 1)
    assert.equal(await shop.metric('idempotency_database_inflight_gauge', { route: 'POST /api/orders' }), 1)
    const { json: [record] } = await alice.get(`/api/idempotency/${key}`)
    assert.deepEqual([record.status, record.route, record.actorId], ['PENDING', 'POST /api/orders', 'alice'])
    await unlock()
    return [await first, second]
  })
  assert.equal(second.status, 409)
  assert.equal(second.json.code, 'DUPLICATE_IN_PROGRESS')
  assert.match(second.headers['retry-after'], /^[1-9]\d*$/)
  assert.equal(first.status, 200)
  assert.equal((await alice.post('/api/orders', { items }, { key })).text, first.text)
  assert.equal(await shop.count('orders'), before + 1)
  assert.deepEqual((await until(() => shop.logOf(key).length === 3 && shop.logOf(key))).map(({ status, outcome }) => [status, outcome]),
    [[409, 'in_flight'], [200, 'completed'], [200, 'replayed']])
})

test('acceptance: idempotency.inflight.gauge goes up while requests are handled, and down again', async () => {
  const running = await whileLocked('LOCK TABLE reservations IN SHARE MODE', async unlock => {
    const running = Array.from({ length: 3 }, async (_, i) =>
      await alice.post('/api/reservations', { sku: `gauge-${i}`, quantity: 1 }, { key: randomUUID() }))
    await until(async () => await shop.metric('idempotency_inflight_gauge') === 3)
    await until(async () => await shop.metric('idempotency_database_inflight_gauge') === 3)
    await unlock()
    return await Promise.all(running)
  })
  assert.deepEqual(running.map(({ status }) => status), [200, 200, 200])
  assert.equal(await shop.metric('idempotency_inflight_gauge'), 0)
  assert.equal(await shop.metric('idempotency_database_inflight_gauge'), 0)
})

test('/metrics is what Prometheus reads, with the names of the ticket in HELP', async () => {
  const { status, headers, text } = await client(shop.service.url).get('/metrics')
  assert.equal(status, 200)
  assert.match(headers['content-type'], /^text\/plain; version=0\.0\.4/)
  for (const name of ['idempotency.replay.count', 'idempotency.conflict.count', 'idempotency.inflight.gauge']) {
    assert.match(text, new RegExp(`^# HELP ${name.replaceAll('.', '_')} ${name}`, 'm'))
  }
  for (const line of text.trimEnd().split('\n')) {
    assert.match(line, /^(?:# HELP [a-z_]+ .+|# TYPE [a-z_]+ (?:counter|gauge)|[a-z_]+(?:\{[a-z]+="[^"]*"(?:,[a-z]+="[^"]*")*\})? \d+)$/)
  }
})

test('scope: row-level status PENDING → COMPLETED / ERRORED', async () => {
  const [paid, declined] = [randomUUID(), randomUUID()]
  const { id: orderId } = await newOrder()

  // a lease has a row of the table while the provider is called
  const stateOf = async key => (await shop.database.query('SELECT state::text FROM idempotency.idempotency_key WHERE key = $1', [key]))[0]?.state
  await whileLocked('LOCK TABLE provider_operations IN SHARE MODE', async unlock => {
    const answer = alice.post('/api/payments', { orderId, amount: 10 }, { key: paid })
    await until(async () => await stateOf(paid) === 'pending')
    const { json: [record] } = await alice.get(`/api/idempotency/${paid}`)
    assert.deepEqual([record.status, record.route], ['PENDING', 'POST /api/payments'])
    await unlock()
    const { text } = await answer
    const { json: [completed] } = await alice.get(`/api/idempotency/${paid}`)
    assert.deepEqual([completed.status, completed.statusCode, completed.response], ['COMPLETED', 200, JSON.parse(text)])
  })
  assert.equal(await stateOf(paid), 'completed')

  for (let i = 0; i < 2; i++) {
    const { status, json } = await alice.post('/api/payments', { orderId, amount: 402 }, { key: declined })
    assert.deepEqual([status, json.code], [402, 'CARD_DECLINED'])
  }
  assert.equal(await stateOf(declined), 'errored')
  const { json: [errored] } = await alice.get(`/api/idempotency/${declined}`)
  assert.deepEqual([errored.status, errored.statusCode], ['ERRORED', 402])
  assert.equal(await shop.count('payments', 'order_id = $1', [orderId]), 1)
})

test('the state of a key is for its actor only, and unknown keys are 404', async () => {
  const key = randomUUID()
  await alice.post('/api/orders', { items }, { key })
  assert.equal((await alice.get(`/api/idempotency/${key}`)).status, 200)
  assert.equal((await shop.as('bob').get(`/api/idempotency/${key}`)).status, 404)
  assert.equal((await client(shop.service.url).get(`/api/idempotency/${key}`)).status, 401)
  assert.equal((await alice.get('/api/idempotency/a.b')).status, 400)
})

test('testing checklist: concurrent requests do not double-create order under load (simulate 10 parallel)', async () => {
  const user = shop.as('loader')
  const keys = Array.from({ length: 10 }, () => randomUUID())
  const answers = await Promise.all(keys.flatMap(key => Array.from({ length: 10 }, async () =>
    [key, await retry(async () => await user.post('/api/orders', { items }, { key }))])))
  assert.deepEqual(new Set(answers.map(([, { status }]) => status)), new Set([200]))
  assert.equal(new Set(answers.map(([key, { json }]) => `${key} ${json.id}`)).size, 10)
  assert.equal(await shop.count('orders', "user_id = 'loader'"), 10)
})

test('stock goes down once for each reservation, and not below zero', async () => {
  const available = async () => (await shop.database.query("SELECT available FROM stock WHERE sku = 'lamp'"))[0].available
  const [key, tooMany] = [randomUUID(), randomUUID()]
  for (let i = 0; i < 3; i++) assert.equal((await alice.post('/api/reservations', { sku: 'lamp', quantity: 60 }, { key })).status, 200)
  assert.equal(await available(), 40)
  for (let i = 0; i < 2; i++) {
    const { status, json } = await alice.post('/api/reservations', { sku: 'lamp', quantity: 41 }, { key: tooMany })
    assert.deepEqual([status, json.code], [422, 'OUT_OF_STOCK'])
  }
  assert.equal(await available(), 40)
})

test('payments and refunds need what they are for, of the same user', async () => {
  const order = await newOrder()
  const payment = await newPayment()
  const bob = shop.as('bob')
  for (const [user, orderId] of [[alice, randomUUID()], [alice, 'none'], [bob, order.id]]) {
    assert.equal((await user.post('/api/payments', { orderId, amount: 1 }, { key: randomUUID() })).status, 404)
  }
  for (const [user, paymentId] of [[alice, randomUUID()], [alice, 'none'], [bob, payment.id]]) {
    assert.equal((await user.post('/api/refunds', { paymentId }, { key: randomUUID() })).status, 404)
  }
})

test('a payment is given back once, also by ten requests with ten keys', async () => {
  const { id: paymentId } = await newPayment()
  const operations = await shop.count('provider_operations')
  const answers = await Promise.all(Array.from({ length: 10 }, async () =>
    await alice.post('/api/refunds', { paymentId }, { key: randomUUID() })))
  assert.deepEqual(answers.map(({ status }) => status).sort(), [200, ...Array(9).fill(422)])
  assert.equal(await shop.count('refunds', 'payment_id = $1', [paymentId]), 1)
  assert.equal(await shop.count('provider_operations'), operations + 1)
})
