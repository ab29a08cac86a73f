/** Metrics for Prometheus; lib/observe.ts says what they count. Without the database, they are those of the process. */

import { database } from '@/lib/database'
import { metricsText } from '@/lib/observe'
import type { DatabaseCounts } from '@/lib/observe'

export const dynamic = 'force-dynamic'

export async function GET (): Promise<Response> {
  const counts = await countsOfDatabase().catch(() => null)
  return new Response(metricsText(counts), { headers: { 'content-type': 'text/plain; version=0.0.4; charset=utf-8' } })
}

async function countsOfDatabase (): Promise<DatabaseCounts[]> {
  const { pool, schema } = await database()
  const { rows } = await pool.query(
    `SELECT action, replayed, mismatched, held + coalesce(leases, 0) AS in_flight_now FROM ${schema}.idempotency_stats ORDER BY action`)
  return rows
}
