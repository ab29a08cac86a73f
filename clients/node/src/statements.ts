/**
 * The statements that the client sends, each a call of one function of the extension.
 *
 * A statement names only the arguments that it has, so that the few forms which an application really
 * uses are prepared once in each connection. Every `$n` comes once and in order, as some ORMs put `?` in
 * their places. JSON goes as a text that is cast, since some drivers would make JSON of a text once more.
 * Results are read as text where drivers would make something else of them: a replayed answer is the same
 * bytes.
 */

import { createHash } from 'node:crypto'
import { JsonRequest } from './types.js'
import type { Answer, Headers, Outcome, Recovery, Request, Result, Row, Scope, Statement, Status } from './types.js'

/** An argument: its name in SQL, its type where drivers have to be told, and its value. */
type Argument = [name: string, type: string, value: unknown]

const ANSWER = 'outcome, status_code, response::text AS response, headers::text AS headers, encode(body, \'hex\') AS body, retry_after'
const LEASE = `${ANSWER}, attempt, recovery_point, recovery_state::text AS recovery_state`
const LOOK = `${LEASE}, ${['created_at', 'finished_at', 'expires_at']
  .map(name => `to_char(${name} AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"') AS ${name}`).join(', ')}`

/** A statement without its values: each form is made once. */
interface Form {
  name: string
  text: string
}

/** What is compared: the argument `request` or `request_hash`, and an expression where parts are left out. */
function fingerprint (request: Request): { argument: Argument, omit: JsonRequest['omit'] } | null {
  if (request === null || request === undefined) return null
  if (request instanceof Uint8Array) return { argument: ['request_hash', 'bytea', request], omit: [] }
  if (request instanceof JsonRequest) return { argument: ['request', 'text::jsonb', request.text], omit: request.omit }
  const text = typeof request === 'string' ? request : JSON.stringify(request)
  return { argument: ['request', 'text::jsonb', text], omit: [] }
}

function quoteIdentifier (name: string): string {
  return `"${name.replaceAll('"', '""')}"`
}

/** A text array as PostgreSQL writes one: drivers differ in what they make of an array. */
function arrayText (values: readonly string[]): string {
  return `{${values.map(value => `"${value.replace(/["\\]/g, '\\$&')}"`).join(',')}}`
}

/** A literal without characters that some driver takes for a placeholder. */
function quoteLiteral (value: string): string {
  return `E'${value.replace(/[!-+\-./:-@[-^`|~]/g, character => `\\x${character.charCodeAt(0).toString(16).padStart(2, '0')}`)}'`
}

/** The calls, in the schema of the extension. */
export class Statements {
  readonly #schema: string
  /** By the name of the call and which of its arguments have a value. */
  readonly #forms = new Map<string, Form>()

  /** @param schema the schema of the extension */
  constructor (schema: string) {
    this.#schema = quoteIdentifier(schema)
  }

  /** A call with the arguments that have a value; those before `named` by their position. */
  #call (columns: string, name: string, named: number, all: Argument[], omit: JsonRequest['omit'] = []): Statement {
    const values: unknown[] = []
    let which = name
    for (let position = 0; position < all.length; position++) {
      const [argument, , value] = all[position] as Argument
      if (position >= named) {
        if (value === null || value === undefined) continue
        which += argument
      }
      values.push(value ?? null)
    }
    if (omit.length > 0) which += JSON.stringify(omit)
    let form = this.#forms.get(which)
    if (form === undefined) {
      form = this.#form(columns, name, named, all, omit)
      this.#forms.set(which, form)
    }
    return { name: form.name, text: form.text, values }
  }

  #form (columns: string, name: string, named: number, all: Argument[], omit: JsonRequest['omit']): Form {
    const list = all.filter(([,, value], position) => position < named || (value !== null && value !== undefined))
      .map(([argument, type], position) => {
        const left = argument === 'request' ? omit.map(path => ` #- ${quoteLiteral(arrayText(path))}`).join('') : ''
        return `${position < named ? '' : `${argument} => `}$${position + 1}::${type}${left}`
      })
    const text = `SELECT ${columns} FROM ${this.#schema}.${name}(${list.join(', ')})`
    return { name: `idempotency_${createHash('sha256').update(text).digest('hex').slice(0, 24)}`, text }
  }

  #scope ({ tenant, action, key }: Scope): Argument[] {
    return [['tenant', 'text', tenant], ['action', 'text', action], ['key', 'text', key]]
  }

  begin (scope: Scope, request: Request, wait?: string | null): Statement {
    const compared = fingerprint(request)
    return this.#call(ANSWER, 'idempotency_try_begin', 3, [...this.#scope(scope),
      ...(compared ? [compared.argument] : []),
      ['actor', 'text', scope.actor], ['wait', 'interval', wait]], compared?.omit)
  }

  beginLease (scope: Scope, request: Request, lease: string, claim: string): Statement {
    const compared = fingerprint(request)
    return this.#call(LEASE, 'idempotency_try_begin', 3, [...this.#scope(scope),
      ...(compared ? [compared.argument] : []),
      ['actor', 'text', scope.actor],
      ['lease', 'interval', lease], ['claim', 'uuid', claim]], compared?.omit)
  }

  finish (scope: Scope, answer: KeptAnswer, claim?: string): Statement {
    return this.#call('idempotency_finish AS outcome', 'idempotency_finish', 5, [...this.#scope(scope),
      ['status_code', 'int', answer.status], ['response', 'text::json', answer.rawJson],
      ['headers', 'text::jsonb', answer.headers && JSON.stringify(answer.headers)],
      ['actor', 'text', scope.actor], ['claim', 'uuid', claim],
      ['body', 'bytea', answer.body], ['ttl', 'interval', answer.ttl]])
  }

  store (scope: Scope, request: Request, answer: KeptAnswer): Statement {
    const compared = fingerprint(request)
    const hash = compared?.argument[0] === 'request_hash'
    return this.#call(ANSWER, 'idempotency_store', 6, [...this.#scope(scope),
      ['request', 'text::jsonb', compared && !hash ? compared.argument[2] : null],
      ['status_code', 'int', answer.status], ['response', 'text::json', answer.rawJson],
      ['headers', 'text::jsonb', answer.headers && JSON.stringify(answer.headers)],
      ['actor', 'text', scope.actor], ['body', 'bytea', answer.body], ['ttl', 'interval', answer.ttl],
      ['request_hash', 'bytea', hash ? compared.argument[2] : null]], compared?.omit)
  }

  replay (scope: Scope, request: Request): Statement {
    const compared = fingerprint(request)
    return this.#call(LOOK, 'idempotency_replay', 3, [...this.#scope(scope),
      ...(compared ? [compared.argument] : []), ['actor', 'text', scope.actor]], compared?.omit)
  }

  checkpoint (scope: Scope, claim: string, point: string, state: unknown, lease?: string | null): Statement {
    return this.#call('idempotency_checkpoint::text AS lease_ends_at', 'idempotency_checkpoint', 5, [...this.#scope(scope),
      ['claim', 'uuid', claim], ['recovery_point', 'text', point],
      ['recovery_state', 'text::jsonb', state === undefined ? null : JSON.stringify(state)],
      ['lease', 'interval', lease], ['actor', 'text', scope.actor]])
  }

  release (scope: Scope, claim?: string): Statement {
    return this.#call('idempotency_release AS released', 'idempotency_release', 3, [...this.#scope(scope),
      ['actor', 'text', scope.actor], ['claim', 'uuid', claim]])
  }

  firstSeen (tenant: string | null, consumer: string, ids: readonly string[], ttl?: string | null): Statement {
    return this.#call('idempotency_first_seen AS id', 'idempotency_first_seen', 3, [
      ['tenant', 'text', tenant], ['consumer', 'text', consumer], ['message_ids', 'text[]', arrayText(ids)],
      ['ttl', 'interval', ttl]])
  }
}

/** An answer as the functions of the extension take it. */
export interface KeptAnswer {
  status: number
  rawJson: string | null
  body: Uint8Array | null
  headers: Headers | null
  ttl: string | null
  commit: boolean
}

const ANSWER_MEMBERS = new Set(['status', 'json', 'rawJson', 'body', 'headers', 'ttl', 'commit',
  'outcome', 'replayed'])

/**
 * What the work returned, as the functions of the extension take it.
 *
 * @throws TypeError if it is no answer: a value that was returned by mistake is not to be kept as one
 */
export function keptAnswer (answer: Answer | Result | undefined | void): KeptAnswer {
  if (answer === undefined) return { status: 200, rawJson: null, body: null, headers: null, ttl: null, commit: false }
  if (typeof answer !== 'object' || answer === null) throw new TypeError(`an answer is an object, not ${JSON.stringify(answer)}`)
  for (const member in answer) {
    if (!ANSWER_MEMBERS.has(member)) {
      throw new TypeError(`an answer has no member "${member}": give what is to be kept as { json: ... }`)
    }
  }
  const { status = 200, headers = null, ttl = null, commit = false } = answer as Answer
  let { rawJson = null, body = null } = answer as Answer
  if (!Number.isInteger(status) || status < 100 || status > 599) throw new RangeError(`the status of an answer is from 100 to 599, not ${status}`)
  if (rawJson === null && body === null && (answer as Answer).json !== undefined) rawJson = JSON.stringify((answer as Answer).json) ?? null
  if (rawJson !== null && body !== null) throw new TypeError('an answer has JSON or a body, not both')
  if (typeof body === 'string') body = Buffer.from(body)
  return { status, rawJson, body, headers, ttl, commit }
}

class ResultOf implements Result {
  readonly replayed: boolean
  constructor (
    readonly outcome: Outcome,
    readonly status: number,
    readonly rawJson: string | null,
    readonly body: Uint8Array | null,
    readonly headers: Headers | null
  ) {
    this.replayed = outcome === 'replayed'
  }

  get json (): any {
    return this.rawJson === null ? undefined : JSON.parse(this.rawJson)
  }
}

/** The answer of this request. */
export function resultOfAnswer (outcome: Outcome, { status, rawJson, body, headers }: KeptAnswer): Result {
  return new ResultOf(outcome, status, rawJson, body, headers)
}

/** The answer in a row, as a driver or as the wire has it. */
export function resultOfRow (row: Row): Result {
  const headers = row['headers'] ?? null
  return new ResultOf(row['outcome'], Number(row['status_code']), row['response'] ?? null,
    bytesOf(row['body']), typeof headers === 'string' ? JSON.parse(headers) : headers)
}

function bytesOf (hex: string | null | undefined): Uint8Array | null {
  return hex === null || hex === undefined ? null : Buffer.from(hex, 'hex')
}

export function recoveryOfRow (row: Row): Recovery | null {
  if (row['recovery_point'] === null || row['recovery_point'] === undefined) return null
  const state = row['recovery_state'] ?? null
  return { point: row['recovery_point'], state: typeof state === 'string' ? JSON.parse(state) : state }
}

export function statusOfRow (row: Row): Status {
  const number = (name: string): number | null => row[name] === null ? null : Number(row[name])
  const date = (name: string): Date | null => row[name] === null ? null : new Date(row[name])
  return {
    outcome: row['outcome'],
    result: row['outcome'] === 'replayed' ? resultOfRow(row) : null,
    retryAfter: number('retry_after'),
    attempt: number('attempt'),
    recoveryPoint: row['recovery_point'],
    createdAt: date('created_at'),
    finishedAt: date('finished_at'),
    expiresAt: date('expires_at')
  }
}
