/**
 * Invoices are sent by e-mail, once for each key, under a lease: a mail cannot be rolled back.
 *
 *   'sending'  the delivery is on record, and the mail may be on its way
 *   'sent'     the mail server has it
 *
 * An attempt that dies leaves the point it had reached, and the next one, with the same key, goes on from
 * there: at 'sending' it asks the mail server first. The delivery becomes `sent` in one transaction with
 * the answer.
 *
 * Another key is another sending, such as a reminder. Where that must not be, let the table of deliveries
 * be unique by tenant and invoice.
 */
import { randomUUID } from 'node:crypto'
import { BadGatewayException, Controller, Get, HttpCode, Param, Post } from '@nestjs/common'
import type { Claim } from 'pg-idempotency'
import { Idempotent, IdempotentWork } from 'pg-idempotency/nestjs'
import type { Protected } from 'pg-idempotency/nestjs'
import { Login } from '../auth/login.js'
import type { LoggedIn } from '../auth/login.js'
import { Database } from '../database/database.js'
import type { Transaction } from '../database/database.js'
import { Mailer } from './mailer.js'

@Controller('invoices/:id')
export class InvoicesController {
  constructor (private readonly database: Database, private readonly mailer: Mailer) {}

  @Idempotent({ action: 'invoices.send', lease: '5 min' })
  @Post('send')
  @HttpCode(200)
  async send (
    @Login() { tenant }: LoggedIn,
    @Param('id') invoice: string,
    @IdempotentWork() { claim }: Protected<Transaction>
  ): Promise<void> {
    const delivery = await this.#record(claim!, tenant, invoice)
    if (claim!.recovery?.point !== 'sent') {
      await this.#mail(claim!, delivery, invoice)
      await claim!.checkpoint('sent', delivery)
    }
    await claim!.finish(async tx => {
      const sent = await tx.invoiceEmailDelivery.update({ where: { id: delivery.id }, data: { status: 'sent', sentAt: new Date() } })
      return { json: sent }
    })
  }

  @Get('deliveries')
  async deliveries (@Login() { tenant }: LoggedIn, @Param('id') invoice: string): Promise<object[]> {
    return await this.database.prisma.invoiceEmailDelivery.findMany({ where: { tenant, invoice }, orderBy: { sentAt: 'asc' } })
  }

  /** The delivery of this request, from an earlier attempt or recorded now. */
  async #record (claim: Claim<Transaction>, tenant: string, invoice: string): Promise<Delivery> {
    if (claim.recovery) return claim.recovery.state
    const delivery = { id: randomUUID(), recipient: `billing@${tenant}.example` }
    await claim.checkpoint('sending', delivery, {
      work: async tx => await tx.invoiceEmailDelivery.create({ data: { ...delivery, tenant, invoice, status: 'sending' } })
    })
    return delivery
  }

  async #mail (claim: Claim<Transaction>, { id, recipient }: Delivery, invoice: string): Promise<void> {
    try {
      if (claim.attempt > 1 && await this.mailer.hasSent(id)) return
      await this.mailer.send({ id, to: recipient, subject: `Invoice ${invoice}` })
    } catch (error) {
      throw new BadGatewayException('the mail server did not answer; repeat the request with the same key', { cause: error })
    }
  }
}

interface Delivery {
  id: string
  recipient: string
}
