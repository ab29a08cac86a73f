// Several processes of the service on one database.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { after, before, test } from 'node:test'
import { client, createDatabase, retry, startService } from '../../harness/index.js'

const items = [{ sku: 'tea', quantity: 2 }]

let database, services
before(async () => {
  database = await createDatabase()
  const start = async () => await startService(new URL('..', import.meta.url), { env: { DATABASE_URL: database.url } })
  services = await Promise.all([start(), start(), start()])
})
after(async () => {
  await Promise.all(services.map(async service => await service.stop()))
  await database.drop()
})

async function metric ({ url }, name) {
  const { text } = await client(url).get('/metrics')
  return Number(new RegExp(`^${name}\\{route="POST /api/orders"\\} (\\d+)$`, 'm').exec(text)?.[1] ?? 0)
}

test('they may start at the same time, and create the tables once', async () => {
  for (const { url } of services) {
    const { status, json } = await client(url, { tenant: 'acme', user: 'alice' }).get('/api/orders')
    assert.deepEqual([status, json], [200, []])
  }
})

test('a request is done once, whichever is asked; their counters add up to that of the database', async () => {
  const key = randomUUID()
  const answers = await Promise.all([...services, ...services, ...services].map(async ({ url }) =>
    await retry(async () => await client(url, { tenant: 'acme', user: 'alice' }).post('/api/orders', { items }, { key }))))
  assert.deepEqual(answers.map(({ status }) => status), Array(9).fill(200))
  assert.equal(new Set(answers.map(({ text }) => text)).size, 1)
  assert.equal(answers.filter(({ headers }) => headers['idempotent-replayed'] === 'true').length, 8)
  assert.deepEqual(await database.query('SELECT count(*)::int FROM orders'), [{ count: 1 }])

  const own = await Promise.all(services.map(async service => await metric(service, 'idempotency_replay_count')))
  assert.equal(own.reduce((sum, count) => sum + count), 8)
  for (const service of services) assert.equal(await metric(service, 'idempotency_database_replay_count'), 8)
})
