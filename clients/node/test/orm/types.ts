// What the types promise of each ORM: the work gets the ORM's own handle.  This file has to compile, and
// does not run.  Prisma's client is generated, so there is something like it here.
import { sql } from 'drizzle-orm'
import type { NodePgDatabase } from 'drizzle-orm/node-postgres'
import type { PostgresJsDatabase } from 'drizzle-orm/postgres-js'
import type { Knex } from 'knex'
import type { Kysely, Transaction as KyselyTransaction } from 'kysely'
import { createIdempotency } from 'pg-idempotency'
import {
  drizzleDatabase, fromDrizzle, fromKnex, fromKysely, fromPrisma, fromSequelize, fromTypeOrm,
  knexDatabase, kyselyDatabase, prismaDatabase, sequelizeDatabase, typeOrmDatabase
} from 'pg-idempotency/orm'
import type { Sequelize, Transaction as SequelizeTransaction } from 'sequelize'
import type { DataSource, EntityManager } from 'typeorm'

interface Tables { orders: { name: string } }
interface PrismaTransaction {
  $queryRawUnsafe: <T = unknown>(query: string, ...values: any[]) => Promise<T>
  order: { create: (order: { data: { name: string } }) => Promise<{ id: number }> }
}
interface PrismaClient extends PrismaTransaction {
  $transaction: <R>(work: (tx: PrismaTransaction) => Promise<R>, options?: { maxWait?: number, timeout?: number }) => Promise<R>
}

declare const knex: Knex
declare const kysely: Kysely<Tables>
declare const drizzle: NodePgDatabase
declare const drizzleOnPostgresJs: PostgresJsDatabase
declare const prisma: PrismaClient
declare const dataSource: DataSource
declare const sequelize: Sequelize

const scope = { action: 'orders.create', key: 'k' }

const overKnex = createIdempotency({ database: knexDatabase(knex, { isolationLevel: 'serializable' }) })
export const knexRun = overKnex.run(scope, null, async (trx: Knex.Transaction) => { await overKnex.firstSeen(fromKnex(trx), 'mailer', []) })

const overKysely = createIdempotency({ database: kyselyDatabase(kysely, { isolationLevel: 'serializable' }) })
export const kyselyRun = overKysely.run(scope, null, async (trx: KyselyTransaction<Tables>) => { await overKysely.firstSeen(fromKysely(trx), 'mailer', []) })

const overDrizzle = createIdempotency({ database: drizzleDatabase(drizzle, sql, { isolationLevel: 'serializable' }) })
export const drizzleRun = overDrizzle.run(scope, null, async tx => {
  await tx.execute(sql`SELECT 1`)
  await overDrizzle.firstSeen(fromDrizzle(tx, sql), 'mailer', [])
})
export const overPostgresJs = createIdempotency({ database: drizzleDatabase(drizzleOnPostgresJs, sql) })

const overPrisma = createIdempotency({ database: prismaDatabase(prisma, { isolationLevel: 'Serializable', timeout: 30_000 }) })
export const prismaRun = overPrisma.run(scope, null, async tx => {
  await tx.order.create({ data: { name: 'a' } })
  await overPrisma.firstSeen(fromPrisma(tx), 'mailer', [])
})

const overTypeOrm = createIdempotency({ database: typeOrmDatabase(dataSource, { isolationLevel: 'SERIALIZABLE' }) })
export const typeOrmRun = overTypeOrm.run(scope, null, async (manager: EntityManager) => { await overTypeOrm.firstSeen(fromTypeOrm(manager), 'mailer', []) })

const overSequelize = createIdempotency({ database: sequelizeDatabase(sequelize, { isolationLevel: 'SERIALIZABLE' }) })
export const sequelizeRun = overSequelize.run(scope, null, async (transaction: SequelizeTransaction) => {
  await overSequelize.firstSeen(fromSequelize(sequelize, transaction), 'mailer', [])
})

// @ts-expect-error not a level that is one
export const level = knexDatabase(knex, { isolationLevel: 'snapshot' })
