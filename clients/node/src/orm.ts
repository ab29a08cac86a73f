/**
 * The client inside the transactions of ORMs. None of them is imported here: each is known by the few
 * methods that are needed of it.
 *
 * `knexDatabase` and its like open the ORM's transaction: `createIdempotency({ database: knexDatabase(knex) })`.
 * `fromKnex` and its like are for a transaction that you have opened: `idempotency.begin(fromKnex(trx), ...)`.
 */
export { drizzleDatabase, fromDrizzle } from './orm/drizzle.js'
export type { DrizzleOptions } from './orm/drizzle.js'
export { fromKnex, knexDatabase } from './orm/knex.js'
export type { KnexOptions } from './orm/knex.js'
export { fromKysely, kyselyDatabase } from './orm/kysely.js'
export type { KyselyOptions } from './orm/kysely.js'
export { fromPrisma, prismaDatabase } from './orm/prisma.js'
export type { PrismaOptions } from './orm/prisma.js'
export { fromSequelize, sequelizeDatabase } from './orm/sequelize.js'
export type { SequelizeOptions } from './orm/sequelize.js'
export { fromTypeOrm, typeOrmDatabase } from './orm/typeorm.js'
export type { TypeOrmOptions } from './orm/typeorm.js'
export type { ConfirmOptions } from './orm/transaction.js'
