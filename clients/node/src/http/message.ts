/** Requests and answers of HTTP, as all frameworks' adapters make and take them. */

import type { IncomingHttpHeaders } from 'node:http'
import type { Headers } from '../types.js'

/** A request, as far as it has to be looked at. `Raw` is the framework's own object. */
export interface HttpRequest<Raw = unknown> {
  raw: Raw
  method: string
  /** The template of the route, such as `/orders/:id`. */
  route: string
  /** Parameters of the path. */
  params: Readonly<Record<string, unknown>>
  /** Parameters of the query. */
  query: Readonly<Record<string, unknown>>
  /** All values of a header field, one for each time that it was sent. @param name in lower case */
  header (name: string): string[]
  /** The body as it came; null if there is none. */
  body: Uint8Array | string | null
  /** Whether somebody has parsed the body as JSON already, so that it need not be done again. */
  parsed?: boolean
}

/** An answer, complete. The names of header fields are in lower case. */
export interface HttpAnswer {
  status: number
  headers: Headers
  body: Uint8Array | string | null
}

/** Whether a content type is JSON: `application/json`, `application/problem+json` and the like. */
export function isJson (contentType: string | undefined): boolean {
  return contentType !== undefined && /^[^;]*[/+]json\s*(?:;|$)/i.test(contentType)
}

/** The values of a header field, one for each time that it was sent: Node's `headers` join them. @param name in lower case */
export function valuesOf (rawHeaders: readonly string[], name: string): string[] {
  const values: string[] = []
  for (let n = 0; n < rawHeaders.length; n += 2) {
    const sent = rawHeaders[n] as string
    if (sent.length === name.length && sent.toLowerCase() === name) values.push(rawHeaders[n + 1] as string)
  }
  return values
}

/** Whether a request of `node:http` says that a body comes with it. */
export function mayHaveBody (headers: IncomingHttpHeaders): boolean {
  return headers['transfer-encoding'] !== undefined || Number(headers['content-length'] ?? 0) > 0
}

/** A body as text. */
export function textOf (body: Uint8Array | string): string {
  if (typeof body === 'string') return body
  return (Buffer.isBuffer(body) ? body : Buffer.from(body.buffer, body.byteOffset, body.byteLength)).toString('utf8')
}

/** The text of JSON, or null where it is not JSON after all. */
export function jsonText (body: Uint8Array | string): string | null {
  const text = textOf(body)
  try {
    JSON.parse(text)
    return text
  } catch {
    return null
  }
}
