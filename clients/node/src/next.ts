/**
 * Protecting route handlers and server actions of Next.js.
 *
 *     const { route, withIdempotency } = createNext(() => idempotency, { actor: async () => (await auth()).userId })
 *
 *     export const POST = route(async (request, context, { tx }) => Response.json(await createOrder(tx, await request.json())))
 *
 *     export async function submitAnswer (key: string, answer: string) {
 *       'use server'
 *       return await withIdempotency(key, userId, 'submitAnswer', async tx => await insertAnswer(tx, answer))
 *     }
 *
 * Next ends a handler or an action by errors as well, which it tells by their `digest`:
 *
 * - `redirect()` is how an action that has succeeded says where to go. So it is an answer: the work is
 *   committed, where to go is kept with it, and each repeat goes there too. Redirect those who are not
 *   logged in before the action is protected, else that is kept.
 * - `notFound()`, `forbidden()` and `unauthorized()` say that the work cannot be done. A route handler
 *   answers them with 404, 403 and 401: what it wrote is rolled back, and the answer is kept like any 4xx.
 *   An action has no status, so there they are errors like all others: nothing is kept.
 *
 * The digests are read and written here, not imported from Next, so that this works whichever copy of it
 * the bundler takes.
 */

import { setTimeout as sleep } from 'node:timers/promises'
import { InFlightError, KeyInvalidError, KeyMissingError, OutOfOrderError, Refusal } from './errors.js'
import { idempotentFetch } from './fetch.js'
import type { FetchCall, FetchOptions, WorkOf } from './fetch.js'
import type { Idempotency } from './idempotency.js'
import type { Claim } from './lease.js'
import type { Answer, Request as Compared, Result, Scope } from './types.js'

type Awaitable<T> = T | Promise<T>

/** The second argument of a route handler. */
export interface RouteContext {
  params: Promise<any>
}

export type RouteOptions = FetchOptions<RouteContext>

/** How a server action is protected. */
export interface ActionOptions {
  /** Whose data the action is about; the one global tenant by default. */
  tenant?: string | null
  /** What the action was called with: the same key with something else is refused. Nothing is compared by default. */
  request?: Compared
  /** How long the result is kept, as PostgreSQL writes an interval; the server's 24 hours by default. */
  ttl?: string | null
  /**
   * How long to wait for the result of the same action in flight, in milliseconds; 10,000 by default, and
   * with 0 it is an InFlightError at once. No connection is held meanwhile.
   */
  patience?: number
  /** Take a lease of this length instead of a transaction: for work with effects outside the database. */
  lease?: string
}

/** The claim of an action with effects outside the database. */
export interface ActionClaim<Tx> extends Omit<Claim<Tx>, 'finish' | 'result'> {
  /**
   * Write the last rows in one transaction with the result.
   *
   * @returns the result, to be returned from the action
   * @throws ClaimLostError: nothing was written
   */
  finish<T> (work: (tx: Tx) => Awaitable<T>): Promise<T>
}

/** Protects server actions; see `createNext`. */
export interface WithIdempotency<Tx> {
  /**
   * Run work with effects outside the database once for each key, under a lease.
   *
   * @throws as the other form; ClaimLostError if the work took longer than its lease and a repeat took over
   */
  <T> (key: unknown, userId: string, action: string, fn: (claim: ActionClaim<Tx>) => Awaitable<T>, options: ActionOptions & { lease: string }): Promise<T>
  /**
   * Run work once for each key, in a transaction that keeps its result, and return the same to each repeat.
   *
   * The result is kept as JSON, and returned as JSON has it, the first time as well: a Date is a string.
   * What `fn` throws rolls back, and nothing is kept, so that a repeat runs; but a `Refusal` is kept and
   * thrown again, and `redirect()` commits.
   *
   * @param key what the client sent: made once for each operation, in the form that is submitted
   * @param userId who acts, from the log-in
   * @param action its name
   * @throws KeyMissingError, KeyInvalidError, MismatchError; InFlightError if the first one is still at
   *   work after `patience`; ConflictError, CommitUnknownError, UnavailableError: repeat it with the same key
   * @throws TypeError if there is no user
   */
  <T> (key: unknown, userId: string, action: string, fn: (tx: Tx) => Awaitable<T>, options?: ActionOptions & { lease?: never }): Promise<T>
}

/** What `createNext` returns. */
export interface NextIdempotency<Tx, Common extends RouteOptions> {
  /**
   * Protect a route handler: `export const POST = route(...)`.
   *
   * @param handler as Next has it; its third argument has the transaction or, with a lease, the claim. It
   *   returns a response, or what `claim.finish` returned
   * @param options of this route, beside those of all
   */
  route<Options extends RouteOptions = {}, Incoming extends Request = Request, Context extends RouteContext = any> (
    handler: (request: Incoming, context: Context, work: WorkOf<Tx, Common & Options>) => Awaitable<Response | Result>,
    options?: Options & RouteOptions
  ): (request: Incoming, context: Context) => Promise<Response>
  withIdempotency: WithIdempotency<Tx>
}

/**
 * Protect the route handlers and server actions of an application.
 *
 * @param idempotency the client, or a function that returns or promises it: `next build` loads all modules,
 *   and there may be no database then
 * @param options of all routes. `tenant` or `actor` has to be given for routes; the action is the method and
 *   the route as Next writes it, such as `POST /api/orders/[id]`
 */
export function createNext<Tx, Common extends RouteOptions = {}> (
  idempotency: Idempotency<Tx> | (() => Awaitable<Idempotency<Tx>>),
  options?: Common & RouteOptions
): NextIdempotency<Tx, Common> {
  const client = async (): Promise<Idempotency<Tx>> => typeof idempotency === 'function' ? await idempotency() : idempotency

  return {
    route (handler, own) {
      let protectedHandler: ReturnType<typeof idempotentFetch<Tx, any, any, any>> | undefined
      return async (request, context) => {
        protectedHandler ??= idempotentFetch<Tx, any, any, any>(await client(),
          { route: templateOf, newRequest: nextRequest, ...options, ...own }, answeringSignals(handler))
        return await protectedHandler(request, context)
      }
    },

    async withIdempotency (key: unknown, userId: string, action: string, fn: (work: any) => any, options: ActionOptions = {}) {
      const { tenant = null, request, ttl = null, lease, patience = 10_000 } = options
      if (typeof userId !== 'string' || userId === '') throw new TypeError(`the action ${action} needs a user`)
      const scope = { tenant, actor: userId, action, key: keyOf(key) }
      const it = await client()
      let late = false
      const result = await whenFree(it, scope, patience, async () => lease === undefined
        ? await it.run(scope, request, async tx => await kept(async () => await fn(tx), ttl))
        : await it.lease(scope, request, { lease }, async claim => {
          const answer = await kept(async () => await fn(actionClaim(claim, ttl)), ttl)
          late = redirectsLate(answer.json, claim)
          return answer
        }))
      if (late) throw new OutOfOrderError('a redirect after finish is not kept: redirect in the work that finish gets, or after withIdempotency')
      return resultOf(result)
    }
  }
}

/**
 * The route as Next writes it, such as `/api/orders/[id]`, for Next does not tell: the parameters are looked
 * up in the path, in their order.
 */
function templateOf ({ request }: FetchCall<unknown>, params: Readonly<Record<string, unknown>>): string {
  const segments = new URL(request.url).pathname.split('/')
  let from = 0
  for (const [name, value] of Object.entries(params)) {
    const wanted = [value].flat().map(part => decoded(String(part)))
    const at = segments.findIndex((_, start) => start >= from && wanted.every((part, i) => decoded(segments[start + i]) === part))
    if (wanted.length === 0 || at === -1) continue
    segments.splice(at, wanted.length, Array.isArray(value) ? `[...${name}]` : `[${name}]`)
    from = at + 1
  }
  return segments.join('/')
}

function decoded (segment: string | undefined): string | undefined {
  try {
    return segment === undefined ? undefined : decodeURIComponent(segment)
  } catch {
    return segment
  }
}

/** A request of Next's own class, which has `nextUrl` and `cookies`. */
function nextRequest (request: Request & { nextUrl?: { basePath: string } }, init: RequestInit): Request {
  const nextConfig = { basePath: request.nextUrl?.basePath }
  return new (request.constructor as new (url: string, init: object) => Request)(request.url, { ...init, nextConfig })
}

/** Answer redirects and refusals as Next does with those that a route handler throws. */
function answeringSignals (handler: (request: any, context: any, work: any) => Awaitable<Response | Result>): typeof handler {
  return async (request, context, work) => {
    try {
      return await handler(request, context, work)
    } catch (error) {
      const digest = digestOf(error)
      const redirect = redirectPattern.exec(digest)
      if (redirect) return new Response(null, { status: Number(redirect[2]), headers: { location: redirect[1] as string } })
      const refusal = refusalPattern.exec(digest)
      if (refusal) return new Response(null, { status: Number(refusal[1]) })
      throw error
    }
  }
}

/** `NEXT_REDIRECT;push;/orders/1;307;` */
const redirectPattern = /^NEXT_REDIRECT;(?:push|replace);(.*);(303|307|308);$/s
/** `NEXT_HTTP_ERROR_FALLBACK;404` */
const refusalPattern = /^NEXT_HTTP_ERROR_FALLBACK;(401|403|404)$/

function digestOf (error: unknown): string {
  const digest = (error as { digest?: unknown } | null | undefined)?.digest
  return typeof digest === 'string' ? digest : ''
}

/** A client can call an action with whatever it likes. */
function keyOf (key: unknown): string {
  if (key === undefined || key === null || key === '') throw new KeyMissingError('the action was called without an idempotency key')
  if (typeof key !== 'string') throw new KeyInvalidError('the idempotency key is not a string')
  return key
}

/** What is kept of an action: its result, which may be undefined, or where it redirected to. */
interface Kept {
  result?: unknown
  redirect?: string
}

async function kept (work: () => Awaitable<unknown>, ttl: string | null): Promise<Answer & { json: Kept }> {
  try {
    return { json: { result: await work() }, ttl }
  } catch (error) {
    const digest = digestOf(error)
    if (!redirectPattern.test(digest)) throw error
    return { status: 303, json: { redirect: digest }, ttl }
  }
}

function actionClaim<Tx> (claim: Claim<Tx>, ttl: string | null): ActionClaim<Tx> {
  return {
    id: claim.id,
    attempt: claim.attempt,
    get recovery () { return claim.recovery },
    checkpoint: async (...args) => await claim.checkpoint(...args),
    release: async () => await claim.release(),
    finish: async work => resultOf(await claim.finish(async tx => await kept(async () => await work(tx), ttl)))
  }
}

/** Whether an action redirected after it had finished its claim with something else. */
function redirectsLate ({ redirect }: Kept, { result }: Claim<unknown>): boolean {
  return result !== null && redirect !== undefined && redirect !== result.json?.redirect
}

/** What was kept, given as the action itself gave it. */
function resultOf ({ status, json, rawJson, body, headers }: Result): any {
  if (status >= 400) throw new Refusal({ status, rawJson, body, headers })
  if (json?.redirect !== undefined) throw Object.assign(new Error('NEXT_REDIRECT'), { digest: json.redirect })
  return json?.result
}

/**
 * Run an action, or wait for the one in flight that has its scope. It is looked at now and then, in place
 * of a wait in the database: there each repeat would hold a connection, which the first one may need.
 *
 * @param patience in milliseconds
 */
async function whenFree<Tx> (idempotency: Idempotency<Tx>, scope: Scope, patience: number, run: () => Promise<Result>): Promise<Result> {
  const end = performance.now() + patience
  let pause = 10
  for (;;) {
    try {
      return await run()
    } catch (error) {
      if (!(error instanceof InFlightError) || performance.now() > end) throw error
    }
    do {
      await sleep(pause)
      pause = Math.min(2 * pause, 250)
    } while (performance.now() < end && (await idempotency.status(scope)).outcome === 'in_flight')
  }
}
