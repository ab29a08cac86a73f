/**
 * Answers of HTTP and what is kept of them.
 *
 * JSON is kept as its text and everything else as bytes, so that a replay has the same bytes. Of the header
 * fields only those are kept that belong to the answer. A cookie, a log-in or a date belongs to one
 * connection at one time, and is never kept.
 */

import type { Answer, Headers, Result } from '../types.js'
import { isJson, jsonText } from './message.js'
import type { HttpAnswer } from './message.js'

/** Kept with every answer. What the content is encoded in has to be, for the body is kept encoded. */
const always = ['content-type', 'location', 'etag', 'link', 'content-encoding']

const never = /^(?:set-cookie2?|date|age|authorization|www-authenticate|proxy-authenticate|authentication-info|connection|keep-alive|transfer-encoding|content-length|.*rate-?limit.*|retry-after|.*request-id|.*correlation-id|traceparent|tracestate|access-control-.*)$/

/** Not worth to be kept, for it is what a replay of JSON has by default. */
const JSON_TYPE = 'application/json; charset=utf-8'

/**
 * The names of header fields that are kept.
 *
 * @param added by the service
 * @throws TypeError if one of them must not be replayed
 */
export function keptHeaders (added: readonly string[]): ReadonlySet<string> {
  const names = added.map(name => name.toLowerCase())
  const wrong = names.find(name => never.test(name))
  if (wrong !== undefined) throw new TypeError(`the header ${wrong} must not be replayed`)
  return new Set([...always, ...names])
}

/** What is kept of an answer. */
export function answerOf ({ status, headers, body }: HttpAnswer, kept: ReadonlySet<string>): Answer {
  const type = headers['content-type']
  const contentType = typeof type === 'string' ? type : type?.[0]
  const text = body !== null && body.length > 0 && headers['content-encoding'] === undefined && isJson(contentType) ? jsonText(body) : null

  let some: Headers | null = null
  for (const name of kept) {
    const value = headers[name]
    if (value === undefined || (name === 'content-type' && text !== null && value === JSON_TYPE)) continue
    some ??= {}
    some[name] = value
  }
  return {
    status,
    headers: some,
    ...(text !== null ? { rawJson: text } : { body: body !== null && body.length > 0 ? body : null })
  }
}

/** A kept answer, as it is sent again. */
export function replayOf ({ status, headers, rawJson, body }: Result): HttpAnswer {
  return {
    status,
    headers: rawJson !== null ? { 'content-type': JSON_TYPE, ...headers } : { ...headers },
    body: rawJson ?? body
  }
}
