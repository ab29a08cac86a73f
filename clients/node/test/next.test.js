// Route handlers and server actions of Next.js. The errors by which Next ends them are made here as Next
// makes them; examples/shop has the real ones.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { after, before, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import pg from 'pg'
import {
  ClaimLostError, InFlightError, KeyInvalidError, KeyMissingError, MismatchError, OutOfOrderError, Refusal, createIdempotency
} from 'pg-idempotency'
import { createNext } from 'pg-idempotency/next'
import { createDatabase } from './support/database.js'

let database, pool, idempotency, next
before(async () => {
  database = await createDatabase()
  await database.pool.query('CREATE TABLE rows (item text)')
  pool = new pg.Pool({ connectionString: database.url })
  idempotency = createIdempotency({ pool })
  next = createNext(idempotency, { actor: () => 'alice' })
})
after(async () => {
  await pool.end()
  await database.drop()
})

async function insert (tx, item) {
  await tx.query('INSERT INTO rows (item) VALUES ($1)', [item])
}

async function rowsOf (item) {
  return (await database.pool.query('SELECT count(*)::int FROM rows WHERE item = $1', [item])).rows[0].count
}

async function recordsOf (key) {
  return (await database.pool.query('SELECT action, actor, state::text, status_code FROM idempotency.idempotency_key WHERE key = $1', [key])).rows
}

function signal (digest) {
  return Object.assign(new Error(digest.split(';')[0]), { digest })
}

const toOrder = 'NEXT_REDIRECT;push;/orders/1;a=b;307;'

//
// Route handlers
//

class NextRequest extends Request {
  constructor (url, { nextConfig, ...init } = {}) {
    super(url, init)
    this.nextUrl = { basePath: nextConfig?.basePath ?? '', pathname: new URL(url).pathname }
  }
}

function post (path, { key = randomUUID(), body = '{}', basePath } = {}) {
  const headers = { 'content-type': 'application/json', ...(key === null ? {} : { 'idempotency-key': key }) }
  return new NextRequest(`http://shop.test${path}`, { method: 'POST', headers, body, nextConfig: { basePath } })
}

function contextOf (params) {
  return { params: Promise.resolve(params) }
}

for (const [path, params, action] of [
  ['/api/orders', {}, 'POST /api/orders'],
  ['/api/orders/17', { id: '17' }, 'POST /api/orders/[id]'],
  ['/api/orders/17/items/17?a=17', { order: '17', item: '17' }, 'POST /api/orders/[order]/items/[item]'],
  ['/files/a/b%20c/d', { path: ['a', 'b c', 'd'] }, 'POST /files/[...path]'],
  ['/shops/caf%C3%A9/%E0%A4/x', { shop: 'café', rest: undefined }, 'POST /shops/[shop]/%E0%A4/x']
]) {
  test(`the action of ${path} is ${action}`, async () => {
    const key = randomUUID()
    const POST = next.route((request, context, { scope }) => Response.json(scope.action))
    const response = await POST(post(path, { key }), contextOf(params))
    assert.equal(await response.json(), action)
    assert.deepEqual(await recordsOf(key), [{ action, actor: 'alice', state: 'completed', status_code: 200 }])
  })
}

test('a route runs once, and a repeat is replayed; another parameter is refused', async () => {
  const key = randomUUID()
  const POST = next.route(async (request, { params }, { tx }) => {
    const { id } = await params
    await insert(tx, `${key} ${id} ${await request.text()}`)
    return Response.json({ id }, { status: 201 })
  })
  const first = await POST(post('/orders/1', { key }), contextOf({ id: '1' }))
  const repeat = await POST(post('/orders/1', { key }), contextOf({ id: '1' }))
  assert.deepEqual([first.status, await first.json()], [201, { id: '1' }])
  assert.deepEqual([repeat.status, await repeat.json()], [201, { id: '1' }])
  assert.equal(repeat.headers.get('idempotent-replayed'), 'true')
  assert.equal(await rowsOf(`${key} 1 {}`), 1)
  assert.equal((await POST(post('/orders/2', { key }), contextOf({ id: '2' }))).status, 422)
})

test("the handler gets a request of Next's own class, with its nextUrl", async () => {
  const POST = next.route(async request => Response.json([request.constructor.name, request.nextUrl, await request.json()]))
  const response = await POST(post('/docs/orders', { body: '[1]', basePath: '/docs' }), contextOf({}))
  assert.deepEqual(await response.json(), ['NextRequest', { basePath: '/docs', pathname: '/docs/orders' }, [1]])
})

test('a redirect from a route handler is its answer: it commits, and is replayed', async () => {
  const key = randomUUID()
  const POST = next.route(async (request, context, { tx }) => {
    await insert(tx, key)
    throw signal(toOrder)
  })
  for (const replayed of [null, 'true']) {
    const response = await POST(post('/orders', { key }), contextOf({}))
    assert.equal(response.status, 307)
    assert.equal(response.headers.get('location'), '/orders/1;a=b')
    assert.equal(response.headers.get('idempotent-replayed'), replayed)
  }
  assert.equal(await rowsOf(key), 1)
})

test('notFound from a route handler is a 404 that is kept, and its work is rolled back', async () => {
  const key = randomUUID()
  let calls = 0
  const POST = next.route(async (request, context, { tx }) => {
    calls++
    await insert(tx, key)
    throw signal('NEXT_HTTP_ERROR_FALLBACK;404')
  })
  for (let i = 0; i < 2; i++) assert.equal((await POST(post('/orders', { key }), contextOf({}))).status, 404)
  assert.equal(calls, 1)
  assert.equal(await rowsOf(key), 0)
})

test('other errors of a route handler are passed on, and nothing is kept', async () => {
  const key = randomUUID()
  for (const error of [new Error('no'), signal('DYNAMIC_SERVER_USAGE'), signal('NEXT_REDIRECT;push;/x;200;')]) {
    const POST = next.route(async (request, context, { tx }) => {
      await insert(tx, key)
      throw error
    })
    await assert.rejects(POST(post('/orders', { key }), contextOf({})), error)
  }
  assert.equal(await rowsOf(key), 0)
  assert.deepEqual(await recordsOf(key), [])
})

test('options of a route come before those of all', async () => {
  const { route } = createNext(idempotency, { actor: () => 'alice', mismatchStatus: 409, lease: '1 min' })
  const key = randomUUID()
  const POST = route(async (request, context, { claim }) => Response.json(claim.attempt), { action: 'orders.create', actor: () => 'bob' })
  assert.equal(await (await POST(post('/orders', { key }), contextOf({}))).json(), 1)
  assert.deepEqual(await recordsOf(key), [{ action: 'orders.create', actor: 'bob', state: 'completed', status_code: 200 }])
  assert.equal((await POST(post('/orders', { key, body: '[2]' }), contextOf({}))).status, 409)
})

test('the client may be promised, and is asked for again if that failed', async () => {
  let calls = 0
  const { route, withIdempotency } = createNext(async () => {
    if (++calls === 1) throw new Error('no database')
    return idempotency
  }, { actor: () => 'alice' })
  assert.equal(calls, 0)
  const POST = route(() => Response.json('ok'))
  await assert.rejects(POST(post('/orders'), contextOf({})), /no database/)
  assert.equal((await POST(post('/orders'), contextOf({}))).status, 200)
  assert.equal(await withIdempotency(randomUUID(), 'alice', 'act', () => 'ok'), 'ok')
})

//
// Server actions
//

test('ten calls of an action at once run it once, and all get the same result', async () => {
  const key = randomUUID()
  const results = await Promise.all(Array.from({ length: 10 }, async () =>
    await next.withIdempotency(key, 'alice', 'submitAnswer', async tx => {
      await insert(tx, key)
      return { id: randomUUID() }
    })))
  assert.equal(await rowsOf(key), 1)
  assert.equal(new Set(results.map(result => result.id)).size, 1)
})

for (const [what, result, expected] of [
  ['undefined', undefined, undefined],
  ['null', null, null],
  ['a text', 'a "b"', 'a "b"'],
  ['something like an answer', { status: 500, redirect: '/x' }, { status: 500, redirect: '/x' }],
  ['a Date', { at: new Date(0) }, { at: '1970-01-01T00:00:00.000Z' }]
]) {
  test(`a result that is ${what} is the same the first time and in a repeat`, async () => {
    const key = randomUUID()
    let calls = 0
    for (let i = 0; i < 2; i++) {
      assert.deepEqual(await next.withIdempotency(key, 'alice', 'act', () => { calls++; return result }), expected)
    }
    assert.equal(calls, 1)
  })
}

test('a result that is not JSON is an error, and nothing is kept', async () => {
  const key = randomUUID()
  await assert.rejects(next.withIdempotency(key, 'alice', 'act', async tx => {
    await insert(tx, key)
    return 1n
  }), TypeError)
  assert.equal(await rowsOf(key), 0)
  assert.deepEqual(await recordsOf(key), [])
})

for (const error of [new Error('no'), signal('NEXT_HTTP_ERROR_FALLBACK;404')]) {
  test(`an action that throws ${error.message} leaves nothing, and a repeat runs`, async () => {
    const key = randomUUID()
    await assert.rejects(next.withIdempotency(key, 'alice', 'act', async tx => {
      await insert(tx, key)
      throw error
    }), thrown => thrown === error)
    assert.equal(await rowsOf(key), 0)
    assert.deepEqual(await recordsOf(key), [])
    assert.equal(await next.withIdempotency(key, 'alice', 'act', () => 'again'), 'again')
  })
}

test('redirect inside an action commits, and each repeat goes to the same page', async () => {
  const key = randomUUID()
  for (let i = 0; i < 2; i++) {
    await assert.rejects(next.withIdempotency(key, 'alice', 'act', async tx => {
      await insert(tx, key)
      throw signal(toOrder)
    }), { message: 'NEXT_REDIRECT', digest: toOrder })
  }
  assert.equal(await rowsOf(key), 1)
  assert.deepEqual(await recordsOf(key), [{ action: 'act', actor: 'alice', state: 'completed', status_code: 303 }])
})

test('a Refusal is kept and thrown again, while the work is rolled back', async () => {
  const key = randomUUID()
  let calls = 0
  for (let i = 0; i < 2; i++) {
    await assert.rejects(next.withIdempotency(key, 'alice', 'act', async tx => {
      calls++
      await insert(tx, key)
      throw new Refusal({ status: 402, json: { error: 'no money' } })
    }), error => {
      assert.ok(error instanceof Refusal)
      assert.equal(error.answer.status, 402)
      assert.equal(error.answer.rawJson, '{"error":"no money"}')
      return true
    })
  }
  assert.equal(calls, 1)
  assert.equal(await rowsOf(key), 0)
})

test('users, actions and tenants do not share keys', async () => {
  const key = randomUUID()
  let calls = 0
  for (const [user, action, tenant] of [['a', 'x', null], ['b', 'x', null], ['a', 'y', null], ['a', 'x', 'acme']]) {
    await next.withIdempotency(key, user, action, () => { calls++ }, { tenant })
  }
  assert.equal(calls, 4)
})

test('an action needs a key that is a text, and a user', async () => {
  const call = async (key, user = 'alice') => await next.withIdempotency(key, user, 'act', () => assert.fail('it ran'))
  for (const key of [undefined, null, '']) await assert.rejects(call(key), KeyMissingError)
  for (const key of [7, { key: 'a' }, ['a'], 'with space', 'x'.repeat(256)]) await assert.rejects(call(key), KeyInvalidError)
  for (const user of ['', null]) await assert.rejects(call(randomUUID(), user), TypeError)
})

test('with the request, the same key with something else is refused', async () => {
  const key = randomUUID()
  const submit = async request => await next.withIdempotency(key, 'alice', 'act', () => 'ok', { request })
  assert.equal(await submit({ answer: 1 }), 'ok')
  assert.equal(await submit({ answer: 1 }), 'ok')
  await assert.rejects(submit({ answer: 2 }), MismatchError)
})

test('results are kept for 24 hours or as long as is said, and run again then', async () => {
  for (const [ttl, seconds] of [[undefined, 24 * 3600], ['10 min', 600]]) {
    const key = randomUUID()
    let calls = 0
    const act = async () => await next.withIdempotency(key, 'alice', 'act', () => ++calls, { ttl })
    assert.equal(await act(), 1)
    const { rows: [{ kept }] } = await database.pool.query(
      'SELECT extract(epoch FROM expires_at - finished_at)::int AS kept FROM idempotency.idempotency_key WHERE key = $1', [key])
    assert.ok(Math.abs(kept - seconds) <= 1, `kept for ${kept} s`)
    assert.equal(await act(), 1)
    await database.pool.query("UPDATE idempotency.idempotency_key SET expires_at = now() - interval '1 s' WHERE key = $1", [key])
    assert.equal(await act(), 2)
  }
})

test('without patience, an action in flight is told so at once', async () => {
  const key = randomUUID()
  await next.withIdempotency(key, 'alice', 'act', async () => {
    await assert.rejects(createNext(createIdempotency({ pool })).withIdempotency(key, 'alice', 'act', () => {}, { patience: 0 }), InFlightError)
  })
})

//
// Server actions under a lease
//

test('ten calls of a leased action at once run it once, and need no connection while they wait', async () => {
  const small = new pg.Pool({ connectionString: database.url, max: 1 })
  const { withIdempotency } = createNext(createIdempotency({ pool: small }))
  const key = randomUUID()
  let calls = 0
  const results = await Promise.all(Array.from({ length: 10 }, async () =>
    await withIdempotency(key, 'alice', 'checkout', async claim => {
      calls++
      await claim.checkpoint('before')
      await sleep(50) // what the others would use to run as well
      return await claim.finish(async tx => {
        await insert(tx, key)
        return 'paid'
      })
    }, { lease: '5 min' })))
  assert.deepEqual(results, Array(10).fill('paid'))
  assert.equal(calls, 1)
  assert.equal(await rowsOf(key), 1)
  await small.end()
})

test('a leased action that died goes on from its checkpoint', async () => {
  const key = randomUUID()
  const seen = []
  const checkout = async () => await next.withIdempotency(key, 'alice', 'checkout', async claim => {
    seen.push([claim.attempt, claim.recovery])
    if (claim.recovery === null) {
      await claim.checkpoint('charged', { charge: 7 })
      assert.deepEqual(claim.recovery, { point: 'charged', state: { charge: 7 } })
      throw new Error('died')
    }
    return claim.recovery.state
  }, { lease: '5 min' })
  await assert.rejects(checkout(), /died/)
  assert.deepEqual(await checkout(), { charge: 7 })
  assert.deepEqual(await checkout(), { charge: 7 })
  assert.deepEqual(seen, [[1, null], [2, { point: 'charged', state: { charge: 7 } }]])
})

test('redirect in the last transaction of a leased action keeps its rows', async () => {
  const key = randomUUID()
  for (let i = 0; i < 2; i++) {
    await assert.rejects(next.withIdempotency(key, 'alice', 'checkout', async claim => await claim.finish(async tx => {
      await insert(tx, key)
      throw signal(toOrder)
    }), { lease: '5 min' }), { digest: toOrder })
  }
  assert.equal(await rowsOf(key), 1)
})

test('redirect after the last transaction of a leased action is an error, for it is not kept', async () => {
  const key = randomUUID()
  await assert.rejects(next.withIdempotency(key, 'alice', 'checkout', async claim => {
    await claim.finish(async tx => await insert(tx, key))
    throw signal(toOrder)
  }, { lease: '5 min' }), OutOfOrderError)
  assert.equal(await rowsOf(key), 1)
})

test('redirect from a leased action that wrote nothing is kept', async () => {
  const key = randomUUID()
  let calls = 0
  for (let i = 0; i < 2; i++) {
    await assert.rejects(next.withIdempotency(key, 'alice', 'checkout', () => {
      calls++
      throw signal(toOrder)
    }, { lease: '5 min' }), { digest: toOrder })
  }
  assert.equal(calls, 1)
})

test('a leased action that gives its claim back has its result, and a repeat runs', async () => {
  const key = randomUUID()
  let calls = 0
  const act = async () => await next.withIdempotency(key, 'alice', 'checkout', async claim => {
    await claim.release()
    return ++calls
  }, { lease: '5 min' })
  assert.deepEqual([await act(), await act()], [1, 2])
})

test('an action that was taken over cannot finish', async () => {
  const key = randomUUID()
  await assert.rejects(next.withIdempotency(key, 'alice', 'checkout', async claim => {
    await database.pool.query("UPDATE idempotency.idempotency_key SET lease_expires_at = now() - interval '1 s' WHERE key = $1", [key])
    assert.equal(await next.withIdempotency(key, 'alice', 'checkout', () => 'second', { lease: '5 min' }), 'second')
    return await claim.finish(async tx => await insert(tx, key))
  }, { lease: '5 min' }), ClaimLostError)
  assert.equal(await rowsOf(key), 0)
  assert.equal(await next.withIdempotency(key, 'alice', 'checkout', () => 'third', { lease: '5 min' }), 'second')
})
