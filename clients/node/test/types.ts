// What the types promise: this file has to compile, and does not run.
import express from 'express'
import Fastify from 'fastify'
import pg from 'pg'
import { createIdempotency, Refusal } from 'pg-idempotency'
import type { Answer, Database, Idempotency, Result, Transaction } from 'pg-idempotency'
import { idempotent, keepRawBody } from 'pg-idempotency/express'
import idempotencyPlugin from 'pg-idempotency/fastify'

const pool = new pg.Pool()
const scope = { tenant: 'acme', action: 'orders.create', key: 'k' }

// a pool gives its own client
const idempotency: Idempotency<Transaction<pg.PoolClient>> = createIdempotency({ pool, schema: 'idempotency' })
export const result: Promise<Result> = idempotency.run(scope, { a: 1 }, async tx => {
  const { rows: [row] } = await tx.query<{ id: number }>('SELECT 1 AS id')
  const id: number | undefined = row?.id
  const client: pg.PoolClient = tx.client
  return { status: 201, json: { id, client: client.getTypeParser !== undefined } }
})

// an ORM's database gives the ORM's handle
interface Handle { insert: (what: string) => Promise<void> }
declare const database: Database<Handle>
const orm = createIdempotency({ database })
export const another = orm.run(scope, null, async handle => await handle.insert('x'))
export const leased = orm.lease(scope, null, { lease: '5 min' }, async claim => {
  await claim.checkpoint('charged', { id: 1 }, { work: async handle => await handle.insert('x') })
  return await claim.finish(async handle => { await handle.insert('y') })
})
export const begun = orm.begin(pool, scope, '{}').then(({ started, result }) => started ? null : result.status)

// an answer that was replayed is an answer
declare const stored: Result
export const again: Answer = stored

// @ts-expect-error a value that is no answer
export const wrong = idempotency.run(scope, null, async () => ({ id: 5 }))
// @ts-expect-error a scope needs a key
export const keyless = idempotency.run({ action: 'x' }, null, async () => {})
// @ts-expect-error one of pool and database
export const nothing = createIdempotency({})
// @ts-expect-error a refusal is an answer
export const refusal = new Refusal(402)

const app = express()
app.post('/a', express.json({ verify: keepRawBody }), idempotent(idempotency, {
  actor: request => request.get('x-user') ?? null,
  omit: ['body.sent_at'],
  mismatchStatus: 409,
  ttl: { '2xx': '24 hours', 404: '10 s' }
}), (request, response) => {
  const key: string | undefined = request.idempotency?.key
  response.json({ key })
})
// @ts-expect-error not a status for it
app.post('/b', idempotent(idempotency, { actor: () => 'a', mismatchStatus: 400 }))

const fastify = Fastify()
export const registered = fastify.register(idempotencyPlugin, { idempotency, actor: request => request.headers.authorization ?? null, global: true })
fastify.post('/c', { config: { idempotency: { lease: '5 min' } } }, async request => {
  const key: string | undefined = request.idempotency?.key
  return { key, attempt: request.idempotency?.claim?.attempt }
})
// @ts-expect-error the plugin needs a client
export const without = fastify.register(idempotencyPlugin, { actor: () => 'a' })
