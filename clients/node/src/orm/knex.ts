/** Knex: placeholders are `?`, and a transaction is a function with the look of a database. */

import { OrmDatabase } from './transaction.js'
import type { ConfirmOptions } from './transaction.js'
import type { Database, Queryable } from '../types.js'

/** What is needed of Knex, or of a transaction of it. */
export interface KnexRunner {
  raw (sql: string, bindings: any[]): PromiseLike<any>
}

/** What is needed of Knex. */
export interface Knex<Trx extends KnexRunner> extends KnexRunner {
  transaction (work: (trx: Trx) => Promise<void>, config?: any): PromiseLike<unknown>
}

/** As those of `knex.transaction`. */
export interface KnexOptions extends ConfirmOptions {
  isolationLevel?: 'read committed' | 'repeatable read' | 'serializable'
}

/** A transaction of Knex, for `begin`, `finish` and `firstSeen`. */
export function fromKnex (trx: KnexRunner): Queryable {
  return {
    query: async (text, values) => await trx.raw(text.replace(/\$\d+/g, '?'), values)
  }
}

/**
 * A database for `createIdempotency`; the work gets the `trx`.
 *
 * @param knex the instance, not a transaction of it
 */
export function knexDatabase<Trx extends KnexRunner> (knex: Knex<Trx>, { confirm, ...config }: KnexOptions = {}): Database<Trx> {
  return new OrmDatabase<Trx>({
    outside: fromKnex(knex),
    inside: fromKnex,
    open: work => knex.transaction(work, config)
  }, confirm)
}
