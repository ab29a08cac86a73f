// Knex, with names mapped to camel case as many do.
import Knex from 'knex'
import { fromKnex, knexDatabase } from 'pg-idempotency/orm'

function camelCase (row) {
  return Object.fromEntries(Object.entries(row).map(([name, value]) =>
    [name.replace(/_(\w)/g, (_, letter) => letter.toUpperCase()), value]))
}

export async function open (url) {
  const knex = Knex({
    client: 'pg',
    connection: url,
    pool: { min: 0, max: 4 },
    postProcessResponse: result => Array.isArray(result) ? result.map(camelCase) : camelCase(result)
  })
  return {
    database: options => knexDatabase(knex, options),
    nested: trx => knexDatabase(trx),
    queryable: fromKnex,
    transaction: work => knex.transaction(work),
    insert: async (trx, name) => await trx('orders').insert({ name }),
    serializable: 'serializable',
    close: async () => await knex.destroy()
  }
}
