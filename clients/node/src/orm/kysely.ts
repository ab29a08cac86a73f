/** Kysely: a statement that is compiled already, without the plugins that rename columns. */

import { OrmDatabase } from './transaction.js'
import type { ConfirmOptions } from './transaction.js'
import type { Database, Queryable, Row } from '../types.js'

/** What is needed of Kysely, or of a transaction of it. */
export interface KyselyRunner {
  withoutPlugins (): { executeQuery (query: any): Promise<{ rows: any[] }> }
}

/** What is needed of Kysely. */
export interface Kysely<Trx extends KyselyRunner> extends KyselyRunner {
  transaction (): KyselyTransactionBuilder<Trx>
}

export interface KyselyTransactionBuilder<Trx> {
  setIsolationLevel (level: any): KyselyTransactionBuilder<Trx>
  execute (work: (trx: Trx) => Promise<void>): Promise<unknown>
}

export interface KyselyOptions extends ConfirmOptions {
  isolationLevel?: 'read committed' | 'repeatable read' | 'serializable'
}

/** A transaction of Kysely, for `begin`, `finish` and `firstSeen`. */
export function fromKysely (trx: KyselyRunner): Queryable {
  return {
    query: async (sql, parameters): Promise<{ rows: Row[] }> => await trx.withoutPlugins().executeQuery({
      sql,
      parameters,
      query: { kind: 'RawNode', sqlFragments: [sql], parameters: [] },
      queryId: { queryId: 'idempotency' }
    })
  }
}

/**
 * A database for `createIdempotency`; the work gets the `trx`.
 *
 * @param db the instance, not a transaction of it
 */
export function kyselyDatabase<Trx extends KyselyRunner> (db: Kysely<Trx>, { confirm, isolationLevel }: KyselyOptions = {}): Database<Trx> {
  return new OrmDatabase<Trx>({
    outside: fromKysely(db),
    inside: fromKysely,
    open: async work => {
      const builder = db.transaction()
      await (isolationLevel ? builder.setIsolationLevel(isolationLevel) : builder).execute(work)
    }
  }, confirm)
}
