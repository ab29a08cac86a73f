/**
 * Protecting routes of Express.
 *
 *     app.post('/orders', authenticate, idempotent(idempotency, { actor: req => req.user.id }), createOrder)
 *
 * What the handlers after it write to the response is collected, that of error handlers included, and sent
 * once it is committed. The middleware comes after the one that authenticates, since it answers repeats.
 *
 * The body is compared as it came. The middleware reads it itself if nobody has done so; a parser that
 * comes before has to keep it: `express.json({ verify: keepRawBody })`.
 */

import type { IncomingMessage, ServerResponse } from 'node:http'
import { handleCaptured, keyOrProblem, readBody, requestOf, sendTooLarge } from './capture.js'
import { HttpProtection } from './http.js'
import type { HttpOptions, HttpRequest, Protected } from './http.js'
import { isJson, mayHaveBody, textOf } from './http/message.js'
import type { Idempotency } from './idempotency.js'

declare global {
  // eslint-disable-next-line @typescript-eslint/no-namespace
  namespace Express {
    interface Request {
      /** The claim of a protected request. */
      idempotency?: Protected<any>
      /** The body as it came. */
      rawBody?: Buffer
    }
  }
}

/** What is needed of a request of Express. */
export interface ExpressRequest extends IncomingMessage {
  body?: any
  rawBody?: Buffer
  idempotency?: Protected<any>
  baseUrl: string
  path: string
  route?: any
  params: any
  query: any
}

export interface ExpressOptions<Request extends ExpressRequest = ExpressRequest> extends HttpOptions<Request> {
  /** The largest body that the middleware reads, in bytes; 1 MB by default. Larger ones are answered with 413. */
  maxBody?: number
}

/** To be given to a parser of bodies as `verify`, so that the body is kept as it came. */
export function keepRawBody (request: IncomingMessage, _response: unknown, body: Buffer): void {
  (request as ExpressRequest).rawBody = body
}

/**
 * A middleware that protects the routes it is given to.
 *
 * @param options whose request it is, and so on
 * @throws TypeError, at once, if the options make no sense
 */
export function idempotent<Tx, Request extends ExpressRequest = any> (idempotency: Idempotency<Tx>, options: ExpressOptions<Request>): (request: Request, response: ServerResponse, next: (error?: any) => void) => void {
  const protection = new HttpProtection<Tx, Request>(idempotency, options)
  const limit = options.maxBody ?? 1024 * 1024

  return (request, response, next) => {
    protect(request, response, next).catch(next)
  }

  async function protect (raw: Request, response: ServerResponse, next: (error?: any) => void): Promise<void> {
    const request = requestOf(raw, { route: routeOf(raw), params: raw.params, query: raw.query, body: null })
    const key = keyOrProblem(protection, request, response)
    if (key === undefined) return
    if (key === null) return next()
    const came = await bodyOf(raw, limit, options.fingerprint !== undefined)
    if (came === null) return sendTooLarge(response)
    Object.assign(request, came)
    await handleCaptured(protection, request, key, response, work => {
      raw.idempotency = work
      next()
    })
  }
}

/** The template of the route, where the middleware belongs to one; else the path. */
function routeOf (request: ExpressRequest): string {
  return request.baseUrl + (typeof request.route?.path === 'string' ? request.route.path : request.path)
}

/**
 * The body as it came: from a parser that has kept it, or read now.
 *
 * @returns null if it is too large
 * @throws Error if a parser has read it and not kept it; with status 415 if it is compressed
 */
async function bodyOf (request: ExpressRequest, limit: number, notCompared: boolean): Promise<Pick<HttpRequest, 'body' | 'parsed'> | null> {
  if (request.rawBody !== undefined) return { body: request.rawBody }
  if (request.readableEnded || request.body !== undefined) {
    if (notCompared || !mayHaveBody(request.headers)) return { body: null }
    throw new Error('the body was parsed before the idempotency middleware could see it as it came: ' +
      'give the parser `verify: keepRawBody`, or put the middleware before it')
  }
  if (isEncoded(request.headers['content-encoding'])) throw Object.assign(new Error('the body is encoded, which takes a parser with `verify: keepRawBody`'), { status: 415 })
  const body = await readBody(request, limit)
  if (body === null) return null
  request.rawBody = request.body = body
  if (body.length === 0 || !isJson(request.headers['content-type'])) return { body }
  const text = textOf(body)
  try {
    request.body = JSON.parse(text)
    return { body: text, parsed: true }
  } catch {
    return { body } // the fingerprint says that it is no JSON
  }
}

function isEncoded (encoding: string | undefined): boolean {
  return encoding !== undefined && encoding.toLowerCase() !== 'identity'
}
