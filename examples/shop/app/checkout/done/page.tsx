import { redirect } from 'next/navigation'
import { database } from '@/lib/database'
import { loginOfPage } from '@/lib/login'

export default async function Done () {
  const { tenant, user } = await loginOfPage() ?? redirect('/')
  const { pool } = await database()
  const { rows } = await pool.query('SELECT plan, session FROM subscriptions WHERE tenant = $1 AND user_id = $2', [tenant, user])
  return (
    <main>
      <h1>Your subscriptions</h1>
      <ul>
        {rows.map(({ plan, session }) => <li key={session}>{plan} ({session})</li>)}
      </ul>
    </main>
  )
}
