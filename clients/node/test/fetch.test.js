// Handlers of the Fetch API, called as a runtime calls them.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { after, before, test } from 'node:test'
import pg from 'pg'
import { createIdempotency } from 'pg-idempotency'
import { idempotentFetch } from 'pg-idempotency/fetch'
import { createDatabase } from './support/database.js'

let database, pool, idempotency
before(async () => {
  database = await createDatabase()
  await database.pool.query('CREATE TABLE orders (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, item text)')
  pool = new pg.Pool({ connectionString: database.url })
  idempotency = createIdempotency({ pool })
})
after(async () => {
  await pool.end()
  await database.drop()
})

const actor = request => request.headers.get('authorization') ?? 'alice'

function protect (handler, options = {}) {
  return idempotentFetch(idempotency, { actor, action: randomUUID(), ...options }, handler)
}

function post (body, { key = 'k1', headers = {}, path = '/orders', method = 'POST' } = {}) {
  const fields = new Headers({ 'content-type': 'application/json', ...headers })
  for (const one of [key].flat()) if (one !== null) fields.append('idempotency-key', one)
  return new Request(`http://shop.test${path}`, { method, headers: fields, body: typeof body === 'object' && !(body instanceof Uint8Array) ? JSON.stringify(body) : body })
}

/** A handler that inserts a row; its items are `item`, or new for each test. */
function inserting (answer, item = randomUUID()) {
  const handler = async (request, context, work) => {
    handler.calls++
    await work.tx.query('INSERT INTO orders (item) VALUES ($1)', [item])
    return await answer(request, context, work)
  }
  handler.calls = 0
  handler.rows = async () => (await database.pool.query('SELECT count(*)::int FROM orders WHERE item = $1', [item])).rows[0].count
  return handler
}

async function bytesOf (response) {
  return Buffer.from(await response.arrayBuffer())
}

test('runs the handler once, and a repeat gets the same status, header fields and bytes', async () => {
  const handler = inserting(async request => new Response(`{"id": 9007199254740993,  "of": ${await request.text()}}`, {
    status: 201, headers: { 'content-type': 'application/json', location: '/orders/1', 'x-request-id': '1' }
  }))
  const protectedHandler = protect(handler)
  const first = await protectedHandler(post('{"n":1}'))
  const repeat = await protectedHandler(post('{ "n": 1 }'))

  for (const response of [first, repeat]) {
    assert.equal(response.status, 201)
    assert.equal(response.headers.get('location'), '/orders/1')
    assert.equal(response.headers.get('content-type'), 'application/json')
  }
  assert.equal(first.headers.get('x-request-id'), '1')
  assert.equal(repeat.headers.get('x-request-id'), null)
  assert.equal(first.headers.get('idempotent-replayed'), null)
  assert.equal(repeat.headers.get('idempotent-replayed'), 'true')
  const text = await first.text()
  assert.equal(text, '{"id": 9007199254740993,  "of": {"n":1}}')
  assert.equal(await repeat.text(), text)
  assert.equal(handler.calls, 1)
  assert.equal(await handler.rows(), 1)
})

test('the handler of each run gets a request of its own, with the same body', async () => {
  const bodies = []
  const protectedHandler = protect(inserting(async (request, context, { key }) => {
    bodies.push(await request.json())
    assert.equal(request.headers.get('x-trace'), 't')
    assert.equal(request.method, 'PUT')
    assert.equal(request.url, 'http://shop.test/orders?a=1')
    assert.equal(key, 'k1')
    if (bodies.length === 1) throw Object.assign(new Error('conflict'), { code: '40001' })
    return Response.json({ ok: true })
  }))
  const response = await protectedHandler(post({ n: 1 }, { method: 'PUT', path: '/orders?a=1', headers: { 'x-trace': 't' } }))
  assert.equal(response.status, 200)
  assert.deepEqual(bodies, [{ n: 1 }, { n: 1 }])
})

test('ten requests at once with one key insert one row', async () => {
  const handler = inserting(() => Response.json({ ok: true }, { status: 201 }))
  const protectedHandler = protect(handler, { wait: '30s' })
  const responses = await Promise.all(Array.from({ length: 10 }, async () => await protectedHandler(post({ n: 1 }))))
  assert.deepEqual(responses.map(response => response.status), Array(10).fill(201))
  assert.equal(responses.filter(response => response.headers.get('idempotent-replayed') === 'true').length, 9)
  assert.equal(await handler.rows(), 1)
})

test('a repeat while the first is at work is 409 with Retry-After', async () => {
  const protectedHandler = protect(async () => {
    const repeat = await protectedHandler(post({ n: 1 }))
    return Response.json({ repeat: [repeat.status, repeat.headers.get('retry-after'), (await repeat.json()).code] })
  }, { lease: '5 min' })
  const response = await protectedHandler(post({ n: 1 }))
  const { repeat: [status, retryAfter, code] } = await response.json()
  assert.equal(status, 409)
  assert.match(retryAfter, /^[1-9]\d*$/)
  assert.equal(code, 'DUPLICATE_IN_PROGRESS')
})

test('a key that is missing, empty, sent twice or has a comma is a problem of 400', async () => {
  const protectedHandler = protect(() => assert.fail('the handler was called'))
  const cases = [
    [null, 'IDEMPOTENCY_KEY_MISSING'], ['', 'IDEMPOTENCY_KEY_MISSING'], ['a b', 'IDEMPOTENCY_KEY_INVALID'],
    [['a', 'b'], 'IDEMPOTENCY_KEY_INVALID'], [['a', 'a'], 'IDEMPOTENCY_KEY_INVALID'],
    ['a,b', 'IDEMPOTENCY_KEY_INVALID'], ['a,', 'IDEMPOTENCY_KEY_INVALID'], [['a', ''], 'IDEMPOTENCY_KEY_INVALID']
  ]
  for (const [key, code] of cases) {
    const response = await protectedHandler(post({ n: 1 }, { key }))
    assert.equal(response.status, 400, String(key))
    assert.match(response.headers.get('content-type'), /^application\/problem\+json/)
    assert.equal((await response.json()).code, code, String(key))
  }
})

test('other header fields may have commas', async () => {
  const protectedHandler = protect(() => Response.json({}), { header: ['X-Key', 'Idempotency-Key'] })
  const response = await protectedHandler(post({ n: 1 }, { key: null, headers: { 'x-key': 'k', accept: 'a, b', origin: 'http://a, http://b' } }))
  assert.equal(response.status, 200)
})

for (const [what, first, second] of [
  ['body', [{ n: 1 }], [{ n: 2 }]],
  ['number that a parser would round', ['{"n": 9007199254740993}'], ['{"n": 9007199254740992}']],
  ['bytes', [new Uint8Array([0, 255]), { headers: { 'content-type': 'image/png' } }], [new Uint8Array([0, 254]), { headers: { 'content-type': 'image/png' } }]],
  ['query', [{ n: 1 }, { path: '/orders?a=1' }], [{ n: 1 }, { path: '/orders?a=1&a=2' }]],
  ['path below a template', [{ n: 1 }, { path: '/orders/1' }, { route: '/orders/:id' }], [{ n: 1 }, { path: '/orders/2' }]],
  ['parameter of the path', [{ n: 1 }, {}, {}, { params: { id: '1' } }], [{ n: 1 }, {}, {}, { params: { id: '2' } }]],
  ['parameter that is promised', [{ n: 1 }, {}, {}, { params: Promise.resolve({ id: '1' }) }], [{ n: 1 }, {}, {}, { params: Promise.resolve({ id: '2' }) }]]
]) {
  test(`the same key with another ${what} is refused`, async () => {
    const [body, request, options, context] = first
    const protectedHandler = protect(() => Response.json({ ok: true }), options)
    assert.equal((await protectedHandler(post(body, request), context)).status, 200)
    assert.equal((await protectedHandler(post(body, request), context)).headers.get('idempotent-replayed'), 'true')
    const refused = await protectedHandler(post(second[0], second[1]), second[3])
    assert.equal(refused.status, 422)
    assert.equal((await refused.json()).code, 'IDEMPOTENCY_KEY_REUSED')
  })
}

test('mismatchStatus and options of the HTTP layer count', async () => {
  const protectedHandler = protect(() => Response.json({ ok: true }), { mismatchStatus: 409, marker: 'X-Replay', omit: ['body.sent_at'] })
  await protectedHandler(post({ n: 1, sent_at: 1 }))
  assert.equal((await protectedHandler(post({ n: 1, sent_at: 2 }))).headers.get('x-replay'), 'true')
  assert.equal((await protectedHandler(post({ n: 2 }))).status, 409)
})

test('the action is method and route', async () => {
  const scopes = []
  const handler = idempotentFetch(idempotency, { actor, route: ({ context }) => context.route }, (request, context, { scope }) => {
    scopes.push(scope.action)
    return new Response(null, { status: 204 })
  })
  await handler(post({}, { key: randomUUID() }), { route: '/orders/:id' })
  const plain = idempotentFetch(idempotency, { actor }, (request, context, { scope }) => {
    scopes.push(scope.action)
    return new Response(null, { status: 204 })
  })
  await plain(post({}, { key: randomUUID(), path: '/things?a=1' }))
  assert.deepEqual(scopes, ['POST /orders/:id', 'POST /things'])
})

test('cookies are set by the first answer, each by itself, and never by a replay', async () => {
  const protectedHandler = protect(() => new Response('x', { headers: [['set-cookie', 'a=1; Expires=Thu, 01 Jan 2099 00:00:00 GMT'], ['set-cookie', 'b=2']] }))
  const first = await protectedHandler(post({ n: 1 }))
  assert.deepEqual(first.headers.getSetCookie(), ['a=1; Expires=Thu, 01 Jan 2099 00:00:00 GMT', 'b=2'])
  const repeat = await protectedHandler(post({ n: 1 }))
  assert.deepEqual(repeat.headers.getSetCookie(), [])
  assert.equal(await repeat.text(), 'x')
})

for (const status of [204, 205, 304]) {
  test(`${status} has no body, the first time and in a replay`, async () => {
    const protectedHandler = protect(() => new Response(null, { status, headers: { etag: '"1"' } }))
    for (const replayed of [null, 'true']) {
      const response = await protectedHandler(post({ n: 1 }))
      assert.equal(response.status, status)
      assert.equal(response.body, null)
      assert.equal(response.headers.get('etag'), '"1"')
      assert.equal(response.headers.get('idempotent-replayed'), replayed)
    }
  })
}

test('a body of bytes is the same for the handler and in the replay', async () => {
  const bytes = Uint8Array.from({ length: 256 }, (_, i) => i)
  const protectedHandler = protect(async request => new Response(await request.arrayBuffer(), { headers: { 'content-type': 'application/octet-stream' } }))
  for (let i = 0; i < 2; i++) {
    const response = await protectedHandler(post(bytes, { headers: { 'content-type': 'application/octet-stream' } }))
    assert.deepEqual(await bytesOf(response), Buffer.from(bytes))
    assert.equal(response.headers.get('content-type'), 'application/octet-stream')
  }
})

test('a request without a body has none for the handler', async () => {
  const protectedHandler = protect(request => Response.json({ body: request.body }))
  assert.deepEqual(await (await protectedHandler(post(undefined))).json(), { body: null })
})

/** A stream of chunks that are made when they are asked for. */
function streamOf (chunks, cancelled = () => {}) {
  const left = [...chunks]
  return new ReadableStream({
    pull (controller) {
      if (left.length === 0) controller.close()
      else controller.enqueue(new TextEncoder().encode(left.shift()))
    },
    cancel: cancelled
  })
}

test('a stream is collected, and replayed whole', async () => {
  const handler = inserting(() => new Response(streamOf(['data: a\n\n', 'data: b\n\n']), { headers: { 'content-type': 'text/event-stream' } }))
  const protectedHandler = protect(handler)
  for (let i = 0; i < 2; i++) {
    const response = await protectedHandler(post({ n: 1 }))
    assert.equal(await response.text(), 'data: a\n\ndata: b\n\n')
    assert.equal(response.headers.get('content-type'), 'text/event-stream')
  }
  assert.equal(handler.calls, 1)
})

test('a stream that breaks rolls back, and nothing is kept', async () => {
  const handler = inserting(() => {
    if (handler.calls === 2) return Response.json({ ok: true })
    return new Response(new ReadableStream({ pull (controller) { controller.error(new Error('broken')) } }))
  })
  const protectedHandler = protect(handler)
  await assert.rejects(protectedHandler(post({ n: 1 })), /broken/)
  assert.equal(await handler.rows(), 0)
  assert.equal((await protectedHandler(post({ n: 1 }))).status, 200)
})

test('an answer larger than maxAnswer is refused, its stream cancelled, and the work rolled back', async () => {
  let cancelled = false
  const handler = inserting(() => new Response(streamOf(Array(100).fill('12345'), () => { cancelled = true })))
  const response = await protect(handler, { maxAnswer: 14 })(post({ n: 1 }))
  assert.equal(response.status, 500)
  assert.equal((await response.json()).code, 'ANSWER_TOO_LARGE')
  assert.equal(cancelled, true)
  assert.equal(await handler.rows(), 0)
})

test('a request larger than maxBody is 413, and the handler is not called', async () => {
  const protectedHandler = protect(() => assert.fail('the handler was called'), { maxBody: 4 })
  assert.equal((await protectedHandler(post('12345', { headers: { 'content-type': 'text/plain' } }))).status, 413)
})

test('a body that should be JSON and is not is 400', async () => {
  const response = await protect(() => assert.fail('the handler was called'))(post('{"n":'))
  assert.equal(response.status, 400)
  assert.equal((await response.json()).code, 'REQUEST_INVALID')
})

test('a request whose body was read before is an error, for nothing could be compared', async () => {
  const request = post({ n: 1 })
  await request.text()
  await assert.rejects(protect(() => assert.fail('the handler was called'))(request), /has been read/)
})

test('a response whose body was read is an error, and nothing is kept', async () => {
  const handler = inserting(async () => {
    const response = Response.json({ ok: true })
    await response.text()
    return response
  })
  await assert.rejects(protect(handler)(post({ n: 1 })), /has been read/)
  assert.equal(await handler.rows(), 0)
})

test('safe methods pass, with their own request and without asking who it is', async () => {
  const request = new Request('http://shop.test/orders')
  const protectedHandler = protect((asked, context, work) => {
    assert.equal(asked, request)
    assert.equal(work, null)
    return Response.json(context)
  }, { actor: () => assert.fail('asked') })
  assert.deepEqual(await (await protectedHandler(request, { a: 1 })).json(), { a: 1 })
})

test('without a key, where it is not required, the handler runs each time', async () => {
  let calls = 0
  const protectedHandler = protect((request, context, work) => {
    assert.equal(work, null)
    return Response.json({ calls: ++calls })
  }, { required: false })
  for (const expected of [1, 2]) {
    assert.deepEqual(await (await protectedHandler(post({ n: 1 }, { key: null }))).json(), { calls: expected })
  }
})

test('who is not logged in is told so, also without a key, and never gets a replay', async () => {
  const handler = inserting(() => Response.json({ secret: 1 }))
  const protectedHandler = protect(handler, {
    actor: async request => {
      if (!request.headers.has('authorization')) throw new Response('log in', { status: 401 })
      return request.headers.get('authorization')
    }
  })
  const login = { headers: { authorization: 'bob' } }
  assert.equal((await protectedHandler(post({ n: 1 }, login))).status, 200)
  assert.equal((await protectedHandler(post({ n: 1 }))).status, 401)
  assert.equal((await protectedHandler(post({ n: 1 }, { key: null }))).status, 401)
  assert.equal((await protectedHandler(post({ n: 1 }, { ...login, key: null }))).status, 400)
  assert.equal(handler.calls, 1)
})

test('an actor or a tenant that is undefined is an error, and the handler is not called', async () => {
  for (const options of [{ actor: async () => undefined }, { tenant: () => undefined }]) {
    await assert.rejects(protect(() => assert.fail('the handler was called'), options)(post({ n: 1 })), TypeError)
  }
})

test('actors and tenants do not share keys', async () => {
  const handler = inserting(async (request, context, { scope }) => Response.json([scope.tenant, scope.actor]))
  const protectedHandler = protect(handler, { tenant: async (request, { tenant }) => tenant })
  for (const [tenant, authorization] of [['a', 'x'], ['a', 'y'], ['b', 'x']]) {
    const response = await protectedHandler(post({ n: 1 }, { headers: { authorization } }), { tenant })
    assert.deepEqual(await response.json(), [tenant, authorization])
  }
  assert.equal(handler.calls, 3)
})

test('one of tenant and actor has to be given', () => {
  assert.throws(() => idempotentFetch(idempotency, {}, () => {}), TypeError)
})

test('what the handler throws rolls back and is passed on, and a repeat runs', async () => {
  const handler = inserting(() => {
    if (handler.calls === 1) throw new Error('no')
    return Response.json({ ok: true })
  })
  const protectedHandler = protect(handler)
  await assert.rejects(protectedHandler(post({ n: 1 })), { message: 'no' })
  assert.equal(await handler.rows(), 0)
  assert.equal((await protectedHandler(post({ n: 1 }))).status, 200)
  assert.equal(await handler.rows(), 1)
})

test('a response that the handler throws is its answer', async () => {
  const handler = inserting(() => { throw new Response(null, { status: 303, headers: { location: '/orders/1' } }) })
  const protectedHandler = protect(handler)
  for (let i = 0; i < 2; i++) {
    const response = await protectedHandler(post({ n: 1 }))
    assert.equal(response.status, 303)
    assert.equal(response.headers.get('location'), '/orders/1')
  }
  assert.equal(handler.calls, 1)
  assert.equal(await handler.rows(), 1)
})

test('a 4xx is kept while the work is rolled back; a 503 is not kept', async () => {
  for (const [status, calls] of [[422, 1], [503, 2]]) {
    const handler = inserting(() => Response.json({ no: true }, { status }))
    const protectedHandler = protect(handler)
    for (let i = 0; i < 2; i++) assert.equal((await protectedHandler(post({ n: 1 }))).status, status)
    assert.equal(handler.calls, calls)
    assert.equal(await handler.rows(), 0)
  }
})

test('with a lease the handler gets the claim, and goes on where an earlier attempt got', async () => {
  const seen = []
  const protectedHandler = protect(async (request, context, { tx, claim }) => {
    assert.equal(tx, undefined)
    seen.push([claim.attempt, claim.recovery])
    if (claim.attempt === 1) {
      await claim.checkpoint('charged', { charge: 7 })
      throw new Error('died')
    }
    return Response.json(claim.recovery.state)
  }, { lease: '5 min' })
  await assert.rejects(protectedHandler(post({ n: 1 })), /died/)
  assert.deepEqual(await (await protectedHandler(post({ n: 1 }))).json(), { charge: 7 })
  assert.deepEqual(seen, [[1, null], [2, { point: 'charged', state: { charge: 7 } }]])
})

test('what claim.finish returned is the answer', async () => {
  const item = randomUUID()
  const protectedHandler = protect(async (request, context, { claim }) => await claim.finish(async tx => {
    await tx.query('INSERT INTO orders (item) VALUES ($1)', [item])
    return { status: 201, json: { item }, headers: { location: '/orders/1' } }
  }), { lease: '5 min' })
  for (const replayed of [null, 'true']) {
    const response = await protectedHandler(post({ n: 1 }))
    assert.equal(response.status, 201)
    assert.equal(response.headers.get('location'), '/orders/1')
    assert.equal(response.headers.get('idempotent-replayed'), replayed)
    assert.deepEqual(await response.json(), { item })
  }
  const { rows } = await database.pool.query('SELECT count(*)::int FROM orders WHERE item = $1', [item])
  assert.deepEqual(rows, [{ count: 1 }])
})

test('a page of another origin may see the marker', async () => {
  const response = await protect(() => Response.json({}))(post({ n: 1 }, { headers: { origin: 'http://else.test' } }))
  assert.equal(response.headers.get('access-control-expose-headers'), 'Idempotency-Key, Idempotent-Replayed, Retry-After')
})

test('newRequest makes the request that the handler gets', async () => {
  class Own extends Request {}
  const protectedHandler = protect(async request => Response.json([request instanceof Own, await request.json()]), {
    newRequest: (request, init) => new Own(request.url, init)
  })
  assert.deepEqual(await (await protectedHandler(post({ n: 1 }))).json(), [true, { n: 1 }])
})
