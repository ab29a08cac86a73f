/**
 * What can go wrong, by class, and the HTTP status that each means.
 *
 * The extension tells its conditions apart by SQLSTATE, in the class ID; every driver and ORM hides
 * that somewhere else, and `sqlStateOf` finds it. Errors that are not the extension's are passed on as
 * they are.
 */

import type { Answer } from './types.js'

export interface ErrorOptions {
  sqlState?: string | null
  detail?: string | null
  hint?: string | null
  retryAfter?: number | null
  cause?: unknown
}

/**
 * Marks the errors of every copy of this package. A process may have two of them, as ESM and CommonJS, or
 * one in a bundle, and an error of one has to be known by the other.
 */
const mark = Symbol.for('pg-idempotency.error')
const refusal = Symbol.for('pg-idempotency.refusal')

/** What all errors of this package have in common. */
export class IdempotencyError extends Error {
  static readonly status: number = 500
  static readonly code: string = 'IDEMPOTENCY_FAILED'
  static readonly title: string = 'The request could not be protected'

  /** The HTTP status to answer with. */
  readonly status: number
  /** A name for clients of an API, such as `DUPLICATE_IN_PROGRESS`. */
  readonly code: string
  /** What a client may be told; the message of a database's error is not for it. */
  readonly title: string
  readonly sqlState: string | null
  readonly detail: string | null
  readonly hint: string | null
  /** After how many seconds a repeat makes sense. */
  readonly retryAfter: number | null
  readonly [mark] = true

  constructor (message: string, options: ErrorOptions = {}) {
    super(message, 'cause' in options ? { cause: options.cause } : undefined)
    this.name = new.target.name
    this.status = new.target.status
    this.code = new.target.code
    this.title = new.target.title
    this.sqlState = options.sqlState ?? null
    this.detail = options.detail ?? null
    this.hint = options.hint ?? null
    this.retryAfter = options.retryAfter ?? null
  }

  /** An error of another copy of the package belongs to the class with its code. */
  static override [Symbol.hasInstance] (candidate: any): boolean {
    if (Function.prototype[Symbol.hasInstance].call(this, candidate)) return true
    return candidate?.[mark] === true && (this === IdempotencyError || (Object.hasOwn(this, 'code') && candidate.code === this.code))
  }
}

/** The request has no key (ID001). */
export class KeyMissingError extends IdempotencyError {
  static override readonly status: number = 400
  static override readonly code: string = 'IDEMPOTENCY_KEY_MISSING'
  static override readonly title: string = 'The idempotency key is missing'
}

/** The key does not have the form that it must have (ID002). */
export class KeyInvalidError extends IdempotencyError {
  static override readonly status: number = 400
  static override readonly code: string = 'IDEMPOTENCY_KEY_INVALID'
  static override readonly title: string = 'The idempotency key is malformed'
}

/** The request is not JSON that the database can read, such as one with a NUL character (22P02, 22P05). */
export class RequestInvalidError extends IdempotencyError {
  static override readonly status: number = 400
  static override readonly code: string = 'REQUEST_INVALID'
  static override readonly title: string = 'The request cannot be read'
}

/** The first request with this key is still at work (ID003). */
export class InFlightError extends IdempotencyError {
  static override readonly status: number = 409
  static override readonly code: string = 'DUPLICATE_IN_PROGRESS'
  static override readonly title: string = 'A request with this idempotency key is in progress'
}

/** The key was used with a different request (ID004). */
export class MismatchError extends IdempotencyError {
  static override readonly status: number = 422
  static override readonly code: string = 'IDEMPOTENCY_KEY_REUSED'
  static override readonly title: string = 'The idempotency key was used with a different request'
}

/** The claim was taken over, or ended by somebody else (ID005): stop, this work does not count. */
export class ClaimLostError extends IdempotencyError {
  static override readonly status: number = 409
  static override readonly code: string = 'IDEMPOTENCY_CLAIM_LOST'
  static override readonly title: string = 'Another attempt at this request has taken over'
}

/** The transaction was to be committed with a claim that was not finished (ID006). */
export class UnfinishedError extends IdempotencyError {
  static override readonly code: string = 'IDEMPOTENCY_UNFINISHED'
}

/** The answer is larger than `idempotency.max_response_size` or `maxAnswer` (ID007). */
export class AnswerTooLargeError extends IdempotencyError {
  static override readonly code: string = 'ANSWER_TOO_LARGE'
  static override readonly title: string = 'The answer is too large to be kept'
}

/** A call out of order (ID008), or one that cannot be right where it is. */
export class OutOfOrderError extends IdempotencyError {
  static override readonly code: string = 'IDEMPOTENCY_OUT_OF_ORDER'
}

/** COMMIT was answered with ROLLBACK: an error inside the transaction had been swallowed. */
export class RolledBackError extends IdempotencyError {
  static override readonly code: string = 'TRANSACTION_ROLLED_BACK'
}

/** The connection broke during COMMIT, and it could not be found out what became of it: ask with the same key. */
export class CommitUnknownError extends IdempotencyError {
  static override readonly status: number = 503
  static override readonly code: string = 'OUTCOME_UNKNOWN'
  static override readonly title: string = 'It is not known whether the request was done; repeat it with the same idempotency key'
}

/** A conflict between transactions (40001, 40P01) that remained after some tries. */
export class ConflictError extends IdempotencyError {
  static override readonly status: number = 503
  static override readonly code: string = 'TRANSACTION_CONFLICT'
  static override readonly title: string = 'The request was in conflict with others; repeat it with the same idempotency key'
}

/** The database cannot be reached; nothing was done. */
export class UnavailableError extends IdempotencyError {
  static override readonly status: number = 503
  static override readonly code: string = 'DATABASE_UNAVAILABLE'
  static override readonly title: string = 'The request could not be done now; repeat it with the same idempotency key'
}

/**
 * To be thrown by the work, from however deep inside: its answer is kept, and what it wrote is rolled
 * back, as if the work had returned an answer of 400 or more.
 */
export class Refusal extends Error {
  override readonly name = 'Refusal'
  readonly [refusal] = true

  /** @param answer what to answer, with a status of 400 or more */
  constructor (readonly answer: Answer) {
    super(`refused with ${answer.status}`)
    if (!(Number(answer.status) >= 400)) throw new RangeError('a refusal has a status of 400 or more')
  }

  static override [Symbol.hasInstance] (candidate: any): boolean {
    return candidate?.[refusal] === true
  }
}

type ErrorClass = new (message: string, options?: ErrorOptions) => IdempotencyError

const byState: Record<string, ErrorClass> = {
  ID001: KeyMissingError,
  ID002: KeyInvalidError,
  ID003: InFlightError,
  ID004: MismatchError,
  ID005: ClaimLostError,
  ID006: UnfinishedError,
  ID007: AnswerTooLargeError,
  ID008: OutOfOrderError
}

/** Where drivers and ORMs keep the error of the one below them. */
const below = ['cause', 'original', 'parent', 'driverError', 'driverAdapterError', 'meta'] as const

/**
 * The database's own error inside that of an ORM, or null.
 *
 * pg, Kysely, Knex and TypeORM have the SQLSTATE in `code`, Drizzle in `cause.code`, Sequelize in
 * `original.code`, Prisma in `meta.driverAdapterError.cause.originalCode` or `cause.originalCode`.
 */
export function databaseErrorOf (error: unknown): { state: string, message: string, detail: string | null, hint: string | null } | null {
  const seen = new Set<unknown>()
  const waiting: any[] = [error]
  for (const candidate of waiting) {
    if (typeof candidate !== 'object' || candidate === null || seen.has(candidate)) continue
    seen.add(candidate)
    for (const state of [candidate.originalCode, candidate.sqlState, candidate.code]) {
      if (isSqlState(state)) {
        return {
          state,
          message: candidate.originalMessage ?? candidate.message ?? '',
          detail: candidate.detail ?? null,
          hint: candidate.hint ?? null
        }
      }
    }
    for (const name of below) waiting.push(candidate[name])
  }
  return null
}

/** The SQLSTATE of an error, wherever the driver or ORM has put it; null if there is none. */
export function sqlStateOf (error: unknown): string | null {
  return databaseErrorOf(error)?.state ?? null
}

/** Five characters, of which the errors of Node (EPIPE) and Prisma (P2010) have none that is taken for a SQLSTATE. */
function isSqlState (code: unknown): code is string {
  return typeof code === 'string' && /^(?:[0-9][0-9A-Z]|ID|F0|HV|P0|XX)[0-9A-Z]{3}$/.test(code)
}

/** The error as one of the classes above where it is the extension's, else as it is. */
export function asIdempotencyError (error: unknown): unknown {
  if (error instanceof IdempotencyError) return error
  const found = databaseErrorOf(error)
  const known = found && byState[found.state]
  if (!known) return error
  const retryAfter = found.state === 'ID003' ? Number(/(\d+) s/.exec(found.hint ?? '')?.[1] ?? 1) : null
  return new known(found.message, { sqlState: found.state, detail: found.detail, hint: found.hint, retryAfter, cause: error })
}

/** Whether the transaction can be run again: a serialization failure or a deadlock. */
export function isConflict (error: unknown): boolean {
  const state = sqlStateOf(error)
  return state === '40001' || state === '40P01'
}

/** Whether the connection is gone: class 08, a shutdown or crash of the server, or no word from it at all. */
export function isConnectionLost (error: unknown): boolean {
  const state = sqlStateOf(error)
  if (state !== null) return state.startsWith('08') || ['57P01', '57P02', '57P03', '57P05', '25P03', '25P04'].includes(state)
  for (let at: any = error; typeof at === 'object' && at !== null; at = at.cause ?? at.original ?? at.driverError) {
    if (networkErrors.has(at.code) || lostMessages.test(String(at.message))) return true
  }
  return false
}

/** What drivers say that give no code; those in capitals are of postgres.js. */
const lostMessages = /(?:connection|query runner).*(?:terminated|ended|closed|lost|released)|CONNECT_TIMEOUT|CONNECTION_DESTROYED|not queryable/i
const networkErrors = new Set(['ECONNRESET', 'ECONNREFUSED', 'EPIPE', 'ETIMEDOUT', 'ENOTCONN', 'ENOENT', 'EHOSTUNREACH', 'ENETUNREACH'])
