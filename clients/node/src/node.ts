/** Protecting handlers of `node:http`. */

import type { IncomingMessage, ServerResponse } from 'node:http'
import { handleCaptured, keyOrProblem, readBody, requestOf, sendTooLarge } from './capture.js'
import { HttpProtection } from './http.js'
import type { HttpOptions, Protected } from './http.js'
import type { Idempotency } from './idempotency.js'

export interface NodeOptions extends HttpOptions<IncomingMessage> {
  /** The template of the route, such as `/orders/:id`; by default the path as it is. */
  route?: string
  /** The largest body of a request, in bytes; 1 MB by default. Larger ones are answered with 413. */
  maxBody?: number
}

/** What a handler gets beside request and response. */
export interface NodeWork<Tx> {
  /** The body of the request, which has been read already. */
  body: Buffer
  /** The request's claim; null if it is not protected. */
  work: Protected<Tx> | null
}

/**
 * Have a handler's answer kept, and sent once it is committed.
 *
 * What the handler writes to the response is collected. What it throws, or a rejection, rolls back and is
 * passed on; the response is then as it was before.
 *
 * @returns a handler for `http.createServer`
 */
export function idempotentHandler<Tx> (
  idempotency: Idempotency<Tx>,
  options: NodeOptions,
  handler: (request: IncomingMessage, response: ServerResponse, work: NodeWork<Tx>) => unknown
): (request: IncomingMessage, response: ServerResponse) => Promise<void> {
  const protection = new HttpProtection<Tx, IncomingMessage>(idempotency, options)
  const limit = options.maxBody ?? 1024 * 1024

  return async (raw, response) => {
    const url = new URL(raw.url ?? '/', 'http://localhost')
    const body = await readBody(raw, limit)
    if (body === null) return sendTooLarge(response)
    const request = requestOf(raw, { route: options.route ?? url.pathname, params: {}, query: queryOf(url, options.route), body })
    const key = keyOrProblem(protection, request, response)
    if (key === undefined) return
    if (key === null) await handler(raw, response, { body, work: null })
    else await handleCaptured(protection, request, key, response, work => handler(raw, response, { body, work }))
  }
}

/** With a template, the path's parameters are unknown, so the whole path counts. */
function queryOf (url: URL, route: string | undefined): Record<string, unknown> {
  const query: Record<string, unknown> = Object.create(null)
  for (const name of url.searchParams.keys()) query[name] = url.searchParams.getAll(name)
  return route === undefined ? query : { ...query, '': url.pathname }
}
