/**
 * Transactions of a pool of `pg`.
 *
 * BEGIN goes together with the first statement, and COMMIT with the last. A pool that pipelines
 * (`pipeline: true`) is given both at once. For any other, both go as one `Batch` with one Sync at its
 * end: this is the interface of pg that pg-cursor and pg-query-stream use. It has a second merit: when
 * the last statement fails, the server skips COMMIT.
 *
 * What a connection may do while it is ours:
 *
 * - It may break. pg then emits 'error', which ends the process if nobody listens, and a pool only
 *   listens to connections that are idle.
 * - COMMIT of a transaction that has failed is no error: its command tag says ROLLBACK.
 * - Whether COMMIT took effect is not known when the connection breaks before its answer has come.
 */

import { CommitUnknownError, IdempotencyError, OutOfOrderError, RolledBackError, UnavailableError, isConnectionLost, sqlStateOf } from './errors.js'
import type { Database, Row, Statement, Transaction } from './types.js'

/** What is needed of a client of `pg`. */
export interface PgClient {
  query: any
  release (destroy?: Error | boolean): void
  on (event: 'error', listener: (error: Error) => void): unknown
  removeListener (event: 'error', listener: (error: Error) => void): unknown
}

/** What is needed of a pool of `pg`. */
export interface PgPool<Client extends PgClient> {
  connect (callback: (error: Error | undefined, client: Client | undefined, done: (release?: any) => void) => void): void
  query: any
  on (event: 'error', listener: (error: Error) => void): unknown
  listenerCount (event: 'error'): number
}

export interface PoolOptions {
  /**
   * Keep the statements prepared in each connection; true by default. Not with a pooler that
   * does not know of prepared statements, such as pgbouncer before 1.21.
   */
  prepare?: boolean
}

interface CommandResult {
  rows: Row[]
  command: string
}

const BEGIN: Statement = { name: 'idempotency_BEGIN', text: 'BEGIN', values: [] }
const COMMIT: Statement = { name: 'idempotency_COMMIT', text: 'COMMIT', values: [] }

/**
 * A database that is reached through a pool of `pg`.
 *
 * @param pool a `pg.Pool`; if it has no listener for errors, it gets one, for without it a connection
 *   that breaks while it is idle would end the process
 */
export function fromPool<Client extends PgClient> (pool: PgPool<Client>, options: PoolOptions = {}): Database<Transaction<Client>> {
  if (pool.listenerCount('error') === 0) pool.on('error', ignore)
  return new PoolDatabase(pool, options.prepare ?? true)
}

class PoolDatabase<Client extends PgClient> implements Database<Transaction<Client>> {
  readonly #pool: PgPool<Client>
  readonly #prepare: boolean

  constructor (pool: PgPool<Client>, prepare: boolean) {
    this.#pool = pool
    this.#prepare = prepare
  }

  async query (statement: Statement): Promise<Row[]> {
    try {
      const { rows } = await this.#pool.query(queryOf(statement, this.#prepare))
      return rows
    } catch (error) {
      throw orExhausted(error)
    }
  }

  async transaction (
    first: Statement | null,
    work: (tx: Transaction<Client>, row: Row | undefined) => Promise<Statement | null>
  ): Promise<Row | null> {
    const client = await this.#connect()
    const tx = new PoolTransaction(client)
    let destroy = false
    let working = false
    let broken: (error: Error) => void = ignore
    const lost = new Promise<never>((_resolve, reject) => { broken = reject })
    lost.catch(ignore)
    client.on('error', broken)
    try {
      const begun = await this.#together(client, first ? [BEGIN, first] : [BEGIN])
      working = true
      const last = await Promise.race([work(tx, begun[1]?.rows[0]), lost])
      tx.end()
      if (last === null) {
        // of nothing, so nobody waits for it
        this.#together(client, [COMMIT]).catch(ignore)
        return null
      }
      return await this.#commit(client, last)
    } catch (error) {
      tx.end()
      destroy = await this.#cannotRollBack(client, error)
      throw working && destroy && nothingDone(error) ? new UnavailableError('the connection was lost, and nothing was done', { cause: error }) : error
    } finally {
      client.removeListener('error', broken)
      client.removeListener('error', ignore)
      client.release(destroy)
    }
  }

  /** A connection that is listened to from the moment that it is ours: it may break in the same packet. */
  async #connect (): Promise<Client> {
    return await new Promise((resolve, reject) => {
      this.#pool.connect((error, client) => {
        if (!client) {
          reject(orExhausted(error))
        } else {
          client.on('error', ignore)
          resolve(client)
        }
      })
    })
  }

  async #commit (client: Client, last: Statement): Promise<Row> {
    let results
    try {
      results = await this.#together(client, [last, COMMIT])
    } catch (error) {
      // only the server can say that it did not commit
      if (sqlStateOf(error) !== null && !isConnectionLost(error)) throw error
      throw new CommitUnknownError('there was no answer to COMMIT', { cause: error })
    }
    if (results[1]?.command !== 'COMMIT') {
      throw new RolledBackError('COMMIT was answered with ROLLBACK')
    }
    return results[0]?.rows[0] as Row
  }

  /** Roll back; whether that fails, so that the connection is of no use any more. */
  async #cannotRollBack (client: Client, error: unknown): Promise<boolean> {
    // somebody has deallocated what was prepared
    if (sqlStateOf(error) === '26000' && !canBatch(client)) return true
    try {
      await client.query('ROLLBACK')
      return false
    } catch {
      return true
    }
  }

  /** Send statements together, if that can be done; their results, if all succeed. */
  async #together (client: Client, statements: Statement[]): Promise<CommandResult[]> {
    if (!canBatch(client)) {
      return await Promise.all(statements.map(async statement => await client.query(queryOf(statement, this.#prepare))))
    }
    return await new Promise((resolve, reject) => {
      client.query(new Batch(statements, this.#prepare, (error, results) => {
        if (error) reject(error)
        else resolve(results)
      }))
    })
  }
}

class PoolTransaction<Client extends PgClient> implements Transaction<Client> {
  readonly #client: Client
  #over = false

  constructor (client: Client) {
    this.#client = client
  }

  get client (): Client {
    if (this.#over) throw new OutOfOrderError('the transaction is over: its connection is back in the pool')
    return this.#client
  }

  readonly query = (...args: unknown[]): any => this.client.query(...args)

  end (): void {
    this.#over = true
  }
}

/** A pool says only by a text that no connection became free in time; nothing was sent then. */
function orExhausted (error: unknown): unknown {
  return error instanceof Error && error.message.startsWith('timeout exceeded when trying to connect')
    ? new UnavailableError('no connection of the pool became free in time', { cause: error })
    : error
}

/** Whether an error says that the connection was lost before COMMIT was sent. */
function nothingDone (error: unknown): boolean {
  return isConnectionLost(error) && !(error instanceof IdempotencyError)
}

function ignore (): void {}

function queryOf ({ name, text, values }: Statement, prepare: boolean): object {
  const list = values.map(value => value instanceof Uint8Array && !Buffer.isBuffer(value) ? Buffer.from(value) : value)
  return prepare && values.length > 0 ? { name, text, values: list } : { text, values: list }
}

/** The part of pg's connection that a Batch uses. */
interface Wire {
  stream: { cork (): void, uncork (): void }
  parse (message: object): void
  bind (message: object): void
  describe (message: object): void
  execute (message: object): void
  close (message: object): void
  sync (): void
}

/** Whether a client takes a Batch: not the native one, nor one that pipelines by itself. */
function canBatch (client: any): boolean {
  return client.pipeline !== true && typeof client.connection?.parse === 'function'
}

/** Which statements each connection has prepared. */
const prepared = new WeakMap<object, Set<string>>()
/** The columns of each statement, so that the server need not describe them again. */
const columnsOf = new Map<string, string[]>()

/** Statements with one Sync at their end: those after one that fails are skipped by the server. */
class Batch {
  callback: (error: unknown, results: CommandResult[]) => void
  readonly #statements: Statement[]
  readonly #prepare: boolean
  readonly #results: CommandResult[] = []
  #rows: Row[] = []
  #settled = false
  #names: Set<string> | null = null

  constructor (statements: Statement[], prepare: boolean, callback: (error: unknown, results: CommandResult[]) => void) {
    this.#statements = statements
    this.#prepare = prepare
    this.callback = callback
  }

  submit (wire: Wire): Error | null {
    let bound
    try {
      bound = this.#statements.map(({ values }) => values.map(bindable))
    } catch (error) {
      return error as Error // nothing was written
    }
    wire.stream.cork()
    try {
      this.#names = this.#prepare ? namesOf(wire) : null
      this.#statements.forEach((statement, position) => this.#send(wire, statement, bound[position] as Array<Buffer | string | null>))
      wire.sync()
    } finally {
      wire.stream.uncork()
    }
    return null
  }

  #send (wire: Wire, { name, text }: Statement, values: Array<Buffer | string | null>): void {
    // not the name that pg gives it when it is sent alone: neither knows what the other has prepared
    const kept = this.#names === null ? '' : `${name}_batch`
    if (!this.#names?.has(name)) {
      // an earlier Batch may have failed after it was prepared, so that we do not know of it
      if (kept !== '') wire.close({ type: 'S', name: kept })
      wire.parse({ name: kept, text, types: [] })
    }
    wire.bind({ portal: '', statement: kept, values })
    if (!columnsOf.has(text)) wire.describe({ type: 'P', name: '' })
    wire.execute({ portal: '', rows: 0 })
  }

  get #current (): Statement {
    return this.#statements[this.#results.length] as Statement
  }

  handleRowDescription (message: { fields: Array<{ name: string }> }): void {
    columnsOf.set(this.#current.text, message.fields.map(field => field.name))
  }

  handleDataRow (message: { fields: Array<string | null> }): void {
    const columns = columnsOf.get(this.#current.text) as string[]
    const row: Row = {}
    message.fields.forEach((value, position) => { row[columns[position] as string] = value })
    this.#rows.push(row)
  }

  handleCommandComplete (message: { text: string }): void {
    const { name, text } = this.#current
    this.#names?.add(name)
    if (!columnsOf.has(text)) columnsOf.set(text, [])
    this.#results.push({ rows: this.#rows, command: message.text.split(' ', 1)[0] as string })
    this.#rows = []
  }

  handleError (error: unknown): void {
    if (sqlStateOf(error) === '26000') this.#names?.clear()
    else this.#names?.delete(this.#current?.name)
    this.#settle(error)
  }

  handleReadyForQuery (): void {
    this.#settle(null)
  }

  #settle (error: unknown): void {
    if (this.#settled) return
    this.#settled = true
    this.callback(error, this.#results)
  }

  // none of our statements does any of these
  handlePortalSuspended (): void {}
  handleEmptyQuery (): void {}
  handleCopyInResponse (): void {}
  handleCopyData (): void {}
}

function namesOf (wire: Wire): Set<string> {
  let names = prepared.get(wire)
  if (names === undefined) {
    names = new Set()
    prepared.set(wire, names)
  }
  return names
}

function bindable (value: unknown): Buffer | string | null {
  if (value === null || value === undefined) return null
  if (value instanceof Uint8Array) return Buffer.isBuffer(value) ? value : Buffer.from(value)
  return String(value)
}
