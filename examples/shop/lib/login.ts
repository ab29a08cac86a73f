/**
 * Who is asking. A demonstration: whoever says a name is believed. A real service would check a session or
 * a token here, and nothing else would change.
 */

import { cookies } from 'next/headers'
import { problem } from './problem'

export interface Login {
  tenant: string
  user: string
}

/**
 * Who calls the API: `Authorization: Bearer TENANT:USER`.
 *
 * @throws Response of 401, if nobody does
 */
export function loginOf (request: Request): Login {
  const [, tenant, user] = /^Bearer ([^:]+):(.+)$/i.exec(request.headers.get('authorization') ?? '') ?? []
  if (!tenant || !user) throw problem(401, 'UNAUTHORIZED', 'send Authorization: Bearer TENANT:USER')
  return { tenant, user }
}

/** Who looks at a page: the cookie `login`, which has TENANT:USER; null if nobody is logged in. */
export async function loginOfPage (): Promise<Login | null> {
  const [, tenant, user] = /^([^:]+):(.+)$/.exec((await cookies()).get('login')?.value ?? '') ?? []
  return tenant && user ? { tenant, user } : null
}
