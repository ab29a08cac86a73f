/**
 * A payment provider that is not one. It stands for the service of another company: what it did stays done
 * when a transaction of the shop rolls back. So it writes by itself, never in a transaction of the shop.
 *
 * Like the real ones it honours an idempotency key: a second call with the same key does nothing and gives
 * the first answer. It counts its calls, so that tests can tell who called it.
 */

import { database } from './database'

export interface Operation {
  id: string
  declined: boolean
}

/** Charge a card. An amount of 402 is declined. */
export async function charge (key: string, amount: number): Promise<Operation> {
  return await operate(key, 'charge', amount)
}

/** Give back what a charge took. */
export async function refund (key: string): Promise<Operation> {
  return await operate(key, 'refund', null)
}

/** Open a page where somebody can subscribe. */
export async function openCheckout (key: string): Promise<Operation> {
  return await operate(key, 'checkout', null)
}

async function operate (key: string, kind: string, amount: number | null): Promise<Operation> {
  const { pool } = await database()
  const { rows: [{ id }] } = await pool.query(
    `INSERT INTO provider_operations AS known (key, kind, amount) VALUES ($1, $2, $3)
     ON CONFLICT (key) DO UPDATE SET calls = known.calls + 1 RETURNING id`, [key, kind, amount])
  return { id, declined: amount === 402 }
}
