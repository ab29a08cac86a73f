// Drizzle on node-postgres.
import { sql } from 'drizzle-orm'
import { drizzle } from 'drizzle-orm/node-postgres'
import { pgTable, serial, text } from 'drizzle-orm/pg-core'
import { drizzleDatabase, fromDrizzle } from 'pg-idempotency/orm'
import { quietPool } from './pool.js'

export const orders = pgTable('orders', { id: serial(), name: text() })

export async function open (url) {
  const pool = quietPool(url)
  // nobody waits: Drizzle keeps a connection on which its BEGIN has failed, and the pool's end would never come
  return { ...drizzleOn(drizzle(pool)), close: async () => { pool.end().catch(() => {}) } }
}

/** What the tests need of Drizzle, whatever its driver is. */
export function drizzleOn (db) {
  return {
    database: options => drizzleDatabase(db, sql, options),
    nested: tx => drizzleDatabase(tx, sql),
    queryable: tx => fromDrizzle(tx, sql),
    transaction: work => db.transaction(work),
    insert: async (tx, name) => await tx.insert(orders).values({ name }),
    serializable: 'serializable'
  }
}
