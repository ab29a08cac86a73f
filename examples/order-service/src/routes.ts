/** The routes whose work is in the database alone: it is committed with its answer, or not at all. */
import type { FastifyInstance, FastifySchema } from 'fastify'
import type pg from 'pg'
import type { Idempotency } from 'pg-idempotency'
import { OrderError } from './errors.js'
import { listEvents } from './events.js'
import { cancelOrder, createOrder, findByIdempotencyKey, findOrder, listOrders, modifyOrder, reserveOrder, upgradeOrder } from './orders.js'
import type { Item } from './orders.js'
import { keyOf, transactionOf } from './protection.js'

const itemsBody = {
  type: 'object',
  required: ['items'],
  properties: {
    items: {
      type: 'array',
      minItems: 1,
      maxItems: 100,
      items: {
        type: 'object',
        required: ['sku', 'quantity'],
        properties: { sku: { type: 'string', minLength: 1 }, quantity: { type: 'integer', minimum: 1, maximum: 1000 } }
      }
    }
  }
}

const tierBody = {
  type: 'object',
  required: ['tier'],
  properties: { tier: { type: 'string', minLength: 1 } }
}

interface WithId { Params: { id: string } }

/** The schema of a route that has an order's id in its path. */
export function withId (body?: object): FastifySchema {
  const params = { type: 'object', properties: { id: { type: 'string', format: 'uuid' } } }
  return body === undefined ? { params } : { params, body }
}

export function routes (app: FastifyInstance, pool: pg.Pool, idempotency: Idempotency<any>): void {
  app.post<{ Body: { items: Item[] } }>('/orders', { schema: { body: itemsBody } }, async (request, reply) => {
    const order = await createOrder(transactionOf(request), request.user, keyOf(request), request.body.items)
    return reply.code(201).header('location', `/orders/${order.id}`).send(order)
  })

  app.post<WithId>('/orders/:id/reserve', { schema: withId() }, async request =>
    await reserveOrder(transactionOf(request), request.user, request.params.id))

  app.post<WithId>('/orders/:id/cancel', { schema: withId() }, async request =>
    await cancelOrder(transactionOf(request), request.user, request.params.id))

  app.post<WithId & { Body: { items: Item[] } }>('/orders/:id/modifications', { schema: withId(itemsBody) }, async request =>
    await modifyOrder(transactionOf(request), request.user, request.params.id, request.body.items))

  app.post<WithId & { Body: { tier: string } }>('/orders/:id/upgrade', { schema: withId(tierBody) }, async request =>
    await upgradeOrder(transactionOf(request), request.user, request.params.id, request.body.tier))

  // reading is not protected: doing it twice does no harm

  app.get<{ Querystring: { idempotencyKey?: string } }>('/orders', async ({ user, query: { idempotencyKey } }) => {
    if (idempotencyKey === undefined) return await listOrders(pool, user)
    const order = await findByIdempotencyKey(pool, user, idempotencyKey)
    return order === undefined ? [] : [order]
  })

  app.get<WithId>('/orders/:id', { schema: withId() }, async request =>
    await findOrder(pool, request.user, request.params.id))

  app.get<WithId>('/orders/:id/events', { schema: withId() }, async request => {
    const { id } = await findOrder(pool, request.user, request.params.id)
    return await listEvents(pool, id)
  })

  // what became of a request whose answer got lost
  app.get<{ Params: { key: string }, Querystring: { action: string } }>('/requests/:key', async ({ user, params: { key }, query: { action = 'POST /orders' } }) => {
    const { outcome, attempt, createdAt, finishedAt, result } = await idempotency.status({ tenant: user.tenant, actor: user.id, action, key })
    if (outcome === null) throw new OrderError(404, 'REQUEST_UNKNOWN', 'There is no request with this key', { key, action })
    return { state: outcome === 'replayed' ? 'completed' : 'in_progress', status: result?.status, attempt, startedAt: createdAt, completedAt: finishedAt }
  })

  app.get('/health', { config: { public: true } }, async () => {
    await pool.query('SELECT 1')
    return { status: 'ok' }
  })
}
