/** Sequelize: a statement names its transaction; without one it is to go to the primary, and to no ambient transaction. */

import { OrmDatabase } from './transaction.js'
import type { ConfirmOptions } from './transaction.js'
import type { Database, Queryable } from '../types.js'

/** What is needed of Sequelize. */
export interface Sequelize<Transaction> {
  query (sql: string, options: any): Promise<any>
  transaction (options: any, work: (transaction: Transaction) => Promise<void>): PromiseLike<unknown>
  transaction (options?: any): Promise<Transaction>
}

/** As those of `sequelize.transaction`. */
export interface SequelizeOptions extends ConfirmOptions {
  isolationLevel?: 'READ COMMITTED' | 'REPEATABLE READ' | 'SERIALIZABLE'
}

/**
 * A transaction of Sequelize, for `begin`, `finish` and `firstSeen`.
 *
 * @param transaction that of `sequelize.transaction`; null for none
 */
export function fromSequelize<Transaction> (sequelize: Pick<Sequelize<Transaction>, 'query'>, transaction: Transaction | null): Queryable {
  return {
    query: async (sql, bind) => ({
      rows: await sequelize.query(sql, { bind, transaction, type: 'SELECT', useMaster: true, supportsSearchPath: false })
    })
  }
}

/** A database for `createIdempotency`; the work gets the `transaction`. */
export function sequelizeDatabase<Transaction> (sequelize: Sequelize<Transaction>, { confirm, ...options }: SequelizeOptions = {}): Database<Transaction> {
  return new OrmDatabase<Transaction>({
    outside: fromSequelize(sequelize, null),
    inside: transaction => fromSequelize(sequelize, transaction),
    open: work => sequelize.transaction(options, work)
  }, confirm)
}
