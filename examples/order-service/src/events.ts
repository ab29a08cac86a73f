/**
 * The events of orders, and a consumer that sees each of them once.
 *
 * An event is recorded in the transaction of the change that it tells of. It is delivered at least once:
 * whatever goes wrong before its acknowledgement, it is delivered again, also to another process. The consumer
 * has the extension remember the keys that it has seen, in the transaction of what it does about them.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import type { FastifyBaseLogger } from 'fastify'
import type pg from 'pg'
import type { Idempotency, Queryable } from 'pg-idempotency'
import { inTransaction } from './database.js'
import { deterministicKey, randomKey, timeOrderedKey } from './event-keys.js'

export interface OrderEvent {
  id: string
  type: string
  orderId: string
  sequenceNumber: number
  idempotencyKey: string
  createdAt: Date
}

/** What became of an event: each of its deliveries has an id, and there should be one notification. */
export interface DeliveredEvent extends OrderEvent {
  deliveries: string[]
  notifications: number
}

const COLUMNS = 'id, type, order_id AS "orderId", sequence_number AS "sequenceNumber", idempotency_key AS "idempotencyKey", created_at AS "createdAt"'

/** Record an event. The transaction has the order's row, so that no two events get one number. */
export async function recordEvent (tx: Queryable, type: string, orderId: string): Promise<void> {
  const { rows: [row] } = await tx.query(
    'SELECT coalesce(max(sequence_number), 0) + 1 AS next FROM order_events WHERE order_id = $1', [orderId])
  await tx.query(
    'INSERT INTO order_events (id, order_id, sequence_number, type, idempotency_key) VALUES ($1, $2, $3, $4, $5)',
    [timeOrderedKey(), orderId, row?.next, type, deterministicKey(type, orderId, row?.next)])
}

export async function listEvents (db: Queryable, orderId: string): Promise<DeliveredEvent[]> {
  const { rows } = await db.query(
    `SELECT ${COLUMNS},
            ARRAY(SELECT id FROM event_deliveries WHERE event_id = order_events.id) AS deliveries,
            (SELECT count(*)::int FROM notifications WHERE event_id = order_events.id) AS notifications
       FROM order_events WHERE order_id = $1 ORDER BY sequence_number`, [orderId])
  return rows as DeliveredEvent[]
}

export class EventConsumer {
  readonly #pool: pg.Pool
  readonly #idempotency: Idempotency<any>
  #running = Promise.resolve()
  #stop = new AbortController()

  constructor (pool: pg.Pool, idempotency: Idempotency<any>) {
    this.#pool = pool
    this.#idempotency = idempotency
  }

  start (log: FastifyBaseLogger): void {
    this.#running = this.#run(log)
  }

  async stop (): Promise<void> {
    this.#stop.abort()
    await this.#running
  }

  async #run (log: FastifyBaseLogger): Promise<void> {
    const { signal } = this.#stop
    while (!signal.aborted) {
      const events = await this.#waiting().catch(() => [])
      try {
        await this.#consume(events)
      } catch (error) {
        log.warn({ err: error }, 'events will be delivered again')
      }
      if (events.length === 0) await sleep(100, undefined, { signal }).catch(() => {})
    }
  }

  async #waiting (): Promise<OrderEvent[]> {
    const { rows } = await this.#pool.query(
      `SELECT ${COLUMNS} FROM order_events WHERE acknowledged_at IS NULL ORDER BY id LIMIT 100`)
    return rows
  }

  async #consume (events: OrderEvent[]): Promise<void> {
    if (events.length === 0) return
    await inTransaction(this.#pool, async tx => {
      const keys = events.map(event => event.idempotencyKey)
      const unseen = new Set(await this.#idempotency.firstSeen(tx, 'order-notifications', keys, { ttl: '72 hours' }))
      for (const { id, idempotencyKey } of events) {
        await tx.query('INSERT INTO event_deliveries (id, event_id) VALUES ($1, $2)', [randomKey(), id])
        if (unseen.has(idempotencyKey)) await tx.query('INSERT INTO notifications (event_id) VALUES ($1)', [id])
      }
    })
    await this.#pool.query('UPDATE order_events SET acknowledged_at = now() WHERE id = ANY ($1::uuid[])', [events.map(({ id }) => id)])
  }
}
