// The examples' tests trust in these tools, so each is tried once.
import assert from 'node:assert/strict'
import { after, before, test } from 'node:test'
import pg from 'pg'
import {
  afterClientBytes, afterClientMessages, beforeAnswer, beforeStatement, client, createDatabase,
  cutProxy, restartDatabase, retry, startService
} from '../index.js'

const echo = new URL('./echo/', import.meta.url)

test('a client sends its login, its key and its body', async () => {
  const service = await startService(echo)
  const api = client(service.url, { tenant: 'acme', user: 'ann', keyHeader: 'X-Key' })

  const { status, json } = await api.post('/orders?a=1', { sku: 'tea' }, { key: ['one', 'two'] })
  assert.equal(status, 200)
  assert.equal(json.method, 'POST')
  assert.equal(json.url, '/orders?a=1')
  assert.equal(json.body, '{"sku":"tea"}')
  assert.deepEqual(json.headers['x-key'], ['one', 'two'])
  assert.deepEqual(json.headers.authorization, ['Bearer acme:ann'])
  assert.deepEqual(await service.stop(), { code: 0, signal: null })
})

test('a service that is killed loses its state and keeps its address', async () => {
  const service = await startService(echo)
  const api = client(service.url)
  const url = service.url

  assert.equal((await api.get('/')).json.requests, 1)
  assert.equal((await api.get('/')).json.requests, 2)
  await service.kill()
  await assert.rejects(api.get('/'), { code: 'ECONNREFUSED' })
  await service.start()
  assert.equal(service.url, url)
  assert.equal((await api.get('/')).json.requests, 1)
  assert.equal(service.output, 'listening\nlistening\n')
  await service.kill()
})

test('a retry outlives a lost connection and a server that is busy', async () => {
  const service = await startService(echo, { env: { BUSY: '2' } })
  const api = client(service.url)

  const { json } = await retry(() => api.post('/orders', {}, { key: 'k' }))
  assert.equal(json.requests, 4)
  assert.deepEqual(json.headers['idempotency-key'], ['k'])
  await service.kill()
})

test('a service that ends at once tells why', async () => {
  const env = { NODE_OPTIONS: '--import=no-such-package' }
  await assert.rejects(startService(echo, { env }), /no-such-package/)
})

test('a database outlives the crash of its server', { skip: !process.env.PGDATA }, async () => {
  const database = await createDatabase()

  await database.query('CREATE TABLE t AS SELECT 1 AS n')
  await restartDatabase()
  assert.deepEqual(await database.query('SELECT n FROM t'), [{ n: 1 }])
  await database.drop()
})

let database, proxy

before(async () => {
  database = await createDatabase()
  proxy = await cutProxy(database.url)
})

after(async () => {
  await proxy.close()
  await database.drop()
})

// Run statements through the proxy until one fails; how many did not
async function run (statements) {
  const connection = new pg.Client({ connectionString: proxy.url })
  connection.on('error', () => {})
  let done = 0
  try {
    await connection.connect()
    for (const statement of statements) {
      await connection.query(statement)
      done += 1
    }
  } catch {
    // the cut
  }
  await connection.end()
  return done
}

async function rows () {
  const [{ count }] = await database.query('SELECT count(*)::int FROM counted')
  return count
}

const insert = 'INSERT INTO counted DEFAULT VALUES'

for (const { what, condition, done, left } of [
  { what: 'nowhere', condition: () => false, done: 3, left: 1 },
  { what: 'before the answer to COMMIT', condition: beforeAnswer('COMMIT'), done: 2, left: 1 },
  { what: 'before COMMIT', condition: beforeStatement(/COMMIT/), done: 2, left: 0 },
  { what: 'before the log-in', condition: afterClientMessages(1), done: 0, left: 0 },
  { what: 'within a message', condition: afterClientBytes(10), done: 0, left: 0 }
]) {
  test(`a proxy cuts ${what}`, async () => {
    await database.query('DROP TABLE IF EXISTS counted')
    await database.query('CREATE TABLE counted (id serial)')
    const cuts = proxy.cuts

    proxy.cutWhen(condition)
    assert.equal(await run(['BEGIN', insert, 'COMMIT']), done)
    assert.equal(proxy.cuts - cuts, done === 3 ? 0 : 1)
    assert.equal(await rows(), left)
  })
}
