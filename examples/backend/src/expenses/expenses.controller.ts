/** Expenses. The row and the answer are written by one transaction, the request's own. */
import { randomUUID } from 'node:crypto'
import { BadRequestException, Body, Controller, Post } from '@nestjs/common'
import { Idempotent, IdempotentWork } from 'pg-idempotency/nestjs'
import type { Protected } from 'pg-idempotency/nestjs'
import { Login } from '../auth/login.js'
import type { LoggedIn } from '../auth/login.js'
import type { Transaction } from '../database/database.js'

@Controller('expenses')
export class ExpensesController {
  @Idempotent({ action: 'expenses.create' })
  @Post()
  async create (
    @Login() { tenant, user }: LoggedIn,
    @Body() { amount, currency }: { amount?: unknown, currency?: unknown } = {},
    @IdempotentWork() { tx }: Protected<Transaction>
  ): Promise<object> {
    if (typeof amount !== 'number' || !(amount > 0 && amount < 1e12)) throw new BadRequestException('amount must be a positive number')
    if (typeof currency !== 'string' || !/^[A-Z]{3}$/.test(currency)) throw new BadRequestException('currency must be a code such as EUR')
    const { id } = await tx!.expense.create({ data: { id: randomUUID(), tenant, userName: user, amount, currency } })
    return { id, amount, currency, createdBy: user }
  }
}
