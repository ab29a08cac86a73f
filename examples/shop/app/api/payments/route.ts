/**
 * Payment attempts: a card is charged, which no transaction can take back. So the request is claimed by a
 * lease, and its recovery point is saved before and after the card is charged. Whoever takes over from a
 * process that died asks the provider with the same key, and goes on.
 */

import { database } from '@/lib/database'
import { isUuid } from '@/lib/ids'
import { list } from '@/lib/list'
import { charge } from '@/lib/payment-provider'
import { problem } from '@/lib/problem'
import { bodyOf, invalid, lease, route } from '@/lib/protect'

const columns = 'id, order_id AS "orderId", amount::float8 AS amount, charge, \'paid\' AS status, created_at AS "createdAt"'

export const GET = list(`SELECT ${columns} FROM payments WHERE tenant = $1 AND user_id = $2 ORDER BY created_at, id`)

export const POST = route(async (request, _context, { claim, scope }) => {
  const { orderId, amount } = await bodyOf(request)
  if (typeof orderId !== 'string' || typeof amount !== 'number' || !(amount > 0)) {
    throw invalid('orderId is the id of an order, amount a positive number')
  }
  const { tenant, actor, action, key } = scope
  let charged = claim.recovery?.point === 'charged' ? claim.recovery.state : null

  if (charged === null) {
    if (!await hasOrder(tenant, actor, orderId)) return problem(404, 'NO_SUCH_ORDER', `there is no order ${orderId}`)
    // the same in each attempt, and another one for each request
    const providerKey = JSON.stringify([tenant, actor, action, key])
    await claim.checkpoint('charging', { providerKey })
    charged = await charge(providerKey, amount)
    if (charged.declined) return problem(402, 'CARD_DECLINED', 'the card was declined')
    await claim.checkpoint('charged', charged)
  }
  return await claim.finish(async tx => {
    const { rows: [payment] } = await tx.query(
      `INSERT INTO payments (tenant, user_id, order_id, amount, charge) VALUES ($1, $2, $3, $4, $5) RETURNING ${columns}`,
      [tenant, actor, orderId, amount, charged.id])
    return { json: payment }
  })
}, { lease })

async function hasOrder (tenant: unknown, user: unknown, id: string): Promise<boolean> {
  if (!isUuid(id)) return false
  const { pool } = await database()
  const { rowCount } = await pool.query('SELECT FROM orders WHERE tenant = $1 AND user_id = $2 AND id = $3', [tenant, user, id])
  return rowCount === 1
}
