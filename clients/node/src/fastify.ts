/**
 * Protecting routes of Fastify 5.
 *
 *     await app.register(idempotencyPlugin, { idempotency, actor: request => request.user.id })
 *     app.post('/orders', { config: { idempotency: true } }, createOrder)
 *
 * The handler of a protected route runs inside the request's transaction: it begins when all that comes
 * before the handler is done, so that a route's own authentication comes first, and it is committed in an
 * onSend hook, before anything is sent. Whatever reaches that hook is the answer, also what an error handler
 * has made of an error: a 4xx is kept while the rows are rolled back, a 5xx is not kept.
 *
 * Replays and problems are sent with `reply.send`, so that other plugins (CORS, compression) see them as
 * they see any other reply.
 *
 * The hard part is a handler of which no reply reaches the hook:
 *
 * - It forgets `return reply` after `reply.send`. Fastify would then send a second, empty reply while the
 *   first one is being committed. So it is told `return reply` in the handler's place.
 * - The client has hung up, and the handler returns nothing. Fastify would not send a reply to nobody; but
 *   it is to be kept, so it is sent.
 * - It writes to `reply.raw`, after `reply.hijack` or without. What it wrote cannot be kept, so when the
 *   response is closed the transaction is rolled back, with a warning in the log.
 * - It never replies, and the client has hung up. The transaction ends after the `handlerTimeout` of the
 *   route; without one, nobody can tell it from a handler that is still at work.
 */

import { Readable, finished } from 'node:stream'
import type { FastifyInstance, FastifyPluginAsync, FastifyReply, FastifyRequest, RouteOptions } from 'fastify'
import { IdempotencyError, Refusal, isConflict } from './errors.js'
import { HttpProtection, answerTooLarge } from './http.js'
import type { Handled, HttpAnswer, HttpOptions, HttpRequest, Protected } from './http.js'
import { mayHaveBody, valuesOf } from './http/message.js'
import type { Idempotency } from './idempotency.js'
import type { Headers } from './types.js'

declare module 'fastify' {
  interface FastifyRequest {
    /** The claim of a protected request while its handler runs, else null. */
    idempotency: Protected<any> | null
  }
  interface FastifyContextConfig {
    /** Whether the route is protected, or how: what differs from the options of the plugin. */
    idempotency?: boolean | Partial<HttpOptions<FastifyRequest>>
  }
}

export interface IdempotencyPluginOptions extends HttpOptions<FastifyRequest> {
  /** The client, as `createIdempotency` makes it. */
  idempotency: Idempotency<any>
  /** Protect all routes that do not say `config: { idempotency: false }`; false by default. */
  global?: boolean
  /** Warn of repeats, and of keys that are used twice, in the log of the request; true by default. */
  log?: boolean
}

/**
 * The plugin. Like one of `fastify-plugin`, it acts on the instance that it is registered on, and is to be
 * loaded (`await app.register`) before the routes are defined.
 *
 * @throws TypeError if the options make no sense; Error if it is registered twice
 */
export const idempotencyPlugin: FastifyPluginAsync<IdempotencyPluginOptions> = Object.assign(register, {
  [Symbol.for('skip-override')]: true,
  [Symbol.for('fastify.display-name')]: 'pg-idempotency',
  [Symbol.for('plugin-meta')]: { name: 'pg-idempotency', fastify: '5.x' }
})

export default idempotencyPlugin

async function register (fastify: FastifyInstance, { idempotency, global = false, log = true, ...options }: IdempotencyPluginOptions): Promise<void> {
  if (fastify.hasRequestDecorator('idempotency')) {
    throw new Error('the idempotency plugin is registered twice; say what differs in the config of the route')
  }
  const common = new HttpProtection(idempotency, options)
  fastify.decorateRequest('idempotency', null)

  fastify.addHook('onRoute', route => {
    const own = route.config?.idempotency ?? global
    if (own === false) return
    const protection = own === true ? common : new HttpProtection(idempotency, { ...options, ...own })
    route.config = { ...route.config, [mark]: true } as NonNullable<typeof route.config>
    if ([route.method].flat().some(method => protection.protects(method))) protectRoute(route, protection, log)
  })

  // onRoute is not told of routes that were defined before, and nobody would notice
  fastify.addHook('onRequest', (request, _reply, done) => {
    const { config } = request.routeOptions
    const meant = (config.idempotency ?? global) !== false && common.protects(request.method) && !request.is404
    done(meant && !(mark in config) ? new Error(`the route ${config.url} was defined before the idempotency plugin was loaded: await app.register`) : undefined)
  })

  // of the instance and not of the route, so that it comes before the hooks that compress what is sent
  fastify.addHook('onSend', sendWhenKept as any)
  fastify.addHook('onError', (request, _reply, error, done) => {
    exchanges.get(request)?.fail(error)
    done()
  })
}

/** Marks the config of a route that the plugin has seen. */
const mark = Symbol('idempotency')

/** See to it that the requests of a route are read along, and that its handler runs inside an exchange. */
function protectRoute (route: RouteOptions, protection: HttpProtection<any, FastifyRequest>, log: boolean): void {
  const { handler } = route
  route.preParsing = [route.preParsing ?? [], readAlong].flat() as any
  route.handler = function (request, reply) {
    const incoming = requests.get(request) as IncomingRequest
    const handle = (): unknown => handler.call(this, request, reply)
    try {
      const key = protection.admit(incoming)
      return key === null ? handle() as any : new Exchange(reply, protection, log).run(incoming, key, handle)
    } catch (error) {
      if (!(error instanceof IdempotencyError)) throw error
      return send(reply, protection.problem(error))
    }
  }
}

//
// The request
//

const requests = new WeakMap<FastifyRequest, IncomingRequest>()

type Payload = Readable & { receivedEncodedLength?: number | undefined }

function readAlong (request: FastifyRequest, reply: FastifyReply, payload: Payload, done: (error: null, payload: Payload) => void): void {
  const body = new ReadAlong(payload, reply)
  requests.set(request, new IncomingRequest(request, body))
  done(null, body)
}

/** A request as it came: the parameters are copied, since a validation turns `9007199254740993` into a number. */
class IncomingRequest implements HttpRequest<FastifyRequest> {
  readonly raw: FastifyRequest
  readonly method: string
  readonly route: string
  readonly params: Readonly<Record<string, unknown>>
  readonly query: Readonly<Record<string, unknown>>
  readonly #body: ReadAlong

  constructor (raw: FastifyRequest, body: ReadAlong) {
    this.raw = raw
    this.method = raw.method
    this.route = raw.routeOptions.url ?? ''
    this.params = structuredClone(raw.params as object) as Record<string, unknown>
    this.query = structuredClone(raw.query as object) as Record<string, unknown>
    this.#body = body
  }

  header (name: string): string[] {
    return valuesOf(this.raw.raw.rawHeaders, name)
  }

  /** @throws Error if the parser of the content type has left the body to the handler, as those of uploads do */
  get body (): Uint8Array | null {
    if (!mayHaveBody(this.raw.headers)) return null
    if (!this.#body.complete) throw new Error('the body is read by the handler, so it cannot be compared: give a `fingerprint` that does without it')
    return this.#body.content()
  }
}

/**
 * The payload of a request, of which a copy is kept. It is only read when a parser reads it, since some
 * read the request itself instead. It keeps no more than the parser takes: when that has found the body too
 * large, a reply has been sent.
 */
class ReadAlong extends Readable {
  complete = false
  readonly #source: Payload
  readonly #reply: FastifyReply
  #chunks: Uint8Array[] = []
  #reading = false

  constructor (source: Payload, reply: FastifyReply) {
    super()
    this.#source = source
    this.#reply = reply
    // a parser that has given up does not listen any more
    this.on('error', () => {})
  }

  /** Of a payload that was decompressed, how many bytes came. */
  get receivedEncodedLength (): number | undefined {
    return this.#source.receivedEncodedLength
  }

  content (): Uint8Array {
    return Buffer.concat(this.#chunks)
  }

  override _read (): void {
    if (!this.#reading) {
      this.#reading = true
      this.#source
        .on('data', chunk => { this.#keep(Buffer.from(chunk)) })
        .on('end', () => {
          this.complete = true
          this.push(null)
        })
        .on('error', error => { this.destroy(error) })
        .on('close', () => { if (!this.complete) this.destroy(new Error('the request was aborted')) })
    }
    this.#source.resume()
  }

  #keep (chunk: Uint8Array): void {
    if (this.#reply.sent) this.#chunks = []
    else this.#chunks.push(chunk)
    if (!this.push(chunk)) this.#source.pause()
  }
}

//
// The answer
//

const exchanges = new WeakMap<FastifyRequest, Exchange>()

/** A protected request, from the moment at which its handler would run. */
class Exchange {
  readonly #reply: FastifyReply
  readonly #protection: HttpProtection<any, FastifyRequest>
  readonly #log: boolean
  /** What other plugins have set before; it belongs to whatever is sent. */
  readonly #headers: Headers
  #phase: 'beginning' | 'working' | 'answering' | 'over' = 'beginning'
  #answer: HttpAnswer | undefined
  /** The answer of a request for which nothing is done. */
  #early: HttpAnswer | undefined
  /** Of which the reply was made. Whatever its status is, nothing is committed then. */
  #error: unknown
  #running!: Promise<Handled>
  /** End the work: with its answer, or so that the transaction is rolled back. */
  #resolve!: (answer: HttpAnswer) => void
  #reject!: (error: unknown) => void

  constructor (reply: FastifyReply, protection: HttpProtection<any, FastifyRequest>, log: boolean) {
    this.#reply = reply
    this.#protection = protection
    this.#log = log
    this.#headers = headersOf(reply)
  }

  /**
   * Begin, and call the handler if there is something to do.
   *
   * @returns what Fastify is to send; the reply itself if it has been sent, or is being sent
   */
  async run (incoming: IncomingRequest, key: string, handle: () => unknown): Promise<unknown> {
    const { request, raw } = this.#reply
    exchanges.set(request, this)
    return await new Promise((resolve, reject) => {
      this.#running = this.#protection.run(incoming, key, async work => {
        if (this.#phase === 'over') throw new Error('the request was answered before it was begun')
        this.#phase = 'working'
        request.idempotency = work
        const answer = new Promise<HttpAnswer>((resolve, reject) => {
          this.#resolve = resolve
          this.#reject = reject
        })
        finished(raw, () => { this.#closed() })
        this.#handled(handle).then(resolve, reject)
        return await answer
      })
      this.#running.then(answer => {
        this.#tell(answer, key)
        if (this.#phase === 'beginning') {
          this.#early = answer
          send(this.#reply, answer)
        }
        resolve(this.#reply)
      }).catch(error => {
        if (this.#phase === 'beginning') {
          this.#phase = 'over'
          reject(error)
        }
        resolve(this.#reply)
      })
    })
  }

  /** Call the handler, and see to it that it replies once, whoever listens. */
  async #handled (handle: () => unknown): Promise<unknown> {
    const reply = this.#reply
    let value
    try {
      const returned = handle()
      if (returned === undefined) return reply
      value = await returned
    } catch (error) {
      return await this.#threw(error)
    }
    if (this.#phase !== 'working' || reply.sent) return reply
    return value === undefined ? reply.send() : value
  }

  async #threw (error: unknown): Promise<unknown> {
    const reply = this.#reply
    if (this.#phase !== 'working') {
      reply.log.warn({ err: error }, 'the handler failed after it had replied')
      return reply
    }
    // these have an answer of their own; no reply will come of the others only if the reply was hijacked
    const answered = error instanceof Refusal || error instanceof IdempotencyError || isConflict(error)
    if (!answered && !reply.sent) throw error
    this.#phase = 'over'
    this.#reject(error)
    if (!answered) throw error
    const answer = await this.#running
    this.#put(NOTHING, false)
    return send(reply, answer)
  }

  /** An error is about to become a reply. An error handler that sets no status leaves that of the handler. */
  fail (error: unknown): void {
    if (this.#phase === 'working') this.#error = error
  }

  /**
   * Keep a reply, in the hook that is the last before it is sent.
   *
   * @returns what is to be sent instead
   */
  async send (payload: unknown): Promise<unknown> {
    switch (this.#phase) {
      case 'beginning':
        this.#phase = 'over'
        // Fastify has made up one for bytes
        if (this.#early !== undefined && !('content-type' in this.#early.headers)) this.#reply.removeHeader('content-type')
        return payload
      case 'over':
        return payload
      case 'answering':
        this.#reply.log.warn('the handler has replied twice; its first reply is sent')
        return await new Promise(() => {})
      case 'working':
        this.#phase = 'answering'
        return await this.#keep(payload)
    }
  }

  async #keep (payload: unknown): Promise<unknown> {
    try {
      this.#answer = await answerOf(this.#reply, payload, this.#protection.maxAnswer)
      if (this.#error !== undefined && this.#answer.status < 400) this.#reject(this.#error)
      else this.#resolve(this.#answer)
    } catch (error) {
      this.#reject(error)
    }
    try {
      const sent = await this.#running
      return this.#put(sent, sent.own)
    } catch (error) {
      if (error === this.#error && this.#answer !== undefined) return this.#put(this.#answer, true)
      this.#put(NOTHING, false)
      throw error
    } finally {
      this.#phase = 'over'
    }
  }

  /**
   * Give the reply what is to be sent. If that is not the handler's own answer, its header fields go.
   *
   * @returns the body
   */
  #put (sent: HttpAnswer, own: boolean): string | Buffer | null {
    const reply = this.#reply
    for (const name of Object.keys(reply.getHeaders())) reply.removeHeader(name)
    if (!own) reply.headers(this.#headers)
    putOn(reply, sent)
    return payloadOf(sent)
  }

  #tell ({ outcome, status }: Handled, key: string): void {
    const message = duplicates[outcome]
    if (this.#log && message !== undefined) this.#reply.log.warn({ idempotencyKey: key, statusCode: status }, message)
  }

  /** The response was sent, or the client has hung up. */
  #closed (): void {
    if (this.#phase !== 'working') return
    const { sent, raw, routeOptions: { handlerTimeout = 0 } } = this.#reply
    if (sent || raw.headersSent) {
      this.#giveUp('the handler has written to reply.raw: what it sent is not kept, and its transaction is rolled back')
    } else if (handlerTimeout > 0) {
      setTimeout(() => {
        if (this.#phase === 'working') this.#giveUp('the handler has not replied in time: its transaction is rolled back')
      }, handlerTimeout).unref()
    }
  }

  #giveUp (reason: string): void {
    this.#phase = 'over'
    this.#reject(new Error(reason))
    this.#reply.log.warn(reason)
  }
}

/** What is worth a warning. */
const duplicates: Partial<Record<Handled['outcome'], string>> = {
  replayed: 'duplicate request: it is answered with the first answer',
  in_flight: 'duplicate request: the first one is still in progress',
  mismatched: 'the idempotency key was used with a different request'
}

/** Before the first status and header field are set: an error handler, or Fastify itself, starts anew. */
const NOTHING: HttpAnswer = { status: 200, headers: {}, body: null }

function sendWhenKept (request: FastifyRequest, _reply: FastifyReply, payload: unknown, done: (error: null, payload: unknown) => void): Promise<unknown> | undefined {
  const exchange = exchanges.get(request)
  if (exchange !== undefined) return exchange.send(payload)
  done(null, payload)
}

/** Send an answer that needs not be kept: as it is, past the serializers of the route. */
function send (reply: FastifyReply, answer: HttpAnswer): FastifyReply {
  putOn(reply, answer)
  return reply.serializer(payload => payload as string).send(payloadOf(answer) ?? undefined)
}

/** Add status and header fields to a reply. The plugin for CORS may have exposed other fields than ours. */
function putOn (reply: FastifyReply, { status, headers }: HttpAnswer): void {
  const exposed = [reply.getHeader(EXPOSE) ?? [], headers[EXPOSE] ?? []].flat().join(', ')
  reply.code(status).headers(headers)
  if (exposed !== '') reply.header(EXPOSE, exposed)
}

const EXPOSE = 'access-control-expose-headers'

function headersOf (reply: FastifyReply): Headers {
  const headers: Headers = {}
  for (const [name, value] of Object.entries(reply.getHeaders())) {
    if (value !== undefined) headers[name] = Array.isArray(value) ? [...value] : String(value)
  }
  return headers
}

function payloadOf ({ body }: HttpAnswer): string | Buffer | null {
  return body instanceof Uint8Array && !Buffer.isBuffer(body) ? Buffer.from(body) : body as string | Buffer | null
}

/** The complete answer, of whatever can be given to `reply.send`. */
async function answerOf (reply: FastifyReply, payload: unknown, limit: number): Promise<HttpAnswer> {
  let content = payload
  if (isResponse(payload)) {
    reply.code(payload.status)
    for (const [name, value] of payload.headers) reply.header(name, value)
    content = payload.body
  }
  const status = reply.statusCode
  const headers = headersOf(reply)
  const body = await bodyOf(content, limit)
  if (status >= 200 && status !== 204 && status !== 304) return { status, headers, body }

  const { 'content-type': _type, 'content-length': _length, ...rest } = headers
  return { status, headers: rest, body: null }
}

/** That of Node, or of a package that has its own. */
function isResponse (payload: unknown): payload is Response {
  return Object.prototype.toString.call(payload) === '[object Response]'
}

/** @throws AnswerTooLargeError as soon as a stream is larger than the limit; it is destroyed then */
async function bodyOf (content: unknown, limit: number): Promise<Uint8Array | string | null> {
  if (content === null || content === undefined) return null
  if (typeof content === 'string' || content instanceof Uint8Array) return content

  const chunks: Buffer[] = []
  let size = 0
  for await (const chunk of content as AsyncIterable<string | Uint8Array>) {
    const bytes = Buffer.from(chunk as Uint8Array)
    size += bytes.length
    if (size > limit) throw answerTooLarge(limit)
    chunks.push(bytes)
  }
  return Buffer.concat(chunks)
}
