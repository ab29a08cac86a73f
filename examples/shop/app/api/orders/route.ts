/** Orders: the work is in this database, so a transaction has the order and the answer, or neither. */

import { list } from '@/lib/list'
import { bodyOf, invalid, route } from '@/lib/protect'

const columns = 'id, status, items, created_at AS "createdAt"'

export const GET = list(`SELECT ${columns} FROM orders WHERE tenant = $1 AND user_id = $2 ORDER BY created_at, id`)

export const POST = route(async (request, _context, { tx, scope }) => {
  const { items } = await bodyOf(request)
  if (!Array.isArray(items) || items.length === 0 || !items.every(isItem)) {
    throw invalid('items is a list of { "sku": text, "quantity": positive integer }')
  }
  const { rows: [order] } = await tx.query(
    `INSERT INTO orders (tenant, user_id, items) VALUES ($1, $2, $3) RETURNING ${columns}`,
    [scope.tenant, scope.actor, JSON.stringify(items)])
  return Response.json(order)
})

function isItem (item: unknown): boolean {
  const { sku, quantity } = (item ?? {}) as { sku?: unknown, quantity?: unknown }
  return typeof sku === 'string' && sku !== '' && Number.isSafeInteger(quantity) && Number(quantity) > 0
}
