// What the tests of the shop share: a shop with a database of its own, and what stands in that.
import { client, createDatabase, startService } from '../../harness/index.js'

/**
 * Start the shop on a new database.
 *
 * @param {Record<string, string>} [env] for the service
 */
export async function openShop (env = {}) {
  const database = await createDatabase()
  let service
  try {
    service = await startService(new URL('..', import.meta.url), { env: { ...env, DATABASE_URL: database.url } })
  } catch (error) {
    await database.drop()
    throw error
  }

  async function count (table, condition = 'true', values = []) {
    const [{ count }] = await database.query(`SELECT count(*)::int FROM ${table} WHERE ${condition}`, values)
    return count
  }

  return {
    database,
    service,
    count,

    /** A client of the API, logged in as a user. */
    as: (user, tenant = 'acme') => client(service.url, { tenant, user }),

    /** The lines of the log about protected requests that have this key. */
    logOf: key => linesOf(service.output).filter(line => line.key === key),

    /** The value of a metric, added up over its labels, of which some can be given. */
    async metric (name, labels = {}) {
      const { text } = await client(service.url).get('/metrics')
      const wanted = Object.entries(labels).map(([label, value]) => `${label}="${value}"`)
      const samples = text.split('\n')
        .filter(line => new RegExp(`^${name}[{ ]`).test(line) && wanted.every(label => line.includes(label)))
      return samples.reduce((sum, line) => sum + Number(line.slice(line.lastIndexOf(' '))), 0)
    },

    async close () {
      await service.stop()
      await database.drop()
    }
  }
}

function linesOf (output) {
  return output.split('\n').filter(line => line.startsWith('{"time"')).map(line => JSON.parse(line))
}
