// Kysely, with names mapped to camel case as many do.
import { CamelCasePlugin, Kysely, PostgresDialect } from 'kysely'
import { fromKysely, kyselyDatabase } from 'pg-idempotency/orm'
import { quietPool } from './pool.js'

export async function open (url) {
  const db = new Kysely({
    dialect: new PostgresDialect({ pool: quietPool(url) }),
    plugins: [new CamelCasePlugin()]
  })
  return {
    database: options => kyselyDatabase(db, options),
    queryable: fromKysely,
    transaction: work => db.transaction().execute(work),
    insert: async (trx, name) => await trx.insertInto('orders').values({ name }).execute(),
    serializable: 'serializable',
    close: async () => await db.destroy()
  }
}
