/**
 * What tells a repeat from a different request: the parameters of the path and the query, and the body's
 * text as it came.
 *
 * The text and not what a parser made of it, since parsers round: 9007199254740993 is ...992 in
 * JavaScript, and two requests would be one. The database compares JSON as `jsonb`, so that the order of
 * members and white space do not count. The text is put into a larger one, so it has to be JSON by itself
 * first: `1, "params": {}` is none.
 */

import { createHash } from 'node:crypto'
import { RequestInvalidError } from '../errors.js'
import { JsonRequest } from '../types.js'
import type { Request } from '../types.js'
import { isJson, jsonText, textOf } from './message.js'
import type { HttpRequest } from './message.js'

/**
 * @param omit paths of what does not count, from `params`, `query` or `body`, such as `['body', 'sent_at']`
 * @throws RequestInvalidError if the body should be JSON and is not
 */
export function fingerprintOf (request: HttpRequest, omit: ReadonlyArray<readonly string[]>): Request {
  const { params, query, body, parsed } = request
  const place = isEmpty(params) && isEmpty(query) ? '{}' : JSON.stringify({ params: orNothing(params), query: orNothing(query) })
  if (body === null || body.length === 0) return new JsonRequest(place, omit)

  const type = request.header('content-type')[0]
  if (isJson(type) && request.header('content-encoding').length === 0) {
    const text = parsed ? textOf(body) : jsonText(body)
    if (text === null) throw new RequestInvalidError('the body is not JSON')
    return new JsonRequest(`${place.slice(0, -1)}${place === '{}' ? '' : ','}"body":${text}}`, omit)
  }
  const kind = type?.split(';', 1)[0]?.trim().toLowerCase() ?? ''
  return createHash('sha256').update(JSON.stringify([place, kind])).update(body).digest()
}

/** @param paths such as `body.sent_at`, or as lists of names where a name has a dot */
export function pathsOf (paths: ReadonlyArray<string | readonly string[]>): ReadonlyArray<readonly string[]> {
  return paths.map(path => {
    const names = typeof path === 'string' ? path.split('.') : path
    if (!['params', 'query', 'body'].includes(names[0] ?? '')) {
      throw new TypeError(`a path that is left out begins with params, query or body, not "${names[0]}"`)
    }
    return names
  })
}

function orNothing<T extends object> (value: T): T | undefined {
  return isEmpty(value) ? undefined : value
}

function isEmpty (value: object): boolean {
  for (const _ in value) return false
  return true
}
