/**
 * Protecting requests of HTTP: what all frameworks' adapters have in common.
 *
 * An adapter makes an `HttpRequest` of the framework's request, asks `admit` whether it is protected, and
 * gives `run` a function that has the request handled and collects its answer. What `run` returns is sent:
 * that answer once it is committed, or that of an earlier request, or a problem. Since the answer is what
 * the function returns, it cannot be sent before it is kept.
 *
 * Parameters of path and query are compared as they came: an adapter copies them before a framework's
 * validation makes numbers of them, for that rounds as well.
 */

import { AnswerTooLargeError, IdempotencyError } from './errors.js'
import { answerOf, keptHeaders, replayOf } from './http/answer.js'
import { fingerprintOf, pathsOf } from './http/fingerprint.js'
import { keyMissing, keyOf } from './http/key.js'
import type { KeyForm } from './http/key.js'
import type { HttpAnswer, HttpRequest } from './http/message.js'
import { problemAnswer, problemJson } from './http/problem.js'
import type { ProblemFormat } from './http/problem.js'
import { outcomeOf } from './idempotency.js'
import type { Idempotency } from './idempotency.js'
import type { Claim } from './lease.js'
import type { Headers, OutcomeEvent, Request, Result, Scope } from './types.js'

export { codeErrorDetails, problemJson } from './http/problem.js'
export type { Problem, ProblemFormat } from './http/problem.js'
export type { KeyForm } from './http/key.js'
export type { HttpAnswer, HttpRequest } from './http/message.js'

/** How requests are protected. `Raw` is the framework's request. */
export interface HttpOptions<Raw> {
  /**
   * Whose data the request is about, from the log-in: never from the body, and not the API key that
   * happened to sign, for keys are rotated. One of `tenant` and `actor` has to be given, so that nobody
   * is answered with what belongs to somebody else; and what they return must not be undefined, which is
   * what `request.user?.id` is of a stranger. Null says that there is none on purpose.
   */
  tenant?: (request: Raw) => string | null | undefined
  /** Who acts inside the tenant, from the log-in. */
  actor?: (request: Raw) => string | null | undefined
  /** The operation; by default the method and the template of the route, such as `POST /orders/:id/cancel`. */
  action?: string | ((request: Raw) => string)
  /** The name of the header that has the key, or several; `Idempotency-Key` by default. */
  header?: string | readonly string[]
  /** The form of a key; 1 to 255 visible characters of ASCII by default. */
  key?: KeyForm
  /** Whether a request without a key is refused; true by default. If not, it runs without protection. */
  required?: boolean
  /** The methods that are protected; by default all but GET, HEAD, OPTIONS and TRACE. */
  methods?: readonly string[]
  /** What is compared; by default the parameters of path and query, and the body's text as it came. */
  fingerprint?: (request: HttpRequest<Raw>) => Request
  /** Paths of what does not count in the default fingerprint, such as `body.sent_at`. */
  omit?: ReadonlyArray<string | readonly string[]>
  /** The status for a key that was used with a different request; 422 by default. */
  mismatchStatus?: 409 | 422
  /** How problems are written; `problemJson` by default. */
  problem?: ProblemFormat
  /** The header that marks a replay; `Idempotent-Replayed` by default, false for none. */
  marker?: string | false
  /** Header fields that are kept beside Content-Type, Location, ETag and Link. */
  replayHeaders?: readonly string[]
  /** How long answers are kept, by status (`404`) or class (`2xx`), as PostgreSQL writes intervals. */
  ttl?: Readonly<Record<string, string>>
  /** The largest answer that is collected, in bytes; 1 MB by default, which is the extension's limit as well. */
  maxAnswer?: number
  /** How long a repeat waits for a request in flight, such as `2s`; not with a lease. */
  wait?: string
  /**
   * The most that Retry-After says, in seconds; 10 by default. The rest of a lease may be half an hour, and
   * the answer there in a second.
   */
  maxRetryAfter?: number
  /** Take a lease of this length instead of a transaction: for work with effects outside the database. */
  lease?: string
  /** Name the headers in Access-Control-Expose-Headers, where a page of another origin asks; true by default. */
  cors?: boolean
}

/** An answer to be sent, and how it came about. */
export interface Handled extends HttpAnswer {
  /** Whether it is the one that `handle` returned; what was made for that one does not belong to another. */
  own: boolean
  outcome: OutcomeEvent['outcome']
  /** What the problem is, where the answer is one. */
  error: IdempotencyError | null
}

/** What the handler of a protected request can find out about it. */
export interface Protected<Tx> {
  key: string
  scope: Scope
  /** The transaction; undefined with a lease. */
  tx: Tx | undefined
  /** The claim; undefined without a lease. */
  claim: Claim<Tx> | undefined
}

const safeMethods = new Set(['GET', 'HEAD', 'OPTIONS', 'TRACE'])

export class HttpProtection<Tx, Raw> {
  readonly #idempotency: Idempotency<Tx>
  readonly #options: HttpOptions<Raw>
  readonly #headers: string[]
  readonly #names: string[]
  readonly #omit: ReadonlyArray<readonly string[]>
  readonly #kept: ReadonlySet<string>
  readonly #exposed: string[]
  /** The largest answer that is collected, in bytes. */
  readonly maxAnswer: number

  /** @throws TypeError if the options say neither whose request it is, nor make sense otherwise */
  constructor (idempotency: Idempotency<Tx>, options: HttpOptions<Raw>) {
    if (!options.tenant && !options.actor) {
      throw new TypeError('say whose request it is, by tenant or actor; for an API without users, `tenant: () => null`')
    }
    if (options.lease !== undefined && options.wait !== undefined) {
      throw new TypeError('a repeat cannot wait for a lease: give lease or wait')
    }
    this.#idempotency = idempotency
    this.#options = options
    this.#headers = [options.header ?? 'Idempotency-Key'].flat()
    this.#names = this.#headers.map(name => name.toLowerCase())
    this.#omit = pathsOf(options.omit ?? [])
    this.#kept = keptHeaders(options.replayHeaders ?? [])
    this.#exposed = [...this.#headers, ...(options.marker === false ? [] : [options.marker ?? 'Idempotent-Replayed']), 'Retry-After']
    this.maxAnswer = options.maxAnswer ?? 1024 * 1024
  }

  /** Whether requests of a method are protected, if they have a key. */
  protects (method: string): boolean {
    const { methods } = this.#options
    return methods ? methods.includes(method) : !safeMethods.has(method)
  }

  /**
   * Whether a request is protected.
   *
   * @returns its key, or null if it is not: its method is safe, or it need not have a key
   * @throws KeyMissingError, KeyInvalidError: answer with `problem`
   */
  admit (request: HttpRequest<Raw>): string | null {
    const { required = true, key: form = {} } = this.#options
    if (!this.protects(request.method)) return null
    const key = keyOf(request, this.#names, form)
    if (key === null && required) throw keyMissing(this.#headers[0] as string)
    return key
  }

  /**
   * Have a request handled once, and return its answer.
   *
   * @param key what `admit` returned
   * @param handle has the request handled, and collects its answer
   * @param rerun whether `handle` can be called again, after a conflict of transactions
   * @returns what is to be sent
   * @throws what `handle` throws
   */
  async run (
    request: HttpRequest<Raw>,
    key: string,
    handle: (work: Protected<Tx>) => Promise<HttpAnswer>,
    { rerun = false }: { rerun?: boolean } = {}
  ): Promise<Handled> {
    const { wait, lease } = this.#options
    let answer: HttpAnswer | undefined
    let finished: Result | null | undefined
    try {
      const scope = this.#scope(request, key)
      const compared = this.#options.fingerprint ? this.#options.fingerprint(request) : fingerprintOf(request, this.#omit)
      const work = async (tx: Tx | undefined, claim: Claim<Tx> | undefined): Promise<ReturnType<typeof answerOf>> => {
        answer = await handle({ key, scope, tx, claim })
        finished = claim?.result
        if (answer.body !== null && Buffer.byteLength(answer.body) > this.maxAnswer) throw answerTooLarge(this.maxAnswer)
        return answerOf(answer, this.#kept)
      }
      const result = lease === undefined
        ? await this.#idempotency.run(scope, compared, async tx => await work(tx, undefined), { rerun, wait: wait ?? null, ttl: this.#ttl })
        : await this.#idempotency.lease(scope, compared, { lease, ttl: this.#ttl }, async claim => await work(undefined, claim))
      // where the work has finished its lease itself, that is the answer, whatever it returned
      const own = !result.replayed && answer !== undefined && !finished
      return this.#handled(request, own ? answer as HttpAnswer : this.#replay(result), own, result.outcome, null)
    } catch (error) {
      if (!(error instanceof IdempotencyError)) throw error
      return this.#handled(request, this.problem(error), false, outcomeOf(error), error)
    }
  }

  /** What to answer to an error of this package. */
  problem (error: IdempotencyError): HttpAnswer {
    const { problem = problemJson, mismatchStatus = 422, maxRetryAfter = 10 } = this.#options
    return problemAnswer(error, problem, mismatchStatus, maxRetryAfter)
  }

  #scope (request: HttpRequest<Raw>, key: string): Scope {
    const { tenant, actor, action } = this.#options
    return {
      tenant: tenant ? somebody('tenant', tenant(request.raw)) : null,
      actor: actor ? somebody('actor', actor(request.raw)) : null,
      action: typeof action === 'function' ? action(request.raw) : action ?? `${request.method} ${request.route}`,
      key
    }
  }

  readonly #ttl = ({ status }: { status: number }): string | undefined => {
    const { ttl } = this.#options
    return ttl?.[status] ?? ttl?.[`${Math.floor(status / 100)}xx`]
  }

  #replay (result: Result): HttpAnswer {
    const answer = replayOf(result)
    const { marker = 'Idempotent-Replayed' } = this.#options
    if (marker !== false && result.replayed) answer.headers[marker.toLowerCase()] = 'true'
    return answer
  }

  #handled (request: HttpRequest<Raw>, { status, headers, body }: HttpAnswer, own: boolean, outcome: Handled['outcome'], error: IdempotencyError | null): Handled {
    return { status, headers: this.#exposing(request, headers), body, own, outcome, error }
  }

  /** A browser lets a page of another origin see only the headers that are named. */
  #exposing (request: HttpRequest<Raw>, headers: Headers): Headers {
    if (this.#options.cors === false || request.header('origin').length === 0) return headers
    const already = [headers['access-control-expose-headers'] ?? []].flat()
    return { ...headers, 'access-control-expose-headers': [...already, ...this.#exposed].join(', ') }
  }
}

function somebody (what: string, id: string | null | undefined): string | null {
  if (id === undefined) throw new TypeError(`${what} is undefined: who is not logged in must not get here, and null says that there is none`)
  // an object would be the same text for everybody
  if (id !== null && typeof id !== 'string' && typeof id !== 'bigint' && !Number.isFinite(id)) throw new TypeError(`${what} is not a string`)
  return id
}

/** For adapters that collect an answer piece by piece. */
export function answerTooLarge (limit: number): AnswerTooLargeError {
  return new AnswerTooLargeError(`the answer is larger than ${limit} bytes`)
}
