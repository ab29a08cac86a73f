/**
 * Running the work of a request once, and answering every repeat with the first answer.
 *
 * What happens to a request that `run` protects, and what to do where:
 *
 *   BEGIN, begin    nothing was done yet: if the connection is lost, ask again on another
 *   the work        an error of its own rolls back and is passed on; a serialization failure or deadlock
 *                   makes it run again, a few times
 *   finish, COMMIT  if the connection is lost, nobody knows. Asking again with the same key tells: there
 *                   is an answer, or the request is still in flight, or the work never happened and runs
 *                   again. Two of them cannot both commit, whatever this client believes
 *
 * A transaction holds one connection, and nothing in here takes a second one for the same request: two
 * requests that each waited for the second of the other would never end. So a call inside the work of
 * another is refused.
 */

import { AsyncLocalStorage } from 'node:async_hooks'
import { setTimeout as sleep } from 'node:timers/promises'
import {
  CommitUnknownError, ConflictError, IdempotencyError, InFlightError, MismatchError,
  OutOfOrderError, Refusal, RequestInvalidError, UnavailableError,
  asIdempotencyError, databaseErrorOf, isConflict, isConnectionLost, sqlStateOf
} from './errors.js'
import { LeasedWork } from './lease.js'
import type { Claim, LeaseOptions } from './lease.js'
import { fromPool } from './pool.js'
import type { PgClient, PgPool, PoolOptions } from './pool.js'
import { Statements, keptAnswer, resultOfAnswer, resultOfRow, statusOfRow } from './statements.js'
import type { KeptAnswer } from './statements.js'
import type { Answer, Database, OutcomeEvent, Queryable, Request, Result, Row, Scope, Status, Transaction } from './types.js'

/** How long answers are kept, as PostgreSQL writes an interval, such as `24 hours`; or what says so of each. */
export type Lifetime = string | null | ((answer: { status: number }) => string | null | undefined)

/** Settings that all calls of a client share. */
export interface CommonOptions {
  /** The schema of the extension; `idempotency` by default. See `findSchema`. */
  schema?: string
  /** How long a repeat waits for a request in flight, such as `2s`; by default the server's setting, which is not at all. */
  wait?: string | null
  /** How long an answer is kept that does not say it itself; by default the server's settings. */
  ttl?: Lifetime
  /** How many times the work may run again after a serialization failure or a deadlock; 3 by default. */
  retries?: number
  /** Is told what became of each request, for logs and metrics. What it throws is a warning of the process. */
  onOutcome?: (event: OutcomeEvent) => void
}

export interface RunOptions {
  /** As the client's own. */
  wait?: string | null
  /** As the client's own. */
  ttl?: Lifetime | undefined
  /** Whether the work may be called a second time, after a conflict or a lost connection; true by default. */
  rerun?: boolean
}

/** How long the server may take to notice that a connection is lost and to roll its transaction back. */
const TO_NOTICE = '5s'

/** What begin found: work to be done, or the answer of an earlier request. */
export type Begun = { started: true, result: null } | { started: false, result: Result }

/**
 * The client of the extension.
 *
 * @param options a `pool` of `pg`, or a `database` that an adapter for an ORM has made
 */
export function createIdempotency<Client extends PgClient> (options: CommonOptions & PoolOptions & { pool: PgPool<Client> }): Idempotency<Transaction<Client>>
export function createIdempotency<Tx> (options: CommonOptions & { database: Database<Tx> }): Idempotency<Tx>
export function createIdempotency (options: CommonOptions & PoolOptions & { pool?: PgPool<PgClient>, database?: Database<unknown> }): Idempotency<unknown> {
  const { pool, database } = options
  if (database) return new Idempotency(database, options)
  if (!pool) throw new TypeError('createIdempotency needs a pool or a database')
  return new Idempotency<unknown>(fromPool(pool, options), options)
}

/**
 * The schema that the extension was created in.
 *
 * @throws IdempotencyError if the database does not have the extension
 */
export async function findSchema (database: Queryable): Promise<string> {
  const { rows: [row] } = await database.query(
    `SELECT nspname AS schema FROM pg_catalog.pg_extension
       JOIN pg_catalog.pg_namespace ON pg_namespace.oid = extnamespace
      WHERE extname = 'idempotency'`, [])
  if (!row) throw new IdempotencyError('the database does not have the extension "idempotency"')
  return row['schema']
}

interface Running<Tx> {
  tx: Tx
  over: boolean
}

/** How far an attempt got. */
interface Progress {
  phase: 'begin' | 'work' | 'finish'
  tries: number
  /** That the answer to a COMMIT was lost. */
  unknown: CommitUnknownError | null
  /** How many times the connection was lost before anything was done. */
  lost: number
  /** How long the next attempt waits: after a lost connection the claim may still be that of the one before. */
  wait: string | null
  /** Whether the work was called. */
  ran: boolean
  last: unknown
}

export class Idempotency<Tx> {
  /** The statements of the extension, for those who send them on their own. */
  readonly statements: Statements
  readonly #database: Database<Tx>
  readonly #options: CommonOptions
  readonly #running = new AsyncLocalStorage<Running<Tx>>()

  constructor (database: Database<Tx>, options: CommonOptions = {}) {
    this.#database = database
    this.#options = options
    this.statements = new Statements(options.schema ?? 'idempotency')
  }

  /** The transaction of the request that is being worked on, wherever in its work this is called. */
  current (): Tx | undefined {
    const running = this.#running.getStore()
    return running && !running.over ? running.tx : undefined
  }

  /**
   * Run work in a transaction, once for each scope, and keep its answer in the same transaction.
   *
   * An answer with a status of 400 or more is kept, as far as it is to be kept at all, while what the
   * work wrote is rolled back. What the work throws rolls back, and nothing is kept; but a `Refusal`
   * carries an answer.
   *
   * @param scope what the request is known by
   * @param request what tells it from a different request
   * @param work gets the transaction, and returns the answer; it is called again after a conflict
   * @returns the answer, once it is committed
   * @throws InFlightError, MismatchError, KeyMissingError, KeyInvalidError, RequestInvalidError: answer with their status
   * @throws ConflictError, CommitUnknownError, UnavailableError: the client has to repeat the request
   */
  async run (scope: Scope, request: Request, work: (tx: Tx) => Promise<Answer | Result | void> | Answer | Result | void, options: RunOptions = {}): Promise<Result> {
    this.#refuseInsideWork('run')
    return this.#observed(scope, async () => {
      const progress: Progress = { phase: 'begin', tries: 0, unknown: null, lost: 0, wait: null, ran: false, last: null }
      for (;;) {
        try {
          return await this.#attempt(scope, request, work, options, progress)
        } catch (error) {
          await this.#tryAgainOrThrow(error, options, progress)
        }
      }
    })
  }

  async #attempt (scope: Scope, request: Request, work: (tx: Tx) => any, options: RunOptions, progress: Progress): Promise<Result> {
    let found: Row | null = null
    let answer: KeptAnswer | null = null
    let undo: KeptAnswer | null = null

    progress.phase = 'begin'
    const begin = this.statements.begin(scope, request, options.wait ?? this.#options.wait ?? progress.wait)
    try {
      const row = await this.#database.transaction(begin, async (tx, row = {}) => {
        if (row['outcome'] !== 'started') {
          found = row
          return null
        }
        if (progress.ran && options.rerun === false) {
          throw new ConflictError('the transaction was rolled back, and its work cannot run again', { cause: progress.last })
        }
        progress.phase = 'work'
        progress.ran = true
        answer = await this.#answerOf(tx, work, options.ttl)
        if (answer.status >= 400 && !answer.commit) {
          undo = answer
          throw new Refusal(answer)
        }
        progress.phase = 'finish'
        return this.statements.finish(scope, answer)
      })
      return found !== null ? this.#foundResult(found) : resultOfAnswer(row?.['outcome'], answer as unknown as KeptAnswer)
    } catch (error) {
      if (undo === null) throw error
    }
    return await this.#store(scope, request, undo)
  }

  async #answerOf (tx: Tx, work: (tx: Tx) => any, ttl: Lifetime | undefined): Promise<KeptAnswer> {
    const running = { tx, over: false }
    try {
      return this.#withTtl(keptAnswer(await this.#running.run(running, work, tx)), ttl)
    } catch (error) {
      if (error instanceof Refusal) return this.#withTtl({ ...keptAnswer(error.answer), commit: false }, ttl)
      throw error
    } finally {
      running.over = true
    }
  }

  #withTtl (answer: KeptAnswer, ...lifetimes: Array<Lifetime | undefined>): KeptAnswer {
    for (const lifetime of [...lifetimes, this.#options.ttl]) {
      if (answer.ttl !== null) break
      answer.ttl = (typeof lifetime === 'function' ? lifetime(answer) : lifetime) ?? null
    }
    return answer
  }

  /** Return if the transaction is to be tried again after an error, else throw what to say. */
  async #tryAgainOrThrow (error: unknown, options: RunOptions, progress: Progress): Promise<void> {
    if (error instanceof CommitUnknownError || isConnectionLost(error)) progress.wait = TO_NOTICE
    if (error instanceof ConflictError || error instanceof InFlightError || error instanceof MismatchError) throw error

    if (error instanceof CommitUnknownError && progress.unknown === null) {
      progress.unknown = progress.last = error
      return
    }

    // some pools hand out a connection that is lost once more before they notice
    const lostBefore = progress.phase === 'begin' && (isConnectionLost(error) || sqlStateOf(error) === '26000')
    if (lostBefore && !(error instanceof UnavailableError) && progress.lost++ < 2) {
      progress.last ??= error
      return
    }

    // a claim that was lost to another transaction which has committed: there is an answer now
    const overtaken = sqlStateOf(error) === 'ID005'
    const mayRun = !progress.ran || options.rerun !== false
    if (progress.tries < (this.#options.retries ?? 3) && (overtaken || (isConflict(error) && mayRun))) {
      progress.last = error
      progress.tries++
      await sleep(Math.random() * 10 * 2 ** progress.tries)
      return
    }

    // it was asked what became of a COMMIT, and there is no answer to that
    if (progress.phase === 'begin' && progress.unknown !== null) throw progress.unknown
    if (lostBefore) throw new UnavailableError('the database cannot be reached', { cause: error })
    if (isConflict(error)) throw new ConflictError('the transaction was in conflict with others', { sqlState: sqlStateOf(error), cause: error })
    throw readable(error, progress.phase)
  }

  /**
   * Keep an answer that is known already: a failure whose transaction was rolled back, or one that was
   * given elsewhere.
   *
   * @returns the answer, or that of an earlier request: the first answer stays
   * @throws InFlightError, MismatchError
   */
  async store (scope: Scope, request: Request, answer: Answer): Promise<Result> {
    this.#refuseInsideWork('store')
    return await this.#observed(scope, async () => {
      try {
        return await this.#store(scope, request, this.#withTtl(keptAnswer(answer)))
      } catch (error) {
        throw readable(error, 'begin')
      }
    })
  }

  async #store (scope: Scope, request: Request, answer: KeptAnswer): Promise<Result> {
    const [row = {}] = await this.#onceMore(async () => await this.#database.query(this.statements.store(scope, request, answer)))
    if (row['outcome'] === 'errored' || row['outcome'] === 'released' || row['outcome'] === 'completed') {
      return resultOfAnswer(row['outcome'], answer)
    }
    return this.#foundResult(row)
  }

  /**
   * Run work that has effects outside the database, under a lease.
   *
   * Nothing of the lease is bound to a connection: none is held while the work runs. When the process
   * dies, the next request with the scope goes on from the last checkpoint, once the lease has run out.
   * When the work throws, the lease is given back, so that a repeat need not wait.
   *
   * A repeat never waits for a lease: it would hold a connection that the work needs to finish. Ask again
   * later, or poll `status`.
   *
   * @param options how long the lease is
   * @param work gets the claim, and returns the answer, or what `claim.finish` returned
   * @throws as `run`; ClaimLostError if the work took longer than its lease and somebody else took over
   */
  async lease (scope: Scope, request: Request, options: LeaseOptions, work: (claim: Claim<Tx>) => Promise<Answer | Result | void> | Answer | Result | void): Promise<Result> {
    this.#refuseInsideWork('lease')
    return await this.#observed(scope, async () => {
      const claim = crypto.randomUUID()
      const { lease = '30 min' } = options
      const begin = this.statements.beginLease(scope, request, lease, claim)
      const [row = {}] = await this.#onceMore(async () => await this.#database.query(begin)).catch(error => { throw readable(error, 'begin') })
      if (row['outcome'] !== 'started') return this.#foundResult(row)
      const leased = new LeasedWork<Tx>(scope, request, claim, row, {
        lease,
        database: this.#database,
        statements: this.statements,
        retries: this.#options.retries ?? 3,
        withTtl: answer => this.#withTtl(answer, options.ttl),
        inTransaction: async (tx, work) => {
          const running = { tx, over: false }
          try {
            return await this.#running.run(running, work, tx)
          } finally {
            running.over = true
          }
        },
        refuseInsideWork: call => this.#refuseInsideWork(call),
        onceMore: async query => await this.#onceMore(query)
      })
      return await leased.run(work)
    })
  }

  /**
   * Look what became of a request, and do nothing else: what a page polls that shows its state.
   *
   * @param request if it is given, and the key was used with a different one: MismatchError
   */
  async status (scope: Scope, request?: Request): Promise<Status> {
    this.#refuseInsideWork('status')
    try {
      const [row = { outcome: null }] = await this.#onceMore(async () => await this.#database.query(this.statements.replay(scope, request)))
      return statusOfRow(row)
    } catch (error) {
      throw readable(error, 'begin')
    }
  }

  /**
   * Begin a request in a transaction that you have opened. If it is started, do the work, `finish` it in
   * the same transaction, and commit; without finish it cannot be committed. Else there is its answer.
   *
   * @param tx the transaction: a client of `pg`, or what `fromKnex` and the like make of an ORM's
   * @throws InFlightError, MismatchError and so on; roll back
   */
  async begin (tx: Queryable, scope: Scope, request: Request, options: { wait?: string | null } = {}): Promise<Begun> {
    const { text, values } = this.statements.begin(scope, request, options.wait ?? this.#options.wait)
    try {
      const { rows: [row = {}] } = await tx.query(text, values)
      return row['outcome'] === 'started' ? { started: true, result: null } : { started: false, result: this.#foundResult(row) }
    } catch (error) {
      throw readable(error, 'begin')
    }
  }

  /**
   * Keep the answer in the transaction that began the request. It is the last statement before COMMIT,
   * and the answer leaves after COMMIT has succeeded. An answer of 400 and more commits what the
   * transaction did, unless you roll back to a savepoint first.
   */
  async finish (tx: Queryable, scope: Scope, answer: Answer): Promise<Result> {
    const kept = this.#withTtl(keptAnswer(answer))
    const { text, values } = this.statements.finish(scope, kept)
    try {
      const { rows: [row = {}] } = await tx.query(text, values)
      return resultOfAnswer(row['outcome'], kept)
    } catch (error) {
      throw readable(error, 'finish')
    }
  }

  /**
   * Those messages of a queue that this consumer has never seen, in the transaction of the work on them.
   *
   * @param tx as that of `begin`, or what `run` gave the work
   * @param consumer who asks: each consumer sees each message once
   * @param ids the ids of messages, of which each comes once in the result
   * @param options the tenant; for how long an id is remembered
   */
  async firstSeen (tx: Queryable, consumer: string, ids: readonly string[], options: { tenant?: string | null, ttl?: string | null } = {}): Promise<string[]> {
    const { text, values } = this.statements.firstSeen(options.tenant ?? null, consumer, ids, options.ttl)
    try {
      const { rows } = await tx.query(text, values)
      return rows.map(row => row['id'])
    } catch (error) {
      throw readable(error, 'work')
    }
  }

  /** The answer in the row of a request that was not started, or the error that says why there is none. */
  #foundResult (row: Row): Result {
    switch (row['outcome']) {
      case 'replayed':
        return resultOfRow(row)
      case 'mismatched':
        throw new MismatchError('key was used with a different request', { sqlState: 'ID004' })
      default:
        throw new InFlightError('request with this key is in flight', { sqlState: 'ID003', retryAfter: Number(row['retry_after'] ?? 1) })
    }
  }

  /** Once more on another connection, for a statement that may be repeated, if the first one is lost. */
  async #onceMore<T> (query: () => Promise<T>): Promise<T> {
    let lost = 0
    for (let tries = 0; ; tries++) {
      try {
        return await query()
      } catch (error) {
        if (isConnectionLost(error) || sqlStateOf(error) === '26000') {
          if (lost++ > 0) throw new CommitUnknownError('the database cannot be reached', { cause: error })
        } else if (!isConflict(error)) {
          throw error
        } else if (tries >= (this.#options.retries ?? 3)) {
          throw new ConflictError('the transaction was in conflict with others', { sqlState: sqlStateOf(error), cause: error })
        }
      }
    }
  }

  #refuseInsideWork (call: string): void {
    if (this.current() !== undefined) {
      throw new OutOfOrderError(`${call} was called inside a transaction of this client, where it would need a second connection: ` +
        'use begin, finish and firstSeen with its transaction')
    }
  }

  /** Tell `onOutcome` what became of a request. */
  async #observed (scope: Scope, work: () => Promise<Result>): Promise<Result> {
    const since = performance.now()
    let event: Pick<OutcomeEvent, 'outcome' | 'status' | 'error'> | undefined
    try {
      const result = await work()
      event = { outcome: result.outcome, status: result.status }
      return result
    } catch (reason) {
      const error = asIdempotencyError(reason)
      event = { outcome: outcomeOf(error), status: error instanceof IdempotencyError ? error.status : null, error }
      throw error
    } finally {
      if (event) this.#tell({ ...event, scope, duration: performance.now() - since })
    }
  }

  #tell (event: OutcomeEvent): void {
    try {
      const told: unknown = this.#options.onOutcome?.(event)
      if (told instanceof Promise) told.catch(warn)
    } catch (error) {
      warn(error)
    }
  }
}

/** What an error says became of a request. */
export function outcomeOf (error: unknown): 'in_flight' | 'mismatched' | 'failed' {
  return error instanceof InFlightError ? 'in_flight' : error instanceof MismatchError ? 'mismatched' : 'failed'
}

/** No JSON, or none that jsonb can hold: a NUL character, a number out of range, nested too deeply. */
const unreadable = new Set(['22P02', '22P05', '22003', '54001'])

function warn (error: unknown): void {
  process.emitWarning(error instanceof Error ? error : String(error))
}

/** An error as a class of its own; JSON that the database cannot read is the client's while a request is begun. */
function readable (error: unknown, phase: Progress['phase']): unknown {
  const found = databaseErrorOf(error)
  if (phase === 'begin' && !(error instanceof IdempotencyError) && found !== null && unreadable.has(found.state)) {
    return new RequestInvalidError(found.message, { sqlState: found.state, detail: found.detail, cause: error })
  }
  return asIdempotencyError(error)
}
