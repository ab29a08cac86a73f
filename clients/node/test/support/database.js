// A database of its own for each file of tests, on the server that DATABASE_URL
// names, which has the extension installed.
import { randomBytes } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import pg from 'pg'

/**
 * Create a database with the extension.
 *
 * @param {object} [options]
 * @param {string} [options.schema] the schema of the extension
 * @returns {Promise<{ url: string, pool: pg.Pool, drop: () => Promise<void> }>}
 *   `pool` is for the test itself; `drop` closes it and drops the database
 */
export async function createDatabase ({ schema = 'idempotency' } = {}) {
  const server = new pg.Client(process.env.DATABASE_URL)
  await server.connect()
  const name = `client_test_${randomBytes(6).toString('hex')}`
  await server.query(`CREATE DATABASE ${name}`)

  const url = new URL(process.env.DATABASE_URL)
  url.pathname = `/${name}`
  const pool = new pg.Pool({ connectionString: url.href })
  pool.on('error', () => {}) // a connection that a test has terminated while it was idle
  const quoted = pg.escapeIdentifier(schema)
  await pool.query('DROP EXTENSION IF EXISTS idempotency')
  await pool.query(`CREATE SCHEMA IF NOT EXISTS ${quoted}`)
  await pool.query(`CREATE EXTENSION idempotency SCHEMA ${quoted}`)

  async function drop () {
    await pool.end()
    // a connection that was ended is still there for a moment, and to terminate it would be an error of its
    // client; one that a library has left behind is there for good
    const isUsed = async () => (await server.query('SELECT FROM pg_stat_activity WHERE datname = $1', [name])).rowCount > 0
    for (let tries = 0; tries < 300 && await isUsed(); tries++) await sleep(10)
    await server.query(`DROP DATABASE ${name} WITH (FORCE)`)
    await server.end()
  }
  return { url: url.href, pool, drop }
}
