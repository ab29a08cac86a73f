/** What a client is told when there is no answer: `application/problem+json`, RFC 9457. */

import type { IdempotencyError } from '../errors.js'
import type { HttpAnswer } from './message.js'

/** What is known of a problem. */
export interface Problem {
  status: number
  /** Such as `DUPLICATE_IN_PROGRESS`. */
  code: string
  /** The same for all problems of this code. */
  title: string
  /** About this request. */
  detail: string
  /** After how many seconds to repeat the request, where that makes sense. */
  retryAfter: number | null
}

/** Makes the body of a problem, and says of which content type it is. */
export type ProblemFormat = (problem: Problem) => { contentType: string, body: unknown }

/** RFC 9457, with the code as a member of its own. */
export const problemJson: ProblemFormat = ({ status, code, title, detail }) => ({
  contentType: 'application/problem+json; charset=utf-8',
  body: { type: 'about:blank', title, status, detail, code }
})

/** `{ code, error, details }`. */
export const codeErrorDetails: ProblemFormat = ({ code, title, detail, retryAfter }) => ({
  contentType: 'application/json; charset=utf-8',
  body: { code, error: title, details: { reason: detail, ...(retryAfter === null ? {} : { retryAfter }) } }
})

/** Problems that a client can do something about; the messages of others are not for it. */
const clients = new Set(['IDEMPOTENCY_KEY_MISSING', 'IDEMPOTENCY_KEY_INVALID', 'REQUEST_INVALID'])

/**
 * The answer to a request that has none.
 *
 * @param mismatchStatus 422 or 409, for a key that was used with a different request
 * @param maxRetryAfter the most that Retry-After says, in seconds
 */
export function problemAnswer (error: IdempotencyError, format: ProblemFormat, mismatchStatus: number, maxRetryAfter: number): HttpAnswer {
  const status = error.code === 'IDEMPOTENCY_KEY_REUSED' ? mismatchStatus : error.status
  const seconds = error.retryAfter ?? (status === 503 ? 1 : null)
  const retryAfter = seconds === null ? null : Math.min(seconds, maxRetryAfter)
  const detail = clients.has(error.code) ? error.message : error.title
  const { contentType, body } = format({ status, code: error.code, title: error.title, detail, retryAfter })
  return {
    status,
    headers: { 'content-type': contentType, ...(retryAfter === null ? {} : { 'retry-after': String(retryAfter) }) },
    body: JSON.stringify(body)
  }
}
