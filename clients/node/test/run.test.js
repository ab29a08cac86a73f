// A transaction claim: `run`, over each kind of pool that there is.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { after, afterEach, before, beforeEach, describe, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import pg from 'pg'
import {
  ConflictError, CommitUnknownError, InFlightError, JsonRequest, KeyInvalidError, MismatchError, OutOfOrderError,
  Refusal, RequestInvalidError, RolledBackError, UnavailableError, createIdempotency, findSchema, isConnectionLost
} from 'pg-idempotency'
import { createDatabase } from './support/database.js'
import { afterClientMessages, beforeAnswer, beforeStatement, cutProxy } from './support/proxy.js'

const kinds = {
  'a pool': [{}, {}],
  'a pool that pipelines': [{ pipeline: true }, {}],
  'a pool without prepared statements': [{}, { prepare: false }]
}

let database
before(async () => {
  database = await createDatabase()
  await database.pool.query('CREATE TABLE orders (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, key text)')
  await database.pool.query('CREATE TABLE counters (name text PRIMARY KEY, value int NOT NULL)')
  await database.pool.query("INSERT INTO counters VALUES ('a', 0)")
})
after(async () => await database.drop())

function scopeOf (key = randomUUID()) {
  return { tenant: 'acme', actor: 'alice', action: 'orders.create', key }
}

async function ordersOf ({ key }) {
  const { rows: [{ count }] } = await database.pool.query('SELECT count(*)::int FROM orders WHERE key = $1', [key])
  return count
}

async function recordOf ({ key }) {
  const { rows: [row] } = await database.pool.query(
    'SELECT state, status_code, response::text, expires_at - finished_at AS kept FROM idempotency.idempotency_key WHERE key = $1', [key])
  return row
}

function insert (tx, { key }) {
  return tx.query('INSERT INTO orders (key) VALUES ($1)', [key])
}

for (const [kind, [poolOptions, clientOptions]] of Object.entries(kinds)) {
  describe(`run over ${kind}`, () => {
    let pool, idempotency

    beforeEach(() => {
      pool = new pg.Pool({ connectionString: database.url, ...poolOptions })
      idempotency = createIdempotency({ pool, ...clientOptions })
    })
    afterEach(async () => await pool.end())

    test('does the work once, and a repeat gets the same bytes', async () => {
      const scope = scopeOf()
      const text = '{"id": 9007199254740993,  "price": 1.50}'
      let calls = 0
      const work = async tx => {
        calls++
        await insert(tx, scope)
        return { status: 201, rawJson: text, headers: { location: '/orders/1' } }
      }
      const first = await idempotency.run(scope, '{"a": 1}', work)
      const repeat = await idempotency.run(scope, '{"a":1}', work)
      assert.deepEqual([first.outcome, first.replayed, first.status, first.rawJson], ['completed', false, 201, text])
      assert.deepEqual([repeat.outcome, repeat.replayed, repeat.status, repeat.rawJson], ['replayed', true, 201, text])
      assert.deepEqual(repeat.headers, { location: '/orders/1' })
      assert.equal(calls, 1)
      assert.equal(await ordersOf(scope), 1)
    })

    test('has committed when it returns', async () => {
      const scope = scopeOf()
      await idempotency.run(scope, null, async tx => { await insert(tx, scope) })
      assert.equal(await ordersOf(scope), 1)
      assert.equal((await recordOf(scope)).state, 'completed')
    })

    test('replays a body that is not JSON, and an answer that is empty', async () => {
      const [bytes, empty] = [scopeOf(), scopeOf()]
      const body = Buffer.from([0, 1, 0x5c, 0xff])
      for (const replayed of [false, true]) {
        const result = await idempotency.run(bytes, null, () => ({ status: 200, body }))
        assert.deepEqual([result.replayed, Buffer.from(result.body), result.rawJson], [replayed, body, null])
        const nothing = await idempotency.run(empty, null, () => ({ status: 204 }))
        assert.deepEqual([nothing.replayed, nothing.status, nothing.body, nothing.json], [replayed, 204, null, undefined])
      }
    })

    test('keeps a 4xx while the rows of its work are rolled back', async () => {
      const scope = scopeOf()
      const work = async tx => {
        await insert(tx, scope)
        return { status: 402, json: { error: 'no money' } }
      }
      assert.deepEqual(pick(await idempotency.run(scope, null, work)), ['errored', 402, '{"error":"no money"}'])
      assert.deepEqual(pick(await idempotency.run(scope, null, work)), ['replayed', 402, '{"error":"no money"}'])
      assert.equal(await ordersOf(scope), 0)
    })

    test('keeps the rows of a 4xx that asks for it', async () => {
      const scope = scopeOf()
      const result = await idempotency.run(scope, null, async tx => {
        await insert(tx, scope)
        return { status: 403, json: {}, commit: true }
      })
      assert.equal(result.outcome, 'errored')
      assert.equal(await ordersOf(scope), 1)
    })

    test('takes a refusal from deep inside as the answer', async () => {
      const scope = scopeOf()
      const work = async tx => {
        await insert(tx, scope)
        throw new Refusal({ status: 409, json: { error: 'sold out' } })
      }
      // 409 is one of the statuses that are not kept
      assert.deepEqual(pick(await idempotency.run(scope, null, work)), ['released', 409, '{"error":"sold out"}'])
      assert.equal(await recordOf(scope), undefined)
      assert.equal(await ordersOf(scope), 0)
    })

    test('keeps nothing of a 5xx, so that a repeat runs', async () => {
      const scope = scopeOf()
      let calls = 0
      const work = async tx => {
        await insert(tx, scope)
        return { status: ++calls === 1 ? 503 : 201, json: calls }
      }
      assert.deepEqual(pick(await idempotency.run(scope, null, work)), ['released', 503, '1'])
      assert.deepEqual(pick(await idempotency.run(scope, null, work)), ['completed', 201, '2'])
      assert.equal(await ordersOf(scope), 1)
    })

    test('passes on what the work throws, and leaves nothing', async () => {
      const scope = scopeOf()
      await assert.rejects(idempotency.run(scope, null, async tx => {
        await insert(tx, scope)
        throw new Error('oops')
      }), { message: 'oops' })
      await assert.rejects(idempotency.run(scope, null, async tx => {
        await tx.query('SELECT 1/0')
      }), { code: '22012' })
      assert.equal(await ordersOf(scope), 0)
      assert.equal((await idempotency.run(scope, null, () => {})).outcome, 'completed')
    })

    test('does not take work whose error was swallowed for done', async () => {
      const scope = scopeOf()
      await assert.rejects(idempotency.run(scope, null, async tx => {
        await insert(tx, scope)
        await tx.query('SELECT 1/0').catch(() => {})
        return { status: 201 }
      }), { code: '25P02' })
      assert.equal(await recordOf(scope), undefined)
    })

    test('does not take work that nobody waits for, and that fails, for done', async () => {
      const scope = scopeOf()
      await assert.rejects(idempotency.run(scope, null, tx => {
        tx.query('SELECT 1/0').catch(() => {})
        return { status: 201 }
      }), { code: '25P02' })
      assert.equal(await recordOf(scope), undefined)
    })

    test('tells a different request, and one in flight', async () => {
      const scope = scopeOf()
      const begun = resolvers()
      const goOn = resolvers()
      const first = idempotency.run(scope, { a: 1 }, async () => {
        begun.resolve()
        await goOn.promise
        return { status: 201 }
      })
      await begun.promise
      await assert.rejects(idempotency.run(scope, { a: 1 }, fail), error =>
        error instanceof InFlightError && error.status === 409 && error.sqlState === 'ID003' && error.retryAfter >= 1)
      const waiting = idempotency.run(scope, { a: 1 }, fail, { wait: '10s' })
      goOn.resolve()
      assert.equal((await first).outcome, 'completed')
      assert.equal((await waiting).outcome, 'replayed')
      await assert.rejects(idempotency.run(scope, { a: 2 }, fail), error =>
        error instanceof MismatchError && error.status === 422 && error.sqlState === 'ID004')
    })

    test('compares numbers as they were sent, and not what is left out', async () => {
      const scope = scopeOf()
      await idempotency.run(scope, new JsonRequest('{"id": 9007199254740993, "sent": {"at": 1}}', [['sent', 'at']]), () => {})
      const repeat = new JsonRequest('{"sent": {"at": 2}, "id": 9007199254740993}', [['sent', 'at']])
      assert.equal((await idempotency.run(scope, repeat, fail)).outcome, 'replayed')
      const other = new JsonRequest('{"id": 9007199254740992, "sent": {"at": 1}}', [['sent', 'at']])
      await assert.rejects(idempotency.run(scope, other, fail), MismatchError)
    })

    test('compares a digest', async () => {
      const scope = scopeOf()
      await idempotency.run(scope, new Uint8Array(32).fill(1), () => {})
      assert.equal((await idempotency.run(scope, new Uint8Array(32).fill(1), fail)).outcome, 'replayed')
      await assert.rejects(idempotency.run(scope, new Uint8Array(32).fill(2), fail), MismatchError)
    })

    test('names what is wrong with key and request', async () => {
      await assert.rejects(idempotency.run(scopeOf(' '), null, fail), KeyInvalidError)
      await assert.rejects(idempotency.run(scopeOf(''), null, fail), { code: 'IDEMPOTENCY_KEY_MISSING', status: 400 })
      await assert.rejects(idempotency.run(scopeOf('ä'), null, fail), KeyInvalidError)
      await assert.rejects(idempotency.run(scopeOf(), '{"a":', fail), RequestInvalidError)
      await assert.rejects(idempotency.run(scopeOf(), '"\\u0000"', fail), RequestInvalidError)
    })

    test('does the work of ten at once one time', async () => {
      const scope = scopeOf()
      const results = await Promise.allSettled(Array.from({ length: 10 }, () =>
        idempotency.run(scope, null, async tx => {
          await insert(tx, scope)
          return { status: 201, json: 'done' }
        }, { wait: '20s' })))
      assert.deepEqual(results.map(({ value }) => value?.rawJson), Array(10).fill('"done"'))
      assert.equal(results.filter(({ value }) => value.outcome === 'completed').length, 1)
      assert.equal(await ordersOf(scope), 1)
    })

    test('runs again after a serialization failure', async () => {
      const serializable = new pg.Pool({ connectionString: database.url, ...poolOptions, options: '-c default_transaction_isolation=repeatable\\ read' })
      const scope = scopeOf()
      let calls = 0
      const result = await createIdempotency({ pool: serializable, ...clientOptions }).run(scope, null, async tx => {
        await insert(tx, scope)
        if (++calls === 1) await database.pool.query("UPDATE counters SET value = value + 1 WHERE name = 'a'")
        await tx.query("UPDATE counters SET value = value + 1 WHERE name = 'a'")
        return { status: 201, json: calls }
      })
      await serializable.end()
      assert.deepEqual(pick(result), ['completed', 201, '2'])
      assert.equal(await ordersOf(scope), 1)
    })

    test('gives up after some conflicts, and at once if the work cannot run again', async () => {
      let calls = 0
      const conflict = async tx => {
        calls++
        await tx.query("DO $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40P01'; END $$")
      }
      await assert.rejects(idempotency.run(scopeOf(), null, conflict), error =>
        error instanceof ConflictError && error.status === 503 && error.sqlState === '40P01')
      assert.equal(calls, 4)
      await assert.rejects(idempotency.run(scopeOf(), null, conflict, { rerun: false }), ConflictError)
      assert.equal(calls, 5)
    })

    test('recovers when somebody has reset all connections', async () => {
      // one that pipelines has to give each of them up
      const count = poolOptions.pipeline ? 2 : 6
      const some = new pg.Pool({ connectionString: database.url, ...poolOptions, max: count })
      const client = createIdempotency({ pool: some, ...clientOptions })
      await Promise.all(Array.from({ length: count }, () => client.run(scopeOf(), null, () => sleep(50))))
      const connections = await Promise.all(Array.from({ length: count }, () => some.connect()))
      for (const connection of connections) await connection.query('DISCARD ALL')
      for (const connection of connections) connection.release()
      for (let n = 0; n < count; n++) assert.equal((await client.run(scopeOf(), null, () => {})).outcome, 'completed')
      await some.end()
    })

    test('recovers when somebody has deallocated its statements', async () => {
      const one = new pg.Pool({ connectionString: database.url, ...poolOptions, max: 1 })
      const client = createIdempotency({ pool: one, ...clientOptions })
      await client.run(scopeOf(), null, () => {})
      await one.query('DEALLOCATE ALL')
      assert.equal((await client.run(scopeOf(), null, () => {})).outcome, 'completed')
      assert.equal((await client.run(scopeOf(), null, () => {})).outcome, 'completed')
      await one.end()
    })

    test('holds one connection for a request, and refuses to take a second one', async () => {
      const one = new pg.Pool({ connectionString: database.url, ...poolOptions, max: 1 })
      const client = createIdempotency({ pool: one, ...clientOptions })
      const scopes = Array.from({ length: 10 }, () => scopeOf())
      await Promise.all(scopes.map(scope => client.run(scope, null, async tx => {
        await insert(tx, scope)
        for (const call of [
          () => client.run(scopeOf(), null, () => {}),
          () => client.lease(scopeOf(), null, {}, () => {}),
          () => client.store(scopeOf(), null, {}),
          () => client.status(scope)
        ]) await assert.rejects(call, OutOfOrderError)
      })))
      for (const scope of scopes) assert.equal(await ordersOf(scope), 1)
      await one.end()
    })

    test('hands out its transaction to whatever the work calls, and not to what outlives it', async () => {
      let late, leaked
      assert.equal(idempotency.current(), undefined)
      await idempotency.run(scopeOf(), null, async tx => {
        await sleep(1)
        assert.equal(idempotency.current(), tx)
        leaked = tx
        late = sleep(200).then(() => idempotency.current())
      })
      assert.equal(await late, undefined)
      assert.throws(() => leaked.query('SELECT 1'), OutOfOrderError)
      assert.throws(() => leaked.client, OutOfOrderError)
    })

    test('is told at once when the connection is lost, whatever the work still waits for', async () => {
      const waiting = resolvers()
      await assert.rejects(idempotency.run(scopeOf(), null, async tx => {
        const { rows: [{ pid }] } = await tx.query('SELECT pg_backend_pid() AS pid')
        await database.pool.query('SELECT pg_terminate_backend($1)', [pid])
        await waiting.promise
      }), UnavailableError)
      waiting.resolve()
    })

    test('replays bytes whatever form the server writes them in', async () => {
      const escaping = new pg.Pool({ connectionString: database.url, ...poolOptions, options: '-c bytea_output=escape' })
      const client = createIdempotency({ pool: escaping, ...clientOptions })
      const scope = scopeOf()
      for (const _ of [1, 2]) {
        assert.equal(Buffer.from((await client.run(scope, null, () => ({ body: 'hello \\ world' }))).body).toString(), 'hello \\ world')
      }
      await escaping.end()
    })

    test('survives a connection that is terminated in its work', async () => {
      const scope = scopeOf()
      await assert.rejects(idempotency.run(scope, null, async tx => {
        const { rows: [{ pid }] } = await tx.query('SELECT pg_backend_pid() AS pid')
        await database.pool.query('SELECT pg_terminate_backend($1)', [pid])
        await tx.query('SELECT pg_sleep(10)')
      }), error => error instanceof UnavailableError && error.status === 503 && isConnectionLost(error))
      assert.equal((await idempotency.run(scope, null, () => {})).outcome, 'completed')
    })

    test('survives connections that broke while they were idle', async () => {
      await idempotency.run(scopeOf(), null, () => {})
      await database.pool.query(`SELECT pg_terminate_backend(pid) FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid()`)
      assert.equal((await idempotency.run(scopeOf(), null, () => {})).outcome, 'completed')
    })

    describe('through a proxy that cuts the connection', () => {
      let proxy, distant, client
      before(async () => { proxy = await cutProxy(database.url) })
      beforeEach(() => {
        distant = new pg.Pool({ connectionString: proxy.url, ...poolOptions })
        client = createIdempotency({ pool: distant, ...clientOptions })
      })
      afterEach(async () => {
        proxy.cutWhen(() => false, { times: 0 })
        await distant.end()
        while (proxy.connections > 0) await sleep(5)
      })
      after(async () => await proxy.close())

      test('after COMMIT has succeeded: gets the answer by asking once more', async () => {
        const scope = scopeOf()
        proxy.cutWhen(beforeAnswer('COMMIT'))
        const result = await client.run(scope, null, async tx => {
          await insert(tx, scope)
          return { status: 201, json: 'kept' }
        })
        assert.equal(proxy.cuts > 0, true)
        assert.deepEqual(pick(result), ['replayed', 201, '"kept"'])
        assert.equal(await ordersOf(scope), 1)
      })

      test('the same when the work cannot run again', async () => {
        const scope = scopeOf()
        proxy.cutWhen(beforeAnswer('COMMIT'))
        const result = await client.run(scope, null, async tx => {
          await insert(tx, scope)
          return { status: 201, json: 'kept' }
        }, { rerun: false })
        assert.deepEqual(pick(result), ['replayed', 201, '"kept"'])
      })

      test('and the server has not noticed: waits until it has, and runs the work again', async () => {
        const scope = scopeOf()
        proxy.cutWhen(beforeStatement(/idempotency_finish/), { noticed: false })
        let calls = 0
        const run = client.run(scope, null, async tx => {
          await insert(tx, scope)
          return { status: 201, json: ++calls }
        })
        const waits = "SELECT pid FROM pg_locks WHERE locktype = 'userlock' AND NOT granted"
        await Promise.race([run, (async () => {
          while ((await database.pool.query(waits)).rows.length === 0) await sleep(5)
        })()])
        proxy.letServerNotice()
        assert.deepEqual(pick(await run), ['completed', 201, '2'])
        assert.equal(await ordersOf(scope), 1)
      })

      test('before finish has arrived: runs the work again, or says that it has to be repeated', async () => {
        for (const rerun of [true, false]) {
          const scope = scopeOf()
          let calls = 0
          const run = client.run(scope, null, async tx => {
            await insert(tx, scope)
            // after the next message of this connection, be it of finish or of COMMIT
            if (++calls === 1) proxy.cutWhen(message => message.from === 'client' && message.type !== 'startup' && 1)
            return { status: 201, json: calls }
          }, { rerun })
          if (rerun) {
            assert.deepEqual(pick(await run), ['completed', 201, '2'])
            assert.equal(await ordersOf(scope), 1)
          } else {
            await assert.rejects(run, error => error instanceof ConflictError && error.status === 503 && error.cause instanceof CommitUnknownError)
            assert.equal(await ordersOf(scope), 0)
          }
        }
      })

      test('and no connection is free to ask: says that it is not known', async () => {
        const one = new pg.Pool({ connectionString: proxy.url, ...poolOptions, max: 1, connectionTimeoutMillis: 100 })
        const scope = scopeOf()
        let other
        proxy.cutWhen(beforeAnswer('COMMIT'))
        await assert.rejects(createIdempotency({ pool: one, ...clientOptions }).run(scope, null, () => {
          other = one.connect() // is next in the queue
          return { status: 201 }
        }), error => error instanceof CommitUnknownError && error.status === 503)
        ;(await other).release()
        await one.end()
        assert.equal((await recordOf(scope)).state, 'completed')
      })

      test('in begin: asks once more; and says that the database is not to be reached', async () => {
        const begins = message => message.from === 'server' && message.type === 'C' && message.text.startsWith('BEGIN')
        proxy.cutWhen(begins)
        assert.equal((await client.run(scopeOf(), null, () => ({ status: 201 }))).outcome, 'completed')
        proxy.cutWhen(begins, { times: 3 })
        await assert.rejects(client.run(scopeOf(), null, fail), error => error instanceof UnavailableError && error.status === 503)
      })

      test('at any message: the work is done once, or not at all and the client knows', async () => {
        for (let number = 1; number < 40; number++) {
          const scope = scopeOf()
          const before = proxy.cuts
          const own = new pg.Pool({ connectionString: proxy.url, ...poolOptions })
          proxy.cutWhen(afterClientMessages(number))
          const answer = await createIdempotency({ pool: own, ...clientOptions })
            .run(scope, null, async tx => {
              await insert(tx, scope)
              return { status: 201 }
            }).catch(error => error)
          const cut = proxy.cuts > before
          proxy.cutWhen(() => false, { times: 0 })
          await own.end()
          const orders = await ordersOf(scope)
          assert.equal(orders, answer instanceof Error ? 0 : 1, `cut after message ${number}: ${orders} orders, ${answer.outcome ?? answer}`)
          if (!cut) break
          assert.notEqual(number, 39)
        }
      })
    })
  })
}

describe('run', () => {
  test('sends BEGIN with begin, and finish with COMMIT', async () => {
    const pool = new pg.Pool({ connectionString: database.url })
    const idempotency = createIdempotency({ pool })
    let trips = 0
    pool.on('connect', client => client.connection.on('readyForQuery', () => trips++))
    await idempotency.run(scopeOf(), { a: 1 }, () => {})
    trips = 0
    await idempotency.run(scopeOf(), { a: 1 }, () => ({ status: 201, json: {} }))
    assert.equal(trips, 2)
    await pool.end()
  })

  test('does not take a COMMIT that is not answered in time for a failure', async () => {
    await database.pool.query(`CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$
      BEGIN PERFORM pg_sleep(2); RETURN NULL; END $$;
      CREATE TABLE slow (); CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON slow DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slow()`)
    const hasty = new pg.Pool({ connectionString: database.url, query_timeout: 1000 })
    const scope = scopeOf()
    const told = await createIdempotency({ pool: hasty }).run(scope, null, async tx => {
      await tx.query('INSERT INTO slow DEFAULT VALUES')
      return { status: 201 }
    }).catch(error => error)
    // asked again, it may be at work still, or be there by now
    assert.ok(told.replayed === true || told instanceof CommitUnknownError || told instanceof InFlightError, String(told))
    await hasty.end()
    while ((await recordOf(scope))?.state !== 'completed') await sleep(50)
  })

  test('passes on a value that cannot be sent, and the connection goes on', async () => {
    const pool = new pg.Pool({ connectionString: database.url, max: 1 })
    const idempotency = createIdempotency({ pool })
    await assert.rejects(idempotency.run({ action: 'x', key: Object.create(null) }, null, fail), TypeError)
    assert.equal((await idempotency.run(scopeOf(), null, () => {})).outcome, 'completed')
    await pool.end()
  })

  test('refuses what is no answer', async () => {
    const idempotency = createIdempotency({ pool: database.pool })
    for (const [answer, error] of [
      [{ id: 5 }, TypeError], ['text', TypeError], [null, TypeError], [{ status: 600 }, RangeError], [{ status: '201' }, RangeError],
      [{ rawJson: '1', body: 'x' }, TypeError]
    ]) {
      const scope = scopeOf()
      await assert.rejects(idempotency.run(scope, null, () => answer), error)
      assert.equal(await recordOf(scope), undefined)
    }
    assert.throws(() => new Refusal({ status: 200 }), RangeError)
    assert.throws(() => createIdempotency({}), TypeError)
  })

  test('says when COMMIT was answered with ROLLBACK', async () => {
    const client = {
      query: async ({ text }) => ({ command: text === 'COMMIT' ? 'ROLLBACK' : 'SELECT', rows: [{ outcome: 'started' }] }),
      on () {},
      removeListener () {},
      release () {}
    }
    const pool = { connect: callback => callback(undefined, client), on () {}, listenerCount: () => 1 }
    await assert.rejects(createIdempotency({ pool }).run(scopeOf(), null, () => {}), RolledBackError)
  })

  test('keeps answers for as long as is said', async () => {
    const byStatus = createIdempotency({ pool: database.pool, ttl: ({ status }) => status < 400 ? '2 hours' : '30 s' })
    const kept = async (idempotency, answer) => {
      const scope = scopeOf()
      await idempotency.run(scope, null, () => answer)
      return (await recordOf(scope)).kept.toPostgres()
    }
    assert.equal(await kept(byStatus, { status: 201 }), '2 hours')
    assert.equal(await kept(byStatus, { status: 404 }), '30 seconds')
    assert.equal(await kept(byStatus, { status: 201, ttl: '10 min' }), '10 minutes')
    assert.equal(await kept(createIdempotency({ pool: database.pool, ttl: '3 hours' }), { status: 201 }), '3 hours')
    assert.equal(await kept(createIdempotency({ pool: database.pool }), { status: 201 }), '1 days')
  })

  test('says when no connection is free', async () => {
    const pool = new pg.Pool({ connectionString: database.url, max: 1, connectionTimeoutMillis: 50 })
    const idempotency = createIdempotency({ pool })
    const busy = await pool.connect()
    await assert.rejects(idempotency.run(scopeOf(), null, fail), error => error instanceof UnavailableError && error.status === 503)
    await assert.rejects(idempotency.status(scopeOf()), UnavailableError)
    busy.release()
    assert.equal((await idempotency.run(scopeOf(), null, () => {})).outcome, 'completed')
    await pool.end()
  })

  test('finds the extension in any schema', async () => {
    const odd = await createDatabase({ schema: 'Odd name' })
    try {
      const schema = await findSchema(odd.pool)
      assert.equal(schema, 'Odd name')
      const idempotency = createIdempotency({ pool: odd.pool, schema })
      assert.equal((await idempotency.run(scopeOf('k'), { a: 1 }, () => {})).outcome, 'completed')
      assert.equal((await idempotency.run(scopeOf('k'), { a: 1 }, fail)).outcome, 'replayed')
      await odd.pool.query('DROP EXTENSION idempotency')
      await assert.rejects(findSchema(odd.pool), { message: /does not have the extension/ })
    } finally {
      await odd.drop()
    }
  })

  test('tells what became of each request, whatever the listener does', async () => {
    const events = []
    const idempotency = createIdempotency({
      pool: database.pool,
      onOutcome (event) {
        events.push([event.outcome, event.status, event.scope.key, event.duration > 0])
        if (event.outcome === 'replayed') return Promise.reject(new Error('of the listener'))
        if (event.outcome === 'mismatched') throw 'no error' // eslint-disable-line no-throw-literal
        throw new Error('of the listener')
      }
    })
    const warning = new Promise(resolve => process.once('warning', resolve))
    await idempotency.run(scopeOf('event'), { a: 1 }, () => ({ status: 201 }))
    await idempotency.run(scopeOf('event'), { a: 1 }, fail)
    await idempotency.run(scopeOf('event'), { a: 2 }, fail).catch(() => {})
    await idempotency.run(scopeOf('event-2'), null, fail).catch(() => {})
    assert.deepEqual(events, [
      ['completed', 201, 'event', true], ['replayed', 201, 'event', true], ['mismatched', 422, 'event', true],
      ['failed', null, 'event-2', true]
    ])
    assert.equal((await warning).message, 'of the listener')
  })
})

function pick ({ outcome, status, rawJson }) {
  return [outcome, status, rawJson]
}

function fail () {
  throw new Error('the work was called')
}

function resolvers () {
  let resolve
  const promise = new Promise(_resolve => { resolve = _resolve })
  return { promise, resolve }
}
