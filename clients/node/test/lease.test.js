// A leased claim: `lease`, for work with effects outside the database.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { after, afterEach, before, beforeEach, describe, test } from 'node:test'
import pg from 'pg'
import {
  ClaimLostError, CommitUnknownError, InFlightError, MismatchError, OutOfOrderError, Refusal, RequestInvalidError, createIdempotency
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

describe('lease, when the answer to a COMMIT is lost', () => {
  // a transaction that writes the row commits slowly, and its connection is lost meanwhile
  async function loseSlowCommit (work) {
    await database.pool.query(`CREATE OR REPLACE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$
      BEGIN PERFORM pg_sleep(0.5); RETURN NULL; END $$;
      CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON charges DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slow()`)
    const proxy = await cutProxy(database.url)
    const distant = new pg.Pool({ connectionString: proxy.url })
    const client = createIdempotency({ pool: distant })
    const scope = scopeOf()
    let calls = 0
    const write = async tx => {
      calls++
      await insert(tx, scope)
      // after the messages of the last statement and COMMIT: the Sync at their end is on its way, and no answer
      proxy.cutWhen(message => message.from === 'client' && message.type === 'S' && message.length)
      return { status: 201, json: 'written' }
    }
    const result = await client.lease(scope, null, {}, claim => work(claim, write)).catch(error => error)
    proxy.cutWhen(() => false, { times: 0 })
    await distant.end()
    await proxy.close()
    await database.pool.query('DROP TRIGGER slow ON charges')
    return { scope, result, calls }
  }

  test('of finish: its rows are there once, with their answer', async () => {
    const { scope, result, calls } = await loseSlowCommit((claim, write) => claim.finish(write))
    assert.deepEqual([calls, await chargesOf(scope)], [1, 1])
    assert.deepEqual([result.status, result.rawJson], [201, '"written"'])
    assert.equal((await idempotency.status(scope)).result.rawJson, '"written"')
  })

  test('of a checkpoint: its rows are there once, and the next request goes on from it', async () => {
    const { scope, result, calls } = await loseSlowCommit((claim, write) => claim.checkpoint('charged', 1, { work: write }))
    assert.deepEqual([calls, await chargesOf(scope)], [1, 1])
    assert.ok(result instanceof CommitUnknownError && result.status === 503, String(result))
    await idempotency.lease(scope, null, {}, claim => { assert.deepEqual(claim.recovery, { point: 'charged', state: 1 }) })
  })
})

describe('lease, what the work does after it has finished', () => {
  test('changes nothing', async () => {
    for (const error of [new Error('late'), new Refusal({ status: 402 })]) {
      const scope = scopeOf()
      const result = await idempotency.lease(scope, null, {}, async claim => {
        await claim.finish(async () => ({ status: 201, json: 'kept' }))
        throw error
      })
      assert.deepEqual(pick(result), ['completed', 201, '"kept"'])
    }
  })

  test('takes no second connection inside of finish', async () => {
    await idempotency.lease(scopeOf(), null, {}, claim => claim.finish(async () => {
      await assert.rejects(claim.checkpoint('x'), OutOfOrderError)
      await assert.rejects(claim.release(), OutOfOrderError)
    }))
  })

  test('passes on what is wrong with a value of the work, and not as the client\'s request', async () => {
    await assert.rejects(idempotency.lease(scopeOf(), null, {}, () => database.pool.query("SELECT 'x'::uuid")), { code: '22P02' })
    await assert.rejects(idempotency.run(scopeOf(), null, tx => tx.query("SELECT 'x'::uuid")), { code: '22P02' })
    await assert.rejects(idempotency.lease(scopeOf(), '{', {}, fail), RequestInvalidError)
    await assert.rejects(idempotency.store(scopeOf(), '{', { status: 404 }), RequestInvalidError)
  })

  test('runs again after conflicts of its own calls', async () => {
    const serializable = new pg.Pool({ connectionString: database.url, options: '-c default_transaction_isolation=serializable' })
    const client = createIdempotency({ pool: serializable, retries: 20 })
    const results = await Promise.all(Array.from({ length: 80 }, () => client.lease(scopeOf(), null, {}, () => ({ status: 201 }))))
    await serializable.end()
    assert.deepEqual(new Set(results.map(({ outcome }) => outcome)), new Set(['completed']))
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

  test('when nothing can be asked any more: says that it is not known', async () => {
    const distant = new pg.Pool({ connectionString: proxy.url })
    const scope = scopeOf()
    const result = createIdempotency({ pool: distant }).lease(scope, null, {}, () => {
      // the answer to finish, and then the next connection
      proxy.cutWhen(message => message.from === 'server' && (message.type === 'C' || message.type === 'R'), { times: 2 })
      return { status: 201 }
    })
    await assert.rejects(result, error => error instanceof CommitUnknownError && error.status === 503)
    proxy.cutWhen(() => false, { times: 0 })
    await distant.end()
    assert.equal((await idempotency.status(scope)).outcome, 'replayed')
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
