/**
 * The shapes that the parts of the client share: what a request is known by,
 * what its answer is, and what a database has to be able to do.
 */

/** What a request is known by. All four are compared byte for byte. */
export interface Scope {
  /** Whose data the request is about, from the log-in; null or '' is the one global tenant. */
  tenant?: string | null
  /** A user or client inside the tenant, when two of them may choose the same key. */
  actor?: string | null
  /** The operation, such as `orders.create` or `POST /orders`. */
  action: string
  /** The key that the client sent. */
  key: string
}

/**
 * What tells a repeat from a different request under the same key:
 *
 * - a string: the JSON text of the request, as it came;
 * - a `JsonRequest`: the same, with parts that do not count;
 * - a `Uint8Array`: a digest of 16 to 64 bytes, for what is not JSON;
 * - any other value: is turned into JSON text;
 * - null or undefined: nothing is compared.
 */
export type Request = string | JsonRequest | Uint8Array | object | number | boolean | null | undefined

/** JSON text of which some parts do not count, such as the time at which it was sent. */
export class JsonRequest {
  /**
   * @param text JSON text, as it came
   * @param omit paths of the members that do not count, such as `[['meta', 'trace_id']]`
   */
  constructor (readonly text: string, readonly omit: ReadonlyArray<readonly string[]> = []) {}
}

/** Header fields of an answer. */
export type Headers = Record<string, string | string[]>

/** An answer to a request: what the work returns. At most one of `json`, `rawJson` and `body`. */
export interface Answer {
  /** HTTP status from 100 to 599; 200 by default. With 400 and more, what the work wrote is rolled back. */
  status?: number
  /** A value to be kept as JSON. */
  json?: unknown
  /** JSON text to be kept as it is. */
  rawJson?: string | null
  /** What is not JSON. */
  body?: Uint8Array | string | null
  /** Header fields to be kept with the answer. */
  headers?: Headers | null
  /** How long the answer is kept, as PostgreSQL writes an interval, such as `10 min`. */
  ttl?: string | null
  /** Commit what the work wrote although the status is 400 or more. */
  commit?: boolean
}

/** How an answer came about. */
export type Outcome = 'completed' | 'errored' | 'released' | 'replayed'

/** The answer to a request, new or replayed; it can be given where an `Answer` is taken. */
export interface Result {
  /** `completed` and `errored` are kept; `released` is not, so a repeat runs; `replayed` was kept. */
  outcome: Outcome
  /** Whether the answer is that of an earlier request. */
  replayed: boolean
  status: number
  /** The JSON text, byte for byte as it was kept, or null. */
  rawJson: string | null
  /** What is not JSON, or null. */
  body: Uint8Array | null
  headers: Headers | null
  /** The JSON text as a value; undefined if there is none. */
  readonly json: any
}

/** What is known of a request; `outcome` is null where nothing is. */
export interface Status {
  outcome: 'replayed' | 'in_flight' | 'stalled' | null
  /** The answer, where there is one. */
  result: Result | null
  /** After how many seconds to ask again. */
  retryAfter: number | null
  attempt: number | null
  recoveryPoint: string | null
  createdAt: Date | null
  finishedAt: Date | null
  expiresAt: Date | null
}

/** A row of a result, by the names of its columns. */
export type Row = Record<string, any>

/** Something that runs one statement: a client or pool of `pg`, or what an adapter makes of an ORM's transaction. */
export interface Queryable {
  /**
   * @param text one statement, with `$1`, `$2` and so on, each once and in this order
   * @param values strings, numbers, Uint8Arrays and nulls
   */
  query (text: string, values: any[]): Promise<{ rows: Row[] }>
}

/** A statement, and the name under which a connection may keep it prepared. */
export interface Statement {
  name: string
  text: string
  values: unknown[]
}

/**
 * What the client needs of a database: one statement, and a transaction around some work.
 * `fromPool` makes one of a pool of `pg`; each ORM has its own (`pg-idempotency/orm`).
 *
 * `Tx` is what the work gets: the handle of the transaction as the ORM's users know it.
 */
export interface Database<Tx> {
  /** Run one statement in a transaction of its own. */
  query (statement: Statement): Promise<Row[]>
  /**
   * Open a transaction, run `first` in it if there is one, and give its row to `work`. What that returns
   * is the last statement before COMMIT; null says that nothing was done, so that the transaction only
   * has to end. If it rejects, the transaction is rolled back and the promise rejects with the same
   * reason.
   *
   * Nothing may come between the last statement and COMMIT. An error after COMMIT was sent, of which
   * nobody knows whether it took effect, is a `CommitUnknownError`.
   *
   * @returns the row of the last statement, once it is committed; null if there was none
   */
  transaction (
    first: Statement | null,
    work: (tx: Tx, row: Row | undefined) => Promise<Statement | null>
  ): Promise<Row | null>
}

/** A transaction of `pg`: its connection, for as long as the transaction lasts. */
export interface Transaction<Client extends { query: unknown }> {
  /** As the connection's own. It throws once the transaction is over. */
  query: Client['query']
  /** The connection, for a library that wants one. Do not keep it: it goes back to the pool. */
  readonly client: Client
}

/** Where the work under a lease got. */
export interface Recovery {
  point: string
  state: any
}

/** What happened to a request: for logs and metrics. */
export interface OutcomeEvent {
  outcome: Outcome | 'in_flight' | 'mismatched' | 'failed'
  scope: Scope
  /** The status to answer with, where it is known. */
  status: number | null
  /** Milliseconds from the call to its end. */
  duration: number
  /** Why it failed, or the error that says so. */
  error?: unknown
}
