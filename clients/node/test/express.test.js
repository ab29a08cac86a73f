// Express, and plain node:http, over real sockets.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { once } from 'node:events'
import http from 'node:http'
import net from 'node:net'
import { Readable, pipeline } from 'node:stream'
import { after, before, describe, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { gzipSync } from 'node:zlib'
import express from 'express'
import { createIdempotency } from 'pg-idempotency'
import { idempotent, keepRawBody } from 'pg-idempotency/express'
import { idempotentHandler } from 'pg-idempotency/node'
import { createDatabase } from './support/database.js'

let database, idempotency
const servers = []
before(async () => {
  database = await createDatabase()
  await database.pool.query('CREATE TABLE orders (key text)')
  idempotency = createIdempotency({ pool: database.pool })
})
after(async () => {
  for (const server of servers) {
    server.closeAllConnections()
    server.close()
  }
  await database.drop()
})

async function listen (handler) {
  const server = http.createServer(handler).listen(0, '127.0.0.1')
  servers.push(server)
  await once(server, 'listening')
  return `http://127.0.0.1:${server.address().port}`
}

async function post (url, { key = randomUUID(), body = '{"a": 1}', headers = {}, method = 'POST' } = {}) {
  const response = await fetch(url, {
    method,
    redirect: 'manual',
    headers: { 'content-type': 'application/json', ...(key === null ? {} : { 'idempotency-key': key }), ...headers },
    body
  })
  return { status: response.status, headers: response.headers, text: await response.text() }
}

// An app whose route does what `handler` does, and counts its calls
async function serve (handler, { options = {}, use = [], before: middlewares = [] } = {}) {
  const app = express()
  const calls = { count: 0, errors: [] }
  for (const middleware of use) app.use(middleware)
  app.post('/orders/:id', ...middlewares, idempotent(idempotency, { actor: () => 'alice', ...options }), (req, res, next) => {
    calls.count++
    return handler(req, res, next)
  })
  app.use((error, req, res, next) => {
    calls.errors.push(error)
    if (res.headersSent) return next(error)
    res.status(error.status ?? 500).json({ failed: error.message })
  })
  return Object.assign(calls, { url: `${await listen(app)}/orders/1` })
}

// Post twice; the second has to be the same, marked, and no second call
async function twice (service, request = {}) {
  const key = randomUUID()
  const first = await post(service.url, { key, ...request })
  const repeat = await post(service.url, { key, ...request })
  assert.deepEqual([repeat.status, repeat.text], [first.status, first.text])
  assert.equal(first.headers.get('idempotent-replayed'), null)
  assert.equal(repeat.headers.get('idempotent-replayed'), 'true')
  return { first, repeat, key }
}

describe('express', () => {
  const answers = {
    json: [(req, res) => res.status(201).json({ id: req.params.id }), 201, '{"id":"1"}'],
    'send of a text': [(req, res) => res.send('text'), 200, 'text'],
    'send of a Buffer': [(req, res) => res.type('bin').send(Buffer.from('abc')), 200, 'abc'],
    'write and end': [(req, res) => { res.writeHead(202, { 'content-type': 'text/csv' }); res.write('a,'); res.write(Buffer.from('b')); res.end('\n') }, 202, 'a,b\n'],
    'writeHead with a message and a list': [(req, res) => { res.writeHead(200, 'Fine', ['content-type', 'text/plain']); res.end('x') }, 200, 'x'],
    'end with callbacks': [(req, res) => res.write('a', 'utf8', () => res.end(() => {})), 200, 'a'],
    'an encoding': [(req, res) => res.end('YQ==', 'base64'), 200, 'a'],
    'a stream': [(req, res) => Readable.from(['a', 'b', 'c']).pipe(res), 200, 'abc'],
    'no body': [(req, res) => res.status(204).end(), 204, ''],
    'a redirect': [(req, res) => res.redirect(303, '/orders/2'), 303, 'See Other. Redirecting to /orders/2'],
    sendStatus: [(req, res) => res.sendStatus(202), 202, 'Accepted']
  }
  for (const [what, [handler, status, text]] of Object.entries(answers)) {
    test(`keeps and replays: ${what}`, async () => {
      const service = await serve(handler)
      const { first, repeat } = await twice(service)
      assert.deepEqual([first.status, first.text, service.count], [status, text, 1])
      for (const name of ['content-type', 'location', 'content-length']) {
        assert.equal(repeat.headers.get(name), first.headers.get(name), name)
      }
    })
  }

  test('answers after the commit, with the work in the claim\'s transaction', async () => {
    const service = await serve(async (req, res) => {
      await req.idempotency.tx.query('INSERT INTO orders VALUES ($1)', [req.idempotency.key])
      assert.equal(idempotency.current(), req.idempotency.tx)
      res.status(201).json({})
    })
    const key = randomUUID()
    await post(service.url, { key })
    const { rowCount } = await database.pool.query('SELECT FROM orders WHERE key = $1', [key])
    assert.equal(rowCount, 1)
  })

  test('keeps a 4xx that an error handler writes, and rolls back', async () => {
    const service = await serve(async (req, res) => {
      await req.idempotency.tx.query('INSERT INTO orders VALUES ($1)', [req.idempotency.key])
      throw Object.assign(new Error('sold out'), { status: 422 })
    })
    const { first, key } = await twice(service)
    assert.deepEqual([first.status, first.text, service.count], [422, '{"failed":"sold out"}', 1])
    assert.equal((await database.pool.query('SELECT FROM orders WHERE key = $1', [key])).rowCount, 0)
  })

  test('keeps nothing of a handler that throws', async () => {
    const service = await serve(async (req, res) => {
      await req.idempotency.tx.query('INSERT INTO orders VALUES ($1)', [req.idempotency.key])
      if (service.count === 1) throw new Error('oops')
      res.status(201).end()
    })
    const key = randomUUID()
    assert.equal((await post(service.url, { key })).status, 500)
    assert.equal((await post(service.url, { key })).status, 201)
    assert.equal((await database.pool.query('SELECT FROM orders WHERE key = $1', [key])).rowCount, 1)
  })

  test('takes the answer back when it cannot be kept', async () => {
    const service = await serve(async (req, res) => {
      await req.idempotency.tx.query('SELECT 1/0').catch(() => {})
      res.setHeader('x-made', 'by the handler')
      res.status(201).json({ done: true })
    }, { use: [(req, res, next) => { res.setHeader('x-before', 'kept'); next() }] })
    const { status, text, headers } = await post(service.url)
    assert.equal(status, 500)
    assert.match(text, /current transaction is aborted/)
    assert.deepEqual([headers.get('x-before'), service.errors[0].code], ['kept', '25P02'])
  })

  test('refuses an answer that is too large, with nothing of it in the headers', async () => {
    const service = await serve((req, res) => {
      res.setHeader('x-made', 'by the handler')
      res.cookie('a', 'b').send('x'.repeat(100))
    }, { options: { maxAnswer: 99 } })
    const { status, headers } = await post(service.url)
    assert.deepEqual([status, headers.get('x-made'), headers.get('set-cookie'), headers.get('content-type')],
      [500, null, null, 'application/problem+json; charset=utf-8'])
  })

  test('never replays a cookie, and leaves what other middlewares have set', async () => {
    const service = await serve((req, res) => res.cookie('session', 'secret').json({}), {
      use: [(req, res, next) => { res.setHeader('access-control-allow-origin', '*'); next() }]
    })
    const { first, repeat } = await twice(service)
    assert.match(first.headers.get('set-cookie'), /secret/)
    assert.equal(repeat.headers.get('set-cookie'), null)
    assert.equal(repeat.headers.get('access-control-allow-origin'), '*')
  })

  test('lets the middleware before it refuse strangers, repeats included', async () => {
    let loggedIn = true
    const service = await serve((req, res) => res.json({ secret: 1 }), {
      before: [(req, res, next) => { if (loggedIn) next(); else res.status(401).end() }]
    })
    const key = randomUUID()
    await post(service.url, { key })
    loggedIn = false
    assert.equal((await post(service.url, { key })).status, 401)
  })

  test('compares the body as it came, whoever reads it', async () => {
    for (const use of [[], [express.json({ verify: keepRawBody })]]) {
      const service = await serve((req, res) => res.json(req.body), { use })
      const key = randomUUID()
      const first = await post(service.url, { key, body: '{"id":9007199254740993}' })
      assert.equal(first.text, '{"id":9007199254740992}') // as JavaScript reads it
      assert.equal((await post(service.url, { key, body: '{"id":9007199254740992}' })).status, 422)
      assert.equal((await post(service.url, { key, body: '{"id": 9007199254740993}' })).status, 200)
    }
  })

  test('does not compare what a parser has made of the body', async () => {
    const service = await serve((req, res) => res.json({}), { use: [express.json()] })
    assert.equal((await post(service.url)).status, 500)
    assert.match(service.errors[0].message, /keepRawBody/)
    assert.equal(service.count, 0)
    const own = await serve((req, res) => res.json({}), { use: [express.json()], options: { fingerprint: ({ raw }) => raw.body.a } })
    assert.equal((await post(own.url)).status, 200)
    const empty = await serve((req, res) => res.status(204).end(), { use: [express.json()] })
    await twice(empty, { body: null })
  })

  test('counts the parameters of path and query', async () => {
    const service = await serve((req, res) => res.json({}))
    const key = randomUUID()
    await post(service.url, { key })
    assert.equal((await post(service.url.replace('orders/1', 'orders/2'), { key })).status, 422)
    assert.equal((await post(`${service.url}?a=1`, { key })).status, 422)
  })

  test('reads a body up to a limit', async () => {
    const service = await serve((req, res) => res.json({}), { options: { maxBody: 10 } })
    assert.equal((await post(service.url, { body: '"0123456789"' })).status, 413)
    assert.equal(service.count, 0)
  })

  test('answers 400 to a key that is missing or sent twice', async () => {
    const service = await serve((req, res) => res.json({}))
    assert.equal((await post(service.url, { key: null })).status, 400)
    const { port } = new URL(service.url)
    const socket = net.connect(port, '127.0.0.1')
    socket.end('POST /orders/1 HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\nIdempotency-Key: a\r\nIdempotency-Key: b\r\n\r\n')
    let answer = ''
    for await (const chunk of socket) answer += chunk
    assert.match(answer, /^HTTP\/1.1 400 .*IDEMPOTENCY_KEY_INVALID/s)
    assert.equal(service.count, 0)
  })

  test('keeps the answer for a client that has hung up', async () => {
    let goOn
    const started = new Promise(resolve => { goOn = resolve })
    const service = await serve(async (req, res) => {
      goOn(res)
      if (service.count === 1) await once(res, 'close')
      res.status(201).json({ n: service.count })
    })
    const key = randomUUID()
    const controller = new AbortController()
    fetch(service.url, { method: 'POST', headers: { 'idempotency-key': key }, signal: controller.signal }).catch(() => {})
    await started
    controller.abort()
    let answer
    do answer = await post(service.url, { key, body: null, headers: { 'content-type': '' } })
    while (answer.status === 409)
    assert.deepEqual([answer.status, answer.text, service.count], [201, '{"n":1}', 1])
  })

  test('passes requests through that are not protected', async () => {
    const service = await serve((req, res) => res.json({ protected: req.idempotency !== undefined }), { options: { required: false } })
    assert.equal((await post(service.url, { key: null })).text, '{"protected":false}')
    assert.equal((await post(service.url)).text, '{"protected":true}')
  })

  test('does the work of ten at once one time', async () => {
    const service = await serve((req, res) => setTimeout(() => res.status(201).json({}), 50))
    const key = randomUUID()
    const statuses = (await Promise.all(Array.from({ length: 10 }, () => post(service.url, { key })))).map(({ status }) => status)
    assert.equal(service.count, 1)
    assert.deepEqual([...new Set(statuses)].sort(), [201, 409])
  })

  test('sends the first of two answers, whole', async () => {
    const handlers = [
      (req, res) => { res.status(201).json({ first: true }); throw Object.assign(new Error('late'), { status: 500 }) },
      (req, res) => { res.status(201).set('x-first', '1').json({ first: 'HTTP/1.1 200 OK' }); res.status(400).send('short') }
    ]
    for (const handler of handlers) {
      const { first } = await twice(await serve(handler))
      assert.equal(first.status, 201)
      assert.match(first.text, /^\{"first":/)
      assert.equal(Number(first.headers.get('content-length')), first.text.length)
    }
  })

  test('sends the reason phrase of the handler with its answer, and with no other', async () => {
    const service = await serve(async (req, res) => {
      if (service.count > 1) await req.idempotency.tx.query('SELECT 1/0').catch(() => {})
      res.writeHead(201, 'Well Done')
      res.end('x')
    })
    for (const [status, reason] of [[201, 'Well Done'], [500, 'Internal Server Error']]) {
      const response = await fetch(service.url, { method: 'POST', headers: { 'idempotency-key': randomUUID() } })
      assert.deepEqual([response.status, response.statusText], [status, reason])
    }
  })

  test('takes cookies and all back when the commit fails', async () => {
    const service = await serve(async (req, res) => {
      await req.idempotency.tx.query('SELECT 1/0').catch(() => {})
      res.cookie('session', 'secret').location('/orders/1').status(201).send('a long answer, longer than that of the error')
    })
    const { status, headers, text } = await post(service.url)
    assert.deepEqual([status, headers.get('set-cookie'), headers.get('location')], [500, null, null])
    assert.match(text, /aborted/)
  })

  test('rolls back when the answer cannot be made', async () => {
    const service = await serve((req, res) => {
      if (service.count > 1) return res.send('fine')
      pipeline(new Readable({ read () { this.destroy(new Error('the source failed')) } }), res, () => {})
    })
    const key = randomUUID()
    assert.equal((await post(service.url, { key })).status, 500)
    assert.equal((await post(service.url, { key })).text, 'fine')
  })

  test('is not ended by a handler that writes on and on', async () => {
    const service = await serve(async (req, res) => {
      for (let n = 0; n < 50; n++) {
        res.write(Buffer.alloc(100))
        await sleep(1)
      }
      res.end()
    }, {
      options: { maxAnswer: 1000 },
      use: [async (req, res, next) => {
        if (req.path !== '/slow') return next()
        await sleep(500)
        res.end('slow')
      }]
    })
    // the problem waits for the answer before it on the connection, and the handler goes on meanwhile
    const { port } = new URL(service.url)
    const socket = net.connect(port, '127.0.0.1')
    const head = key => `POST /orders/1 HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nIdempotency-Key: ${key}\r\n`
    socket.write(`GET /slow HTTP/1.1\r\nHost: x\r\n\r\n${head(randomUUID())}Connection: close\r\n\r\n`)
    let answers = ''
    for await (const chunk of socket) answers += chunk
    assert.match(answers, /^HTTP\/1.1 200 .*slow.*HTTP\/1.1 500 .*ANSWER_TOO_LARGE/s)
    assert.equal((await post(service.url)).status, 500)
  })

  test('refuses to be there twice', async () => {
    const service = await serve((req, res) => res.json({}), { before: [idempotent(idempotency, { actor: () => 'alice' })] })
    const { status, text } = await post(service.url)
    assert.deepEqual([status, JSON.parse(text).code], [500, 'IDEMPOTENCY_OUT_OF_ORDER'])
  })

  test('keeps the routes of one handler apart', async () => {
    const app = express()
    app.post(['/orders', '/refunds'], idempotent(idempotency, { actor: () => 'alice' }), (req, res) => res.json({ path: req.path }))
    const url = await listen(app)
    const key = randomUUID()
    for (const path of ['/orders', '/refunds']) assert.equal((await post(url + path, { key })).text, `{"path":"${path}"}`)
  })

  test('sends a length where the handler wanted chunks', async () => {
    const { first } = await twice(await serve((req, res) => { res.setHeader('transfer-encoding', 'chunked'); res.end('abc') }))
    assert.deepEqual([first.text, first.headers.get('content-length')], ['abc', '3'])
  })

  test('names the headers that a middleware for CORS names, also for a replay', async () => {
    const service = await serve((req, res) => res.json({}), { use: [(req, res, next) => { res.setHeader('access-control-expose-headers', 'X-Total'); next() }] })
    const { first, repeat } = await twice(service, { headers: { origin: 'https://shop.example' } })
    for (const { headers } of [first, repeat]) {
      assert.equal(headers.get('access-control-expose-headers'), 'X-Total, Idempotency-Key, Idempotent-Replayed, Retry-After')
    }
  })

  test('refuses a compressed body that it would have to read itself', async () => {
    const service = await serve((req, res) => res.json({}))
    const { status } = await post(service.url, { body: gzipSync('{"a": 1}'), headers: { 'content-encoding': 'gzip' } })
    assert.equal(status, 415)
    const parsed = await serve((req, res) => res.json(req.body), { use: [express.json({ verify: keepRawBody })] })
    assert.equal((await post(parsed.url, { body: gzipSync('{"a": 1}'), headers: { 'content-encoding': 'gzip' } })).text, '{"a":1}')
  })

  test('is told at once when it does not know whose requests they are', () => {
    assert.throws(() => idempotent(idempotency, {}), TypeError)
  })
})

describe('node:http', () => {
  async function serveNode (handler, options = {}) {
    const calls = { count: 0 }
    const protectedHandler = idempotentHandler(idempotency, { actor: () => 'alice', ...options }, (request, response, work) => {
      calls.count++
      return handler(request, response, work)
    })
    const url = await listen((request, response) => {
      protectedHandler(request, response).catch(error => {
        response.statusCode = 500
        response.end(error.message)
      })
    })
    return Object.assign(calls, { url: `${url}/orders/1?a=1` })
  }

  test('keeps and replays what the handler writes', async () => {
    const service = await serveNode(async (request, response, { body, work }) => {
      await work.tx.query('INSERT INTO orders VALUES ($1)', [work.key])
      response.writeHead(201, { 'content-type': 'application/json', location: '/orders/1' })
      response.end(body)
    })
    const { first, repeat, key } = await twice(service, { body: '{"b":  2}' })
    assert.deepEqual([first.status, first.text, repeat.headers.get('location'), service.count], [201, '{"b":  2}', '/orders/1', 1])
    assert.equal((await post(service.url.replace('a=1', 'a=2'), { key, body: '{"b":  2}' })).status, 422)
  })

  test('passes on what the handler throws, and keeps nothing', async () => {
    const service = await serveNode((request, response) => {
      if (service.count === 1) throw new Error('oops')
      response.end('fine')
    })
    const key = randomUUID()
    assert.deepEqual([(await post(service.url, { key })).text, (await post(service.url, { key })).text], ['oops', 'fine'])
  })

  test('counts the path where there is a template', async () => {
    const service = await serveNode((request, response) => response.end(), { route: '/orders/:id' })
    const key = randomUUID()
    assert.equal((await post(service.url, { key })).status, 200)
    assert.equal((await post(service.url.replace('/1?', '/2?'), { key })).status, 422)
  })

  test('passes safe methods and optional keys through, and refuses the rest', async () => {
    const service = await serveNode((request, response, { work }) => response.end(String(work)), { maxBody: 10 })
    assert.equal((await post(service.url, { method: 'GET', body: null })).text, 'null')
    assert.equal((await post(service.url, { key: null })).status, 400)
    assert.equal((await post(service.url, { body: '"0123456789"' })).status, 413)
  })
})
