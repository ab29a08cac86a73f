/** Whether the service can work: the database answers, and has the tables and the extension. */

import { database } from '@/lib/database'
import { problem } from '@/lib/problem'

export const dynamic = 'force-dynamic'

export async function GET (): Promise<Response> {
  try {
    const { pool } = await database()
    await pool.query('SELECT 1')
    return Response.json({ status: 'ok' })
  } catch (error) {
    console.error(JSON.stringify({ level: 'error', message: error instanceof Error ? error.message : String(error) }))
    return problem(503, 'NOT_READY', 'the database cannot be used')
  }
}
