/**
 * Collecting what a handler writes to a response of `node:http`, instead of sending it.
 *
 * The methods that send are replaced on the response itself, so that Express and anything else that is
 * built on it is collected as well. Header fields stay on the response until the answer is sent: those that
 * were set before, by a middleware for CORS for example, belong to every answer, so they are put back when
 * another answer has to be sent.
 */

import type { IncomingMessage, OutgoingHttpHeader, OutgoingHttpHeaders, ServerResponse } from 'node:http'
import { IdempotencyError } from './errors.js'
import { answerTooLarge } from './http.js'
import type { Handled, HttpAnswer, HttpProtection, HttpRequest, Protected } from './http.js'
import { valuesOf } from './http/message.js'
import type { Headers } from './types.js'

/** The request of `node:http` as the HTTP layer takes it. */
export function requestOf<Raw extends IncomingMessage> (raw: Raw, place: { route: string, params: object, query: object, body: Uint8Array | string | null }): HttpRequest<Raw> {
  return {
    raw,
    method: raw.method ?? '',
    route: place.route,
    params: place.params as Record<string, unknown>,
    query: place.query as Record<string, unknown>,
    header: name => valuesOf(raw.rawHeaders, name),
    body: place.body
  }
}

/**
 * Read the body of a request.
 *
 * @param limit in bytes
 * @returns the body, or null if it is larger
 */
export async function readBody (request: IncomingMessage, limit: number): Promise<Buffer | null> {
  if (request.readableEnded) return Buffer.alloc(0)
  return await new Promise((resolve, reject) => {
    const chunks: Buffer[] = []
    let size = 0
    request.on('data', (chunk: Buffer) => {
      size += chunk.length
      if (size > limit) {
        request.pause()
        resolve(null)
      } else {
        chunks.push(chunk)
      }
    })
    request.on('end', () => resolve(chunks.length === 1 ? chunks[0] as Buffer : Buffer.concat(chunks)))
    request.on('error', reject)
    request.on('close', () => {
      if (!request.readableEnded) reject(new Error('the client has hung up'))
    })
  })
}

/**
 * The key of a request.
 *
 * @returns null if the request is not protected; undefined if its key is wrong, which it has been told
 */
export function keyOrProblem<Raw> (protection: HttpProtection<any, Raw>, request: HttpRequest<Raw>, response: ServerResponse): string | null | undefined {
  try {
    return protection.admit(request)
  } catch (error) {
    if (!(error instanceof IdempotencyError)) throw error
    sendAnswer(response, protection.problem(error))
    return undefined
  }
}

/**
 * Have a request handled by what writes to its response, and send what is to be sent.
 *
 * @param handle begins to handle the request; what it throws or rejects with rolls back
 * @throws what `handle` throws; the response is then as it was before
 */
export async function handleCaptured<Tx, Raw> (
  protection: HttpProtection<Tx, Raw>,
  request: HttpRequest<Raw>,
  key: string,
  response: ServerResponse,
  handle: (work: Protected<Tx>) => unknown
): Promise<void> {
  const collected = new Capture(response, protection.maxAnswer)
  try {
    const answer = await protection.run(request, key, async work => {
      Promise.resolve(handle(work)).catch(error => collected.fail(error))
      return await collected.answer
    })
    collected.send(answer)
  } catch (error) {
    collected.abandon()
    throw error
  }
}

/** Tell a client that the body of its request is too large; what is left of it is not read. */
export function sendTooLarge (response: ServerResponse): void {
  response.setHeader('connection', 'close')
  sendAnswer(response, { status: 413, headers: {}, body: null })
}

/** Where a response has what is collected of it. */
const capture = Symbol('capture')

interface CapturedResponse extends ServerResponse {
  [capture]: Capture
}

/** The answer that a handler is writing. */
class Capture {
  readonly #response: CapturedResponse
  readonly #limit: number
  readonly #before: OutgoingHttpHeaders
  readonly #status: number
  readonly #message: string
  /** The reason phrase that the handler has given with its answer. */
  #ownMessage = ''
  readonly #outer: Capture | undefined
  readonly #methods: Pick<ServerResponse, 'writeHead' | 'write' | 'end' | 'flushHeaders' | 'destroy'>
  #chunks: Array<Buffer | string> = []
  #size = 0
  #ended = false
  #resolve!: (answer: HttpAnswer) => void
  #reject!: (error: unknown) => void

  /** The answer, as soon as the handler has ended it. */
  readonly answer: Promise<HttpAnswer>

  /** @param limit the largest answer, in bytes */
  constructor (response: ServerResponse, limit: number) {
    this.#response = response as CapturedResponse
    this.#limit = limit
    this.#before = response.getHeaders()
    this.#status = response.statusCode
    this.#message = response.statusMessage
    this.#outer = this.#response[capture]
    this.answer = new Promise((resolve, reject) => {
      this.#resolve = resolve
      this.#reject = reject
    })
    this.answer.catch(() => {})

    const { writeHead, write, end, flushHeaders, destroy } = response
    this.#methods = { writeHead, write, end, flushHeaders, destroy }
    this.#response[capture] = this
    Object.assign(response, collecting)
  }

  /** What the handler threw, where it is us who called it. */
  fail (error: unknown): void {
    this.#reject(error)
  }

  /**
   * Send an answer: that of the handler, once it is committed, or another one. What the response has by now
   * does not count: the handler may have gone on, and begun another answer.
   */
  send (answer: Handled): void {
    const response = this.#response
    this.abandon()
    if (response.headersSent || response.destroyed) return // the client has hung up
    if (answer.own) {
      response.statusMessage = this.#ownMessage
      for (const name of response.getHeaderNames()) response.removeHeader(name)
    }
    response.on('error', () => {}) // a handler that still writes
    sendAnswer(response, answer.own ? answer : exposingAlso(response, answer))
  }

  /** Give the response back as it was before anything was collected. */
  abandon (): void {
    const response = this.#response
    Object.assign(response, this.#methods)
    response[capture] = this.#outer as Capture
    if (response.headersSent) return
    response.statusCode = this.#status
    response.statusMessage = this.#message
    for (const name of response.getHeaderNames()) response.removeHeader(name)
    for (const [name, value] of Object.entries(this.#before)) if (value !== undefined) response.setHeader(name, value)
  }

  /** Collect a piece of the body. */
  add (chunk: unknown, encoding: unknown): void {
    if (this.#ended) return
    const data = pieceOf(chunk, encoding)
    this.#size += Buffer.byteLength(data)
    if (this.#size > this.#limit) {
      this.#ended = true
      this.#reject(answerTooLarge(this.#limit))
      return
    }
    this.#chunks.push(data)
  }

  /** The answer is complete. */
  end (): void {
    if (this.#ended) return
    this.#ended = true
    this.#ownMessage = this.#response.statusMessage
    const [first = null] = this.#chunks
    this.#resolve({
      status: this.#response.statusCode,
      headers: this.#response.getHeaders() as Headers,
      body: this.#chunks.length <= 1 ? first : Buffer.concat(this.#chunks.map(chunk => Buffer.from(chunk as string)))
    })
  }
}

/** An answer that names the headers which a middleware for CORS has named as well. */
function exposingAlso (response: ServerResponse, answer: HttpAnswer): HttpAnswer {
  const name = 'access-control-expose-headers'
  const [named, ours] = [response.getHeader(name), answer.headers[name]]
  if (named === undefined || ours === undefined) return answer
  return { ...answer, headers: { ...answer.headers, [name]: [named, ours].flat().join(', ') } }
}

/** The methods of a response while it is collected. */
const collecting = {
  writeHead (this: CapturedResponse, status: number, ...rest: unknown[]): CapturedResponse {
    const [first, second] = rest
    this.statusCode = status
    if (typeof first === 'string') this.statusMessage = first
    const headers = (typeof first === 'string' ? second : first) as OutgoingHttpHeaders | OutgoingHttpHeader[] | undefined
    if (Array.isArray(headers)) {
      for (let n = 0; n < headers.length; n += 2) this.setHeader(String(headers[n]), headers[n + 1] as OutgoingHttpHeader)
    } else {
      for (const name in headers) this.setHeader(name, headers[name] as OutgoingHttpHeader)
    }
    return this
  },

  write (this: CapturedResponse, chunk: unknown, encoding?: unknown, callback?: unknown): boolean {
    this[capture].add(chunk, encoding)
    called(encoding, callback)
    return true
  },

  end (this: CapturedResponse, chunk?: unknown, encoding?: unknown, callback?: unknown): CapturedResponse {
    if (typeof chunk !== 'function' && chunk !== undefined && chunk !== null) this[capture].add(chunk, encoding)
    called(chunk, encoding, callback)
    this[capture].end()
    return this
  },

  flushHeaders (): void {},

  destroy (this: CapturedResponse, error?: Error): CapturedResponse {
    this[capture].fail(error ?? new Error('the response was destroyed'))
    return this
  }
}

/** A piece of a body: text stays text, which spares turning it into bytes and back. */
function pieceOf (chunk: unknown, encoding: unknown): Buffer | string {
  if (typeof chunk !== 'string') return Buffer.from(chunk as Uint8Array)
  return typeof encoding !== 'string' || /^utf-?8$/i.test(encoding) ? chunk : Buffer.from(chunk, encoding as BufferEncoding)
}

/** Call the callback among the last arguments of write or end, as they would. */
function called (...args: unknown[]): void {
  const callback = args.find(arg => typeof arg === 'function') as (() => void) | undefined
  if (callback) process.nextTick(callback)
}

/** Send an answer as a whole. Header fields that the response has already, and the answer has not, stay. */
export function sendAnswer (response: ServerResponse, answer: HttpAnswer): void {
  response.statusCode = answer.status
  for (const [name, value] of Object.entries(answer.headers)) response.setHeader(name, value)
  endWith(response, answer)
}

function endWith (response: ServerResponse, { status, body }: HttpAnswer): void {
  if (status === 204 || status === 304 || response.req.method === 'HEAD') {
    response.end()
  } else {
    response.removeHeader('transfer-encoding')
    if (!response.hasHeader('content-length')) response.setHeader('content-length', body === null ? 0 : Buffer.byteLength(body))
    response.end(body ?? undefined)
  }
}
