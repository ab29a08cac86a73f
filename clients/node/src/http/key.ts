/**
 * The key that a client sends in a header.
 *
 * A header that is empty is missing. One that was sent twice is refused: Node joins the two, which makes a
 * key that nobody has sent. The draft of the IETF writes the key in quotes, most APIs do not: they are
 * taken off, so that both are one key.
 */

import { KeyInvalidError, KeyMissingError } from '../errors.js'
import type { HttpRequest } from './message.js'

/** The form of a key. */
export interface KeyForm {
  /** `ascii` (visible characters, the default), `slug` (letters, digits, `-`, `_`), `uuid`, or a pattern of your own. */
  format?: 'ascii' | 'slug' | 'uuid' | RegExp
  /** In characters; 1 by default. */
  minLength?: number
  /** In characters; 255 by default, which the extension allows. */
  maxLength?: number
}

const formats = {
  ascii: /^[\x21-\x7e]+$/,
  slug: /^[A-Za-z0-9_-]+$/,
  uuid: /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/i
}

/**
 * @param names the names of headers that may carry the key, in lower case
 * @returns the key, or null if there is none
 * @throws KeyInvalidError
 */
export function keyOf (request: HttpRequest, names: readonly string[], form: KeyForm): string | null {
  let key: string | undefined
  for (const name of names) {
    for (const value of request.header(name)) {
      const sent = unquoted(value)
      if (sent === '') continue
      if (key !== undefined) throw new KeyInvalidError('the header was sent more than once')
      key = sent
    }
  }
  if (key === undefined) return null

  const { format = 'ascii', minLength = 1, maxLength = 255 } = form
  if (key.length < minLength || key.length > maxLength) {
    throw new KeyInvalidError(`the key must have ${minLength} to ${maxLength} characters`)
  }
  if (key.search(format instanceof RegExp ? format : formats[format]) === -1) {
    throw new KeyInvalidError(format instanceof RegExp ? 'the key does not have the form that it must have' : `the key must have the form "${format}"`)
  }
  return key
}

export function keyMissing (name: string): KeyMissingError {
  return new KeyMissingError(`the header ${name} is missing`)
}

function unquoted (value: string): string {
  const text = value.trim()
  return text.length >= 2 && text.startsWith('"') && text.endsWith('"') ? text.slice(1, -1).trim() : text
}
