/**
 * A payment provider that is not real. It is somebody else: what it does is not in our transactions, its answers
 * may get lost, and it knows a request again by a key of its own, as providers do.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import type pg from 'pg'
import { randomKey } from './event-keys.js'

export class PaymentProvider {
  readonly #books: pg.Pool

  constructor (books: pg.Pool) {
    this.#books = books
  }

  /**
   * Pay an amount back.
   *
   * @param key the same for all requests about one payment
   * @param slow whether the answer takes two seconds; the money is on its way by then
   * @returns the provider's reference
   */
  async refund (key: string, amount: number, slow: boolean): Promise<string> {
    const { rows: [refund] } = await this.#books.query(
      `INSERT INTO provider_refunds (key, amount, reference) VALUES ($1, $2, $3)
       ON CONFLICT (key) DO UPDATE SET requests = provider_refunds.requests + 1 RETURNING reference`,
      [key, amount, randomKey()])
    if (slow) await sleep(2000)
    return refund.reference
  }
}
