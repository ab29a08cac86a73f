// The plugin of Fastify: by `inject` where a real connection makes no difference, else over sockets.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { once } from 'node:events'
import http from 'node:http'
import { createRequire } from 'node:module'
import { PassThrough, Readable } from 'node:stream'
import { after, afterEach, before, beforeEach, describe, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { createGunzip, gzipSync } from 'node:zlib'
import compress from '@fastify/compress'
import cors from '@fastify/cors'
import Fastify from 'fastify'
import pg from 'pg'
import { Refusal, createIdempotency } from 'pg-idempotency'
import idempotencyPlugin from 'pg-idempotency/fastify'
import { createDatabase } from './support/database.js'

const PROTECTED = { config: { idempotency: true } }

let database
before(async () => {
  database = await createDatabase()
  database.pool.on('error', () => {})
  await database.pool.query('CREATE TABLE orders (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, key text)')
})
after(async () => await database.drop())

let pool, idempotency, app, logged
beforeEach(async () => {
  pool = new pg.Pool({ connectionString: database.url, max: 5 })
  idempotency = createIdempotency({ pool })
  app = await createApp()
})
afterEach(async () => {
  await app.close()
  assert.equal(pool.totalCount, pool.idleCount, 'a connection has not come back to the pool')
  await pool.end()
})

/** An application with the plugin, whose log is in `logged`. */
async function createApp ({ server = {}, plugin = {}, pool: ofPool = idempotency } = {}) {
  logged = []
  const stream = { write: line => { logged.push(JSON.parse(line)) } }
  const app = Fastify({ logger: { level: 'warn', stream }, forceCloseConnections: true, ...server })
  await app.register(idempotencyPlugin, { idempotency: ofPool, actor: request => request.headers.user ?? 'alice', ...plugin })
  return app
}

/** The same application once more, with other options. */
async function again (options) {
  await app.close()
  app = await createApp(options)
}

function post (url, key, payload, headers = {}) {
  return app.inject({ method: 'POST', url, headers: { 'idempotency-key': key, ...headers }, payload })
}

function insert (request) {
  return idempotency.current().query('INSERT INTO orders (key) VALUES ($1)', [request.idempotency.key])
}

async function ordersOf (key) {
  const { rows: [{ count }] } = await database.pool.query('SELECT count(*)::int FROM orders WHERE key = $1', [key])
  return count
}

async function recordOf (key) {
  const { rows: [row] } = await database.pool.query(
    'SELECT state, status_code, action, actor, headers, response::text, body FROM idempotency.idempotency_key WHERE key = $1', [key])
  return row
}

async function until (condition) {
  for (let tries = 0; tries < 1000; tries++) {
    const result = await condition()
    if (result) return result
    await sleep(10)
  }
  throw new Error(`waited in vain for ${condition}`)
}

/** A promise, and the function that resolves it. */
function signal () {
  let give
  const promise = new Promise(resolve => { give = resolve })
  return { promise, give }
}

function warnings () {
  return logged.filter(({ level }) => level === 40).map(({ msg }) => msg)
}

/** Listen, and send a request over a socket of its own. */
async function overSocket (method, url, { key, headers = {}, body } = {}) {
  if (!app.server.listening) await app.listen({ host: '127.0.0.1', port: 0 })
  const request = http.request({
    host: '127.0.0.1',
    port: app.server.address().port,
    agent: false,
    method,
    path: url,
    headers: { ...(key === undefined ? {} : { 'idempotency-key': key }), ...headers }
  })
  const answer = new Promise((resolve, reject) => {
    request.on('error', reject)
    request.on('response', async response => {
      try {
        const chunks = []
        for await (const chunk of response) chunks.push(chunk)
        const content = Buffer.concat(chunks)
        resolve({ status: response.statusCode, headers: response.headers, content, text: content.toString() })
      } catch (error) {
        reject(error)
      }
    })
  })
  answer.catch(() => {})
  if (body !== null) request.end(body)
  return { request, answer }
}

describe('a protected route', () => {
  test('does the work once, and a repeat gets the same bytes', async () => {
    const text = '{"id": 9007199254740993,  "price": 1.50}'
    let calls = 0
    app.post('/orders', PROTECTED, async (request, reply) => {
      calls++
      await insert(request)
      return reply.code(201).header('location', '/orders/1').type('application/json; charset=utf-8').send(text)
    })
    const key = randomUUID()
    const first = await post('/orders', key, { item: 1 })
    const repeat = await post('/orders', key, { item: 1 })
    assert.deepEqual([first.statusCode, first.body, first.headers.location], [201, text, '/orders/1'])
    assert.deepEqual([repeat.statusCode, repeat.body, repeat.headers.location], [201, text, '/orders/1'])
    assert.equal(repeat.headers['content-type'], first.headers['content-type'])
    assert.equal(first.headers['idempotent-replayed'], undefined)
    assert.equal(repeat.headers['idempotent-replayed'], 'true')
    assert.equal(calls, 1)
    assert.equal(await ordersOf(key), 1)
  })

  test('sends nothing before the answer is committed', async () => {
    app.post('/orders', PROTECTED, async request => { await insert(request); return {} })
    let found
    app.addHook('onSend', async request => { found = await ordersOf(request.headers['idempotency-key']) })
    await post('/orders', randomUUID())
    assert.equal(found, 1)
  })

  test('replays past the serializer of the route', async () => {
    const schema = { response: { 200: { type: 'object', properties: { kept: { type: 'number' } } } } }
    app.post('/orders', { ...PROTECTED, schema }, async () => ({ kept: 1.5, dropped: true }))
    const wrapped = (_request, reply, done) => {
      reply.serializer(payload => JSON.stringify({ wrapped: payload }))
      done()
    }
    app.post('/wrapped', { ...PROTECTED, preHandler: wrapped }, async (_request, reply) => { reply.type('application/json'); return { a: 1 } })
    app.post('/untyped', { ...PROTECTED, preHandler: wrapped }, async () => ({ a: 1 }))
    for (const url of ['/orders', '/wrapped', '/untyped']) {
      const key = randomUUID()
      const first = await post(url, key)
      const repeat = await post(url, key)
      assert.equal(repeat.headers['idempotent-replayed'], 'true')
      assert.equal(repeat.body, first.body)
      assert.equal(repeat.headers['content-type'], first.headers['content-type'])
    }
  })

  test('has its claim on the request, and its transaction wherever the handler goes', async () => {
    app.post('/orders', PROTECTED, async request => {
      const before = idempotency.current()
      await sleep(1)
      return { same: before !== undefined && before === idempotency.current() && before === request.idempotency.tx, ...request.idempotency.scope }
    })
    app.post('/plain', async request => ({ idempotency: request.idempotency, current: idempotency.current() ?? null }))
    const key = randomUUID()
    assert.deepEqual((await post('/orders', key)).json(), { same: true, tenant: null, actor: 'alice', action: 'POST /orders', key })
    assert.deepEqual((await post('/plain', key)).json(), { idempotency: null, current: null })
  })

  test('has an action of its template, with the prefix, and compares the parameters', async () => {
    await app.register(async child => {
      child.post('/orders/:id/cancel', PROTECTED, async request => ({ id: request.params.id, note: request.query.note }))
    }, { prefix: '/v1' })
    const key = randomUUID()
    assert.deepEqual((await post('/v1/orders/7/cancel?note=a', key)).json(), { id: '7', note: 'a' })
    assert.equal((await recordOf(key)).action, 'POST /v1/orders/:id/cancel')
    assert.equal((await post('/v1/orders/8/cancel?note=a', key)).statusCode, 422)
    assert.equal((await post('/v1/orders/7/cancel?note=b', key)).statusCode, 422)
    assert.equal((await post('/v1/orders/7/cancel?note=a', key)).statusCode, 200)
  })

  test('belongs to its actor', async () => {
    app.post('/orders', PROTECTED, async request => ({ for: request.headers.user }))
    const key = randomUUID()
    assert.deepEqual((await post('/orders', key, {}, { user: 'alice' })).json(), { for: 'alice' })
    assert.deepEqual((await post('/orders', key, {}, { user: 'bob' })).json(), { for: 'bob' })
  })

  test('refuses a key that is missing, empty, sent twice or malformed', async () => {
    let calls = 0
    app.post('/orders', PROTECTED, async () => { calls++ })
    const url = '/orders'
    for (const [headers, code] of [
      [{}, 'IDEMPOTENCY_KEY_MISSING'],
      [{ 'idempotency-key': ' ' }, 'IDEMPOTENCY_KEY_MISSING'],
      [{ 'idempotency-key': 'a b' }, 'IDEMPOTENCY_KEY_INVALID'],
      [{ 'idempotency-key': ['a', 'b'] }, 'IDEMPOTENCY_KEY_INVALID']
    ]) {
      const { answer } = await overSocket('POST', url, { headers })
      const { status, text, headers: { 'content-type': type } } = await answer
      assert.deepEqual([status, JSON.parse(text).code], [400, code])
      assert.equal(type, 'application/problem+json; charset=utf-8')
    }
    assert.equal(calls, 0)
  })

  test('need not have a key where it is not required', async () => {
    app.post('/orders', { config: { idempotency: { required: false } } }, async request => ({ idempotency: request.idempotency }))
    assert.deepEqual((await app.inject({ method: 'POST', url: '/orders' })).json(), { idempotency: null })
  })

  test('answers one of ten requests at once, and the others with it or with 409', async () => {
    let calls = 0
    app.post('/orders', PROTECTED, async (request, reply) => {
      calls++
      await insert(request)
      reply.code(201)
      return { calls }
    })
    const key = randomUUID()
    const sent = await Promise.all(Array.from({ length: 10 }, () => overSocket('POST', '/orders', { key })))
    const answers = await Promise.all(sent.map(({ answer }) => answer))
    for (const { status, headers, text } of answers) {
      if (status === 409) {
        assert.equal(JSON.parse(text).code, 'DUPLICATE_IN_PROGRESS')
        assert.ok(Number(headers['retry-after']) >= 1)
      } else {
        assert.deepEqual([status, text], [201, '{"calls":1}'])
      }
    }
    assert.equal(calls, 1)
    assert.equal(await ordersOf(key), 1)
  })

  test('can wait for the first request', async () => {
    const { promise, give } = signal()
    const begun = signal()
    app.post('/orders', { config: { idempotency: { wait: '30s' } } }, async () => {
      begun.give()
      await promise
      return { calls: 1 }
    })
    const key = randomUUID()
    const first = post('/orders', key)
    await begun.promise
    const repeat = post('/orders', key)
    await until(async () => {
      const { rows } = await database.pool.query("SELECT FROM pg_locks WHERE NOT granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())")
      return rows.length > 0
    })
    give()
    assert.equal((await first).headers['idempotent-replayed'], undefined)
    assert.equal((await repeat).headers['idempotent-replayed'], 'true')
    assert.equal((await repeat).body, '{"calls":1}')
  })

  test('works with a handler that returns nothing and replies later', async () => {
    app.post('/orders', PROTECTED, (request, reply) => {
      insert(request).then(() => setImmediate(() => reply.code(201).send({ current: idempotency.current() === request.idempotency.tx })))
    })
    const key = randomUUID()
    assert.deepEqual([(await post('/orders', key)).body, await ordersOf(key)], ['{"current":true}', 1])
    assert.equal((await post('/orders', key)).headers['idempotent-replayed'], 'true')
  })

  for (const [what, handler, body] of [
    ['a string', () => 'text', 'text'],
    ['an object', () => ({ a: 1 }), '{"a":1}'],
    ['null', async () => null, 'null'],
    ['nothing', async () => {}, '']
  ]) {
    test(`may return ${what}`, async () => {
      app.post('/orders', PROTECTED, handler)
      const key = randomUUID()
      for (const replayed of [undefined, 'true']) {
        const answer = await post('/orders', key)
        assert.deepEqual([answer.statusCode, answer.body, answer.headers['idempotent-replayed']], [200, body, replayed])
      }
    })
  }

  test('may take a lease', async () => {
    const points = []
    app.post('/refund', { config: { idempotency: { lease: '1 min' } } }, async request => {
      const { claim, tx } = request.idempotency
      points.push([claim.attempt, claim.recovery?.point, tx])
      await claim.checkpoint('refunded', { reference: 'r1' })
      if (points.length === 1) throw new Error('the provider has hung up')
      return claim.recovery.state
    })
    const key = randomUUID()
    assert.equal((await post('/refund', key)).statusCode, 500)
    assert.deepEqual((await post('/refund', key)).json(), { reference: 'r1' })
    assert.equal((await post('/refund', key)).headers['idempotent-replayed'], 'true')
    assert.deepEqual(points, [[1, undefined, undefined], [2, 'refunded', undefined]])
  })

  test('whose lease was taken over is answered with 409', async () => {
    app.post('/refund', { config: { idempotency: { lease: '1 min' } } }, async request => {
      await database.pool.query('UPDATE idempotency.idempotency_key SET claim = gen_random_uuid() WHERE key = $1', [request.idempotency.key])
      await request.idempotency.claim.checkpoint('refunded')
    })
    const answer = await post('/refund', randomUUID())
    assert.deepEqual([answer.statusCode, answer.json().code], [409, 'IDEMPOTENCY_CLAIM_LOST'])
  })
})

describe('the plugin', () => {
  test('protects only what is said', async () => {
    app.post('/plain', async request => request.idempotency)
    app.get('/orders', PROTECTED, async request => ({ idempotency: request.idempotency }))
    assert.equal((await app.inject({ method: 'POST', url: '/plain' })).body, 'null')
    assert.deepEqual((await app.inject({ url: '/orders' })).json(), { idempotency: null })
    const head = await app.inject({ method: 'HEAD', url: '/orders' })
    assert.deepEqual([head.statusCode, head.body, head.headers['content-length']], [200, '', '20'])
  })

  test('protects everything with `global`, except what says no', async () => {
    await again({ plugin: { global: true } })
    app.post('/orders', async () => ({}))
    app.post('/plain', { config: { idempotency: false } }, async () => ({}))
    app.get('/orders', async () => ({}))
    assert.equal((await app.inject({ method: 'POST', url: '/orders' })).statusCode, 400)
    assert.equal((await app.inject({ method: 'POST', url: '/plain' })).statusCode, 200)
    assert.equal((await app.inject({ url: '/orders' })).statusCode, 200)
    assert.equal((await app.inject({ method: 'POST', url: '/nowhere' })).statusCode, 404)
  })

  test('takes options of a route over its own', async () => {
    const options = { header: 'X-Key', mismatchStatus: 409, marker: 'X-Again', action: 'orders.create', ttl: { '2xx': '10 min' } }
    app.post('/orders', { config: { idempotency: options } }, async () => ({}))
    const key = randomUUID()
    const send = payload => app.inject({ method: 'POST', url: '/orders', headers: { 'x-key': key }, payload })
    await send({ a: 1 })
    assert.equal((await send({ a: 1 })).headers['x-again'], 'true')
    assert.equal((await send({ a: 2 })).statusCode, 409)
    assert.deepEqual([(await recordOf(key)).action, (await recordOf(key)).actor], ['orders.create', 'alice'])
  })

  test('acts on the instance that it is registered on, and not on others', async () => {
    const root = Fastify()
    await root.register(async child => {
      await child.register(idempotencyPlugin, { idempotency, actor: () => 'alice' })
      child.post('/inside', PROTECTED, async request => ({ key: request.idempotency.key }))
    })
    await root.register(async other => {
      await other.register(idempotencyPlugin, { idempotency, actor: () => 'bob', header: 'X-Key' })
      other.post('/other', PROTECTED, async request => ({ key: request.idempotency.key }))
    })
    root.post('/outside', PROTECTED, async request => ({ idempotency: String(request.idempotency) }))
    const send = (url, header) => root.inject({ method: 'POST', url, headers: { [header]: 'k' } })
    assert.equal((await send('/inside', 'idempotency-key')).body, '{"key":"k"}')
    assert.equal((await send('/other', 'x-key')).body, '{"key":"k"}')
    assert.equal((await send('/outside', 'idempotency-key')).body, '{"idempotency":"undefined"}')
    assert.ok(root.printPlugins().includes('pg-idempotency'))
    await root.close()
  })

  test('refuses to be registered twice, and options without an owner', async () => {
    const twice = Fastify()
    const options = { idempotency, actor: () => 'alice' }
    await twice.register(idempotencyPlugin, options)
    await assert.rejects(async () => await twice.register(idempotencyPlugin, options), /twice/)
    await assert.rejects(async () => await Fastify().register(idempotencyPlugin, { idempotency }), /whose request/)
  })

  test('refuses requests of a route that it could not see', async () => {
    const early = Fastify()
    early.register(idempotencyPlugin, { idempotency, actor: () => 'alice' })
    let calls = 0
    early.post('/orders', PROTECTED, async () => { calls++ })
    early.post('/plain', async () => ({}))
    const answer = await early.inject({ method: 'POST', url: '/orders', headers: { 'idempotency-key': 'k' } })
    assert.deepEqual([answer.statusCode, calls], [500, 0])
    assert.match(answer.json().message, /before the idempotency plugin/)
    assert.equal((await early.inject({ method: 'POST', url: '/plain' })).statusCode, 200)
    await early.close()
  })

  test('can be required by CommonJS', () => {
    const required = createRequire(import.meta.url)('pg-idempotency/fastify')
    assert.equal(typeof required.default, 'function')
    assert.equal(required.default, required.idempotencyPlugin)
  })

  test('warns of duplicates in the log of the request, unless told not to', async () => {
    const key = randomUUID()
    const messages = async () => {
      const begun = signal()
      const { promise, give } = signal()
      app.post('/orders', PROTECTED, async request => {
        if (request.body.slow) {
          begun.give()
          await promise
        }
        return {}
      })
      const slow = randomUUID()
      await post('/orders', key, { a: 1 })
      await post('/orders', key, { a: 1 })
      await post('/orders', key, { a: 2 })
      const first = post('/orders', slow, { slow: true })
      await begun.promise
      await post('/orders', slow, { slow: true })
      give()
      await first
      return logged.map(({ level, msg, idempotencyKey, statusCode }) => [level, msg, idempotencyKey === slow ? 'slow' : idempotencyKey, statusCode])
    }
    assert.deepEqual(await messages(), [
      [40, 'duplicate request: it is answered with the first answer', key, 200],
      [40, 'the idempotency key was used with a different request', key, 422],
      [40, 'duplicate request: the first one is still in progress', 'slow', 409]
    ])
    await again({ plugin: { log: false } })
    assert.deepEqual(await messages(), [])
  })
})

describe('authentication', () => {
  const refuse = async (request, reply) => {
    if (request.headers.authorization !== 'Bearer good') return reply.code(401).send({ error: 'who are you?' })
  }

  for (const [where, add] of [
    ['onRequest of the route', handler => { app.post('/orders', { ...PROTECTED, onRequest: refuse }, handler) }],
    ['preHandler of the route', handler => { app.post('/orders', { ...PROTECTED, preHandler: [refuse] }, handler) }],
    ['preHandler of the instance', handler => {
      app.addHook('preHandler', refuse)
      app.post('/orders', PROTECTED, handler)
    }],
    ['a hook that a later plugin adds to the route', handler => {
      app.addHook('onRoute', route => { route.preHandler = [route.preHandler ?? [], refuse].flat() })
      app.post('/orders', PROTECTED, handler)
    }]
  ]) {
    test(`in ${where} comes first: a stranger gets no replay, and no 401 is kept`, async () => {
      add(async () => ({ secret: 1 }))
      const key = randomUUID()
      const good = { authorization: 'Bearer good' }
      assert.equal((await post('/orders', key)).statusCode, 401)
      assert.equal(await recordOf(key), undefined)
      assert.equal((await post('/orders', key, undefined, good)).statusCode, 200)
      assert.equal((await post('/orders', key)).statusCode, 401)
      assert.equal((await post('/orders', key, undefined, good)).headers['idempotent-replayed'], 'true')
    })
  }
})

describe('the body', () => {
  test('counts as it came, not as it was parsed', async () => {
    app.post('/orders', PROTECTED, async request => ({ parsed: request.body.id }))
    const key = randomUUID()
    const json = { 'content-type': 'application/json' }
    assert.equal((await post('/orders', key, '{"id": 9007199254740993, "a": 1}', json)).body, '{"parsed":9007199254740992}')
    assert.equal((await post('/orders', key, '{"id": 9007199254740992, "a": 1}', json)).statusCode, 422)
    assert.equal((await post('/orders', key, '{ "a":1,"id":9007199254740993}', json)).headers['idempotent-replayed'], 'true')
  })

  test('and the query count as they came before the schema made something of them', async () => {
    const schema = {
      querystring: { type: 'object', properties: { id: { type: 'number' }, some: { type: 'number', default: 5 } } },
      params: { type: 'object', properties: { number: { type: 'number' } } },
      body: { type: 'object', properties: { a: { type: 'number' } }, additionalProperties: false }
    }
    app.post('/orders/:number', { ...PROTECTED, schema }, async request => ({ query: request.query, params: request.params, body: request.body }))
    const key = randomUUID()
    const first = await post('/orders/9007199254740993?id=9007199254740993', key, { a: '1', b: 2 })
    assert.deepEqual(first.json(), {
      query: { id: 9007199254740992, some: 5 }, params: { number: 9007199254740992 }, body: { a: 1 }
    })
    assert.equal((await post('/orders/9007199254740993?id=9007199254740992', key, { a: '1', b: 2 })).statusCode, 422)
    assert.equal((await post('/orders/9007199254740992?id=9007199254740993', key, { a: '1', b: 2 })).statusCode, 422)
    assert.equal((await post('/orders/9007199254740993?id=9007199254740993', key, { a: '1' })).statusCode, 422)
    assert.equal((await post('/orders/9007199254740993?id=9007199254740993', key, { b: 2, a: '1' })).statusCode, 200)
  })

  test('of a content type that is parsed by the application counts', async () => {
    app.addContentTypeParser('text/csv', { parseAs: 'string' }, (_request, body, done) => { done(null, body.split(',')) })
    app.addContentTypeParser('application/x-stream', async (_request, payload) => {
      let text = ''
      for await (const chunk of payload) text += chunk
      return text
    })
    app.post('/orders', PROTECTED, async request => ({ body: request.body }))
    for (const [type, body, parsed] of [['text/csv', 'a,b', ['a', 'b']], ['application/x-stream', 'a stream', 'a stream']]) {
      const key = randomUUID()
      assert.deepEqual((await post('/orders', key, body, { 'content-type': type })).json(), { body: parsed })
      assert.equal((await post('/orders', key, body, { 'content-type': type })).headers['idempotent-replayed'], 'true')
      assert.equal((await post('/orders', key, 'other', { 'content-type': type })).statusCode, 422)
    }
  })

  test('that was compressed counts as it is after a hook has decompressed it', async () => {
    const gunzip = async (_request, _reply, payload) => {
      const inflated = payload.pipe(createGunzip())
      inflated.receivedEncodedLength = 0
      payload.on('data', chunk => { inflated.receivedEncodedLength += chunk.length })
      return inflated
    }
    app.post('/orders', { ...PROTECTED, preParsing: gunzip }, async request => request.body)
    const key = randomUUID()
    const headers = { 'content-type': 'application/json' }
    assert.equal((await post('/orders', key, gzipSync('{"a": 1}', { level: 1 }), headers)).body, '{"a":1}')
    assert.equal((await post('/orders', key, gzipSync('{"a": 1}', { level: 9 }), headers)).headers['idempotent-replayed'], 'true')
    assert.equal((await post('/orders', key, gzipSync('{"a": 2}'), headers)).statusCode, 422)
  })

  test('that only the handler reads needs a fingerprint of its own', async () => {
    app.addContentTypeParser('multipart/form-data', (_request, _payload, done) => { done(null) })
    const handler = async request => {
      let text = ''
      for await (const chunk of request.raw) text += chunk
      return { text }
    }
    app.post('/uploads', PROTECTED, handler)
    app.post('/named', { config: { idempotency: { fingerprint: request => request.query } } }, handler)
    const headers = { 'content-type': 'multipart/form-data; boundary=x' }
    const refused = await post('/uploads', randomUUID(), 'a file', headers)
    assert.deepEqual([refused.statusCode, /fingerprint/.test(refused.json().message)], [500, true])
    const key = randomUUID()
    const { answer } = await overSocket('POST', '/named?name=a', { key, headers, body: 'a file' })
    assert.equal((await answer).text, '{"text":"a file"}')
    assert.equal((await post('/named?name=b', key, 'a file', headers)).statusCode, 422)
  })

  test('that is not JSON or not valid is refused by Fastify, and nothing is begun', async () => {
    const schema = { body: { type: 'object', required: ['a'], properties: { a: { type: 'number' } } } }
    app.post('/orders', { ...PROTECTED, schema }, async request => request.body)
    const key = randomUUID()
    assert.equal((await post('/orders', key, '{', { 'content-type': 'application/json' })).statusCode, 400)
    assert.equal((await post('/orders', key, { b: 1 })).statusCode, 400)
    assert.equal(await recordOf(key), undefined)
    assert.equal((await post('/orders', key, { a: 1 })).statusCode, 200)
  })

  test('that is too large is refused by Fastify, and the server goes on', async () => {
    app.post('/orders', { ...PROTECTED, bodyLimit: 1000 }, async () => ({}))
    const key = randomUUID()
    const headers = { 'content-type': 'application/json' }
    const large = JSON.stringify('a'.repeat(2000))
    const known = await overSocket('POST', '/orders', { key, headers, body: large })
    assert.equal((await known.answer).status, 413)

    const chunked = await overSocket('POST', '/orders', { key, headers, body: null })
    chunked.request.write(large)
    const { status } = await chunked.answer
    assert.equal(status, 413)
    chunked.request.destroy()

    const small = await overSocket('POST', '/orders', { key, headers, body: '{}' })
    assert.equal((await small.answer).status, 200)
  })

  test('that is cut off after it was refused does no harm', async () => {
    const refused = signal()
    const closed = signal()
    app.setErrorHandler(async (error, request, reply) => {
      request.raw.once('close', closed.give)
      refused.give()
      await closed.promise
      return reply.send(error)
    })
    app.post('/orders', { ...PROTECTED, bodyLimit: 1000 }, async () => ({}))
    const headers = { 'content-type': 'application/json' }
    const { request } = await overSocket('POST', '/orders', { key: 'a', headers, body: null })
    request.write(JSON.stringify('a'.repeat(2000)))
    await refused.promise
    request.destroy()
    await closed.promise
    const { answer } = await overSocket('POST', '/orders', { key: 'a', headers, body: '{}' })
    assert.equal((await answer).status, 200)
  })

  test('that was cut off begins nothing', async () => {
    let calls = 0
    app.post('/orders', PROTECTED, async () => { calls++; return {} })
    const closed = signal()
    app.addHook('onRequest', async request => { request.raw.once('close', closed.give) })
    const key = randomUUID()
    const { request } = await overSocket('POST', '/orders', { key, headers: { 'content-type': 'application/json', 'content-length': '100' }, body: null })
    request.write('{"a":')
    await until(() => request.socket !== null && request.writableLength === 0)
    request.destroy()
    await closed.promise
    const { answer } = await overSocket('POST', '/orders', { key, headers: { 'content-type': 'application/json' }, body: '{"a":1}' })
    assert.equal((await answer).status, 200)
    assert.equal(calls, 1)
  })

  test('may come slowly, in pieces that cut a character', async () => {
    app.post('/orders', PROTECTED, async request => request.body)
    const key = randomUUID()
    const headers = { 'content-type': 'application/json' }
    const body = Buffer.from('{"a":"ä"}')
    const { request, answer } = await overSocket('POST', '/orders', { key, headers, body: null })
    request.setNoDelay(true)
    for (const byte of body) {
      request.write(Buffer.from([byte]))
      await new Promise(resolve => setImmediate(resolve))
    }
    request.end()
    assert.equal((await answer).text, '{"a":"ä"}')
    assert.equal((await post('/orders', key, body, headers)).headers['idempotent-replayed'], 'true')
  })
})

describe('an error', () => {
  test('of the handler rolls back, and is not kept', async () => {
    let calls = 0
    app.post('/orders', PROTECTED, async request => {
      await insert(request)
      if (++calls === 1) throw new Error('broken')
      return { calls }
    })
    const key = randomUUID()
    assert.equal((await post('/orders', key)).statusCode, 500)
    assert.equal(await ordersOf(key), 0)
    assert.equal((await post('/orders', key)).body, '{"calls":2}')
    assert.equal(await ordersOf(key), 1)
  })

  for (const [what, status, fail] of [
    ['that is thrown with a status', 422, () => { throw Object.assign(new Error('no'), { statusCode: 422 }) }],
    ['that is sent', 404, (_request, reply) => reply.code(404).send(new Error('no'))],
    ['that is returned as a reply', 410, (_request, reply) => reply.code(410).send({ no: true })]
  ]) {
    test(`of the client ${what} is kept, and its rows are not`, async () => {
      let calls = 0
      app.post('/orders', PROTECTED, async (request, reply) => {
        calls++
        await insert(request)
        return fail(request, reply)
      })
      const key = randomUUID()
      const first = await post('/orders', key)
      const repeat = await post('/orders', key)
      assert.deepEqual([first.statusCode, repeat.statusCode, repeat.body], [status, status, first.body])
      assert.deepEqual([repeat.headers['idempotent-replayed'], calls, await ordersOf(key)], ['true', 1, 0])
      assert.equal((await recordOf(key)).state, 'errored')
    })
  }

  test('that the application makes a reply of is kept as that', async () => {
    app.setErrorHandler((error, _request, reply) => reply.code(422).send({ mine: error.message }))
    app.post('/orders', PROTECTED, () => { throw new Error('no') })
    const key = randomUUID()
    assert.deepEqual((await post('/orders', key)).json(), { mine: 'no' })
    assert.equal((await recordOf(key)).response, '{"mine":"no"}')
  })

  test('is never committed, whatever status it is sent with', async () => {
    app.setErrorHandler((error, _request, reply) => reply.send({ mine: error.message }))
    app.post('/orders', PROTECTED, async request => {
      await insert(request)
      throw new Error('no')
    })
    const key = randomUUID()
    const answer = await post('/orders', key)
    assert.deepEqual([answer.statusCode, answer.body], [200, '{"mine":"no"}'])
    assert.deepEqual([await ordersOf(key), await recordOf(key)], [0, undefined])
  })

  test('after a status was set is not sent with that status', async () => {
    app.post('/thrown', PROTECTED, async (request, reply) => {
      reply.code(201)
      await insert(request)
      throw new Error('no')
    })
    const schema = { response: { 201: { type: 'object', properties: { a: { type: 'string' } }, required: ['a'] } } }
    app.post('/serialized', { ...PROTECTED, schema }, async (request, reply) => {
      await insert(request)
      return reply.code(201).send({})
    })
    for (const url of ['/thrown', '/serialized']) {
      const key = randomUUID()
      assert.equal((await post(url, key)).statusCode, 500)
      assert.deepEqual([await ordersOf(key), await recordOf(key)], [0, undefined])
    }
  })

  test('that is a refusal is kept, from however deep inside', async () => {
    app.post('/orders', PROTECTED, async (request, reply) => {
      reply.code(201).header('location', '/orders/1')
      await insert(request)
      throw new Refusal({ status: 422, json: { code: 'SOLD_OUT' } })
    })
    const key = randomUUID()
    for (const replayed of [undefined, 'true']) {
      const answer = await post('/orders', key)
      assert.equal(answer.headers.location, undefined)
      assert.deepEqual([answer.statusCode, answer.body, answer.headers['idempotent-replayed']], [422, '{"code":"SOLD_OUT"}', replayed])
    }
    assert.equal(await ordersOf(key), 0)
  })

  test('of two transactions in conflict asks for a repeat', async () => {
    let calls = 0
    app.post('/orders', PROTECTED, async request => {
      await insert(request)
      if (++calls === 1) await idempotency.current().query("DO $$ BEGIN RAISE 'conflict' USING ERRCODE = '40001'; END $$")
      return {}
    })
    const key = randomUUID()
    const answer = await post('/orders', key)
    assert.deepEqual([answer.statusCode, answer.json().code, answer.headers['retry-after']], [503, 'TRANSACTION_CONFLICT', '1'])
    assert.equal(await ordersOf(key), 0)
    assert.equal((await post('/orders', key)).statusCode, 200)
  })

  test('that was swallowed is found at COMMIT, and takes the reply with it', async () => {
    app.post('/orders', PROTECTED, async (request, reply) => {
      await insert(request)
      await idempotency.current().query('SELECT 1/0').catch(() => {})
      return reply.code(201).header('location', '/orders/1').header('set-cookie', 'a=1').send({ id: 1 })
    })
    const key = randomUUID()
    const answer = await post('/orders', key)
    assert.deepEqual([answer.statusCode, answer.headers.location, answer.headers['set-cookie']], [500, undefined, undefined])
    assert.deepEqual([await ordersOf(key), await recordOf(key)], [0, undefined])
  })

  test('of the database that cannot be reached is 503', async () => {
    const nowhere = new pg.Pool({ host: '127.0.0.1', port: 1 })
    await again({ pool: createIdempotency({ pool: nowhere }) })
    let calls = 0
    app.post('/orders', PROTECTED, async () => { calls++ })
    const answer = await post('/orders', randomUUID())
    assert.deepEqual([answer.statusCode, answer.json().code, calls], [503, 'DATABASE_UNAVAILABLE', 0])
    await nowhere.end()
  })

  test('of a connection that is lost while the handler works is 503, whatever the handler makes of it', async () => {
    let calls = 0
    app.post('/orders', PROTECTED, async request => {
      await insert(request)
      const tx = idempotency.current()
      if (++calls === 1) {
        const { rows: [{ pid }] } = await tx.query('SELECT pg_backend_pid() AS pid')
        await database.pool.query('SELECT pg_terminate_backend($1, 10000)', [pid])
        await until(async () => await tx.query('SELECT 1').then(() => false, () => true))
      }
      return { calls }
    })
    const key = randomUUID()
    const answer = await post('/orders', key)
    assert.deepEqual([answer.statusCode, answer.json().code], [503, 'DATABASE_UNAVAILABLE'])
    assert.equal(await ordersOf(key), 0)
    assert.equal((await post('/orders', key)).body, '{"calls":2}')
    assert.equal(await ordersOf(key), 1)
  })

  test('of a function that says whose request it is goes to the error handler', async () => {
    await again({ plugin: { actor: request => request.user.id } })
    app.post('/orders', PROTECTED, async () => ({}))
    assert.match((await post('/orders', randomUUID())).json().message, /undefined/)
  })
})

describe('a reply', () => {
  test('that is not returned is sent once, and whole', async () => {
    // a hook after ours gives a second reply the time to overtake the first
    app.addHook('onSend', async (_request, _reply, payload) => {
      await sleep(5)
      return payload
    })
    let calls = 0
    app.post('/orders', PROTECTED, async (request, reply) => {
      calls++
      await insert(request)
      reply.code(201).send({ id: 1 })
    })
    const key = randomUUID()
    for (const replayed of [undefined, 'true']) {
      const { answer } = await overSocket('POST', '/orders', { key })
      const { status, text, headers } = await answer
      assert.deepEqual([status, text, headers['idempotent-replayed']], [201, '{"id":1}', replayed])
    }
    assert.deepEqual([calls, await ordersOf(key)], [1, 1])
    assert.deepEqual(logged.map(({ msg }) => msg), ['duplicate request: it is answered with the first answer'])
  })

  test('that is sent twice is sent once', async () => {
    app.post('/orders', PROTECTED, (_request, reply) => {
      reply.code(201).send({ id: 1 })
      reply.code(202).header('x-second', '1').send({ id: 2 })
    })
    const key = randomUUID()
    const first = await post('/orders', key)
    assert.deepEqual([first.statusCode, first.body, first.headers['x-second']], [201, '{"id":1}', undefined])
    assert.equal((await post('/orders', key)).body, '{"id":1}')
    assert.deepEqual(warnings()[0], 'the handler has replied twice; its first reply is sent')
  })

  test('stands, although the handler fails afterwards', async () => {
    app.post('/orders', PROTECTED, async (_request, reply) => {
      reply.code(201).send({ id: 1 })
      throw new Error('too late')
    })
    const key = randomUUID()
    for (const _ of [1, 2]) {
      const answer = await post('/orders', key)
      assert.deepEqual([answer.statusCode, answer.body], [201, '{"id":1}'])
    }
    assert.equal(warnings()[0], 'the handler failed after it had replied')
  })

  test('by reply.raw is not kept: the transaction is rolled back, with a warning', async () => {
    app.post('/hijacked', PROTECTED, async (request, reply) => {
      await insert(request)
      reply.hijack()
      reply.raw.end('raw')
    })
    app.post('/raw', PROTECTED, async (request, reply) => {
      await insert(request)
      reply.raw.end('raw')
    })
    for (const url of ['/hijacked', '/raw']) {
      const key = randomUUID()
      const { answer } = await overSocket('POST', url, { key })
      assert.equal((await answer).text, 'raw')
      await until(() => pool.idleCount === pool.totalCount)
      assert.deepEqual([await ordersOf(key), await recordOf(key)], [0, undefined], url)
      assert.match(warnings().at(-1), /reply\.raw/)
    }
  })

  test('that was hijacked by a handler that fails leaves no transaction open', async () => {
    let raw
    app.post('/orders', PROTECTED, async (request, reply) => {
      await insert(request)
      reply.hijack()
      raw = reply.raw
      throw new Error('broken')
    })
    const key = randomUUID()
    const { answer } = await overSocket('POST', '/orders', { key })
    await until(() => raw !== undefined && pool.idleCount === pool.totalCount)
    assert.equal(await ordersOf(key), 0)
    raw.end('raw')
    assert.equal((await answer).text, 'raw')
  })

  test('that is not found is not kept where the plugin does not see it', async () => {
    const root = Fastify()
    await root.register(async child => {
      await child.register(idempotencyPlugin, { idempotency, actor: () => 'alice' })
      child.post('/orders', PROTECTED, async (request, reply) => {
        await insert(request)
        return reply.callNotFound()
      })
    })
    const key = randomUUID()
    assert.equal((await root.inject({ method: 'POST', url: '/orders', headers: { 'idempotency-key': key } })).statusCode, 404)
    await until(() => pool.idleCount === pool.totalCount)
    assert.equal(await ordersOf(key), 0)
    await root.close()
  })

  for (const [status, type] of [[204, undefined], [304, undefined], [200, undefined]]) {
    test(`without a body is replayed, ${status}`, async () => {
      app.post('/orders', PROTECTED, async (_request, reply) => reply.code(status).header('etag', '"1"').send())
      const key = randomUUID()
      const answers = []
      for (const _ of [1, 2]) answers.push(await (await overSocket('POST', '/orders', { key })).answer)
      const [first, repeat] = answers
      assert.deepEqual([first.status, first.text, first.headers['content-type'], first.headers.etag], [status, '', type, '"1"'])
      assert.deepEqual([repeat.status, repeat.text, repeat.headers['content-type'], repeat.headers.etag], [status, '', type, '"1"'])
      assert.equal(repeat.headers['content-length'], first.headers['content-length'])
      assert.equal(repeat.headers['idempotent-replayed'], 'true')
    })
  }

  test('with a body that has none by its status is kept without', async () => {
    app.post('/orders', PROTECTED, async (_request, reply) => reply.code(204).send({ a: 1 }))
    const key = randomUUID()
    for (const _ of [1, 2]) {
      const { answer } = await overSocket('POST', '/orders', { key })
      const { status, text, headers } = await answer
      assert.deepEqual([status, text, headers['content-type'], headers['content-length']], [204, '', undefined, undefined])
    }
    assert.deepEqual([(await recordOf(key)).response, (await recordOf(key)).body], [null, null])
  })

  const bytes = Buffer.from([0, 1, 255, 128])
  for (const [what, payload, type] of [
    ['bytes', () => bytes, 'application/octet-stream'],
    ['a stream', () => Readable.from([bytes.subarray(0, 2), bytes.subarray(2)]), 'image/x'],
    ['a stream of the web', () => new Blob([bytes]).stream(), 'image/x'],
    ['a Response', () => new Response(bytes, { status: 200, headers: { 'content-type': 'image/x' } }), 'image/x']
  ]) {
    test(`of ${what} is replayed byte for byte`, async () => {
      app.post('/orders', PROTECTED, async (request, reply) => {
        await insert(request)
        if (what.includes('stream')) reply.type('image/x')
        return reply.send(payload())
      })
      const key = randomUUID()
      for (const replayed of [undefined, 'true']) {
        const { answer } = await overSocket('POST', '/orders', { key })
        const { status, content, headers } = await answer
        assert.deepEqual([status, content, headers['content-type'], headers['idempotent-replayed']], [200, bytes, type, replayed])
        assert.equal(headers['content-length'], '4')
      }
      assert.equal(await ordersOf(key), 1)
    })
  }

  test('of a Response keeps its status and headers', async () => {
    app.post('/orders', PROTECTED, async () => Response.json({ id: 1 }, { status: 201, headers: { location: '/orders/1', 'set-cookie': 'a=1' } }))
    app.post('/empty', PROTECTED, async () => new Response(null, { status: 204 }))
    const key = randomUUID()
    const first = await post('/orders', key)
    assert.deepEqual([first.statusCode, first.body, first.headers.location, first.headers['set-cookie']], [201, '{"id":1}', '/orders/1', 'a=1'])
    const repeat = await post('/orders', key)
    assert.deepEqual([repeat.statusCode, repeat.body, repeat.headers.location, repeat.headers['set-cookie']], [201, '{"id":1}', '/orders/1', undefined])
    assert.equal((await post('/empty', key)).statusCode, 204)
    assert.equal((await post('/empty', key)).statusCode, 204)
  })

  test('of a stream that is too large is refused, and rolled back', async () => {
    const streams = []
    app.post('/orders', { config: { idempotency: { maxAnswer: 10 } } }, async (request, reply) => {
      await insert(request)
      const stream = new PassThrough()
      stream.write('more than ten bytes')
      streams.push(stream)
      return reply.code(201).header('location', '/orders/1').send(stream)
    })
    const key = randomUUID()
    const answer = await post('/orders', key)
    assert.deepEqual([answer.statusCode, answer.json().code, answer.headers.location], [500, 'ANSWER_TOO_LARGE', undefined])
    assert.equal(streams[0].destroyed, true)
    assert.equal(await ordersOf(key), 0)
  })

  test('of a stream that fails is an error, and rolled back', async () => {
    app.post('/orders', PROTECTED, async (request, reply) => {
      await insert(request)
      return reply.code(201).send(new Readable({ read () { this.destroy(new Error('the disk is gone')) } }))
    })
    const key = randomUUID()
    const answer = await post('/orders', key)
    assert.deepEqual([answer.statusCode, answer.json().message], [500, 'the disk is gone'])
    assert.deepEqual([await ordersOf(key), await recordOf(key)], [0, undefined])
  })

  test('may be without a header that another plugin has set', async () => {
    app.addHook('onRequest', async (_request, reply) => { reply.header('x-of-all', 'yes') })
    app.post('/orders', PROTECTED, async (_request, reply) => reply.removeHeader('x-of-all').send({}))
    assert.equal((await post('/orders', randomUUID())).headers['x-of-all'], undefined)
  })

  test('sets cookies for the first one who asked, and never again', async () => {
    app.post('/orders', PROTECTED, async (_request, reply) => reply.header('set-cookie', ['a=1', 'b=2']).send({}))
    const key = randomUUID()
    assert.deepEqual((await post('/orders', key)).headers['set-cookie'], ['a=1', 'b=2'])
    assert.equal((await post('/orders', key)).headers['set-cookie'], undefined)
  })

  test('that turns out to be another\'s has nothing of the first', async () => {
    // with one connection, the second request gets it between the rollback of the first and the keeping of its 422
    const narrow = new pg.Pool({ connectionString: database.url, max: 1 })
    const begun = signal()
    const { promise, give } = signal()
    await again({ pool: createIdempotency({ pool: narrow }) })
    app.addHook('onRequest', async (_request, reply) => { reply.header('x-of-all', 'yes') })
    app.post('/orders', PROTECTED, async (request, reply) => {
      if (request.headers.user === undefined) throw new Error('no user')
      if (request.headers.first === 'yes') {
        begun.give()
        await promise
        return reply.code(422).header('set-cookie', 'secret=1').header('x-first', 'yes').removeHeader('x-of-all').send({ first: true })
      }
      return reply.code(201).header('location', '/orders/2').send({ second: true })
    })
    const key = randomUUID()
    const first = post('/orders', key, {}, { user: 'alice', first: 'yes' })
    await begun.promise
    const second = post('/orders', key, {}, { user: 'alice' })
    await until(() => narrow.waitingCount === 1)
    give()
    assert.deepEqual([(await second).statusCode, (await second).body], [201, '{"second":true}'])
    const { statusCode, body, headers } = await first
    assert.deepEqual([statusCode, body], [201, '{"second":true}'])
    assert.deepEqual([headers.location, headers['set-cookie'], headers['x-first'], headers['x-of-all'], headers['idempotent-replayed']],
      ['/orders/2', undefined, undefined, 'yes', 'true'])
    await narrow.end()
  })
})

describe('other plugins', () => {
  test('cors: a page of another origin sees replays, problems and their headers', async () => {
    await again()
    await app.register(cors, { origin: 'https://shop.example', exposedHeaders: ['X-Mine'] })
    app.post('/orders', PROTECTED, async () => ({}))
    const key = randomUUID()
    const origin = { origin: 'https://shop.example' }
    await post('/orders', key, { a: 1 }, origin)
    for (const [payload, status] of [[{ a: 1 }, 200], [{ a: 2 }, 422]]) {
      const { statusCode, headers } = await post('/orders', key, payload, origin)
      assert.deepEqual([statusCode, headers['access-control-allow-origin']], [status, 'https://shop.example'])
      assert.equal(headers['access-control-expose-headers'], 'X-Mine, Idempotency-Key, Idempotent-Replayed, Retry-After')
    }
  })

  for (const order of ['before', 'after']) {
    test(`compress, registered ${order}: compresses what is sent, not what is kept`, async () => {
      await again()
      if (order === 'before') {
        await app.close()
        app = Fastify()
        await app.register(compress, { threshold: 0 })
        await app.register(idempotencyPlugin, { idempotency, actor: () => 'alice' })
      } else {
        await app.register(compress, { threshold: 0 })
      }
      app.post('/orders', PROTECTED, async () => ({ text: 'a'.repeat(2000) }))
      const key = randomUUID()
      const first = await post('/orders', key, undefined, { 'accept-encoding': 'gzip' })
      const plain = await post('/orders', key)
      const repeat = await post('/orders', key, undefined, { 'accept-encoding': 'gzip' })
      assert.equal(first.headers['content-encoding'], 'gzip')
      assert.deepEqual([plain.headers['content-encoding'], plain.json().text.length], [undefined, 2000])
      assert.equal(repeat.headers['content-encoding'], 'gzip')
      assert.equal(repeat.headers['idempotent-replayed'], 'true')
      assert.deepEqual(repeat.rawPayload, first.rawPayload)
    })
  }

  test('hooks that change what is sent change replays as well, and are not kept', async () => {
    let calls = 0
    app.addHook('onSend', async (_request, reply, payload) => {
      reply.header('x-calls', String(++calls))
      return payload.replace('}', `,"calls":${calls}}`)
    })
    app.post('/orders', PROTECTED, async () => ({ id: 1 }))
    const key = randomUUID()
    assert.equal((await post('/orders', key)).body, '{"id":1,"calls":1}')
    const repeat = await post('/orders', key)
    assert.deepEqual([repeat.body, repeat.headers['x-calls']], ['{"id":1,"calls":2}', '2'])
    assert.equal((await recordOf(key)).response, '{"id":1}')
  })

  test('a hook that fails after the commit answers an error, and a repeat gets the answer', async () => {
    let calls = 0
    app.addHook('onSend', async () => { if (++calls === 1) throw new Error('broken hook') })
    app.post('/orders', PROTECTED, async request => { await insert(request); return { id: 1 } })
    const key = randomUUID()
    assert.equal((await post('/orders', key)).statusCode, 500)
    assert.equal((await post('/orders', key)).body, '{"id":1}')
    assert.equal(await ordersOf(key), 1)
  })
})

describe('a client that hangs up', () => {
  for (const [what, finish, status] of [
    ['a handler that returns a value', () => ({ id: 1 }), 200],
    ['a handler that returns nothing', () => undefined, 204],
    ['a handler that throws', () => { throw Object.assign(new Error('no'), { statusCode: 422 }) }, 422]
  ]) {
    test(`while ${what} is at work: its answer is kept`, async () => {
      const begun = signal()
      const { promise, give } = signal()
      const closed = signal()
      let calls = 0
      app.post('/orders', PROTECTED, async (request, reply) => {
        calls++
        reply.raw.once('close', closed.give)
        begun.give()
        await promise
        await insert(request)
        if (status === 204) reply.code(204)
        return finish()
      })
      const key = randomUUID()
      const { request } = await overSocket('POST', '/orders', { key })
      await begun.promise
      request.destroy()
      await closed.promise
      give()
      await until(async () => await recordOf(key) !== undefined)
      const { answer } = await overSocket('POST', '/orders', { key })
      const repeat = await answer
      assert.deepEqual([repeat.status, repeat.headers['idempotent-replayed'], calls], [status, 'true', 1])
      assert.equal(await ordersOf(key), status === 422 ? 0 : 1)
    })
  }

  test('while its request waits for a connection: the work is done, and kept', async () => {
    const narrow = new pg.Pool({ connectionString: database.url, max: 1 })
    await again({ pool: createIdempotency({ pool: narrow }) })
    const client = await narrow.connect()
    const closed = signal()
    app.addHook('onRequest', async (_request, reply) => { reply.raw.once('close', closed.give) })
    app.post('/orders', PROTECTED, async () => ({ id: 1 }))
    const key = randomUUID()
    const { request } = await overSocket('POST', '/orders', { key })
    await until(() => narrow.waitingCount === 1)
    request.destroy()
    await closed.promise
    client.release()
    await until(async () => await recordOf(key) !== undefined)
    assert.equal((await post('/orders', key)).headers['idempotent-replayed'], 'true')
    await narrow.end()
  })

  test('before a handler that never replies: the transaction ends with the time of the handler', async () => {
    const begun = signal()
    app.post('/orders', { ...PROTECTED, handlerTimeout: 1000 }, async request => {
      await insert(request)
      begun.give()
      await new Promise(() => {})
    })
    const key = randomUUID()
    const { request } = await overSocket('POST', '/orders', { key })
    await begun.promise
    request.destroy()
    await until(() => pool.idleCount === pool.totalCount)
    assert.equal(await ordersOf(key), 0)
    await until(() => warnings().length > 0)
    assert.match(warnings()[0], /not replied in time/)
  })
})

describe('the time of a handler', () => {
  test('that runs out while it works is 503, and rolled back', async () => {
    app.post('/orders', { ...PROTECTED, handlerTimeout: 100 }, async request => {
      await insert(request)
      await new Promise(() => {})
    })
    const key = randomUUID()
    const { answer } = await overSocket('POST', '/orders', { key })
    assert.equal((await answer).status, 503)
    await until(() => pool.idleCount === pool.totalCount)
    assert.deepEqual([await ordersOf(key), await recordOf(key)], [0, undefined])
  })

  test('that runs out while it waits for a connection is 503, and the handler is not called', async () => {
    const narrow = new pg.Pool({ connectionString: database.url, max: 1 })
    await again({ pool: createIdempotency({ pool: narrow }) })
    const client = await narrow.connect()
    let calls = 0
    app.post('/orders', { ...PROTECTED, handlerTimeout: 100 }, async () => { calls++; return {} })
    const key = randomUUID()
    const { answer } = await overSocket('POST', '/orders', { key })
    assert.equal((await answer).status, 503)
    client.release()
    await until(() => narrow.idleCount === 1 && narrow.waitingCount === 0)
    assert.deepEqual([calls, await recordOf(key)], [0, undefined])
    assert.equal((await post('/orders', key)).statusCode, 200)
    await narrow.end()
  })
})

test('the server keeps a connection open for further requests', async () => {
  app.post('/orders', PROTECTED, async request => request.body)
  await app.listen({ host: '127.0.0.1', port: 0 })
  const agent = new http.Agent({ keepAlive: true, maxSockets: 1 })
  const send = async key => {
    const request = http.request({ host: '127.0.0.1', port: app.server.address().port, agent, method: 'POST', path: '/orders', headers: { 'idempotency-key': key, 'content-type': 'application/json' } })
    request.end('{"a":1}')
    const [response] = await once(request, 'response')
    let text = ''
    for await (const chunk of response) text += chunk
    return [text, request.reusedSocket]
  }
  const key = randomUUID()
  assert.deepEqual(await send(key), ['{"a":1}', false])
  assert.deepEqual(await send(key), ['{"a":1}', true])
  agent.destroy()
})
