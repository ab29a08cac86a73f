/** How requests are protected: all that the service says about idempotency keys is on this page. */
import type { FastifyRequest } from 'fastify'
import type { IdempotencyPluginOptions } from 'pg-idempotency/fastify'
import type { ProblemFormat } from 'pg-idempotency/http'
import type { Claim, Queryable } from 'pg-idempotency'

export const HEADER = 'X-Idempotency-Key'

/** How long answers are kept, and how long work outside the database may take. A 5xx is not kept at all. */
export const lifetimes = {
  success: '24 hours',
  clientError: '1 hour',
  processing: process.env.PROCESSING_WINDOW ?? '30 minutes'
}

/** `{ code, error, details }`, where the details say for how long a key counts. */
const problem: ProblemFormat = ({ code, title, detail, retryAfter }) => ({
  contentType: 'application/json; charset=utf-8',
  body: { code, error: title, details: { reason: detail, ...(retryAfter === null ? {} : { retryAfter }), lifetimes } }
})

export const protection: Omit<IdempotencyPluginOptions, 'idempotency'> = {
  global: true,
  header: HEADER,
  key: { format: 'uuid', minLength: 16, maxLength: 255 },
  tenant: request => request.user.tenant,
  actor: request => request.user.id,
  ttl: { '2xx': lifetimes.success, '4xx': lifetimes.clientError },
  problem
}

/** For routes that call outside: their work is not in a transaction, and the claim outlives the process. */
export const outside = { config: { idempotency: { lease: lifetimes.processing } } }

/** The key of a protected request. */
export function keyOf (request: FastifyRequest): string {
  return protectedBy(request).key
}

/** The transaction that a protected request is in, and in which its answer will be kept. */
export function transactionOf (request: FastifyRequest): Queryable {
  return protectedBy(request).tx
}

/** The claim of a request to a route that calls outside. */
export function claimOf (request: FastifyRequest): Claim<Queryable> {
  return protectedBy(request).claim as Claim<Queryable>
}

function protectedBy (request: FastifyRequest): NonNullable<FastifyRequest['idempotency']> {
  if (request.idempotency === null) throw new Error('the route is not protected')
  return request.idempotency
}
