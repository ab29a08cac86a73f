/** Orders: what they are, and what can be done with them. Each change is an event as well. */
import { setTimeout as sleep } from 'node:timers/promises'
import type { Queryable } from 'pg-idempotency'
import { DuplicateOrderError, OrderError } from './errors.js'
import { timeOrderedKey } from './event-keys.js'
import { recordEvent } from './events.js'
import type { User } from './login.js'

export interface Item {
  sku: string
  quantity: number
}

export interface Order {
  id: string
  status: 'created' | 'reserved' | 'cancelled' | 'partially_refunded' | 'refunded'
  tier: string
  items: Item[]
  /** In cents, as `refunded`; each item costs 10.00. */
  total: number
  refunded: number
  idempotencyKey: string
  createdAt: Date
}

const COLUMNS = 'id, status, tier, items, total, refunded, idempotency_key AS "idempotencyKey", created_at AS "createdAt"'

/**
 * Create an order, and take its items from the stock.
 *
 * @throws DuplicateOrderError if there is one for this key
 */
export async function createOrder (tx: Queryable, user: User, key: string, items: Item[]): Promise<Order> {
  const { rows: [order] } = await tx.query(
    `INSERT INTO orders (id, tenant, user_id, items, total, idempotency_key) VALUES ($1, $2, $3, $4, $5, $6)
     ON CONFLICT (tenant, user_id, idempotency_key) DO NOTHING RETURNING ${COLUMNS}`,
    [timeOrderedKey(), user.tenant, user.id, JSON.stringify(items), totalOf(items), key])
  if (order === undefined) {
    const existing = await findByIdempotencyKey(tx, user, key)
    throw new DuplicateOrderError(existing?.id ?? '')
  }
  await recordEvent(tx, 'order.created', order.id)
  await takeFromStock(items)
  return order as Order
}

export async function findByIdempotencyKey (db: Queryable, user: User, key: string): Promise<Order | undefined> {
  const { rows } = await db.query(
    `SELECT ${COLUMNS} FROM orders WHERE tenant = $1 AND user_id = $2 AND idempotency_key = $3`, [user.tenant, user.id, key])
  return rows[0] as Order | undefined
}

/** The orders of a tenant, the latest first. */
export async function listOrders (db: Queryable, { tenant }: User): Promise<Order[]> {
  const { rows } = await db.query(`SELECT ${COLUMNS} FROM orders WHERE tenant = $1 ORDER BY id DESC LIMIT 100`, [tenant])
  return rows as Order[]
}

/** @throws OrderError 404 */
export async function findOrder (db: Queryable, { tenant }: User, id: string, lock: '' | 'FOR UPDATE' = ''): Promise<Order> {
  const { rows: [order] } = await db.query(`SELECT ${COLUMNS} FROM orders WHERE tenant = $1 AND id = $2 ${lock}`, [tenant, id])
  if (order === undefined) throw new OrderError(404, 'ORDER_NOT_FOUND', 'There is no such order', { orderId: id })
  return order as Order
}

/** Change an order, and record it. @throws OrderError 404 or 422 */
async function changeOrder (tx: Queryable, user: User, id: string, eventType: string, change: (order: Order) => Partial<Order>): Promise<Order> {
  const before = await findOrder(tx, user, id, 'FOR UPDATE')
  const { status, tier, items, total, refunded } = { ...before, ...change(before) }
  const { rows: [order] } = await tx.query(
    `UPDATE orders SET status = $1, tier = $2, items = $3, total = $4, refunded = $5 WHERE id = $6 RETURNING ${COLUMNS}`,
    [status, tier, JSON.stringify(items), total, refunded, id])
  await recordEvent(tx, eventType, id)
  return order as Order
}

export async function reserveOrder (tx: Queryable, user: User, id: string): Promise<Order> {
  return await changeOrder(tx, user, id, 'order.reserved', order => {
    mustBe(order, 'created')
    return { status: 'reserved' }
  })
}

export async function cancelOrder (tx: Queryable, user: User, id: string): Promise<Order> {
  return await changeOrder(tx, user, id, 'order.cancelled', order => {
    mustBe(order, 'created', 'reserved')
    return { status: 'cancelled' }
  })
}

export async function modifyOrder (tx: Queryable, user: User, id: string, items: Item[]): Promise<Order> {
  const order = await changeOrder(tx, user, id, 'order.modified', order => {
    mustBe(order, 'created', 'reserved')
    return { items, total: totalOf(items) }
  })
  await takeFromStock(items)
  return order
}

export async function upgradeOrder (tx: Queryable, user: User, id: string, tier: string): Promise<Order> {
  return await changeOrder(tx, user, id, 'order.upgraded', order => {
    mustBe(order, 'created', 'reserved')
    return { tier }
  })
}

/** A part of what was paid for an order that goes back. */
export interface Refund {
  id: string
  amount: number
  /** Of the payment provider; null as long as nothing was paid back. */
  reference: string | null
}

/**
 * Set an amount aside before it is refunded, so that two refunds together are not more than was paid.
 *
 * @param amount null for all that is left
 */
export async function setRefundAside (tx: Queryable, user: User, orderId: string, refundId: string, amount: number | null): Promise<void> {
  const { total, refunded } = await findOrder(tx, user, orderId, 'FOR UPDATE')
  // a checkpoint whose COMMIT was not answered is saved once more, with its work
  if (await findRefund(tx, refundId) !== undefined) return
  const left = total - refunded
  const refund = amount ?? left
  if (refund === 0 || refund > left) {
    throw new OrderError(422, 'REFUND_TOO_LARGE', 'There is not so much left to refund', { left })
  }
  await tx.query('UPDATE orders SET refunded = refunded + $1 WHERE id = $2', [refund, orderId])
  await tx.query('INSERT INTO refunds (id, order_id, amount) VALUES ($1, $2, $3)', [refundId, orderId, refund])
}

export async function findRefund (db: Queryable, id: string): Promise<Refund | undefined> {
  const { rows } = await db.query('SELECT id, amount, reference FROM refunds WHERE id = $1', [id])
  return rows[0] as Refund | undefined
}

/** Say that an amount that was set aside has been paid back. */
export async function completeRefund (tx: Queryable, user: User, orderId: string, refundId: string, reference: string): Promise<Order & { refund: Refund }> {
  await tx.query('UPDATE refunds SET reference = $1 WHERE id = $2', [reference, refundId])
  const order = await changeOrder(tx, user, orderId, 'order.refunded', ({ total, refunded }) =>
    ({ status: refunded === total ? 'refunded' : 'partially_refunded' }))
  return { ...order, refund: await findRefund(tx, refundId) as Refund }
}

function mustBe (order: Order, ...allowed: Array<Order['status']>): void {
  if (!allowed.includes(order.status)) {
    throw new OrderError(422, 'ORDER_STATUS', `The order is ${order.status}`, { status: order.status, allowed })
  }
}

function totalOf (items: Item[]): number {
  return items.reduce((total, { quantity }) => total + quantity * 1000, 0)
}

/** The stock of a demonstration: some items are always trouble. */
async function takeFromStock (items: Item[]): Promise<void> {
  for (const { sku } of items) {
    if (sku === 'slow') await sleep(2000)
    if (sku === 'broken') throw new Error('the stock cannot be reached')
    if (sku === 'sold-out') throw new OrderError(422, 'SOLD_OUT', 'There is none left', { sku })
  }
}
