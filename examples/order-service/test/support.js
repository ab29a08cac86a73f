// The service on a database of its own, and what its tests ask again and again.
import { randomUUID } from 'node:crypto'
import { client, createDatabase, startService, until } from '../../harness/index.js'

export const HEADER = 'X-Idempotency-Key'

/**
 * Start the service on a database of its own.
 *
 * @param {object} [options]
 * @param {Record<string, string>} [options.env] what is added to its environment
 * @param {(url: string) => Promise<string>} [options.through] makes the URL by which the service
 *   reaches the database
 */
export async function startOrderService ({ env = {}, through = async url => url } = {}) {
  const database = await createDatabase()
  const service = await startService(new URL('..', import.meta.url), { env: { ...env, DATABASE_URL: await through(database.url) } })

  /** A client that is logged in. */
  function as (user, tenant = 'acme') {
    return client(service.url, { tenant, user, keyHeader: HEADER })
  }

  /** The record of a key, or undefined. */
  async function recordOf (key) {
    const [record] = await database.query('SELECT * FROM idempotency.idempotency_key WHERE key = $1', [key])
    return record
  }

  /** How many orders there are for a key. */
  async function ordersOf (key) {
    const [{ count }] = await database.query('SELECT count(*)::int FROM orders WHERE idempotency_key = $1', [key])
    return count
  }

  /** Wait until a request is at work, and return what the server says of it. */
  async function inFlight (key) {
    return await until(async () => {
      const [row] = await database.query('SELECT * FROM idempotency.idempotency_in_flight WHERE key = $1', [key])
      return row
    }, { what: 'the request to be in flight' })
  }

  async function stop () {
    await service.stop()
    await database.drop()
  }

  return { service, database, as, stranger: client(service.url, { keyHeader: HEADER }), recordOf, ordersOf, inFlight, stop }
}

/** An order of one item. */
export function orderOf (...skus) {
  return { items: skus.map(sku => ({ sku, quantity: 1 })) }
}

/** Create an order. @returns what was answered, as a value */
export async function createOrder (api, ...skus) {
  return (await api.post('/orders', orderOf(...skus), { key: randomUUID() })).json
}
