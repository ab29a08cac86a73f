/**
 * Protecting handlers of the Fetch API: `(request: Request, context) => Promise<Response>`, on any runtime
 * that has these classes and Node's modules.
 *
 * A body can be read once. So it is read here, for the fingerprint, and each run of the handler gets a
 * request of its own with the same bytes; therefore the handler may run again after a conflict. A response
 * is collected in the same way, streams as well, since what is kept has to be complete.
 *
 * `Headers` joins a header that was sent twice by ", ", and nobody can tell this from a comma in its value.
 * So a key with a comma is refused as one that was sent twice.
 */

import { IdempotencyError } from './errors.js'
import { HttpProtection, answerTooLarge } from './http.js'
import type { HttpAnswer, HttpOptions, HttpRequest, Protected } from './http.js'
import type { Idempotency } from './idempotency.js'
import type { Claim } from './lease.js'
import type { Result } from './types.js'

type Awaitable<T> = T | Promise<T>

/** A call of a handler, as the options see it. `Context` is the second argument that the runtime gives. */
export interface FetchCall<Context> {
  request: Request
  context: Context
}

/**
 * How handlers are protected. `tenant` and `actor` may ask the log-in asynchronously. For who is not logged
 * in, they throw a `Response`, such as one of 401, which is the answer then.
 */
export interface FetchOptions<Context = any> extends Omit<HttpOptions<FetchCall<Context>>, 'tenant' | 'actor'> {
  /** Whose data the request is about, from the log-in; not undefined. One of `tenant` and `actor` has to be given. */
  tenant?: (request: Request, context: Context) => Awaitable<string | null | undefined>
  /** Who acts inside the tenant, from the log-in; not undefined. */
  actor?: (request: Request, context: Context) => Awaitable<string | null | undefined>
  /** The template of the route, such as `/orders/:id`; by default the path as it is. */
  route?: string | ((call: FetchCall<Context>, params: Readonly<Record<string, unknown>>) => string)
  /** The parameters of the path; by default `context.params`, or what that promises. */
  params?: (call: FetchCall<Context>) => Awaitable<Readonly<Record<string, unknown>> | undefined>
  /** The largest body of a request, in bytes; 1 MB by default. Larger ones are answered with 413. */
  maxBody?: number
  /** Makes the requests for the handler, where it wants a class of its own; `new Request` by default. */
  newRequest?: (request: Request, init: RequestInit) => Request
}

/** A protected request that runs in a transaction. */
export interface TransactionWork<Tx> extends Protected<Tx> {
  tx: Tx
  claim: undefined
}

/** A protected request that runs under a lease. */
export interface ClaimWork<Tx> extends Protected<Tx> {
  tx: undefined
  claim: Claim<Tx>
}

/**
 * The third argument of a handler. It is null where a request is not protected because it need not have a
 * key; its method is not looked at here, for a handler mostly serves one.
 */
export type WorkOf<Tx, Options> =
  | (Options extends { lease: string } ? ClaimWork<Tx> : 'lease' extends keyof Options ? ClaimWork<Tx> | TransactionWork<Tx> : TransactionWork<Tx>)
  | ('required' extends keyof Options ? null : never)

/**
 * Have a handler's answer kept, and sent once it is committed.
 *
 * What the handler throws rolls back and is passed on. A `Response` that it throws is an answer, as if it
 * had been returned.
 *
 * @param options whose request it is, and so on
 * @param handler gets the request, the context, and the claim with its transaction; null instead of that
 *   if the request is not protected. It returns a response, or what `claim.finish` returned
 * @returns a handler for the runtime
 * @throws TypeError, at once, if the options make no sense
 */
export function idempotentFetch<
  Tx, Context = any, Options extends FetchOptions<Context> = FetchOptions<Context>, Incoming extends Request = Request
> (
  idempotency: Idempotency<Tx>,
  options: Options & FetchOptions<Context>,
  handler: (request: Incoming, context: Context, work: WorkOf<Tx, Options>) => Awaitable<Response | Result>
): (request: Incoming, context: Context) => Promise<Response> {
  const { maxBody = 1024 * 1024, newRequest = plainRequest, ...shared } = options as FetchOptions<Context>
  const protection = new HttpProtection<Tx, Call<Context>>(idempotency, withPrincipals(shared))

  return async (request, context) => await thrownOrReturned(async () => await protect(request, context))

  async function protect (request: Incoming, context: Context): Promise<Response> {
    const asked = await requestOf({ request, context, tenant: null, actor: null }, options)
    const key = admit(asked)
    if (key === null) return await handler(request, context, null as WorkOf<Tx, Options>) as Response

    // who is not logged in is told so before anything about the key
    asked.raw.tenant = await options.tenant?.(request, context)
    asked.raw.actor = await options.actor?.(request, context)
    if (typeof key !== 'string') return responseOf(key)

    const body = await collect(request, maxBody)
    if (body === null) return new Response(null, { status: 413 })
    asked.body = body

    return responseOf(await protection.run(asked, key, async work => {
      const { method, headers, signal } = request
      const copy = newRequest(request, { method, headers, signal, ...(body.length > 0 ? { body } : {}) })
      const returned = await thrownOrReturned(async () => await handler(copy as Incoming, context, work as WorkOf<Tx, Options>))
      // what finished the lease is the answer, whatever is returned here
      if (work.claim?.result) return { status: work.claim.result.status, headers: {}, body: null }
      return await answerOf(returned as Response, protection.maxAnswer)
    }, { rerun: true }))
  }

  /** The key, null for a request that is not protected, or the problem that it has. */
  function admit (asked: HttpRequest<Call<Context>>): string | null | HttpAnswer {
    try {
      return protection.admit(asked)
    } catch (error) {
      if (!(error instanceof IdempotencyError)) throw error
      return protection.problem(error)
    }
  }
}

async function thrownOrReturned<T> (work: () => Promise<T>): Promise<T | Response> {
  try {
    return await work()
  } catch (error) {
    if (error instanceof Response) return error
    throw error
  }
}

/** A call, and whose it is, once that is known. */
interface Call<Context> extends FetchCall<Context> {
  tenant: string | null | undefined
  actor: string | null | undefined
}

/** The options as the HTTP layer takes them: it asks for tenant and actor when they are known. */
function withPrincipals<Context> ({ tenant, actor, route: _route, params: _params, ...options }: FetchOptions<Context>): HttpOptions<Call<Context>> {
  return {
    ...options,
    ...(tenant ? { tenant: call => call.tenant } : {}),
    ...(actor ? { actor: call => call.actor } : {})
  }
}

async function requestOf<Context> (raw: Call<Context>, options: FetchOptions<Context>): Promise<HttpRequest<Call<Context>>> {
  const { request } = raw
  const { pathname, searchParams } = new URL(request.url)
  const known = await (options.params ? options.params(raw) : (raw.context as any)?.params) ?? {}
  const route = typeof options.route === 'function' ? options.route(raw, known) : options.route ?? pathname
  const keyHeaders = new Set([options.header ?? 'Idempotency-Key'].flat().map(name => name.toLowerCase()))
  return {
    raw,
    method: request.method,
    route,
    // with a template whose parameters nobody knows, the whole path counts
    params: route !== pathname && Object.keys(known).length === 0 ? { '': pathname } : known,
    query: Object.fromEntries([...searchParams.keys()].map(name => [name, searchParams.getAll(name)])),
    header: name => {
      const value = request.headers.get(name)
      if (value === null) return []
      return keyHeaders.has(name) && value.includes(',') ? [value, value] : [value]
    },
    body: null
  }
}

function plainRequest (request: Request, init: RequestInit): Request {
  return new Request(request.url, init)
}

/**
 * Read a body to its end.
 *
 * @param limit in bytes
 * @returns null if it is larger
 * @throws TypeError if somebody has read it before
 */
async function collect (message: Request | Response, limit: number): Promise<Uint8Array<ArrayBuffer> | null> {
  if (message.bodyUsed) throw new TypeError('the body has been read before it could be kept')
  const chunks: Uint8Array[] = []
  let size = 0
  for await (const chunk of message.body ?? []) {
    size += chunk.length
    if (size > limit) return null // to leave the loop cancels the stream
    chunks.push(chunk)
  }
  return Buffer.concat(chunks)
}

/** @throws AnswerTooLargeError */
async function answerOf (response: Response, limit: number): Promise<HttpAnswer> {
  const body = await collect(response, limit)
  if (body === null) throw answerTooLarge(limit)
  const headers: HttpAnswer['headers'] = Object.fromEntries(response.headers)
  const cookies = response.headers.getSetCookie()
  if (cookies.length > 0) headers['set-cookie'] = cookies
  return { status: response.status, headers, body }
}

/** Statuses with which a response must not have a body, be it an empty one. */
const withoutBody = new Set([101, 204, 205, 304])

function responseOf ({ status, headers, body }: HttpAnswer): Response {
  const fields = new Headers()
  for (const [name, value] of Object.entries(headers)) {
    for (const one of [value].flat()) fields.append(name, one)
  }
  const content = withoutBody.has(status) || body === null || body.length === 0 ? null : body
  return new Response(content as Uint8Array<ArrayBuffer> | string | null, { status, headers: fields })
}
