/**
 * Refunds call the payment provider, which no transaction can roll back. So they are under a lease, and say before
 * and after each step how far they got. When the process dies, the next request with the key goes on from there,
 * once the lease has run out; the provider may be asked twice then, but with the same key.
 */
import type { FastifyInstance } from 'fastify'
import type pg from 'pg'
import type { Claim, Queryable, Result } from 'pg-idempotency'
import { randomKey } from './event-keys.js'
import type { User } from './login.js'
import { completeRefund, findOrder, findRefund, setRefundAside } from './orders.js'
import type { Refund } from './orders.js'
import type { PaymentProvider } from './payments.js'
import { claimOf, outside } from './protection.js'
import { withId } from './routes.js'

const amountBody = {
  type: 'object',
  required: ['amount'],
  properties: { amount: { type: 'integer', minimum: 1 } }
}

export function refundRoutes (app: FastifyInstance, pool: pg.Pool, provider: PaymentProvider): void {
  app.post<{ Params: { id: string } }>('/orders/:id/refund', { ...outside, schema: withId() }, async request =>
    await refund(claimOf(request), request.user, request.params.id, null))

  app.post<{ Params: { id: string }, Body: { amount: number } }>('/orders/:id/refunds', { ...outside, schema: withId(amountBody) }, async request =>
    await refund(claimOf(request), request.user, request.params.id, request.body.amount))

  async function refund (claim: Claim<Queryable>, user: User, id: string, amount: number | null): Promise<Result> {
    if (claim.recovery === null) {
      const refund = randomKey()
      await claim.checkpoint('set aside', { refund }, {
        work: async tx => { await setRefundAside(tx, user, id, refund, amount) }
      })
    }
    if (claim.recovery?.point === 'set aside') {
      const { refund } = claim.recovery.state
      const { items } = await findOrder(pool, user, id)
      const { amount } = await findRefund(pool, refund) as Refund
      const reference = await provider.refund(refund, amount, items.some(({ sku }) => sku === 'slow'))
      await claim.checkpoint('paid back', { refund, reference })
    }
    const { refund, reference } = claim.recovery?.state
    return await claim.finish(async tx => ({
      status: 200,
      json: await completeRefund(tx, user, id, refund, reference)
    }))
  }
}
