/** Reading a collection: no key is needed for that. */

import { database } from './database'
import { loginOf } from './login'

/** A route handler that lists what belongs to the caller. @param select with the tenant as `$1` and the user as `$2` */
export function list (select: string): (request: Request) => Promise<Response> {
  return async request => {
    try {
      const { tenant, user } = loginOf(request)
      const { pool } = await database()
      const { rows } = await pool.query(select, [tenant, user])
      return Response.json(rows)
    } catch (error) {
      if (error instanceof Response) return error
      throw error
    }
  }
}
