/**
 * Refunds: under a lease, like payments. A payment can be given back once, whatever keys its refunds have, so
 * the provider's key is made of the payment.
 */

import { database } from '@/lib/database'
import { isUuid } from '@/lib/ids'
import { list } from '@/lib/list'
import { refund } from '@/lib/payment-provider'
import { problem } from '@/lib/problem'
import { bodyOf, invalid, lease, route } from '@/lib/protect'

const columns = 'id, payment_id AS "paymentId", refund, \'refunded\' AS status, created_at AS "createdAt"'

export const GET = list(`SELECT ${columns} FROM refunds WHERE tenant = $1 AND user_id = $2 ORDER BY created_at, id`)

export const POST = route(async (request, _context, { claim, scope: { tenant, actor } }) => {
  const { paymentId } = await bodyOf(request)
  if (typeof paymentId !== 'string') throw invalid('paymentId is the id of a payment')

  let refunded = claim.recovery?.point === 'refunded' ? claim.recovery.state : null
  if (refunded === null) {
    const found = await lookUp(tenant, actor, paymentId)
    if (found === undefined) return problem(404, 'NO_SUCH_PAYMENT', `there is no payment ${paymentId}`)
    if (found.refunded) return alreadyRefunded(paymentId)
    const providerKey = JSON.stringify(['refund', found.charge])
    await claim.checkpoint('refunding', { providerKey })
    refunded = await refund(providerKey)
    await claim.checkpoint('refunded', refunded)
  }
  return await claim.finish(async tx => {
    const { rows: [row] } = await tx.query(
      `INSERT INTO refunds (tenant, user_id, payment_id, refund) VALUES ($1, $2, $3, $4)
       ON CONFLICT (payment_id) DO NOTHING RETURNING ${columns}`,
      [tenant, actor, paymentId, refunded.id])
    if (row === undefined) throw alreadyRefunded(paymentId) // by a request with another key, meanwhile
    return { json: row }
  })
}, { lease })

async function lookUp (tenant: unknown, user: unknown, id: string): Promise<{ charge: string, refunded: boolean } | undefined> {
  if (!isUuid(id)) return undefined
  const { pool } = await database()
  const { rows: [found] } = await pool.query(
    `SELECT charge, EXISTS (SELECT FROM refunds WHERE payment_id = payments.id) AS refunded
       FROM payments WHERE tenant = $1 AND user_id = $2 AND id = $3`, [tenant, user, id])
  return found
}

function alreadyRefunded (id: string): Response {
  return problem(422, 'ALREADY_REFUNDED', `the payment ${id} was given back before`)
}
