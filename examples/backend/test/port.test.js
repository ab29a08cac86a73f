// The kernel's port on its own: `get`, `store` and `run`, and that nobody can
// overwrite an answer with them.
import 'reflect-metadata'
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { after, before, describe, test } from 'node:test'
import { InFlightError, KeyMissingError, MismatchError, createIdempotency } from 'pg-idempotency'
import { prismaDatabase } from 'pg-idempotency/orm'
import { createDatabase } from '../../harness/index.js'
import { Database } from '../dist/database/database.js'
import { IdempotencyPort } from '../dist/idempotency/idempotency.port.js'
import { PostgresIdempotencyAdapter } from '../dist/idempotency/postgres-idempotency.adapter.js'

let database, prisma, port
before(async () => {
  database = await createDatabase()
  const opened = await Database.open(database.url)
  prisma = opened.prisma
  port = new PostgresIdempotencyAdapter(createIdempotency({ database: prismaDatabase(prisma), schema: opened.schema }))
})
after(async () => {
  await prisma.$disconnect()
  await database.drop()
})

const scopeOf = (key = randomUUID()) => ({ tenant: 'acme', user: 'alice', action: 'test', key })
const request = '{"a":1}'

/** Work that inserts a custom field and answers. */
function insert (name, status = 201) {
  return async tx => {
    await tx.customField.create({ data: { tenant: 'acme', name, type: 'text' } })
    return { status, body: { name, big: 'ü' } }
  }
}

async function exists (name) {
  return await prisma.customField.count({ where: { name } }) === 1
}

describe('IdempotencyPort', () => {
  test('has no other methods', () => {
    assert.deepEqual(Object.getOwnPropertyNames(PostgresIdempotencyAdapter.prototype).sort(), ['constructor', 'get', 'run', 'store'])
    assert.ok(port instanceof IdempotencyPort)
  })

  test('get: null, and then the answer with its status', async () => {
    const scope = scopeOf()
    assert.equal(await port.get(scope, request), null)
    await port.run(scope, request, insert(scope.key))
    assert.deepEqual(await port.get(scope, request), { status: 201, body: { name: scope.key, big: 'ü' } })
    await assert.rejects(port.get(scope, '{"a":2}'), MismatchError)
  })

  test('store: the first answer stays, whoever comes later', async () => {
    const scope = scopeOf()
    const first = { status: 200, body: { first: true } }
    assert.deepEqual(await port.store(scope, request, first), first)
    assert.deepEqual(await port.store(scope, request, { status: 500, body: null }), first)
    assert.deepEqual(await port.store(scope, request, { status: 201, body: { second: true } }), first)
    assert.deepEqual(await port.get(scope, request), first)
    await assert.rejects(port.store(scope, '{"a":2}', first), MismatchError)
  })

  test('store: not over the answer of run, nor while run is at work', async () => {
    const scope = scopeOf()
    const kept = await port.run(scope, request, async tx => {
      await assert.rejects(storeElsewhere(scope), InFlightError)
      return await insert(scope.key)(tx)
    })
    assert.equal((await port.store(scope, request, { status: 200, body: {} })).status, 201)
    assert.equal(kept.replayed, false)
  })

  test('run: once, also if it is asked ten times at the same time', async () => {
    const scope = scopeOf()
    let calls = 0
    const results = await Promise.allSettled(Array.from({ length: 10 }, async () => await port.run(scope, request, async tx => {
      calls++
      return await insert(scope.key)(tx)
    })))
    assert.equal(calls, 1)
    for (const { reason, value } of results) assert.ok(value?.status === 201 || reason instanceof InFlightError)
    assert.equal((await port.run(scope, request, insert('never'))).replayed, true)
    assert.equal(await exists('never'), false)
  })

  test('run: a 4xx is kept while its rows are rolled back; an error keeps nothing', async () => {
    const scope = scopeOf()
    const refused = await port.run(scope, request, insert(scope.key, 422))
    assert.equal(refused.status, 422)
    assert.equal(await exists(scope.key), false)
    assert.deepEqual(await port.run(scope, request, insert(scope.key)), { ...refused, replayed: true })

    const other = scopeOf()
    await assert.rejects(port.run(other, request, async tx => { await insert(other.key)(tx); throw new Error('bug') }), /bug/)
    assert.equal(await exists(other.key), false)
    assert.equal(await port.get(other, request), null)
    assert.equal((await port.run(other, request, insert(other.key))).replayed, false)
  })

  test('a tenant of null is one tenant, the global one', async () => {
    const scope = { ...scopeOf(), tenant: null, user: null }
    await port.run(scope, request, insert(scope.key))
    assert.equal((await port.run({ ...scope, tenant: '' }, request, insert('never'))).replayed, true)
    assert.equal(await exists('never'), false)
  })

  test('there is no default key', async () => {
    await assert.rejects(port.run(scopeOf(''), request, insert('never')), KeyMissingError)
    assert.equal(await exists('never'), false)
  })
})

/** As another process would do it: inside run, the client itself refuses. */
async function storeElsewhere (scope) {
  const { prisma, schema } = await Database.open(database.url)
  try {
    const other = new PostgresIdempotencyAdapter(createIdempotency({ database: prismaDatabase(prisma), schema }))
    return await other.store(scope, request, { status: 200, body: {} })
  } finally {
    await prisma.$disconnect()
  }
}
