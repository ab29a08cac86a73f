/** Prisma, with a driver adapter such as `@prisma/adapter-pg`. */

import { OrmDatabase } from './transaction.js'
import type { ConfirmOptions } from './transaction.js'
import type { Database, Queryable } from '../types.js'

/** What is needed of Prisma's client, or of a transaction of it. */
export interface PrismaRunner {
  $queryRawUnsafe (query: string, ...values: any[]): PromiseLike<any>
}

/** What is needed of Prisma's client. */
export interface Prisma<Tx extends PrismaRunner> extends PrismaRunner {
  $transaction (work: (tx: Tx) => Promise<void>, options?: any): Promise<unknown>
}

/** As those of `prisma.$transaction`. */
export interface PrismaOptions extends ConfirmOptions {
  isolationLevel?: 'ReadCommitted' | 'RepeatableRead' | 'Serializable'
  /** Milliseconds to wait for a connection. */
  maxWait?: number
  /** Milliseconds until Prisma rolls the transaction back; the time that a repeat waits counts. */
  timeout?: number
}

/** A transaction of Prisma, for `begin`, `finish` and `firstSeen`. */
export function fromPrisma (tx: PrismaRunner): Queryable {
  return {
    query: async (text, values) => ({ rows: await tx.$queryRawUnsafe(text, ...values) })
  }
}

/**
 * A database for `createIdempotency`; the work gets the `tx`.
 *
 * @param prisma the client; with the extension for read replicas, `prisma.$primary()`
 */
export function prismaDatabase<Tx extends PrismaRunner> (prisma: Prisma<Tx>, { confirm, ...options }: PrismaOptions = {}): Database<Tx> {
  return new OrmDatabase<Tx>({
    outside: fromPrisma(prisma),
    inside: fromPrisma,
    open: work => prisma.$transaction(work, options)
  }, confirm)
}
