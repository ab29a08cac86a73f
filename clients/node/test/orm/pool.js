// A pool of pg for an ORM that takes one, made as its users have to make it.
import pg from 'pg'

/** A pool whose connections may break, be they idle or not, without an end of the process. */
export function quietPool (url) {
  const pool = new pg.Pool({ connectionString: url, max: 4 })
  pool.on('error', () => {})
  pool.on('connect', client => client.on('error', () => {}))
  return pool
}
