'use server'
/**
 * The server actions of the shop. Each takes an idempotency key that its form has made once, and who acts is
 * whoever is logged in: a browser can call an action with whatever it likes.
 */

import { cookies } from 'next/headers'
import { redirect } from 'next/navigation'
import { IdempotencyError, Refusal } from 'pg-idempotency'
import { isUuid } from '@/lib/ids'
import { loginOfPage } from '@/lib/login'
import type { Login } from '@/lib/login'
import { openCheckout } from '@/lib/payment-provider'
import { lease, withIdempotency } from '@/lib/protect'

/** What a form is told: Next hides from the browser what an action throws. */
export type Told<T> = { done: T } | { problem: string }

/**
 * Subscribe to a plan. The payment provider is called, so the request is claimed by a lease.
 *
 * The key answers repeats of one form. Two forms, in two tabs, have two keys, and one user may have one
 * subscription all the same: that is a rule of the business, and a primary key says so.
 */
export async function createCheckoutSession ({ idempotencyKey, plan }: { idempotencyKey: string, plan: string }): Promise<Told<{ plan: string, session: string }>> {
  const { tenant, user } = await loggedIn()
  if (!['basic', 'pro'].includes(plan)) return { problem: 'There is no such plan.' }

  return await told(async () => await withIdempotency(idempotencyKey, user, 'createCheckoutSession', async claim => {
    let session = claim.recovery?.point === 'opened' ? claim.recovery.state : null
    if (session === null) {
      const providerKey = JSON.stringify(['checkout', tenant, user])
      await claim.checkpoint('opening', { providerKey })
      session = await openCheckout(providerKey)
      await claim.checkpoint('opened', session)
    }
    return await claim.finish(async tx => {
      const { rows: [subscription] } = await tx.query(
        `INSERT INTO subscriptions AS known (tenant, user_id, plan, session) VALUES ($1, $2, $3, $4)
         ON CONFLICT (tenant, user_id) DO UPDATE SET plan = known.plan RETURNING plan, session`,
        [tenant, user, plan, session.id])
      return subscription
    })
  }, { tenant, lease, request: { plan } }))
}

/** Begin to practise a topic, and go there. The redirect is kept as the answer, so a repeat goes to the same page. */
export async function createPracticeSession ({ idempotencyKey, topic }: { idempotencyKey: string, topic: string }): Promise<Told<never>> {
  const { tenant, user } = await loggedIn()
  return await told(async () => await withIdempotency(idempotencyKey, user, 'createPracticeSession', async tx => {
    const { rows: [{ id }] } = await tx.query(
      'INSERT INTO practice_sessions (tenant, user_id, topic) VALUES ($1, $2, $3) RETURNING id',
      [tenant, user, String(topic)])
    redirect(`/practice/${id}`)
  }, { tenant, request: { topic } }))
}

/** Record an answer, and say how many there are now. */
export async function submitAnswer ({ idempotencyKey, sessionId, answer }: { idempotencyKey: string, sessionId: string, answer: string }): Promise<Told<{ answers: number }>> {
  const { tenant, user } = await loggedIn()
  return await told(async () => await withIdempotency(idempotencyKey, user, 'submitAnswer', async tx => {
    const { rowCount } = isUuid(sessionId)
      ? await tx.query('SELECT FROM practice_sessions WHERE tenant = $1 AND user_id = $2 AND id = $3 FOR UPDATE', [tenant, user, sessionId])
      : { rowCount: 0 }
    if (rowCount === 0) throw new Refusal({ status: 404, json: 'There is no such practice.' })
    await tx.query('INSERT INTO answers (session_id, answer) VALUES ($1, $2)', [sessionId, String(answer)])
    const { rows: [{ count }] } = await tx.query('SELECT count(*)::int FROM answers WHERE session_id = $1', [sessionId])
    return { answers: count }
  }, { tenant, request: { sessionId, answer } }))
}

/** Log in, for this demonstration: whoever says a name is believed. To do it twice changes nothing. */
export async function logIn (form: FormData): Promise<void> {
  (await cookies()).set('login', String(form.get('login')), { httpOnly: true, sameSite: 'lax' })
  redirect('/checkout')
}

/** Before the action is protected, for a redirect in there is kept. */
async function loggedIn (): Promise<Login> {
  return await loginOfPage() ?? redirect('/')
}

async function told<T> (action: () => Promise<T>): Promise<Told<T>> {
  try {
    return { done: await action() }
  } catch (error) {
    if (error instanceof Refusal) return { problem: JSON.parse(error.answer.rawJson ?? '""') }
    if (error instanceof IdempotencyError) return { problem: error.title }
    throw error
  }
}
