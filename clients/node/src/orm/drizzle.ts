/** Drizzle: a statement is made by its `sql`, of the texts between values; each driver returns rows in its own way. */

import { OrmDatabase } from './transaction.js'
import type { ConfirmOptions } from './transaction.js'
import type { Database, Queryable } from '../types.js'

/** What is needed of Drizzle, or of a transaction of it. */
export interface DrizzleRunner {
  execute (query: any): PromiseLike<any>
}

/** What is needed of Drizzle. */
export interface Drizzle<Tx extends DrizzleRunner> extends DrizzleRunner {
  transaction (work: (tx: Tx) => Promise<void>, config?: any): Promise<unknown>
}

/** The `sql` of `drizzle-orm`. */
export type DrizzleSql = (texts: TemplateStringsArray, ...values: any[]) => unknown

/** As those of `db.transaction`. */
export interface DrizzleOptions extends ConfirmOptions {
  isolationLevel?: 'read committed' | 'repeatable read' | 'serializable'
}

/**
 * A transaction of Drizzle, for `begin`, `finish` and `firstSeen`.
 *
 * @param sql that of `drizzle-orm`
 */
export function fromDrizzle (tx: DrizzleRunner, sql: DrizzleSql): Queryable {
  return {
    query: async (text, values) => {
      const result = await tx.execute(sql(text.split(/\$\d+/) as unknown as TemplateStringsArray, ...values))
      return Array.isArray(result) ? { rows: result } : result
    }
  }
}

/**
 * A database for `createIdempotency`; the work gets the `tx`.
 *
 * @param db the instance, not a transaction of it
 * @param sql that of `drizzle-orm`
 */
export function drizzleDatabase<Tx extends DrizzleRunner> (db: Drizzle<Tx>, sql: DrizzleSql, { confirm, ...config }: DrizzleOptions = {}): Database<Tx> {
  return new OrmDatabase<Tx>({
    outside: fromDrizzle(db, sql),
    inside: tx => fromDrizzle(tx, sql),
    open: work => db.transaction(work, config.isolationLevel ? config : undefined)
  }, confirm)
}
