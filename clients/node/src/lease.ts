/**
 * Work under a lease, whose effects are outside the database.
 *
 * No connection is held while it runs. Each call is fenced by the claim's id: whoever was taken over gets
 * a ClaimLostError and has to stop. The id is made here and sent with begin, so that all of begin,
 * checkpoint and finish can be sent again when a connection breaks: whoever brings the same id is the
 * same caller.
 */

import { ClaimLostError, CommitUnknownError, OutOfOrderError, Refusal, asIdempotencyError, isConflict, sqlStateOf } from './errors.js'
import type { Lifetime } from './idempotency.js'
import { keptAnswer, recoveryOfRow, resultOfAnswer, resultOfRow } from './statements.js'
import type { KeptAnswer, Statements } from './statements.js'
import type { Answer, Database, Recovery, Request, Result, Row, Scope, Statement } from './types.js'

export interface LeaseOptions {
  /** How long the lease is, as PostgreSQL writes an interval; `30 min` by default. */
  lease?: string
  /** As that of the client. */
  ttl?: Lifetime | undefined
}

export interface CheckpointOptions<Tx> {
  /** How long the lease is from now on; by default as long as begin said. */
  lease?: string
  /** What to write in the transaction of the checkpoint. */
  work?: (tx: Tx) => Promise<unknown>
}

/** The right to do the work, for as long as the lease lasts. */
export interface Claim<Tx> {
  /** The claim's id: its fencing token, which never comes again. */
  readonly id: string
  /** How many times the work was begun, this time included. */
  readonly attempt: number
  /** Where an earlier attempt got, or the last checkpoint of this one; null at the beginning. */
  readonly recovery: Recovery | null
  /** The answer, once `finish` has kept it. */
  readonly result: Result | null
  /**
   * Save how far the work got, before and after each effect outside, and renew the lease.
   *
   * @param point the name of the point; '' says that everything was undone
   * @param state what is needed to go on from there, as JSON
   * @throws ClaimLostError: stop
   */
  checkpoint (point: string, state?: unknown, options?: CheckpointOptions<Tx>): Promise<void>
  /**
   * Write the last rows in one transaction with the answer. Return from the work what this returns.
   *
   * @throws ClaimLostError: nothing was written
   */
  finish (work: (tx: Tx) => Promise<Answer | void>): Promise<Result>
  /** Give the lease back without an answer; what was saved stays for the next attempt. */
  release (): Promise<void>
}

/** What leased work needs of the client. */
export interface LeaseEnvironment<Tx> {
  /** How long the lease is. */
  lease: string
  database: Database<Tx>
  statements: Statements
  retries: number
  withTtl: (answer: KeptAnswer) => KeptAnswer
  inTransaction: <T>(tx: Tx, work: (tx: Tx) => Promise<T>) => Promise<T>
  /** Throws where a call would need a second connection. */
  refuseInsideWork: (call: string) => void
  onceMore: <T>(query: () => Promise<T>) => Promise<T>
}

export class LeasedWork<Tx> implements Claim<Tx> {
  readonly id: string
  readonly attempt: number
  recovery: Recovery | null
  readonly #scope: Scope
  readonly #request: Request
  readonly #at: LeaseEnvironment<Tx>
  result: Result | null = null
  #ended = false

  constructor (scope: Scope, request: Request, id: string, row: Row, environment: LeaseEnvironment<Tx>) {
    this.#scope = scope
    this.#request = request
    this.id = id
    this.attempt = Number(row['attempt'])
    this.recovery = recoveryOfRow(row)
    this.#at = environment
  }

  /** Do the work, and see to it that the claim ends, whatever becomes of the work. */
  async run (work: (claim: Claim<Tx>) => Promise<Answer | Result | void> | Answer | Result | void): Promise<Result> {
    let answer: KeptAnswer
    try {
      const returned = await work(this)
      if (this.result) return this.result
      answer = this.#at.withTtl(keptAnswer(returned))
      if (this.#ended) return resultOfAnswer('released', answer)
    } catch (error) {
      if (this.result) return this.result
      if (!(error instanceof Refusal)) {
        await this.#giveUp(error)
        throw error
      }
      answer = this.#at.withTtl(keptAnswer(error.answer))
    }
    try {
      return await this.#finish(answer)
    } catch (error) {
      await this.#giveUp(error)
      throw error
    }
  }

  async checkpoint (point: string, state?: unknown, options: CheckpointOptions<Tx> = {}): Promise<void> {
    this.#mustBeHeld('checkpoint')
    const statement = this.#at.statements.checkpoint(this.#scope, this.id, point, state, options.lease ?? this.#at.lease)
    const { work } = options
    try {
      if (work) {
        await this.#inTransaction(async tx => {
          await work(tx)
          return statement
        })
      } else {
        await this.#at.onceMore(async () => await this.#at.database.query(statement))
      }
    } catch (error) {
      throw asIdempotencyError(error)
    }
    this.recovery = point === '' ? null : { point, state: state ?? null }
  }

  async finish (work: (tx: Tx) => Promise<Answer | void>): Promise<Result> {
    this.#mustBeHeld('finish')
    let answer: KeptAnswer | undefined
    let undo: KeptAnswer | undefined
    try {
      const row = await this.#inTransaction(async tx => {
        answer = this.#at.withTtl(keptAnswer(await work(tx)))
        if (answer.status >= 400 && !answer.commit) {
          undo = answer
          throw new Refusal(answer)
        }
        return this.#at.statements.finish(this.#scope, answer, this.id)
      })
      this.#ended = true
      this.result = resultOfAnswer(row['outcome'], answer as KeptAnswer)
      return this.result
    } catch (error) {
      if (this.result) return this.result // it took effect, although COMMIT was not answered
      if (error instanceof Refusal) undo ??= this.#at.withTtl(keptAnswer(error.answer))
      if (!undo) throw asIdempotencyError(error)
    }
    return await this.#finish(undo)
  }

  async release (): Promise<void> {
    this.#mustBeHeld('release')
    this.#ended = true
    try {
      await this.#at.onceMore(async () => await this.#at.database.query(this.#at.statements.release(this.#scope, this.id)))
    } catch (error) {
      throw asIdempotencyError(error)
    }
  }

  /** Keep an answer, in a statement of its own; sent again, it changes nothing. */
  async #finish (answer: KeptAnswer): Promise<Result> {
    const statement = this.#at.statements.finish(this.#scope, answer, this.id)
    const [row = {}] = await this.#at.onceMore(async () => await this.#at.database.query(statement))
    this.#ended = true
    this.result = resultOfAnswer(row['outcome'], answer)
    return this.result
  }

  /**
   * A transaction whose last statement is fenced by the claim. After a conflict it runs again, but not
   * when the connection is lost in COMMIT: that may still be going on, and then the same rows would come
   * twice. So the lease is given back, which waits for that COMMIT or fences it off. What is there then is
   * how it ended: an answer, or where the next request goes on.
   */
  async #inTransaction (work: (tx: Tx) => Promise<Statement>): Promise<Row> {
    for (let tries = 0; ; tries++) {
      try {
        return await this.#at.database.transaction(null, async tx =>
          await this.#at.inTransaction(tx, work)) as Row
      } catch (error) {
        if (error instanceof CommitUnknownError) {
          await this.#giveUp(error)
          await this.#lookForAnswer().catch(() => {})
          throw error
        }
        if (!isConflict(error) || tries >= this.#at.retries) throw error
      }
    }
  }

  async #lookForAnswer (): Promise<void> {
    const [row = {}] = await this.#at.onceMore(async () =>
      await this.#at.database.query(this.#at.statements.replay(this.#scope, this.#request)))
    if (row['outcome'] === 'replayed') this.result = resultOfRow(row)
  }

  #mustBeHeld (call: string): void {
    this.#at.refuseInsideWork(call)
    if (this.#ended) throw new OutOfOrderError(`${call} was called after the claim had ended`)
  }

  /** Give the lease back after an error, if it is still ours and can be. */
  async #giveUp (error: unknown): Promise<void> {
    if (this.#ended || error instanceof ClaimLostError || sqlStateOf(error) === 'ID005') return
    await this.release().catch(() => {})
  }
}
