// The 49 checks of the audit, by their numbers, each over HTTP or in the database.
import assert from 'node:assert/strict'
import { createHash, randomUUID } from 'node:crypto'
import { after, before, describe, test } from 'node:test'
import pg from 'pg'
import { cutProxy, retry, until } from '../../harness/index.js'
import { createApp } from '../dist/app.js'
import { ORDER_EVENT_NAMESPACE, deterministicKey, randomKey, timeOrderedKey } from '../dist/event-keys.js'
import { HEADER, createOrder, orderOf, startOrderService } from './support.js'

const BOOK = orderOf('book')
const UUID = /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/

// what changes an order, and the event that tells of it
const mutations = {
  reserve: { event: 'order.reserved' },
  cancel: { event: 'order.cancelled' },
  refund: { event: 'order.refunded' },
  refunds: { event: 'order.refunded', body: { amount: 300 } },
  modifications: { event: 'order.modified', body: orderOf('pen') },
  upgrade: { event: 'order.upgraded', body: { tier: 'gold' } }
}

let orders, database, alice, bob
before(async () => {
  orders = await startOrderService()
  database = orders.database
  alice = orders.as('alice')
  bob = orders.as('bob')
})
after(async () => await orders.stop())

async function eventsOf (id) {
  return (await alice.get(`/orders/${id}/events`)).json
}

function assertReplayed (repeat, first) {
  assert.equal(repeat.headers['idempotent-replayed'], 'true')
  assert.deepEqual([repeat.status, repeat.text, repeat.headers.location, repeat.headers['content-type']],
    [first.status, first.text, first.headers.location, first.headers['content-type']])
}

/** Let the time of a record pass. */
async function expire (key) {
  await database.query("UPDATE idempotency.idempotency_key SET expires_at = clock_timestamp() - interval '1 s' WHERE key = $1", [key])
}

/** For how many hours an answer is kept. */
async function hoursKept (key) {
  const [{ hours }] = await database.query('SELECT extract(epoch FROM expires_at - finished_at)::float / 3600 AS hours FROM idempotency.idempotency_key WHERE key = $1', [key])
  return hours
}

describe('7.1 Idempotency key requirements', () => {
  test('IK1: Key required for mutations', async () => {
    const { id } = await createOrder(alice, 'book')
    const refused = [await alice.post('/orders', BOOK)]
    for (const [path, { body }] of Object.entries(mutations)) refused.push(await alice.post(`/orders/${id}/${path}`, body))
    assert.deepEqual(refused.map(({ status, json }) => [status, json.code]), Array(7).fill([400, 'IDEMPOTENCY_KEY_MISSING']))
    assert.equal((await eventsOf(id)).length, 1)
  })

  test('IK2: Key format validated', async () => {
    for (const key of ['not-a-uuid-but-long-enough', 'f47ac10b58cc4372a5670e02b2c3d479', 'f47ac10b-58cc-4372-a567-0e02b2c3d47g']) {
      const { status, json } = await alice.post('/orders', BOOK, { key })
      assert.deepEqual([status, json.code, json.details.reason], [400, 'IDEMPOTENCY_KEY_INVALID', 'the key must have the form "uuid"'])
    }
    assert.equal((await alice.post('/orders', BOOK, { key: randomUUID().toUpperCase() })).status, 201)
  })

  test('IK3: Key min length', async () => {
    const reasons = await Promise.all([15, 16].map(async length => (await alice.post('/orders', BOOK, { key: 'a'.repeat(length) })).json.details.reason))
    assert.deepEqual(reasons, ['the key must have 16 to 255 characters', 'the key must have the form "uuid"'])
  })

  test('IK4: Key max length', async () => {
    const reasons = await Promise.all([255, 256].map(async length => (await alice.post('/orders', BOOK, { key: 'a'.repeat(length) })).json.details.reason))
    assert.deepEqual(reasons, ['the key must have the form "uuid"', 'the key must have 16 to 255 characters'])
  })

  test('IK5: Key scoped to user', async () => {
    const key = randomUUID()
    const answers = []
    for (const api of [alice, bob, orders.as('alice', 'globex')]) answers.push(await api.post('/orders', BOOK, { key }))
    assert.deepEqual(answers.map(({ status, headers }) => [status, headers['idempotent-replayed']]), Array(3).fill([201, undefined]))
    assert.equal(new Set(answers.map(({ json }) => json.id)).size, 3)
    assert.equal(await orders.ordersOf(key), 3)
    assertReplayed(await bob.post('/orders', BOOK, { key }), answers[1])
  })

  test('IK6: Key in CORS headers', async () => {
    const origin = 'https://shop.example'
    const preflight = await orders.stranger.request('OPTIONS', '/orders', undefined, {
      headers: { origin, 'access-control-request-method': 'POST', 'access-control-request-headers': HEADER }
    })
    assert.equal(preflight.status, 204)
    assert.ok(preflight.headers['access-control-allow-headers'].split(', ').includes('X-Idempotency-Key'))
    const { headers } = await alice.post('/orders', BOOK, { key: randomUUID(), headers: { origin } })
    assert.deepEqual(headers['access-control-expose-headers'].split(', '), ['X-Idempotency-Key', 'Idempotent-Replayed', 'Retry-After'])
  })
})

describe('7.2 Route-level idempotency', () => {
  test('RL1: Create order', async () => {
    const key = randomUUID()
    const first = await alice.post('/orders', BOOK, { key })
    const repeat = await alice.post('/orders', BOOK, { key })
    assert.deepEqual([first.status, first.json.status, first.json.items], [201, 'created', BOOK.items])
    assert.equal(first.headers.location, `/orders/${first.json.id}`)
    assertReplayed(repeat, first)
    assert.equal(await orders.ordersOf(key), 1)
  })

  for (const [number, path, expected] of [
    ['RL2: Reserve order', 'reserve', { status: 'reserved' }],
    ['RL3: Cancel order', 'cancel', { status: 'cancelled' }],
    ['RL4: Refund order', 'refund', { status: 'refunded', refunded: 1000 }],
    ['RL5: Partial refund', 'refunds', { status: 'partially_refunded', refunded: 300 }],
    ['RL6: Modifications', 'modifications', { items: orderOf('pen').items }],
    ['RL7: Upgrade', 'upgrade', { tier: 'gold' }]
  ]) {
    test(number, async () => {
      const { event, body } = mutations[path]
      const { id } = await createOrder(alice, 'book')
      const key = randomUUID()
      const first = await alice.post(`/orders/${id}/${path}`, body, { key })
      const repeat = await alice.post(`/orders/${id}/${path}`, body, { key })
      assert.equal(first.status, 200)
      assertReplayed(repeat, first)

      const order = (await alice.get(`/orders/${id}`)).json
      for (const [name, value] of Object.entries(expected)) assert.deepEqual([order[name], first.json[name]], [value, value])
      assert.deepEqual((await eventsOf(id)).map(({ type }) => type), ['order.created', event])
      const paid = await database.query('SELECT requests FROM provider_refunds JOIN refunds ON key = refunds.id::text WHERE order_id = $1', [id])
      assert.deepEqual(paid, path.startsWith('refund') ? [{ requests: 1 }] : [])
    })
  }

  test('RL8: Read operations skip', async () => {
    const { id } = await createOrder(alice, 'book')
    const key = randomUUID()
    for (const path of ['/orders', `/orders/${id}`, `/orders/${id}/events`]) {
      const read = await alice.get(path)
      assert.equal(read.status, 200)
      assert.equal((await alice.get(path, { key })).headers['idempotent-replayed'], undefined)
    }
    assert.equal(await orders.recordOf(key), undefined)
    await alice.post(`/orders/${id}/reserve`, undefined, { key })
    assert.equal((await alice.get(`/orders/${id}`, { key })).json.status, 'reserved')
  })

  test('RL9: Middleware order: authentication, and then idempotency', async () => {
    const key = randomUUID()
    const first = await alice.post('/orders', BOOK, { key })
    for (const headers of [{}, { authorization: 'Basic YTpi' }, { authorization: 'Bearer acme' }]) {
      const answer = await orders.stranger.post('/orders', BOOK, { key, headers })
      assert.deepEqual([answer.status, answer.json.code, answer.headers['idempotent-replayed']], [401, 'UNAUTHENTICATED', undefined])
      assert.ok(!answer.text.includes(first.json.id), 'a stranger was answered from the record')
    }
    const unknown = randomUUID()
    assert.equal((await orders.stranger.post('/orders', BOOK, { key: unknown })).status, 401)
    assert.equal(await orders.recordOf(unknown), undefined)
    assert.equal((await alice.post('/orders', BOOK, { key: unknown })).status, 201)
    assertReplayed(await alice.post('/orders', BOOK, { key }), first)
  })
})

describe('7.3 Caching strategy, without Redis', () => {
  test('RC1: In-progress tracked', async () => {
    const key = randomUUID()
    const first = alice.post('/orders', orderOf('slow'), { key })
    const { tenant, actor, action } = await orders.inFlight(key)
    assert.deepEqual({ tenant, actor, action }, { tenant: 'acme', actor: 'alice', action: 'POST /orders' })
    assert.equal((await alice.get(`/requests/${key}`)).json.state, 'in_progress')
    assert.equal((await first).status, 201)
    assert.deepEqual(await database.query('SELECT FROM idempotency.idempotency_in_flight WHERE key = $1', [key]), [])
    assert.equal((await alice.get(`/requests/${key}`)).json.state, 'completed')
  })

  test('RC2: Concurrent duplicates', async () => {
    const key = randomUUID()
    const first = alice.post('/orders', orderOf('slow'), { key })
    await orders.inFlight(key)
    const duplicate = await alice.post('/orders', orderOf('slow'), { key })
    assert.deepEqual([duplicate.status, duplicate.json.code], [409, 'DUPLICATE_IN_PROGRESS'])
    assert.ok(Number(duplicate.headers['retry-after']) >= 1)
    assertReplayed(await retry(() => alice.post('/orders', orderOf('slow'), { key })), await first)
    assert.equal(await orders.ordersOf(key), 1)
  })

  test('RC3: Success cached', async () => {
    const key = randomUUID()
    const first = await alice.post('/orders', BOOK, { key })
    assert.deepEqual([first.status, (await orders.recordOf(key)).state, await hoursKept(key)], [201, 'completed', 24])
    assertReplayed(await alice.post('/orders', BOOK, { key }), first)
  })

  test('RC4: Client errors cached', async () => {
    const key = randomUUID()
    const first = await alice.post('/orders', orderOf('book', 'sold-out'), { key })
    assert.deepEqual([first.status, first.json.code, (await orders.recordOf(key)).state, await hoursKept(key)], [422, 'SOLD_OUT', 'errored', 1])
    assertReplayed(await alice.post('/orders', orderOf('book', 'sold-out'), { key }), first)
    assert.equal(await orders.ordersOf(key), 0)
  })

  test('RC5: Server errors allow retry', async () => {
    const key = randomUUID()
    const failures = () => orders.service.output.split('the stock cannot be reached').length
    const before = failures()
    for (const _ of [1, 2]) {
      const answer = await alice.post('/orders', orderOf('broken'), { key })
      assert.deepEqual([answer.status, answer.json.code, answer.headers['idempotent-replayed']], [500, 'INTERNAL_ERROR', undefined])
      assert.deepEqual([await orders.recordOf(key), await orders.ordersOf(key)], [undefined, 0])
    }
    await until(() => failures() >= before + 2, { what: 'both attempts in the log' })
    assert.equal((await alice.post('/orders', BOOK, { key })).status, 201)
  })

  test('RC6: TTL configured', async () => {
    const { id } = await createOrder(alice, 'book')
    const [kept, refused] = [randomUUID(), randomUUID()]
    await alice.post(`/orders/${id}/refunds`, { amount: 1 }, { key: kept })
    await alice.post(`/orders/${id}/refunds`, { amount: 5000 }, { key: refused })
    // the record of a lease has room for renewals, and is kept up to a eighth longer
    const hours = await hoursKept(kept)
    assert.ok(hours >= 24 && hours <= 27, `${hours}`)
    assert.equal(await hoursKept(refused), 1)
  })

  test('RC7: Graceful degradation', async () => {
    let proxy
    const apart = await startOrderService({ through: async url => (proxy = await cutProxy(url)).url })
    const api = apart.as('alice')
    const key = randomUUID()
    try {
      proxy.cutAll()
      proxy.cutWhen(() => true, { times: Infinity })
      const refused = await api.post('/orders', BOOK, { key })
      assert.deepEqual([refused.status, refused.json.code, refused.headers['retry-after']], [503, 'DATABASE_UNAVAILABLE', '1'])
      assert.equal((await api.get('/orders')).status, 503)
      assert.equal(await apart.ordersOf(key), 0)

      proxy.cutWhen(() => false)
      const answer = await retry(() => api.post('/orders', BOOK, { key }))
      assert.deepEqual([answer.status, await apart.ordersOf(key)], [201, 1])
    } finally {
      await apart.stop()
      await proxy.close()
    }
  })
})

describe('7.4 Database', () => {
  test('DB1: Key stored in DB', async () => {
    const key = randomUUID()
    const { json: { id } } = await alice.post('/orders', BOOK, { key })
    assert.deepEqual(await database.query('SELECT idempotency_key FROM orders WHERE id = $1', [id]), [{ idempotency_key: key }])
  })

  test('DB2: Unique constraint', async () => {
    const { id } = await createOrder(alice, 'book')
    await assert.rejects(database.query(
      `INSERT INTO orders (id, tenant, user_id, items, total, idempotency_key)
       SELECT gen_random_uuid(), tenant, user_id, items, total, idempotency_key FROM orders WHERE id = $1`, [id]),
    { code: '23505', constraint: 'idx_orders_unique_idempotency_per_tenant' })
  })

  test('DB3: Tenant-scoped unique', async () => {
    const [{ indexdef }] = await database.query("SELECT indexdef FROM pg_indexes WHERE indexname = 'idx_orders_unique_idempotency_per_tenant'")
    assert.match(indexdef, /^CREATE UNIQUE INDEX .* \(tenant, user_id, idempotency_key\)$/)
    const key = randomUUID()
    assert.equal((await alice.post('/orders', BOOK, { key })).status, 201)
    assert.equal((await orders.as('alice', 'globex').post('/orders', BOOK, { key })).status, 201)
    assert.deepEqual(await database.query('SELECT tenant FROM orders WHERE idempotency_key = $1 ORDER BY tenant', [key]), [{ tenant: 'acme' }, { tenant: 'globex' }])
  })

  test('DB4: Model lookup method', async () => {
    const key = randomUUID()
    const { json: order } = await alice.post('/orders', BOOK, { key })
    assert.deepEqual((await alice.get(`/orders?idempotencyKey=${key}`)).json, [order])
    assert.deepEqual((await bob.get(`/orders?idempotencyKey=${key}`)).json, [])
  })

  test('DB5: DB check on Redis miss: there is no miss, the record commits with the order', async () => {
    const key = randomUUID()
    const first = await alice.post('/orders', BOOK, { key })
    const [{ together }] = await database.query(
      `SELECT orders.xmin = record.xmin AS together FROM orders, idempotency.idempotency_key AS record
        WHERE orders.idempotency_key = $1 AND record.key = $1`, [key])
    assert.equal(together, true)
    await orders.service.restart()
    assertReplayed(await alice.post('/orders', BOOK, { key }), first)
  })

  test('DB6: Duplicate error defined', async () => {
    const key = randomUUID()
    const { json: { id } } = await alice.post('/orders', BOOK, { key })
    const [{ forgotten }] = await database.query("SELECT idempotency.idempotency_forget('acme', 'POST /orders', $1, 'alice') AS forgotten", [key])
    assert.equal(forgotten, true)
    const { status, json } = await alice.post('/orders', BOOK, { key })
    assert.deepEqual([status, json.code, json.details], [409, 'DUPLICATE_ORDER', { orderId: id }])
    assert.equal(await orders.ordersOf(key), 1)
  })
})

describe('7.5 Event idempotency', () => {
  let id, events
  before(async () => {
    id = (await createOrder(alice, 'book')).id
    for (const [path, { body }] of Object.entries(mutations)) {
      if (path !== 'cancel') await alice.post(`/orders/${id}/${path}`, body, { key: randomUUID() })
    }
    // what comes after the refund of everything is refused, and no event
    events = await until(async () => {
      const all = await eventsOf(id)
      return all.every(({ deliveries }) => deliveries.length > 0) && all
    }, { what: 'all events to be delivered' })
    assert.deepEqual(events.map(({ type }) => type), ['order.created', 'order.reserved', 'order.refunded'])
  })

  test('EV1: Events have keys', () => {
    for (const { idempotencyKey } of events) assert.match(idempotencyKey, UUID)
    assert.equal(new Set(events.map(({ idempotencyKey }) => idempotencyKey)).size, events.length)
  })

  test('EV2: Keys deterministic', async () => {
    for (const { type, sequenceNumber, idempotencyKey } of events) {
      assert.equal(idempotencyKey, deterministicKey(type, id, sequenceNumber))
      const [{ key }] = await database.query('SELECT idempotency.idempotency_event_key($1, $2, $3, $4) AS key', [type, id, sequenceNumber, ORDER_EVENT_NAMESPACE])
      assert.equal(idempotencyKey, key)
    }
  })

  test('EV3: Sequence numbers', () => {
    assert.deepEqual(events.map(({ sequenceNumber }) => sequenceNumber), [1, 2, 3])
  })

  test('EV4: Key generators', () => {
    const version = key => Number(key[14])
    for (const event of events) {
      assert.deepEqual([event.idempotencyKey, event.deliveries[0], event.id].map(version), [5, 4, 7])
    }
    assert.deepEqual(events.map(event => event.id), events.map(event => event.id).toSorted())

    const inOrder = Array.from({ length: 10_000 }, timeOrderedKey)
    assert.deepEqual(inOrder, [...new Set(inOrder)].sort())
    assert.equal(new Set(Array.from({ length: 1000 }, randomKey)).size, 1000)
  })

  test('EV5: Namespace UUID', () => {
    assert.match(ORDER_EVENT_NAMESPACE, UUID)
    const digest = createHash('sha1')
      .update(Buffer.from(ORDER_EVENT_NAMESPACE.replaceAll('-', ''), 'hex'))
      .update(`order.created:${id}:1`)
      .digest('hex')
    // version 5 and the variant take six of the bits of the hash
    const bits = key => key.replaceAll('-', '').replace(/^(.{12}).(.{3}).(.{15})$/, '$1$2$3')
    assert.equal(bits(events[0].idempotencyKey), bits(digest.slice(0, 32)))
  })

  test('EV: a consumer sees an event once, however often it is delivered', async () => {
    assert.deepEqual(events.map(({ notifications }) => notifications), [1, 1, 1])
    await database.query('UPDATE order_events SET acknowledged_at = NULL WHERE order_id = $1', [id])
    const again = await until(async () => {
      const all = await eventsOf(id)
      return all.every(({ deliveries }) => deliveries.length === 2) && all
    }, { what: 'all events to be delivered again' })
    assert.deepEqual(again.map(({ notifications }) => notifications), [1, 1, 1])
  })
})

describe('7.6 Error responses', () => {
  test('ER1: Missing key is 400', async () => {
    for (const headers of [{}, { [HEADER]: '' }, { [HEADER]: '  ' }]) {
      const { status, json } = await alice.post('/orders', BOOK, { headers })
      assert.deepEqual([status, json.code, json.details.reason], [400, 'IDEMPOTENCY_KEY_MISSING', 'the header X-Idempotency-Key is missing'])
    }
  })

  test('ER2: Invalid format is 400', async () => {
    for (const key of ['abc', [randomUUID(), randomUUID()]]) {
      const { status, json } = await alice.post('/orders', BOOK, { key })
      assert.deepEqual([status, json.code], [400, 'IDEMPOTENCY_KEY_INVALID'])
    }
  })

  test('ER3: Concurrent is 409', async () => {
    const { id } = await createOrder(alice, 'slow')
    const key = randomUUID()
    const first = alice.post(`/orders/${id}/refund`, undefined, { key })
    await orders.inFlight(key)
    const { status, json, headers } = await alice.post(`/orders/${id}/refund`, undefined, { key })
    assert.deepEqual([status, json.code], [409, 'DUPLICATE_IN_PROGRESS'])
    assert.equal(json.details.retryAfter, Number(headers['retry-after']))
    assert.equal((await first).status, 200)
  })

  test('ER4: Completed is the cached response', async () => {
    const key = randomUUID()
    const body = '{"items": [{"sku": "book", "quantity": 1}]}'
    const first = await alice.post('/orders', body, { key })
    assertReplayed(await alice.post('/orders', body, { key }), first)
    assertReplayed(await alice.post('/orders', '{ "items":[{"quantity":1,"sku":"book"}] }', { key }), first)
    const other = await alice.post('/orders', orderOf('pen'), { key })
    assert.deepEqual([other.status, other.json.code], [422, 'IDEMPOTENCY_KEY_REUSED'])
    assert.ok(!other.text.includes(first.json.id))
  })

  test('ER5: Descriptive codes', async () => {
    const { id } = await createOrder(alice, 'book')
    const key = randomUUID()
    await alice.post('/orders', BOOK, { key })
    const errors = [
      [400, 'IDEMPOTENCY_KEY_MISSING', await alice.post('/orders', BOOK)],
      [400, 'IDEMPOTENCY_KEY_INVALID', await alice.post('/orders', BOOK, { key: 'x' })],
      [400, 'VALIDATION_FAILED', await alice.post('/orders', { items: [] }, { key: randomUUID() })],
      [400, 'FST_ERR_CTP_INVALID_JSON_BODY', await alice.post('/orders', '{', { key: randomUUID() })],
      [401, 'UNAUTHENTICATED', await orders.stranger.get('/orders')],
      [404, 'ORDER_NOT_FOUND', await alice.get(`/orders/${randomUUID()}`)],
      [404, 'NOT_FOUND', await alice.get('/nowhere')],
      [404, 'REQUEST_UNKNOWN', await alice.get(`/requests/${randomUUID()}`)],
      [422, 'IDEMPOTENCY_KEY_REUSED', await alice.post('/orders', orderOf('pen'), { key })],
      [422, 'REFUND_TOO_LARGE', await alice.post(`/orders/${id}/refunds`, { amount: 1001 }, { key: randomUUID() })],
      [422, 'SOLD_OUT', await alice.post('/orders', orderOf('sold-out'), { key: randomUUID() })],
      [500, 'INTERNAL_ERROR', await alice.post('/orders', orderOf('broken'), { key: randomUUID() })]
    ]
    for (const [status, code, answer] of errors) {
      assert.deepEqual([answer.status, answer.json.code], [status, code])
      assert.deepEqual(Object.keys(answer.json), ['code', 'error', 'details'])
      assert.ok(answer.json.error.length > 0)
      assert.equal(typeof answer.json.details, 'object')
    }
  })

  test('ER6: Duplicate logging', async () => {
    const key = randomUUID()
    await alice.post('/orders', BOOK, { key })
    await alice.post('/orders', BOOK, { key })
    await alice.post('/orders', orderOf('pen'), { key })
    const lines = await until(() => {
      const found = orders.service.output.split('\n').filter(line => line.includes(key)).map(line => JSON.parse(line))
      return found.length === 2 && found
    }, { what: 'two warnings' })
    assert.deepEqual(lines.map(({ level, msg, statusCode }) => [level, msg, statusCode]), [
      [40, 'duplicate request: it is answered with the first answer', 201],
      [40, 'the idempotency key was used with a different request', 422]
    ])
  })
})

describe('7.7 Service integration', () => {
  test('SI1: Service stores key', async () => {
    const key = randomUUID()
    const { json: { id, idempotencyKey } } = await alice.post('/orders', BOOK, { key })
    assert.equal(idempotencyKey, key)
    assert.equal((await alice.get(`/orders/${id}`)).json.idempotencyKey, key)
  })

  test('SI2: Key on request', async () => {
    // what the handler finds on the request is the key, and not the header as it was written
    const key = randomUUID()
    const first = await alice.post('/orders', BOOK, { key: `"${key}"` })
    assert.equal(first.json.idempotencyKey, key)
    assertReplayed(await alice.post('/orders', BOOK, { key }), first)
  })

  test('SI3: Global cache hook', async () => {
    process.env.LOG_LEVEL = 'silent'
    const pool = new pg.Pool({ connectionString: database.url })
    const app = await createApp(pool)
    let calls = 0
    app.post('/later', async (_request, reply) => reply.code(202).send({ calls: ++calls }))
    const send = headers => app.inject({ method: 'POST', url: '/later', headers: { authorization: 'Bearer acme:alice', ...headers } })
    try {
      assert.equal((await send({})).json().code, 'IDEMPOTENCY_KEY_MISSING')
      const key = randomUUID()
      for (const replayed of [undefined, 'true']) {
        const { statusCode, body, headers } = await send({ [HEADER]: key })
        assert.deepEqual([statusCode, body, headers['idempotent-replayed']], [202, '{"calls":1}', replayed])
      }
    } finally {
      await app.close()
      await pool.end()
    }
  })

  test('SI4: Validator accepts key', async () => {
    const key = randomUUID()
    const invalid = await alice.post('/orders', { items: [{ sku: 'book', quantity: 0 }] }, { key })
    assert.deepEqual([invalid.status, invalid.json.code], [400, 'VALIDATION_FAILED'])
    // nothing was begun, so that the same key is good for the corrected request
    assert.equal(await orders.recordOf(key), undefined)
    assert.equal((await alice.post('/orders', BOOK, { key })).status, 201)
  })

  test('SI5: Schema validates format', async () => {
    const codeOf = async key => (await alice.post('/orders', BOOK, { key })).json.code ?? 'accepted'
    const uuid = randomUUID()
    assert.deepEqual(await Promise.all([uuid.slice(0, 15), uuid.slice(0, 16), uuid, uuid.padEnd(255, '0'), uuid.padEnd(256, '0')].map(codeOf)),
      ['IDEMPOTENCY_KEY_INVALID', 'IDEMPOTENCY_KEY_INVALID', 'accepted', 'IDEMPOTENCY_KEY_INVALID', 'IDEMPOTENCY_KEY_INVALID'])
  })
})

describe('7.8 Timing and TTL', () => {
  test('TT1: Processing window', async () => {
    const { id } = await createOrder(alice, 'slow')
    const key = randomUUID()
    const refund = () => alice.post(`/orders/${id}/refund`, undefined, { key })
    const lost = refund().catch(error => error)
    await until(async () => (await orders.recordOf(key))?.recovery_point === 'set aside' &&
      (await database.query('SELECT FROM provider_refunds JOIN refunds ON key = refunds.id::text WHERE order_id = $1', [id])).length > 0)
    await orders.service.restart()
    assert.equal((await lost).code, 'ECONNRESET')

    const [{ window }] = await database.query("SELECT date_trunc('minute', lease_expires_at - created_at)::text AS window FROM idempotency.idempotency_key WHERE key = $1", [key])
    assert.equal(window, '00:30:00')
    const early = await refund()
    assert.equal(early.status, 409)
    assert.ok(Number(early.headers['retry-after']) >= 1)

    // after the window, the next attempt goes on where the dead one was: the money has left already
    await database.query("UPDATE idempotency.idempotency_key SET lease_expires_at = clock_timestamp() - interval '1 s' WHERE key = $1", [key])
    const { status, json } = await refund()
    assert.deepEqual([status, json.status, json.refunded], [200, 'refunded', 1000])
    const payments = await database.query('SELECT amount, requests, provider_refunds.reference FROM provider_refunds JOIN refunds USING (amount) WHERE key = refunds.id::text AND order_id = $1', [id])
    assert.deepEqual(payments, [{ amount: 1000, requests: 2, reference: json.refund.reference }])
    assert.equal((await orders.recordOf(key)).attempt, 2)
  })

  test('TT2: Success TTL', async () => {
    const { id } = await createOrder(alice, 'book')
    const key = randomUUID()
    const upgrade = () => alice.post(`/orders/${id}/upgrade`, { tier: 'gold' }, { key })
    assertReplayed(await upgrade().then(upgrade), await upgrade())
    assert.equal(await hoursKept(key), 24)
    await expire(key)
    assert.equal((await upgrade()).headers['idempotent-replayed'], undefined)
    assert.equal((await eventsOf(id)).length, 3)
  })

  test('TT3: Error TTL', async () => {
    const key = randomUUID()
    const order = () => alice.post('/orders', orderOf('sold-out'), { key })
    assert.equal((await order()).status, 422)
    assert.equal((await order()).headers['idempotent-replayed'], 'true')
    assert.equal(await hoursKept(key), 1)
    await expire(key)
    assert.equal((await order()).headers['idempotent-replayed'], undefined)
  })

  test('TT4: TTL documented in error messages', async () => {
    const key = randomUUID()
    const first = alice.post('/orders', orderOf('slow'), { key })
    await orders.inFlight(key)
    for (const answer of [
      await alice.post('/orders', BOOK),
      await alice.post('/orders', BOOK, { key: 'x' }),
      await alice.post('/orders', orderOf('slow'), { key }),
      await alice.post('/orders', BOOK, { key })
    ]) {
      assert.deepEqual(answer.json.details.lifetimes, { success: '24 hours', clientError: '1 hour', processing: '30 minutes' })
    }
    await first
  })

  test('TT5: Timestamps tracked', async () => {
    const key = randomUUID()
    const first = alice.post('/orders', orderOf('slow'), { key })
    await orders.inFlight(key)
    const running = (await alice.get(`/requests/${key}`)).json
    await first
    const { startedAt, completedAt, status } = (await alice.get(`/requests/${key}`)).json
    assert.deepEqual([running.startedAt, running.completedAt, status], [startedAt, null, 201])
    assert.ok(Date.parse(completedAt) - Date.parse(startedAt) >= 1900, `${startedAt} to ${completedAt}`)
  })
})
