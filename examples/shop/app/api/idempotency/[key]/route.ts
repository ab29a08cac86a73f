/**
 * What became of a key of the caller's: PENDING, COMPLETED or ERRORED, one record for each route it was used
 * with. It looks and touches nothing, so a page can poll it. A request that failed with a 5xx, or threw, has
 * no record: nothing was kept, and a repeat runs.
 */

import type { Status } from 'pg-idempotency'
import { actions } from '@/lib/actions'
import { database } from '@/lib/database'
import { loginOf } from '@/lib/login'
import { problem } from '@/lib/problem'

export async function GET (request: Request, { params }: { params: Promise<{ key: string }> }): Promise<Response> {
  try {
    const { tenant, user } = loginOf(request)
    const { key } = await params
    if (!/^[A-Za-z0-9_-]{1,255}$/.test(key)) return problem(400, 'INVALID_REQUEST', 'this is not a key')

    const { idempotency } = await database()
    const records = []
    for (const action of actions) {
      const status = await idempotency.status({ tenant, actor: user, action, key })
      if (status.outcome !== null) records.push({ key, actorId: user, route: action, ...stateOf(status) })
    }
    return records.length > 0 ? Response.json(records) : problem(404, 'NO_SUCH_KEY', 'nothing is known of this key')
  } catch (error) {
    if (error instanceof Response) return error
    throw error
  }
}

function stateOf ({ result, retryAfter, attempt, createdAt, finishedAt, expiresAt }: Status): object {
  if (result === null) return { status: 'PENDING', attempt, retryAfter, createdAt }
  return {
    status: result.status < 400 ? 'COMPLETED' : 'ERRORED',
    statusCode: result.status,
    response: result.json ?? (result.body && new TextDecoder().decode(result.body)),
    createdAt,
    finishedAt,
    expiresAt
  }
}
