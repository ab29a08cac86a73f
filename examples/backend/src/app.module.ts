/** What the service is made of, and how its requests are protected. */
import { Module } from '@nestjs/common'
import { APP_FILTER, APP_GUARD } from '@nestjs/core'
import type { Request } from 'express'
import { createIdempotency } from 'pg-idempotency'
import { IdempotencyModule } from 'pg-idempotency/nestjs'
import { prismaDatabase } from 'pg-idempotency/orm'
import { AuthController } from './auth/auth.controller.js'
import { LoginGuard } from './auth/login.js'
import { CopilotController } from './copilot/copilot.controller.js'
import { Model } from './copilot/model.js'
import { CustomizationController } from './customization/customization.controller.js'
import { CustomizationService } from './customization/customization.service.js'
import { Database } from './database/database.js'
import { DatabaseModule } from './database/database.module.js'
import { ExpensesController } from './expenses/expenses.controller.js'
import { HealthController } from './health.controller.js'
import { IdempotencyPort } from './idempotency/idempotency.port.js'
import { PostgresIdempotencyAdapter } from './idempotency/postgres-idempotency.adapter.js'
import { ProblemFilter } from './idempotency/problem.filter.js'
import { InvoicesController } from './invoices/invoices.controller.js'
import { Mailer } from './invoices/mailer.js'
import { TaxController } from './tax/tax.controller.js'

/** The header that has the key, as the clients of this API know it. */
export const KEY_HEADER = 'X-Idempotency-Key'

@Module({
  imports: [
    DatabaseModule,
    IdempotencyModule.forRootAsync({
      inject: [Database],
      useFactory: ({ prisma, schema }: Database) => ({
        idempotency: createIdempotency({ database: prismaDatabase(prisma, { maxWait: 10_000, timeout: 30_000 }), schema }),
        header: KEY_HEADER,
        // whoever writes a new route has to say so if it is not to be protected
        everywhere: true,
        // the log-in and nothing else says whose data it is; a tenant in the body would be a claim of the client
        tenant: (request: Request) => request.login.tenant,
        actor: (request: Request) => request.login.user
      })
    })
  ],
  controllers: [
    HealthController, AuthController, ExpensesController, TaxController, CustomizationController,
    InvoicesController, CopilotController
  ],
  providers: [
    { provide: APP_GUARD, useClass: LoginGuard },
    { provide: APP_FILTER, useClass: ProblemFilter },
    { provide: IdempotencyPort, useClass: PostgresIdempotencyAdapter },
    CustomizationService,
    Mailer,
    Model
  ]
})
export class AppModule {}
