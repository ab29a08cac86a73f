// How long keys live, and what is left of them.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { after, before, test } from 'node:test'
import { until } from '../../harness/index.js'
import { openShop } from './support.js'

const items = [{ sku: 'tea', quantity: 2 }]

let shop, alice
before(async () => {
  shop = await openShop()
  alice = shop.as('alice')
})
after(async () => await shop.close())

async function secondsKept (key) {
  const [{ kept }] = await shop.database.query(
    'SELECT extract(epoch FROM expires_at - finished_at)::int AS kept FROM idempotency.idempotency_key WHERE key = $1', [key])
  return kept
}

test('acceptance: key expiry is configurable (default 24h, min 5m, max 72h)', async () => {
  for (const [ttl, seconds] of [['', 24 * 3600], ['5min', 300], ['72 h', 72 * 3600]]) {
    await shop.service.restart({ env: { IDEMPOTENCY_TTL: ttl } })
    const key = randomUUID()
    await alice.post('/api/orders', { items }, { key })
    assert.equal(await secondsKept(key), seconds)
  }
})

for (const ttl of ['299s', '73h']) {
  test(`acceptance: a key expiry of ${ttl} is out of range, and the service does not get ready`, async () => {
    const began = shop.service.output.length
    await shop.service.kill()
    const starting = shop.service.start({ env: { IDEMPOTENCY_TTL: ttl } })
    await until(() => /idempotency\.ttl is .*must be from 5min to 3d/.test(shop.service.output.slice(began)))
    await shop.service.kill()
    await assert.rejects(starting)
  })
}

test('testing checklist: an expired key allows a new side effect', async () => {
  const name = new URL(shop.database.url).pathname.slice(1)
  await shop.database.query(`ALTER DATABASE ${name} SET idempotency.min_ttl = '1s'`)
  await shop.service.kill()
  await shop.service.start({ env: { IDEMPOTENCY_TTL: '1s' } })

  const key = randomUUID()
  const { json: first } = await alice.post('/api/orders', { items }, { key })
  const second = await until(async () => {
    const { json } = await alice.post('/api/orders', { items }, { key })
    return json.id !== first.id && json
  })
  const ids = (await alice.get('/api/orders')).json.map(({ id }) => id)
  assert.ok(ids.includes(first.id) && ids.includes(second.id))
})

test('acceptance: keys are cleaned by a scheduled sweep (success and expired), preserving the last 7d of metrics', async () => {
  const database = shop.database
  await database.query("UPDATE idempotency.idempotency_key SET expires_at = now() - interval '1 s'")
  assert.ok(await shop.count('idempotency.idempotency_key') > 0)
  const counted = async () => Number((await database.query("SELECT completed FROM idempotency.idempotency_stats WHERE action = 'POST /api/orders'"))[0].completed)
  const before = await counted()

  // a worker of the server sweeps by itself; called here, so that the test need not wait for it
  const [{ warnings }] = await database.query('SELECT warnings FROM idempotency.idempotency_health')
  assert.deepEqual(warnings, [])
  await database.query('CALL idempotency.idempotency_sweep()')
  assert.equal(await shop.count('idempotency.idempotency_key'), 0)
  assert.equal(await counted(), before)
  assert.ok(before > 0)
  const [{ retention }] = await database.query("SELECT current_setting('idempotency.metrics_retention')::interval = '7 days' AS retention")
  assert.equal(retention, true)

  // what was counted is written down for those days
  const [{ kept }] = await until(async () => {
    const rows = await database.query("SELECT sum(completed)::int AS kept FROM idempotency.idempotency_metric WHERE action = 'POST /api/orders'")
    return rows[0].kept >= before && rows
  }, { timeout: 150_000 })
  assert.equal(kept, before)
})

test('metrics target: conflict detection is 100% logged', async () => {
  const key = randomUUID()
  await shop.service.restart({ env: { IDEMPOTENCY_TTL: '1h' } })
  await alice.post('/api/orders', { items }, { key })
  const conflicts = await Promise.all(Array.from({ length: 20 }, async (_, i) =>
    await alice.post('/api/orders', { items: [{ sku: 'x', quantity: i + 1 }] }, { key })))
  assert.deepEqual(conflicts.map(({ status }) => status), Array(20).fill(409))
  await until(() => shop.logOf(key).filter(({ outcome, level, status }) => outcome === 'mismatched' && level === 'warn' && status === 409).length === 20)
})

test('metrics target: the replay ratio is watched (duplicate vs unique < 5%)', async () => {
  const key = randomUUID()
  for (let i = 0; i < 5; i++) await alice.post('/api/reservations', { sku: 'tea', quantity: 1 }, { key })
  await shop.database.query('CALL idempotency.idempotency_sweep()')
  const [counted] = await until(async () => {
    const rows = await shop.database.query(
      "SELECT requests::int, duplicates::int, ratio::float8, on_target FROM idempotency.idempotency_replay_ratio WHERE action = 'POST /api/reservations'")
    return rows[0]?.requests + rows[0]?.duplicates === 5 && rows
  }, { timeout: 150_000 })
  assert.deepEqual(counted, { requests: 1, duplicates: 4, ratio: 4, on_target: false })
})
