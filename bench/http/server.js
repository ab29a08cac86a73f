// bench/http/server.js
//   An order service that is protected by one of the peers.
//
//   node server.js PEER, as a child that is told over IPC on which port
//
// POST /orders makes an order with two lines, and answers 201 with its number.
// Everything but the protection is the same for all: the route, the work, the
// statements, which are prepared, and the pool of connections, which is that of
// pg with pipelining, so that BEGIN and COMMIT make no round trip of their own
// where there is something to send them with.  The client of this extension sees
// to that by itself, with a pool as it is by default.
//
//   none                        nothing
//   none-run                    nothing, and the work is a function of the database
//   node-idempotency            @node-idempotency/core, as its README says, with its
//                               adapter for Redis
//   express-idempotency         the middleware, as its README says, with the default
//                               adapter, which keeps answers in memory
//   express-idempotency-redis   the same, with the adapter for Redis that there is
//   idempot-postgres, -redis    @idempot/express-middleware with its stores
//   nestarc-postgres, -redis    @nestarc/idempotency with its stores, in NestJS
//   idempotency                 this extension through its client, as the client's README says
//   idempotency-run             idempotency_run, and the work is a function
//
// Those of idempot and nestarc are in no package-lock of ours: bench/peers says
// where they come from.
//
// Answers are kept for a day, which is everybody's default but that of the
// adapter that keeps them in memory: it never forgets.

import { createServer } from 'node:http'
import express from 'express'
import pg from 'pg'
import { createIdempotency } from 'pg-idempotency'
import { idempotent } from 'pg-idempotency/express'
import { createClient } from '@redis/client'
import { Idempotency } from '@node-idempotency/core'
import { RedisStorageAdapter } from '@node-idempotency/storage-adapter-redis'
import expressIdempotency from 'express-idempotency'
import ExpressRedisAdapter from 'express-idempotency-redis-adapter'

const redis = { socket: { path: process.env.REDIS_SOCKET } }
const pool = new pg.Pool({ pipeline: true, idleTimeoutMillis: 0 })

// a connection that breaks is an error of its queries, and no reason to exit
pool.on('error', () => {})
pool.on('connect', client => client.on('error', () => {}))

//
// The work
//

async function insertOrder (client, { reference, customer, skus }) {
  const { rows: [{ id }] } = await client.query({
    name: 'order',
    text: 'INSERT INTO orders (reference, customer) VALUES ($1, $2) RETURNING id',
    values: [reference, customer]
  })
  await client.query({
    name: 'lines',
    text: 'INSERT INTO order_line SELECT $1, * FROM unnest($2::text[]) WITH ORDINALITY',
    values: [id, skus]
  })
  return { status: 201, body: JSON.stringify({ order: id, status: 'created' }) }
}

async function makeOrder (request) {
  const client = await pool.connect()
  let broken = false
  try {
    const [, answer] = await Promise.all([
      client.query('BEGIN'),
      insertOrder(client, request)
    ])
    await client.query('COMMIT')
    return answer
  } catch (error) {
    broken = await client.query('ROLLBACK').then(() => false, () => true)
    throw error
  } finally {
    client.release(broken)
  }
}

function failure (status, error) {
  return { status, body: JSON.stringify({ error: error.message }) }
}

function send (res, { status, body }) {
  res.status(status).type('json').send(body)
}

//
// The peers: each makes the handlers of the route, or an application
//

const peers = {
  none () {
    return [express.json(), async (req, res) => send(res, await makeOrder(req.body))]
  },

  'none-run' () {
    return [express.json(), async (req, res) => {
      const { rows: [answer] } = await pool.query({
        name: 'create_order',
        text: 'SELECT status_code AS status, response::text AS body FROM create_order($1)',
        values: [JSON.stringify(req.body)]
      })
      send(res, answer)
    }]
  },

  async 'node-idempotency' () {
    const storage = new RedisStorageAdapter(redis)
    await storage.connect()
    const idempotency = new Idempotency(storage, { enforceIdempotency: true })

    return [express.json(), async ({ method, path, headers, body }, res) => {
      const request = { method, path, headers, body }
      const stored = await idempotency.onRequest(request)
      if (stored) return send(res, stored.body)

      // a failure is stored as their own middlewares do: a key cannot be given back
      const answer = await makeOrder(body).catch(error => failure(500, error))
      await idempotency.onResponse(request, { body: answer })
      send(res, answer)
    }]
  },

  'express-idempotency' (options) {
    return [express.json(), expressIdempotency.idempotency(options), async (req, res) => {
      if (expressIdempotency.getSharedIdempotencyService().isHit(req)) return
      send(res, await makeOrder(req.body)) // of a failure it forgets the key
    }]
  },

  async 'express-idempotency-redis' () {
    // a client of our own, for without a listener for errors they end the process
    const connectionInstance = createClient(redis).on('error', () => {})
    const dataAdapter = new ExpressRedisAdapter.default({ connectionInstance })
    await dataAdapter.connect()
    return peers['express-idempotency']({ dataAdapter })
  },

  async 'idempot-postgres' () {
    const { PostgresIdempotencyStore } = await import('@idempot/postgres-store')
    return await idempot(new PostgresIdempotencyStore({ pool, schema: 'idempot' }))
  },

  async 'idempot-redis' () {
    const { RedisIdempotencyStore } = await import('@idempot/redis-store')
    const { Redis } = await import('ioredis')
    return await idempot(new RedisIdempotencyStore({ client: new Redis(redis.socket.path) }))
  },

  async 'nestarc-postgres' () {
    const { PostgresStorage } = (await import('@nestarc/idempotency')).default
    return await nestarc(new PostgresStorage({ pool, autoCreateSchema: true }))
  },

  async 'nestarc-redis' () {
    const { RedisStorage } = (await import('@nestarc/idempotency')).default
    const { Redis } = await import('ioredis')
    return await nestarc(new RedisStorage({ client: new Redis(redis.socket.path) }))
  },

  idempotency () {
    const idempotency = createIdempotency({ pool: new pg.Pool({ idleTimeoutMillis: 0 }), schema: 'public' })
    return [idempotent(idempotency, { tenant: () => 'acme', action: 'orders.create' }), async (req, res) => {
      send(res, await insertOrder(req.idempotency.tx, req.body))
    }]
  },

  'idempotency-run' () {
    return [express.json(), async (req, res) => {
      const { rows: [answer] } = await pool.query({
        name: 'run',
        text: `SELECT status_code AS status, response::text AS body
          FROM idempotency_run('acme', 'orders.run', $1, $2, 'create_order(jsonb)')`,
        values: [req.get('Idempotency-Key'), JSON.stringify(req.body)]
      })
      send(res, answer)
    }]
  }
}

async function idempot (store) {
  const { idempotency } = await import('@idempot/express-middleware')
  return [express.json(), idempotency({ store }), async (req, res) => send(res, await makeOrder(req.body))]
}

// An application of NestJS; its decorators are called as functions
async function nestarc (storage) {
  await import('reflect-metadata')
  const { Body, Controller, Module, Post, UseInterceptors } = (await import('@nestjs/common')).default
  const { NestFactory } = (await import('@nestjs/core')).default
  const { Idempotent, IdempotencyInterceptor, IdempotencyModule } = (await import('@nestarc/idempotency')).default

  class Orders {
    async create (order) {
      return JSON.parse((await makeOrder(order)).body)
    }
  }
  const method = [Orders.prototype, 'create', Object.getOwnPropertyDescriptor(Orders.prototype, 'create')]
  Body()(Orders.prototype, 'create', 0)
  for (const decorate of [Post('orders'), UseInterceptors(IdempotencyInterceptor), Idempotent()]) decorate(...method)
  Controller()(Orders)

  class Service {}
  Module({ imports: [IdempotencyModule.forRoot({ storage })], controllers: [Orders] })(Service)
  const service = await NestFactory.create(Service, { logger: false })
  await service.init()
  return service.getHttpAdapter().getInstance()
}

// What to answer to an error, by its code
const statusOf = {
  // @node-idempotency/core
  IDEMPOTENCY_KEY_MISSING: 400,
  IDEMPOTENCY_KEY_LEN_EXEEDED: 400,
  REQUEST_IN_PROGRESS: 409,
  IDEMPOTENCY_FINGERPRINT_MISSMATCH: 422,
  // this extension
  ID001: 400,
  ID002: 400,
  ID003: 409,
  ID004: 422,
  ID005: 409
}

// express knows an error handler by its four parameters
function handleError (error, req, res, next) {
  // express-idempotency has set the status
  const status = statusOf[error.code] ?? (res.statusCode < 400 ? 500 : res.statusCode)
  if (status === 409) res.set('Retry-After', '1')
  send(res, failure(status, error))
}

function serviceOf (handlers) {
  const app = express()
  app.post('/orders', ...handlers)
  app.use(handleError)
  return app
}

const peer = await peers[process.argv[2]]()
const server = createServer(Array.isArray(peer) ? serviceOf(peer) : peer)
server.listen(0, '127.0.0.1', () => process.send(server.address().port))

// nobody is left to ask
process.on('disconnect', () => process.exit())
