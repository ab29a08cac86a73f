// Requests in the transactions of ORMs: the same tests with each of them.  What
// differs is how it is set up, in orm/NAME.js.
import assert from 'node:assert/strict'
import { createHash, randomUUID } from 'node:crypto'
import { after, before, describe, test } from 'node:test'
import { setImmediate } from 'node:timers/promises'
import {
  CommitUnknownError, ConflictError, InFlightError, JsonRequest, MismatchError, OutOfOrderError,
  UnfinishedError, asIdempotencyError, createIdempotency, sqlStateOf
} from 'pg-idempotency'
import { createDatabase } from './support/database.js'
import { beforeAnswer, beforeStatement, cutProxy } from './support/proxy.js'

const orms = {
  'knex': {},
  'kysely': { nests: false },
  'drizzle': {},
  // a connection that breaks in a transaction of postgres.js 3.4.9 ends the process
  'drizzle-postgres-js': { survives: false },
  'typeorm': {},
  'sequelize': { nests: false },
  'prisma': { nests: false }
}

// JSON that is not what a parser and a printer would make of it
const text = '{"id": 9007199254740993,  "price": 1.50, "note": "a\'b\\"c\\\\d ? $1 :e"}'

const schema = `
  CREATE TABLE orders (id serial PRIMARY KEY, name text NOT NULL UNIQUE);

  CREATE FUNCTION fail (how text) RETURNS int LANGUAGE plpgsql AS $$
  BEGIN
    IF how = 'conflict' THEN
      RAISE serialization_failure;
    END IF;
    PERFORM pg_terminate_backend(pg_backend_pid());
    PERFORM pg_sleep(60);
    RETURN NULL;
  END $$;

  CREATE FUNCTION fail () RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM fail(NEW.how); RETURN NULL; END';
  CREATE TABLE failing_commit (how text);
  CREATE CONSTRAINT TRIGGER fail AFTER INSERT ON failing_commit
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION fail();`

let database, proxy
before(async () => {
  database = await createDatabase()
  await database.pool.query(schema)
  proxy = await cutProxy(database.url)
})
after(async () => {
  await proxy.close()
  await database.drop()
})

function scopeOf (key = randomUUID()) {
  return { tenant: "acme's \\ \"shop\"", actor: 'alice', action: 'orders.create', key }
}

async function ordersOf ({ key }) {
  const { rows: [{ count }] } = await database.pool.query('SELECT count(*)::int FROM orders WHERE name = $1', [key])
  return count
}

async function recordOf ({ key }) {
  const { rows: [row] } = await database.pool.query(
    'SELECT state, status_code, response::text FROM idempotency.idempotency_key WHERE key = $1', [key])
  return row
}

/** End the process of a connection, and wait until it is gone. */
async function kill (pid) {
  await database.pool.query('SELECT pg_terminate_backend($1)', [pid])
  let alive = 1
  while (alive) ({ rowCount: alive } = await database.pool.query('SELECT FROM pg_stat_activity WHERE pid = $1', [pid]))
}

for (const [name, { nests = true, survives = true }] of Object.entries(orms)) {
  describe(name, () => {
    let orm, idempotency

    before(async () => {
      const { open } = await import(`./orm/${name}.js`)
      orm = await open(proxy.url)
      idempotency = createIdempotency({ database: orm.database() })
    })
    after(async () => await orm?.close())

    async function valueOf (tx, expression) {
      const { rows: [{ value }] } = await orm.queryable(tx).query(`SELECT ${expression} AS value`, [])
      return value
    }

    function failCommit (tx, how) {
      return orm.queryable(tx).query('INSERT INTO failing_commit VALUES ($1::text)', [how])
    }

    test('the first request commits rows and record together, and a repeat gets the same bytes', async () => {
      const scope = scopeOf()
      const answer = { status: 201, rawJson: text, headers: { Location: '/orders/1' } }
      const first = await idempotency.run(scope, text, async tx => {
        await orm.insert(tx, scope.key)
        assert.equal(await recordOf(scope), undefined)
        return answer
      })
      assert.equal(first.outcome, 'completed')
      assert.equal(await ordersOf(scope), 1)
      assert.deepEqual(await recordOf(scope), { state: 'completed', status_code: 201, response: text })

      const repeat = await idempotency.run(scope, text, () => assert.fail('the work ran again'))
      assert.deepEqual({ ...repeat }, { outcome: 'replayed', replayed: true, body: null, ...answer })
    })

    test('a body that is not JSON is replayed, and its digest tells requests apart', async () => {
      const scope = scopeOf()
      const body = Buffer.from(Array.from({ length: 256 }, (_, byte) => byte))
      const digest = createHash('sha256').update(body).digest()
      const first = await idempotency.run(scope, digest, () => ({ status: 200, body }))
      assert.deepEqual(Buffer.from(first.body), body)

      const repeat = await idempotency.run(scope, digest, () => assert.fail('the work ran again'))
      assert.equal(repeat.outcome, 'replayed')
      assert.deepEqual(Buffer.from(repeat.body), body)
      await assert.rejects(idempotency.run(scope, createHash('sha256').digest(), () => {}), MismatchError)
    })

    test('a refusal is kept, and what the work wrote is rolled back', async () => {
      const scope = scopeOf()
      const refuse = async tx => {
        await orm.insert(tx, scope.key)
        return { status: 402, json: { error: 'no funds' } }
      }
      assert.equal((await idempotency.run(scope, text, refuse)).outcome, 'errored')
      assert.equal(await ordersOf(scope), 0)
      assert.deepEqual(await recordOf(scope), { state: 'errored', status_code: 402, response: '{"error":"no funds"}' })

      const repeat = await idempotency.run(scope, text, () => assert.fail('the work ran again'))
      assert.equal(repeat.outcome, 'replayed')
      assert.equal(repeat.status, 402)
    })

    test('a different request under the same key is refused', async () => {
      const scope = scopeOf()
      await idempotency.run(scope, '{"amount": 9007199254740992}', () => {})
      await assert.rejects(idempotency.run(scope, '{"amount": 9007199254740993}', () => assert.fail()), MismatchError)
    })

    test('parts of a request do not count, whatever their names hold', async () => {
      const scope = scopeOf()
      const path = ['a?b', "c$1'd\\\"", ':e{f},']
      const requestAt = time => new JsonRequest(JSON.stringify({ amount: 1, [path[0]]: { [path[1]]: { [path[2]]: time } } }), [path])
      await idempotency.run(scope, requestAt(1), () => ({ status: 201 }))
      assert.equal((await idempotency.run(scope, requestAt(2), () => assert.fail())).outcome, 'replayed')
    })

    test('a request in flight on another connection is told to come back', async () => {
      const scope = scopeOf()
      const other = await database.pool.connect()
      try {
        await other.query('BEGIN')
        await createIdempotency({ pool: database.pool }).begin(other, scope, text)
        await assert.rejects(idempotency.run(scope, text, () => assert.fail()), error => {
          assert.ok(error instanceof InFlightError)
          assert.ok(error.retryAfter >= 1)
          return true
        })
      } finally {
        await other.query('ROLLBACK')
        other.release()
      }
      assert.equal((await idempotency.run(scope, text, () => {})).outcome, 'completed')
    })

    test('work that throws leaves nothing, not even a connection', async () => {
      const scope = scopeOf()
      // more often than there are connections
      for (let time = 0; time < 6; time++) {
        const reason = new Error('no')
        await assert.rejects(idempotency.run(scope, text, async tx => {
          await orm.insert(tx, scope.key)
          throw reason
        }), error => error === reason)
      }
      assert.equal(await ordersOf(scope), 0)
      assert.equal(await recordOf(scope), undefined)
      assert.equal((await idempotency.run(scope, text, () => {})).outcome, 'completed')
    })

    test('work that throws nothing has failed all the same', async () => {
      const scope = scopeOf()
      await assert.rejects(idempotency.run(scope, text, async tx => {
        await orm.insert(tx, scope.key)
        throw undefined // eslint-disable-line no-throw-literal
      }), reason => reason === undefined)
      assert.equal(await ordersOf(scope), 0)
    })

    test('an error that the work swallowed is none of success', async () => {
      const scope = scopeOf()
      await assert.rejects(idempotency.run(scope, text, async tx => {
        await orm.insert(tx, scope.key)
        await valueOf(tx, '1 / 0').catch(() => {})
        return { status: 201 }
      }))
      assert.equal(await ordersOf(scope), 0)
      assert.equal(await recordOf(scope), undefined)
    })

    test('an answer leaves only if it was kept, whatever fails between it and COMMIT', async () => {
      const scope = scopeOf()
      // fails once the answer is kept; so many that one of them comes before COMMIT
      const failing = `1 / (1 - (SELECT count(*)::int FROM idempotency.idempotency_key WHERE key = '${scope.key}'))`
      let over = false
      async function meddle (tx, wait) {
        while (!over) {
          if (wait) await setImmediate()
          await valueOf(tx, failing)
        }
      }
      const run = idempotency.run(scope, text, async tx => {
        await orm.insert(tx, scope.key)
        for (let time = 0; time < 20; time++) meddle(tx, time < 10).catch(() => {})
        return { status: 201 }
      })
      const kept = await run.then(() => true, () => false)
      over = true
      assert.equal(await ordersOf(scope), kept ? 1 : 0)
      assert.equal((await recordOf(scope))?.state, kept ? 'completed' : undefined)
    })

    test('a conflict in the work or in COMMIT runs the work again', async () => {
      const scope = scopeOf()
      let runs = 0
      const result = await idempotency.run(scope, text, async tx => {
        runs++
        await orm.insert(tx, scope.key)
        if (runs === 1) await valueOf(tx, "fail('conflict')")
        if (runs === 2) await failCommit(tx, 'conflict')
        return { status: 201 }
      })
      assert.equal(result.outcome, 'completed')
      assert.equal(runs, 3)
      assert.equal(await ordersOf(scope), 1)
    })

    test('the transaction has the isolation level that was asked for', async () => {
      const serializable = createIdempotency({ database: orm.database({ isolationLevel: orm.serializable, confirm: false }) })
      const scope = scopeOf()
      const { json } = await serializable.run(scope, text, async tx => ({ json: await valueOf(tx, "current_setting('transaction_isolation')") }))
      assert.equal(json, 'serializable')
      assert.equal((await serializable.run(scope, text, () => assert.fail())).json, 'serializable')
    })

    test('a state can be looked at, and leased work writes its last rows with the answer', async () => {
      const scope = scopeOf()
      const result = await idempotency.lease(scope, text, { lease: '1 min' }, async claim => {
        await claim.checkpoint('charged', { id: 'ch_1' }, { work: async tx => await orm.insert(tx, `${scope.key}, charged`) })
        const { outcome, recoveryPoint, retryAfter } = await idempotency.status(scope)
        assert.deepEqual({ outcome, recoveryPoint }, { outcome: 'in_flight', recoveryPoint: 'charged' })
        assert.ok(retryAfter > 1)
        return await claim.finish(async tx => {
          await orm.insert(tx, scope.key)
          return { status: 201, rawJson: text }
        })
      })
      assert.equal(result.outcome, 'completed')
      assert.equal(await ordersOf(scope), 1)
      const status = await idempotency.status(scope)
      assert.equal(status.result.rawJson, text)
      assert.ok(status.expiresAt > status.createdAt)
    })

    test('begin and finish in a transaction of its own', async () => {
      const scope = scopeOf()
      const request = async () => await orm.transaction(async tx => {
        const queryable = orm.queryable(tx)
        const begun = await idempotency.begin(queryable, scope, text)
        if (!begun.started) return begun.result
        await orm.insert(tx, scope.key)
        return await idempotency.finish(queryable, scope, { status: 201, rawJson: text })
      })
      assert.equal((await request()).outcome, 'completed')
      const repeat = await request()
      assert.equal(repeat.outcome, 'replayed')
      assert.equal(repeat.rawJson, text)
      assert.equal(await ordersOf(scope), 1)
    })

    test('a transaction whose request was not finished cannot be committed', async () => {
      const scope = scopeOf()
      for (let time = 0; time < 6; time++) {
        await assert.rejects(orm.transaction(async tx => {
          await idempotency.begin(orm.queryable(tx), scope, text)
          await orm.insert(tx, scope.key)
        }), error => asIdempotencyError(error) instanceof UnfinishedError && sqlStateOf(error) === 'ID006')
      }
      assert.equal(await ordersOf(scope), 0)
      assert.equal((await idempotency.run(scope, text, () => {})).outcome, 'completed')
    })

    test('the work of a message is done once, whatever its id holds', async () => {
      const ids = [`'`, '"', '\\', ',', '{}', '()', 'NULL', '$1', '?', ':a', '%'].map(part => `${randomUUID()}${part}`)
      const seen = async ids => await orm.transaction(async tx => await idempotency.firstSeen(orm.queryable(tx), 'mailer', ids))
      assert.deepEqual((await seen(ids)).sort(), [...ids].sort())
      const another = randomUUID()
      assert.deepEqual(await seen([...ids, another]), [another])
    })

    test('an error of the database is the same wherever it is hidden', async () => {
      const scope = scopeOf()
      const begin = async request => await orm.transaction(async tx => await orm.queryable(tx).query(
        'SELECT FROM idempotency.idempotency_begin($1::text, $2::text, $3::text, $4::text::jsonb, actor => $5::text)',
        [scope.tenant, scope.action, scope.key, request, scope.actor]))
      await idempotency.run(scope, '1', async tx => {
        await orm.insert(tx, scope.key)
        await assert.rejects(begin('1'), error => {
          assert.equal(sqlStateOf(error), 'ID003')
          assert.ok(asIdempotencyError(error) instanceof InFlightError)
          assert.ok(asIdempotencyError(error).retryAfter >= 1)
          return true
        })
        await assert.rejects(begin('2'), error => sqlStateOf(error) === 'ID004' && asIdempotencyError(error) instanceof MismatchError)
      })
      await assert.rejects(idempotency.run(scopeOf(), '1', async tx => await orm.insert(tx, scope.key)), error => sqlStateOf(error) === '23505')
    })

    test('a transaction inside another one is no place to answer from', { skip: !nests }, async () => {
      const scope = scopeOf()
      await orm.transaction(async tx => {
        const nested = createIdempotency({ database: orm.nested(tx) })
        await assert.rejects(nested.run(scope, text, () => ({ status: 201 })), OutOfOrderError)
      })
    })

    describe('when the connection is lost', { skip: !survives }, () => {
      /** Run work that loses its connection the first time; how often it ran. */
      async function runsOf (scope, lose) {
        let runs = 0
        const result = await idempotency.run(scope, text, async tx => {
          await orm.insert(tx, scope.key)
          if (++runs === 1) await lose(tx)
          return { status: 201, rawJson: text }
        })
        assert.equal(result.status, 201)
        assert.equal(result.rawJson, text)
        assert.equal(await ordersOf(scope), 1)
        assert.deepEqual(await recordOf(scope), { state: 'completed', status_code: 201, response: text })
        return runs
      }

      test('before the answer is kept, the work runs again', async () => {
        assert.equal(await runsOf(scopeOf(), async tx => await kill(await valueOf(tx, 'pg_backend_pid()'))), 2)
      })

      test('before COMMIT, the work runs again', async () => {
        assert.equal(await runsOf(scopeOf(), () => proxy.cutWhen(beforeStatement(/^commit/i))), 2)
      })

      test('in COMMIT, the work runs again', async () => {
        assert.equal(await runsOf(scopeOf(), async tx => await failCommit(tx, 'death')), 2)
      })

      test('after COMMIT, the work does not run again', async () => {
        assert.equal(await runsOf(scopeOf(), () => proxy.cutWhen(beforeAnswer('COMMIT'))), 1)
      })

      test('while COMMIT is confirmed, the work does not run again', async () => {
        assert.equal(await runsOf(scopeOf(), () => proxy.cutWhen(beforeStatement(/pg_xact_status/))), 1)
      })

      test('while the transaction of a repeat ends, the repeat has its answer', async () => {
        const scope = scopeOf()
        await idempotency.run(scope, text, () => ({ status: 201 }))
        proxy.cutWhen(beforeStatement(/^commit/i))
        const cuts = proxy.cuts
        assert.equal((await idempotency.run(scope, text, () => assert.fail())).status, 201)
        assert.equal(proxy.cuts, cuts + 1)
      })

      test('in the work, which has a reason of its own to fail, that reason comes out', async () => {
        const reason = new Error('no')
        await assert.rejects(idempotency.run(scopeOf(), text, async tx => {
          await kill(await valueOf(tx, 'pg_backend_pid()'))
          throw reason
        }), error => error === reason)
      })

      test('in COMMIT, and the work may not run again, the error says that nobody knew', async () => {
        const scope = scopeOf()
        await assert.rejects(idempotency.run(scope, text, async tx => {
          await orm.insert(tx, scope.key)
          await failCommit(tx, 'death')
        }, { rerun: false }), error => error instanceof ConflictError && error.cause instanceof CommitUnknownError)
        assert.equal(await ordersOf(scope), 0)
      })
    })
  })
}
