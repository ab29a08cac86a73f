import { notFound, redirect } from 'next/navigation'
import { database } from '@/lib/database'
import { isUuid } from '@/lib/ids'
import { loginOfPage } from '@/lib/login'
import { AnswerForm } from './form'

export default async function PracticeSession ({ params }: { params: Promise<{ id: string }> }) {
  const { tenant, user } = await loginOfPage() ?? redirect('/')
  const { id } = await params
  const { pool } = await database()
  const { rows: [session] } = isUuid(id)
    ? await pool.query('SELECT topic FROM practice_sessions WHERE tenant = $1 AND user_id = $2 AND id = $3', [tenant, user, id])
    : { rows: [] }
  if (session === undefined) notFound()
  return (
    <main>
      <h1>{session.topic}</h1>
      <AnswerForm sessionId={id} />
    </main>
  )
}
