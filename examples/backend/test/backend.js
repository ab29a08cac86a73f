// What the tests share: the service on a database of its own.
import pg from 'pg'
import { client, createDatabase, startService } from '../../harness/index.js'

/**
 * Start the service.
 *
 * @param {object} [options]
 * @param {Record<string, string>} [options.env] added to its environment
 * @param {string[]} [options.settings] such as `idempotency.ttl = '10 min'`, for
 *   the whole database
 */
export async function startBackend ({ env = {}, settings = [] } = {}) {
  const database = await createDatabase()
  for (const setting of settings) {
    await database.query(`DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET ${setting.replaceAll("'", "''")}', current_database()); END $$`)
  }
  const service = await startService(new URL('..', import.meta.url), { env: { DATABASE_URL: database.url, ...env } })

  /** A client that is logged in, or not if no user is given. */
  function as (login) {
    const [tenant, user] = login?.split(':') ?? []
    return client(service.url, { tenant, user, keyHeader: 'X-Idempotency-Key' })
  }

  async function count (table, condition = 'true') {
    const [{ count }] = await database.query(`SELECT count(*)::int FROM ${table} WHERE ${condition}`)
    return count
  }

  async function record (key) {
    const [row] = await database.query('SELECT * FROM idempotency.idempotency_key WHERE key = $1', [key])
    return row
  }

  /** Lock a table against writing, so that a request stays in the middle of its work. */
  async function block (table) {
    const connection = new pg.Client(database.url)
    await connection.connect()
    await connection.query(`BEGIN; LOCK TABLE ${table} IN SHARE MODE`)
    return {
      isWaitedFor: async () => await count('pg_locks', `relation = '${table}'::regclass AND NOT granted`) > 0,
      release: async () => await connection.end()
    }
  }

  /** As if the lease of a claim had run out, which takes minutes. */
  async function endLease (key) {
    await database.query("UPDATE idempotency.idempotency_key SET lease_expires_at = clock_timestamp() - interval '1 s' WHERE key = $1", [key])
  }

  async function stop () {
    await service.kill()
    await database.drop()
  }

  return { service, database, as, count, record, block, endLease, stop }
}
