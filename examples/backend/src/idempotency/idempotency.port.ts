/**
 * The kernel's port, for use cases that ask for idempotency themselves, wherever they are called from.
 *
 * It has no way to write over an answer: `store` keeps the first, and `run` keeps its answer in the
 * transaction of its work.
 */
import type { Transaction } from '../database/database.js'

/** What a request is known by. */
export interface RequestScope {
  /** null is the one global tenant. */
  tenant: string | null
  user: string | null
  /** Such as `customization.create`. */
  action: string
  /** The key that the client sent. */
  key: string
}

/** An answer, as HTTP has it. */
export interface StoredAnswer {
  status: number
  body: unknown
}

export abstract class IdempotencyPort {
  /**
   * The answer to a request, or null if there is none (yet).
   *
   * @param request JSON text that tells it from another one
   * @throws MismatchError if the key was used with another request
   */
  abstract get (scope: RequestScope, request: string): Promise<StoredAnswer | null>

  /**
   * Keep an answer that was given elsewhere.
   *
   * @returns the answer that is kept: this one, or the one that was there before
   */
  abstract store (scope: RequestScope, request: string, answer: StoredAnswer): Promise<StoredAnswer>

  /**
   * Do some work once. An answer of 4xx is kept while what the work wrote is rolled back.
   *
   * @returns the answer, once it is committed, and whether it is that of an earlier request
   * @throws InFlightError, MismatchError, KeyMissingError, KeyInvalidError
   */
  abstract run (
    scope: RequestScope,
    request: string,
    work: (transaction: Transaction) => Promise<StoredAnswer>
  ): Promise<StoredAnswer & { replayed: boolean }>
}
