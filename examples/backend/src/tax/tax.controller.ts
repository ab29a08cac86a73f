/**
 * Tax. The tenant is that of the log-in, so the requests are protected whether or not they have a body.
 *
 * A year is locked once, whatever the key: a second key finds the snapshot that is there.
 */
import { randomUUID } from 'node:crypto'
import { BadRequestException, Body, Controller, Post } from '@nestjs/common'
import { IdempotentWork } from 'pg-idempotency/nestjs'
import type { Protected } from 'pg-idempotency/nestjs'
import { Login } from '../auth/login.js'
import type { LoggedIn } from '../auth/login.js'
import type { Transaction } from '../database/database.js'

@Controller('tax')
export class TaxController {
  @Post('lock-tax-snapshot')
  async lock (
    @Login() { tenant }: LoggedIn,
    @Body() { year }: { year?: unknown } = {},
    @IdempotentWork() { tx }: Protected<Transaction>
  ): Promise<object> {
    if (!Number.isInteger(year) || Number(year) < 1900 || Number(year) > 9999) throw new BadRequestException('year must be a year')
    const [from, to] = [new Date(Date.UTC(Number(year), 0)), new Date(Date.UTC(Number(year) + 1, 0))]
    const { _sum: { amount } } = await tx!.expense.aggregate({ _sum: { amount: true }, where: { tenant, createdAt: { gte: from, lt: to } } })
    await tx!.taxSnapshot.createMany({
      data: [{ id: randomUUID(), tenant, year: Number(year), total: amount ?? 0 }],
      skipDuplicates: true
    })
    const { id, total, lockedAt } = await tx!.taxSnapshot.findUniqueOrThrow({ where: { tenant_year: { tenant, year: Number(year) } } })
    return { id, year, total, lockedAt }
  }
}
