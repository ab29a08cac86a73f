/**
 * A request in a transaction that an ORM opens and commits.
 *
 * The order is that of `fromPool`: begin is the first statement, finish the last before COMMIT. But it is
 * the ORM that sends COMMIT, when the work has returned, and most ORMs do not look at the answer: in a
 * transaction that has failed it is ROLLBACK, and no error. Can that happen to a request?
 *
 * Not by an error in the work, even if the work swallowed it: finish fails in such a transaction. Nor by
 * what fails in COMMIT itself, such as a deferred constraint: that is an error, and each ORM passes it on.
 * But finish and COMMIT are two messages, and a statement may come between them: one that the work did
 * not wait for, or one of a hook that the ORM calls before COMMIT. If it fails and nobody hears of it,
 * COMMIT rolls back in silence, and an answer would leave that was not kept.
 *
 * So the last statement also reads the number of the transaction, and once the ORM has committed, the
 * server is asked what became of it. That is one short statement more for a request. It finds another
 * mistake as well: a handle that was in a transaction already, whose COMMIT is not ours, and which the
 * ORM has given a savepoint.
 *
 * When the connection is lost after finish was sent, nobody knows whether COMMIT took effect.
 */

import { CommitUnknownError, OutOfOrderError, RolledBackError, isConnectionLost } from '../errors.js'
import type { Database, Queryable, Row, Statement } from '../types.js'

export interface ConfirmOptions {
  /**
   * Ask the server after COMMIT whether it took effect; true by default. It may be false if no work and no
   * hook ever leaves a statement running that nobody waits for.
   */
  confirm?: boolean
}

/** What is needed of an ORM. */
export interface Orm<Tx> {
  /** Runs a statement in a transaction of its own. */
  outside: Queryable
  /** Runs statements in a transaction of the ORM. */
  inside: (tx: Tx) => Queryable
  /** Opens a transaction for some work, and commits it, or rolls it back if the work rejects. */
  open: (work: (tx: Tx) => Promise<void>) => PromiseLike<unknown>
}

/** A database that is reached through an ORM. */
export class OrmDatabase<Tx> implements Database<Tx> {
  readonly #orm: Orm<Tx>
  readonly #confirm: boolean

  constructor (orm: Orm<Tx>, confirm = true) {
    this.#orm = orm
    this.#confirm = confirm
  }

  async query (statement: Statement): Promise<Row[]> {
    return await rowsOf(this.#orm.outside, statement)
  }

  async transaction (
    first: Statement | null,
    work: (tx: Tx, row: Row | undefined) => Promise<Statement | null>
  ): Promise<Row | null> {
    let failure: { reason: unknown } | null = null
    let last: Statement | null | undefined
    let row: Row | undefined

    try {
      await this.#orm.open(async tx => {
        try {
          const queryable = this.#orm.inside(tx)
          const [begun] = first ? await rowsOf(queryable, first) : []
          last = await work(tx, begun)
          if (last !== null) [row] = await rowsOf(queryable, this.#confirm ? withNumber(last) : last)
        } catch (reason) {
          failure = { reason }
          throw reason
        }
      })
    } catch (reason) {
      // of the work, if it has one: some ORMs put that of a failing ROLLBACK in its place
      failure ??= { reason }
    }

    if (last === null) return null
    if (failure !== null) throw last === undefined ? failure.reason : failedCommit(failure.reason)
    if (this.#confirm) await this.#confirmed(row?.['transaction'])
    return row as Row
  }

  /** @param transaction its number; null if it wrote nothing */
  async #confirmed (transaction: string | null): Promise<void> {
    if (transaction === null) return
    let status
    try {
      const { rows: [row] } = await this.#orm.outside.query('SELECT pg_catalog.pg_xact_status($1::text::xid8) AS status', [transaction])
      status = row?.['status']
    } catch (error) {
      throw new CommitUnknownError('the connection was lost after COMMIT', { cause: error })
    }
    if (status === 'aborted') throw new RolledBackError('COMMIT was answered with ROLLBACK')
    if (status !== 'committed') throw new OutOfOrderError('the transaction is inside another one, which has not ended')
  }
}

async function rowsOf (queryable: Queryable, { text, values }: Statement): Promise<Row[]> {
  const { rows } = await queryable.query(text, values)
  return rows
}

/** The statement, and the number of the transaction once it was run. */
function withNumber (statement: Statement): Statement {
  return {
    ...statement,
    text: `SELECT last.*, pg_catalog.pg_current_xact_id_if_assigned()::text AS transaction FROM (${statement.text}) AS last`
  }
}

/** Why the last statement or COMMIT failed; a connection that was lost does not tell what the server did. */
function failedCommit (reason: unknown): unknown {
  if (!isConnectionLost(reason)) return reason
  return new CommitUnknownError('the connection was lost during COMMIT', { cause: reason })
}
