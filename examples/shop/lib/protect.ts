/** Routes and server actions of the shop, each request of which is done once. */

import { createNext } from 'pg-idempotency/next'
import { database } from './database'
import { loginOf } from './login'
import { inFlight } from './observe'
import { mismatchStatus, problem } from './problem'

const next = createNext(async () => (await database()).idempotency, {
  tenant: request => loginOf(request).tenant,
  actor: request => loginOf(request).user,
  key: { format: 'slug' }, // letters, digits, - and _, as a UUID has them
  mismatchStatus,
  maxRetryAfter: 2 // of the leases, whose rest is longer than their work mostly takes
})

/** How long one attempt may take from one checkpoint to the next, as PostgreSQL writes an interval. */
export const lease = process.env.IDEMPOTENCY_LEASE ?? '30 s'

/** Protect a route handler: see `pg-idempotency/next`. */
export const route: typeof next.route = (handler, options) => {
  const protectedHandler = next.route(handler, options)
  return async (request, context) => await inFlight(async () => await protectedHandler(request, context))
}

/** Protect a server action: see `pg-idempotency/next`. */
export const withIdempotency = (async (...args: [any, any, any, any, any?]) =>
  await inFlight(async () => await next.withIdempotency(...args))) as typeof next.withIdempotency

/** The body of a request, as far as it is an object. @throws Response of 400 */
export async function bodyOf (request: Request): Promise<Record<string, unknown>> {
  const body = await request.json().catch(() => null)
  if (typeof body !== 'object' || body === null || Array.isArray(body)) throw invalid('the body is not a JSON object')
  return body
}

/** What to throw at a request that makes no sense. */
export function invalid (detail: string): Response {
  return problem(400, 'INVALID_REQUEST', detail)
}
