/** TypeORM: the manager of a transaction runs statements. */

import { OrmDatabase } from './transaction.js'
import type { ConfirmOptions } from './transaction.js'
import type { Database, Queryable } from '../types.js'

/** What is needed of TypeORM's data source, or of the manager of a transaction. */
export interface TypeOrmRunner {
  query (text: string, values?: any[]): Promise<any>
}

/** What is needed of TypeORM's data source. */
export interface TypeOrm<Manager extends TypeOrmRunner> extends TypeOrmRunner {
  transaction (work: (manager: Manager) => Promise<void>): Promise<unknown>
  transaction (isolationLevel: any, work: (manager: Manager) => Promise<void>): Promise<unknown>
}

export interface TypeOrmOptions extends ConfirmOptions {
  isolationLevel?: 'READ COMMITTED' | 'REPEATABLE READ' | 'SERIALIZABLE'
}

/** A transaction of TypeORM, for `begin`, `finish` and `firstSeen`. */
export function fromTypeOrm (manager: TypeOrmRunner): Queryable {
  return {
    query: async (text, values) => ({ rows: await manager.query(text, values) })
  }
}

/**
 * A database for `createIdempotency`; the work gets the `manager`.
 *
 * @param dataSource the data source, not the manager of a transaction
 */
export function typeOrmDatabase<Manager extends TypeOrmRunner> (dataSource: TypeOrm<Manager>, { confirm, isolationLevel }: TypeOrmOptions = {}): Database<Manager> {
  return new OrmDatabase<Manager>({
    outside: fromTypeOrm(dataSource),
    inside: fromTypeOrm,
    open: work => isolationLevel ? dataSource.transaction(isolationLevel, work) : dataSource.transaction(work)
  }, confirm)
}
