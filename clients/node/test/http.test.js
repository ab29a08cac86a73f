// What all frameworks' adapters have in common, with requests and answers made by hand.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { after, before, describe, test } from 'node:test'
import { createIdempotency } from 'pg-idempotency'
import { HttpProtection, codeErrorDetails } from 'pg-idempotency/http'
import { createDatabase } from './support/database.js'

let database, idempotency
before(async () => {
  database = await createDatabase()
  idempotency = createIdempotency({ pool: database.pool })
})
after(async () => await database.drop())

function protect (options = {}) {
  return new HttpProtection(idempotency, { actor: raw => raw.user, ...options })
}

// A request; `headers` are lists of values by lower-case names
function requestOf ({ method = 'POST', route = '/orders', params = {}, query = {}, headers = {}, body = null, user = 'alice', key = randomUUID() } = {}) {
  const all = { 'content-type': ['application/json'], ...(key === null ? {} : { 'idempotency-key': [key].flat() }), ...headers }
  return { raw: { user }, method, route, params, query, header: name => all[name] ?? [], body }
}

const json = (status, body, headers = {}) => ({ status, headers: { 'content-type': 'application/json; charset=utf-8', ...headers }, body })

// The answer as a client sees it, and whether the handler was called
async function ask (protection, request, answer = json(201, '{"id":1}')) {
  let called = false
  const key = protection.admit(request)
  const sent = await protection.run(request, key, async () => {
    called = true
    return typeof answer === 'function' ? answer() : answer
  })
  return { ...sent, called }
}

describe('the key', () => {
  const refused = [
    ['missing', null, 'IDEMPOTENCY_KEY_MISSING'],
    ['empty', '', 'IDEMPOTENCY_KEY_MISSING'],
    ['white space', '  \t', 'IDEMPOTENCY_KEY_MISSING'],
    ['empty in quotes', '""', 'IDEMPOTENCY_KEY_MISSING'],
    ['sent twice', ['a', 'b'], 'IDEMPOTENCY_KEY_INVALID'],
    ['sent twice, the same', ['a', 'a'], 'IDEMPOTENCY_KEY_INVALID'],
    ['too long', 'x'.repeat(256), 'IDEMPOTENCY_KEY_INVALID'],
    ['with a space', 'a b', 'IDEMPOTENCY_KEY_INVALID'],
    ['not ASCII', 'ä', 'IDEMPOTENCY_KEY_INVALID']
  ]
  for (const [what, key, code] of refused) {
    test(`is refused with 400: ${what}`, () => {
      const protection = protect()
      assert.throws(() => protection.admit(requestOf({ key })), error => {
        const { status, headers, body } = protection.problem(error)
        assert.deepEqual([status, headers['content-type'], JSON.parse(body).code, JSON.parse(body).status],
          [400, 'application/problem+json; charset=utf-8', code, 400])
        return true
      })
    })
  }

  test('is taken out of quotes', () => {
    assert.equal(protect().admit(requestOf({ key: '"abc"' })), 'abc')
    assert.equal(protect().admit(requestOf({ key: ' abc ' })), 'abc')
  })

  test('has the form that is asked for', () => {
    const uuid = '8e03978e-40d5-43dd-bc93-6894a57f9324'
    const global = { format: /k/g }
    const cases = [
      [{ format: 'uuid' }, uuid, true], [{ format: 'uuid' }, 'abc', false],
      [{ format: 'slug' }, 'a-b_1', true], [{ format: 'slug' }, 'a.b', false],
      [{ format: /^k\d+$/ }, 'k12', true], [global, 'k', true], [global, 'k', true], [{ format: /^k\d+$/ }, 'x', false],
      [{ minLength: 16 }, 'x'.repeat(16), true], [{ minLength: 16 }, 'x'.repeat(15), false],
      [{ maxLength: 20 }, 'x'.repeat(21), false]
    ]
    for (const [form, key, good] of cases) {
      const admit = () => protect({ key: form }).admit(requestOf({ key }))
      if (good) assert.equal(admit(), key)
      else assert.throws(admit, { code: 'IDEMPOTENCY_KEY_INVALID' })
    }
  })

  test('comes in the header that is named', () => {
    const protection = protect({ header: ['X-Idempotency-Key', 'X-Request-Key'] })
    assert.equal(protection.admit(requestOf({ key: null, headers: { 'x-request-key': ['abc'] } })), 'abc')
    assert.throws(() => protection.admit(requestOf({ key: null, headers: { 'x-request-key': ['a'], 'x-idempotency-key': ['b'] } })),
      { code: 'IDEMPOTENCY_KEY_INVALID' })
    assert.throws(() => protection.admit(requestOf({ key: 'abc' })), /X-Idempotency-Key is missing/)
  })

  test('need not be there where it is optional, or the method is safe', () => {
    assert.equal(protect({ required: false }).admit(requestOf({ key: null })), null)
    for (const method of ['GET', 'HEAD', 'OPTIONS', 'TRACE']) assert.equal(protect().admit(requestOf({ method })), null)
    for (const method of ['POST', 'PUT', 'PATCH', 'DELETE']) assert.equal(protect().admit(requestOf({ method, key: 'k' })), 'k')
    assert.equal(protect({ methods: ['POST'] }).admit(requestOf({ method: 'PUT' })), null)
  })
})

describe('the scope', () => {
  test('keeps users, tenants and routes apart', async () => {
    const protection = protect({ tenant: raw => raw.tenant ?? null })
    const key = randomUUID()
    const requests = [requestOf({ key }), requestOf({ key, user: 'bob' }), requestOf({ key, route: '/refunds' }), requestOf({ key, method: 'PUT' })]
    requests.push({ ...requestOf({ key }), raw: { user: 'alice', tenant: 'other' } })
    for (const request of requests) assert.equal((await ask(protection, request)).called, true)
    for (const request of requests) assert.equal((await ask(protection, request)).called, false)
    const { rows: [{ action }] } = await database.pool.query(
      "SELECT action FROM idempotency.idempotency_key WHERE key = $1 AND action LIKE '%refunds'", [key])
    assert.equal(action, 'POST /refunds')
  })

  test('has to be somebody\'s', async () => {
    assert.throws(() => new HttpProtection(idempotency, {}), TypeError)
    for (const who of ['actor', 'tenant']) {
      const stranger = new HttpProtection(idempotency, { [who]: () => undefined })
      await assert.rejects(ask(stranger, requestOf()), { name: 'TypeError', message: new RegExp(`${who} is undefined`) })
      for (const id of [{}, [], NaN, true, () => {}]) {
        await assert.rejects(ask(new HttpProtection(idempotency, { [who]: () => id }), requestOf()), TypeError)
      }
      assert.equal((await ask(new HttpProtection(idempotency, { [who]: () => null }), requestOf())).called, true)
    }
  })

  test('has the action that is given', async () => {
    const key = randomUUID()
    await ask(protect({ action: 'orders.create' }), requestOf({ key }))
    assert.equal((await ask(protect({ action: () => 'orders.create' }), requestOf({ key, route: '/v2/orders' }))).called, false)
  })
})

describe('the fingerprint', () => {
  const first = { params: { id: '1' }, query: { a: '1' }, body: '{"id": 9007199254740993, "sent_at": 1}' }
  const same = [
    { body: '{"sent_at":1,"id":9007199254740993}' },
    { body: Buffer.from('{"sent_at":1, "id":9007199254740993}') },
    { headers: { 'content-type': ['application/json; charset=utf-8'] } }
  ]
  const different = [
    { body: '{"id": 9007199254740992, "sent_at": 1}' }, { body: '{"id": 9007199254740993, "sent_at": 2}' },
    { params: { id: '2' } }, { query: { a: '2' } }, { query: {} }, { body: null }
  ]
  test('is that of the whole request, as it came', async () => {
    const key = randomUUID()
    const protection = protect()
    await ask(protection, requestOf({ key, ...first }))
    for (const change of same) assert.equal((await ask(protection, requestOf({ key, ...first, ...change }))).status, 201, JSON.stringify(change))
    for (const change of different) {
      const { status, body, called } = await ask(protection, requestOf({ key, ...first, ...change }))
      assert.deepEqual([status, JSON.parse(body).code, called], [422, 'IDEMPOTENCY_KEY_REUSED', false], JSON.stringify(change))
    }
  })

  test('leaves out what does not count', async () => {
    const key = randomUUID()
    const protection = protect({ omit: ['body.sent_at', ['query', 'a']] })
    await ask(protection, requestOf({ key, ...first }))
    const repeat = requestOf({ key, ...first, query: { a: '9' }, body: '{"id": 9007199254740993, "sent_at": 2}' })
    assert.equal((await ask(protection, repeat)).called, false)
    assert.throws(() => protect({ omit: ['sent_at'] }), TypeError)
  })

  test('is of the bytes of what is not JSON', async () => {
    const key = randomUUID()
    const form = body => requestOf({ key, body, headers: { 'content-type': ['application/x-www-form-urlencoded'] } })
    await ask(protect(), form('a=1'))
    assert.equal((await ask(protect(), form(Buffer.from('a=1')))).status, 201)
    assert.equal((await ask(protect(), form('a=2'))).status, 422)
    const text = requestOf({ key, body: 'a=1', headers: { 'content-type': ['text/plain'] } })
    assert.equal((await ask(protect(), text)).status, 422)
  })

  test('refuses what should be JSON and is not, be it JSON once it is put into more', async () => {
    for (const body of ['{"a":', '1,"params":{}', 'nul', '{"a":1e400000}', '['.repeat(9000) + ']'.repeat(9000)]) {
      const { status, body: problem, called } = await ask(protect(), requestOf({ body }))
      assert.deepEqual([status, JSON.parse(problem).code, called], [400, 'REQUEST_INVALID', false])
    }
    assert.equal((await ask(protect(), requestOf({ body: '"\\u0000"' }))).status, 400)
  })

  test('can be one of the service\'s own', async () => {
    const key = randomUUID()
    const protection = protect({ fingerprint: request => JSON.parse(request.body).id })
    await ask(protection, requestOf({ key, body: '{"id": 1, "x": 1}' }))
    assert.equal((await ask(protection, requestOf({ key, body: '{"id": 1}' }))).status, 201)
    assert.equal((await ask(protection, requestOf({ key, body: '{"id": 2}' }))).status, 422)
  })
})

describe('the answer', () => {
  test('is replayed byte for byte, with its status and the headers that belong to it', async () => {
    const request = requestOf()
    const headers = { location: '/orders/1', etag: '"1"', link: '</>; rel=x', 'x-total': '5', 'set-cookie': ['a=1', 'b=2'], date: 'now', 'x-request-id': '7' }
    const protection = protect({ replayHeaders: ['X-Total'] })
    const first = await ask(protection, request, json(201, '{"a":  1}', headers))
    assert.deepEqual(first.headers['set-cookie'], ['a=1', 'b=2'])
    assert.equal(first.headers['idempotent-replayed'], undefined)
    const { called, ...repeat } = await ask(protection, request)
    assert.equal(called, false)
    assert.deepEqual(repeat, {
      own: false,
      outcome: 'replayed',
      error: null,
      status: 201,
      headers: { 'content-type': 'application/json; charset=utf-8', location: '/orders/1', etag: '"1"', link: '</>; rel=x', 'x-total': '5', 'idempotent-replayed': 'true' },
      body: '{"a":  1}'
    })
  })

  test('may be anything', async () => {
    const answers = [
      json(201, '{"a": 1}'), json(200, '"ä"'),
      { status: 200, headers: { 'content-type': 'application/vnd.api+json' }, body: '{"data": []}' },
      { status: 200, headers: { 'content-type': 'text/csv' }, body: 'a,b\n1,2\n' },
      { status: 200, headers: { 'content-type': 'image/png' }, body: Buffer.from([0, 255, 13]) },
      { status: 200, headers: { 'content-type': 'application/json', 'content-encoding': 'gzip' }, body: Buffer.from([31, 139]) },
      { status: 200, headers: { 'content-type': 'application/json' }, body: 'no JSON' },
      { status: 204, headers: {}, body: null },
      { status: 303, headers: { location: '/' }, body: null }
    ]
    for (const answer of answers) {
      const request = requestOf()
      await ask(protect(), request, structuredClone(answer))
      const { status, headers, body, called } = await ask(protect(), request)
      assert.equal(called, false)
      assert.equal(status, answer.status)
      assert.deepEqual({ ...headers, 'idempotent-replayed': undefined }, { ...answer.headers, 'idempotent-replayed': undefined })
      assert.deepEqual(body === null ? null : Buffer.from(body), answer.body === null ? null : Buffer.from(answer.body))
    }
  })

  test('is not kept when it says that a repeat may do better', async () => {
    for (const status of [408, 409, 425, 429, 500, 503]) {
      const request = requestOf()
      assert.equal((await ask(protect(), request, json(status, '{}'))).status, status)
      assert.equal((await ask(protect(), request)).called, true)
    }
  })

  test('is kept when it is a 4xx', async () => {
    const request = requestOf()
    await ask(protect(), request, json(404, '{"no": 1}'))
    const { status, body, called } = await ask(protect(), request)
    assert.deepEqual([status, body, called], [404, '{"no": 1}', false])
  })

  test('is not kept when it is too large, and the work is rolled back', async () => {
    const request = requestOf()
    const { status, body } = await ask(protect({ maxAnswer: 10 }), request, json(200, '"12345678901"'))
    assert.deepEqual([status, JSON.parse(body).code], [500, 'ANSWER_TOO_LARGE'])
    assert.equal((await ask(protect({ maxAnswer: 10 }), requestOf(), json(200, '"ääääää"'))).status, 500) // in bytes
    assert.equal((await ask(protect(), request)).called, true)
  })

  test('is kept as long as is said for its status', async () => {
    const protection = protect({ ttl: { '2xx': '2 hours', 404: '10 s', '4xx': '20 s' } })
    const kept = async status => {
      const key = randomUUID()
      await ask(protection, requestOf({ key }), json(status, '{}'))
      const { rows: [{ kept }] } = await database.pool.query(
        'SELECT extract(epoch FROM expires_at - finished_at)::int AS kept FROM idempotency.idempotency_key WHERE key = $1', [key])
      return kept
    }
    assert.deepEqual([await kept(201), await kept(404), await kept(402), await kept(302)], [7200, 10, 20, 86400])
  })

  test('is not marked where no marker is wanted, or by another name', async () => {
    const request = requestOf()
    await ask(protect(), request)
    assert.equal((await ask(protect({ marker: false }), request)).headers['idempotent-replayed'], undefined)
    assert.equal((await ask(protect({ marker: 'X-Replay' }), request)).headers['x-replay'], 'true')
  })

  test('refuses to replay what belongs to one connection', () => {
    for (const name of ['Set-Cookie', 'Date', 'Authorization', 'WWW-Authenticate', 'X-RateLimit-Limit', 'RateLimit', 'X-Request-Id']) {
      assert.throws(() => protect({ replayHeaders: [name] }), TypeError, name)
    }
  })

  test('names its headers to pages of another origin', async () => {
    const request = requestOf({ headers: { origin: ['https://shop.example'] } })
    const first = await ask(protect(), request, json(201, '{}', { 'access-control-expose-headers': 'X-Total' }))
    assert.equal(first.headers['access-control-expose-headers'], 'X-Total, Idempotency-Key, Idempotent-Replayed, Retry-After')
    assert.equal((await ask(protect(), request)).headers['access-control-expose-headers'], 'Idempotency-Key, Idempotent-Replayed, Retry-After')
    assert.equal((await ask(protect({ cors: false }), request)).headers['access-control-expose-headers'], undefined)
  })

  test('is that of the handler when it throws', async () => {
    const request = requestOf()
    await assert.rejects(ask(protect(), request, () => { throw new Error('oops') }), { message: 'oops' })
    assert.equal((await ask(protect(), request)).called, true)
  })
})

describe('a problem', () => {
  test('of a request in flight is 409 with Retry-After', async () => {
    const request = requestOf({ key: 'in-flight' })
    // another process of the service
    const other = new HttpProtection(createIdempotency({ pool: database.pool }), { actor: raw => raw.user })
    await protect().run(request, 'in-flight', async () => {
      const { status, headers, body } = await ask(other, request)
      assert.deepEqual([status, JSON.parse(body).code], [409, 'DUPLICATE_IN_PROGRESS'])
      assert.match(headers['retry-after'], /^[1-9]\d*$/)
      return json(201, '{}')
    })
  })

  test('of a key used again is 409 where the API says so', async () => {
    const key = randomUUID()
    const protection = protect({ mismatchStatus: 409 })
    await ask(protection, requestOf({ key, body: '1' }))
    const { status, body } = await ask(protection, requestOf({ key, body: '2' }))
    assert.deepEqual([status, JSON.parse(body)], [409, {
      type: 'about:blank', title: 'The idempotency key was used with a different request', status: 409,
      detail: 'The idempotency key was used with a different request', code: 'IDEMPOTENCY_KEY_REUSED'
    }])
  })

  test('is written as the API writes its errors', async () => {
    const protection = protect({ problem: codeErrorDetails })
    assert.throws(() => protection.admit(requestOf({ key: null })), error => {
      const { headers, body } = protection.problem(error)
      assert.equal(headers['content-type'], 'application/json; charset=utf-8')
      assert.deepEqual(JSON.parse(body), {
        code: 'IDEMPOTENCY_KEY_MISSING', error: 'The idempotency key is missing', details: { reason: 'the header Idempotency-Key is missing' }
      })
      return true
    })
  })

  test('does not tell what the database said', async () => {
    const broken = createIdempotency({ pool: database.pool, wait: 'no interval' })
    const protection = new HttpProtection(broken, { actor: () => 'a' })
    await assert.rejects(protection.run(requestOf(), 'k', async () => json(200, '1')), { code: '22007' })
  })
})

describe('a lease', () => {
  test('is not waited for', () => {
    assert.throws(() => protect({ lease: '5 min', wait: '1s' }), TypeError)
  })

  test('is taken where it is asked for, and its claim handed out', async () => {
    const request = requestOf({ key: 'leased' })
    const protection = protect({ lease: '5 min' })
    await protection.run(request, 'leased', async ({ tx, claim, key, scope }) => {
      assert.equal(tx, undefined)
      assert.deepEqual([key, scope.actor], ['leased', 'alice'])
      await claim.checkpoint('charged')
      const { status, headers } = await ask(protection, request)
      assert.equal(status, 409)
      assert.equal(headers['retry-after'], '10')
      const whole = protect({ lease: '5 min', maxRetryAfter: 1000 })
      assert.ok((await ask(whole, request)).headers['retry-after'] > 200)
      return json(201, '"charged"')
    })
    assert.equal((await ask(protection, request)).body, '"charged"')
  })

  test('has the answer that its own finish has kept', async () => {
    const request = requestOf({ key: 'finished' })
    const protection = protect({ lease: '5 min', ttl: { '2xx': '2 hours' } })
    const first = await protection.run(request, 'finished', async ({ claim }) => {
      await claim.finish(async () => ({ status: 202, json: 'kept' }))
      return json(200, '"returned"')
    })
    assert.deepEqual([first.status, first.body, first.outcome, first.own], [202, '"kept"', 'completed', false])
    assert.deepEqual([(await ask(protection, request)).status, (await ask(protection, request)).body], [202, '"kept"'])
    const { rows: [{ hours }] } = await database.pool.query(
      "SELECT extract(epoch FROM expires_at - finished_at) / 3600 AS hours FROM idempotency.idempotency_key WHERE key = 'finished'")
    assert.ok(hours >= 2 && hours < 2.5, `${hours} hours`) // a lease's may be an eighth longer
  })
})
