/** The database: Prisma's client, and the schema in which the extension was found. */
import { Injectable } from '@nestjs/common'
import type { OnModuleDestroy } from '@nestjs/common'
import { PrismaPg } from '@prisma/adapter-pg'
import pg from 'pg'
import { findSchema } from 'pg-idempotency'
import { PrismaClient } from './prisma/client.js'
import type { Prisma } from './prisma/client.js'
import { createTables } from './tables.js'

/** A transaction of Prisma. */
export type Transaction = Prisma.TransactionClient

@Injectable()
export class Database implements OnModuleDestroy {
  constructor (readonly prisma: PrismaClient, readonly schema: string) {}

  /** Connect, and create the tables of the service if they are missing. */
  static async open (connectionString: string): Promise<Database> {
    const client = new pg.Client({ connectionString })
    await client.connect()
    try {
      await createTables(client)
      const adapter = new PrismaPg({ connectionString, max: 10 })
      return new Database(new PrismaClient({ adapter }), await findSchema(client))
    } finally {
      await client.end()
    }
  }

  async onModuleDestroy (): Promise<void> {
    await this.prisma.$disconnect()
  }
}
