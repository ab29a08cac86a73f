// A leased claim: `lease`, for work with effects outside the database.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { after, afterEach, before, beforeEach, describe, test } from 'node:test'
import pg from 'pg'
import {
  ClaimLostError, InFlightError, MismatchError, OutOfOrderError, Refusal, createIdempotency
} from 'pg-idempotency'
import { createDatabase } from './support/database.js'
import { beforeAnswer, cutProxy } from './support/proxy.js'

let database, pool, idempotency
before(async () => {
  database = await createDatabase()
  await database.pool.query('CREATE TABLE charges (key text)')
})
after(async () => await database.drop())
beforeEach(() => {
  pool = new pg.Pool({ connectionString: database.url, max: 1 })
  idempotency = createIdempotency({ pool })
})
afterEach(async () => await pool.end())

function scopeOf (key = randomUUID()) {
  return { tenant: 'acme', action: 'cards.charge', key }
}

async function recordOf ({ key }) {
  const { rows: [row] } = await database.pool.query('SELECT * FROM idempotency.idempotency_key WHERE key = $1', [key])
  return row
}

async function chargesOf ({ key }) {
  const { rows: [{ count }] } = await database.pool.query('SELECT count(*)::int FROM charges WHERE key = $1', [key])
  return count
}

function insert (tx, { key }) {
  return tx.query('INSERT INTO charges VALUES ($1)', [key])
}

// Let a lease run out, as time would
async function expire ({ key }) {
  await database.pool.query(
    "UPDATE idempotency.idempotency_key SET lease_expires_at = now() - interval '1 s' WHERE key = $1", [key])
}

function pick ({ outcome, status, rawJson }) {
  return [outcome, status, rawJson]
}

function fail () {
  throw new Error('the work was called')
}

describe('lease', () => {
  test('does the work once, and a repeat gets its answer', async () => {
    const scope = scopeOf()
    const first = await idempotency.lease(scope, { a: 1 }, {}, async claim => {
      assert.equal(claim.attempt, 1)
      assert.equal(claim.recovery, null)
      assert.match(claim.id, /^[0-9a-f-]{36}$/)
      return { status: 201, rawJson: '{"a":  1}' }
    })
    assert.deepEqual(pick(first), ['completed', 201, '{"a":  1}'])
    assert.deepEqual(pick(await idempotency.lease(scope, { a: 1 }, {}, fail)), ['replayed', 201, '{"a":  1}'])
    await assert.rejects(idempotency.lease(scope, { a: 2 }, {}, fail), MismatchError)
  })

  test('holds no connection while the work runs, and refuses repeats meanwhile', async () => {
    const scope = scopeOf()
    await idempotency.lease(scope, null, { lease: '10 min' }, async () => {
      assert.equal(pool.idleCount, 1)
      await assert.rejects(idempotency.lease(scope, null, {}, fail), error =>
        error instanceof InFlightError && error.retryAfter > 500 && error.retryAfter <= 600)
      const status = await idempotency.status(scope)
      assert.deepEqual([status.outcome, status.attempt, status.result], ['in_flight', 1, null])
      assert.ok(status.createdAt instanceof Date)
      // another request may run inside, as there is no transaction
      assert.equal((await idempotency.run(scopeOf(), null, () => {})).outcome, 'completed')
    })
  })

  test('saves where the work got, and an attempt after a crash goes on from there', async () => {
    const scope = scopeOf()
    // an attempt that never comes back
    await new Promise(resolve => {
      idempotency.lease(scope, null, {}, async claim => {
        await claim.checkpoint('charging', { amount: 5 })
        await claim.checkpoint('charged', { charge: 'ch_1' }, { work: async tx => { await insert(tx, scope) } })
        assert.deepEqual(claim.recovery, { point: 'charged', state: { charge: 'ch_1' } })
        resolve()
        await new Promise(() => {})
      })
    })
    assert.equal((await idempotency.status(scope)).recoveryPoint, 'charged')
    await expire(scope)
    assert.equal((await idempotency.status(scope)).outcome, 'stalled')
    const result = await idempotency.lease(scope, null, {}, async claim => {
      assert.equal(claim.attempt, 2)
      assert.deepEqual(claim.recovery, { point: 'charged', state: { charge: 'ch_1' } })
      return { status: 201, json: claim.recovery.state }
    })
    assert.deepEqual(pick(result), ['completed', 201, '{"charge":"ch_1"}'])
    assert.equal(await chargesOf(scope), 1)
  })

  test('fences an attempt that was taken over, in every call', async () => {
    const scope = scopeOf()
    await assert.rejects(idempotency.lease(scope, null, {}, async claim => {
      await expire(scope)
      await idempotency.lease(scope, null, {}, async () => {
        await assert.rejects(claim.checkpoint('late'), ClaimLostError)
        await assert.rejects(claim.checkpoint('late', null, { work: tx => insert(tx, scope) }), ClaimLostError)
        await assert.rejects(claim.finish(async tx => { await insert(tx, scope) }), ClaimLostError)
        return { status: 201, json: 'second' }
      })
      return { status: 201, json: 'first' }
    }), error => error instanceof ClaimLostError && error.status === 409)
    assert.equal((await idempotency.status(scope)).result.json, 'second')
    assert.equal(await chargesOf(scope), 0)
  })

  test('writes the last rows in one transaction with the answer', async () => {
    const scope = scopeOf()
    const result = await idempotency.lease(scope, null, {}, async claim => await claim.finish(async tx => {
      await insert(tx, scope)
      assert.equal(idempotency.current(), tx)
      return { status: 201, json: 'paid' }
    }))
    assert.deepEqual(pick(result), ['completed', 201, '"paid"'])
    assert.equal(await chargesOf(scope), 1)
  })

  test('keeps a 4xx, while the rows of finish are rolled back', async () => {
    const [returned, finished, refused] = [scopeOf(), scopeOf(), scopeOf()]
    const answer = { status: 402, json: 'no money' }
    const works = [
      [returned, () => answer],
      [finished, claim => claim.finish(async tx => { await insert(tx, finished); return answer })],
      [refused, () => { throw new Refusal(answer) }]
    ]
    for (const [scope, work] of works) {
      assert.deepEqual(pick(await idempotency.lease(scope, null, {}, work)), ['errored', 402, '"no money"'])
      assert.deepEqual(pick(await idempotency.lease(scope, null, {}, fail)), ['replayed', 402, '"no money"'])
      assert.equal(await chargesOf(scope), 0)
    }
  })

  test('gives the lease back when the work throws, with what protects the next attempt', async () => {
    const scope = scopeOf()
    await assert.rejects(idempotency.lease(scope, { a: 1 }, {}, async claim => {
      await claim.checkpoint('charged', 'ch_2')
      throw new Error('oops')
    }), { message: 'oops' })
    await assert.rejects(idempotency.lease(scope, { a: 2 }, {}, fail), MismatchError)
    const result = await idempotency.lease(scope, { a: 1 }, {}, claim => ({ status: 200, json: claim.recovery }))
    assert.deepEqual(result.json, { point: 'charged', state: 'ch_2' })
  })

  test('gives the lease back for a 503, and when it is asked to', async () => {
    const scope = scopeOf()
    assert.equal((await idempotency.lease(scope, null, {}, () => ({ status: 503 }))).outcome, 'released')
    const released = await idempotency.lease(scope, null, {}, async claim => {
      await claim.release()
      await assert.rejects(claim.checkpoint('late'), OutOfOrderError)
      return { status: 503 }
    })
    assert.deepEqual(pick(released), ['released', 503, null])
    assert.equal((await idempotency.lease(scope, null, {}, () => {})).outcome, 'completed')
  })

  test('forgets a recovery point whose effect was undone', async () => {
    const scope = scopeOf()
    await idempotency.lease(scope, null, {}, async claim => {
      await claim.checkpoint('charged')
      await claim.checkpoint('')
      assert.equal(claim.recovery, null)
      return { status: 503 }
    })
    await idempotency.lease(scope, null, {}, claim => { assert.equal(claim.recovery, null) })
  })

  test('renews the lease with a checkpoint', async () => {
    const scope = scopeOf()
    await idempotency.lease(scope, null, { lease: '1 min' }, async claim => {
      const { lease_expires_at: before } = await recordOf(scope)
      await claim.checkpoint('far', null, { lease: '1 hour' })
      const { lease_expires_at: later } = await recordOf(scope)
      assert.ok(later - before > 50 * 60 * 1000)
    })
  })

  test('runs a last transaction again after a conflict', async () => {
    const scope = scopeOf()
    let calls = 0
    const result = await idempotency.lease(scope, null, {}, claim => claim.finish(async tx => {
      await insert(tx, scope)
      if (++calls === 1) await tx.query("DO $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END $$")
      return { status: 201 }
    }))
    assert.deepEqual([result.outcome, calls, await chargesOf(scope)], ['completed', 2, 1])
  })
})

describe('lease through a proxy that cuts the connection', () => {
  let proxy
  before(async () => { proxy = await cutProxy(database.url) })
  after(async () => await proxy.close())

  test('at any message: what was written is there once, and the answer is kept', async () => {
    for (let number = 1; number < 60; number++) {
      const scope = scopeOf()
      const before = proxy.cuts
      const distant = new pg.Pool({ connectionString: proxy.url, max: 1 })
      const client = createIdempotency({ pool: distant })
      // one connection is open already, so that the cut is in a call
      await client.status(scope)
      let sent = 0
      proxy.cutWhen(message => message.from === 'client' && ++sent === number && message.length)
      const result = await client.lease(scope, null, {}, async claim => {
        await claim.checkpoint('one', 1)
        return await claim.finish(async tx => {
          await insert(tx, scope)
          return { status: 201, json: 'done' }
        })
      }).catch(error => error)
      const cut = proxy.cuts > before
      proxy.cutWhen(() => false, { times: 0 })
      await distant.end()

      const { state, recovery_point: point } = await recordOf(scope) ?? {}
      const expected = result instanceof Error ? ['pending', 0] : ['completed', 1]
      assert.deepEqual([state, await chargesOf(scope)], expected, `cut after message ${number}: ${result.message ?? result.outcome}`)
      if (result instanceof Error) assert.equal(point, 'one')
      if (!cut) return
    }
    assert.fail('the messages did not come to an end')
  })

  test('after COMMIT of finish has succeeded: returns the answer', async () => {
    const scope = scopeOf()
    const distant = new pg.Pool({ connectionString: proxy.url })
    const result = await createIdempotency({ pool: distant }).lease(scope, null, {}, async claim => {
      proxy.cutWhen(beforeAnswer('COMMIT'))
      return await claim.finish(async tx => {
        await insert(tx, scope)
        return { status: 201, json: 'paid' }
      })
    })
    await distant.end()
    assert.deepEqual([result.status, result.rawJson, await chargesOf(scope)], [201, '"paid"', 1])
  })

  test('in begin: the same claim is asked for again', async () => {
    const distant = new pg.Pool({ connectionString: proxy.url })
    const client = createIdempotency({ pool: distant })
    const scope = scopeOf()
    await client.status(scope)
    // after the server has begun it, before the client hears of it
    proxy.cutWhen(beforeAnswer('SELECT'))
    const result = await client.lease(scope, null, {}, claim => ({ status: 201, json: claim.attempt }))
    await distant.end()
    assert.deepEqual(pick(result), ['completed', 201, '1'])
  })

})
