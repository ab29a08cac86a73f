/** Reservations: the stock goes down once for each. */

import { list } from '@/lib/list'
import { problem } from '@/lib/problem'
import { bodyOf, invalid, route } from '@/lib/protect'

const columns = 'id, sku, quantity, created_at AS "createdAt"'

/** Of each article there are as many at first. */
const stock = 100

export const GET = list(`SELECT ${columns} FROM reservations WHERE tenant = $1 AND user_id = $2 ORDER BY created_at, id`)

export const POST = route(async (request, _context, { tx, scope }) => {
  const { sku, quantity } = await bodyOf(request)
  if (typeof sku !== 'string' || sku === '' || typeof quantity !== 'number' || !(quantity > 0) || !isInt4(quantity)) {
    throw invalid('sku is a text, quantity a positive integer')
  }
  await tx.query('INSERT INTO stock (tenant, sku, available) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING', [scope.tenant, sku, stock])
  const { rowCount } = await tx.query(
    'UPDATE stock SET available = available - $3 WHERE tenant = $1 AND sku = $2 AND available >= $3',
    [scope.tenant, sku, quantity])
  // what was written is rolled back, and the answer is kept
  if (rowCount === 0) return problem(422, 'OUT_OF_STOCK', `there are not ${quantity} of ${sku} left`)

  const { rows: [reservation] } = await tx.query(
    `INSERT INTO reservations (tenant, user_id, sku, quantity) VALUES ($1, $2, $3, $4) RETURNING ${columns}`,
    [scope.tenant, scope.actor, sku, quantity])
  return Response.json(reservation)
})

function isInt4 (value: number): boolean {
  return Number.isInteger(value) && value < 2 ** 31
}
