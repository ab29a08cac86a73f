/**
 * Protecting routes of NestJS, on Express or Fastify.
 *
 *     const app = await NestFactory.create(AppModule, { rawBody: true })
 *
 *     IdempotencyModule.forRoot({ idempotency, tenant: request => request.user.tenant })
 *
 *     @Post() @Idempotent()
 *     create (@Body() order: Order) { ... }
 *
 * An interceptor runs the handler inside the request's transaction (or lease). Guards come before
 * interceptors, so who asks is known; pipes, and the interceptors inside, are part of the work. What the
 * handler returns is made into bytes here and not by Nest, because these bytes are kept with the
 * transaction, and leave after it was committed: a first answer and its replay are the same.
 *
 * So an interceptor that stands outside of this one is too late to change an answer. The module registers
 * this one for the whole application, which puts all those inside that app.useGlobalInterceptors and
 * @UseInterceptors add. Outside may be what a module registers as APP_INTERCEPTOR: a serializer among them
 * is refused, for what it hides would be kept and sent.
 *
 * An HttpException is what the handler says to the exception filters. If its status is 4xx, the exception
 * itself is kept, and thrown again for each repeat, so that the filters write the same answer again.
 */

import { AsyncLocalStorage } from 'node:async_hooks'
import { STATUS_CODES } from 'node:http'
import type { IncomingMessage, OutgoingHttpHeaders } from 'node:http'
import * as nest from '@nestjs/common'
import {
  ConfigurableModuleBuilder, HttpException, Inject, Injectable, Logger, Module, SetMetadata, StreamableFile,
  UnsupportedMediaTypeException, createParamDecorator
} from '@nestjs/common'
import type {
  CallHandler, DynamicModule, ExecutionContext, NestInterceptor, OnModuleInit, Provider, Type
} from '@nestjs/common'
import {
  REDIRECT_METADATA, RENDER_METADATA, RESPONSE_PASSTHROUGH_METADATA, ROUTE_ARGS_METADATA, SSE_METADATA
} from '@nestjs/common/constants.js'
import { RouteParamtypes } from '@nestjs/common/enums/route-paramtypes.enum.js'
import { APP_INTERCEPTOR, HttpAdapterHost, ModulesContainer, Reflector } from '@nestjs/core'
import { lastValueFrom, of } from 'rxjs'
import type { Observable } from 'rxjs'
import { IdempotencyError } from './errors.js'
import { HttpProtection, answerTooLarge } from './http.js'
import type { Handled, HttpAnswer, HttpOptions, HttpRequest, Protected } from './http.js'
import { mayHaveBody, valuesOf } from './http/message.js'
import { Idempotency } from './idempotency.js'
import type { Headers } from './types.js'

export type { HttpOptions, Protected } from './http.js'

/** How requests are protected; `Request` is that of Express or Fastify. */
export interface IdempotencyModuleOptions<Request = any> extends HttpOptions<Request> {
  /** The client, from `createIdempotency`. Services can inject it by its class, `Idempotency`. */
  idempotency: Idempotency<any>
  /** Protect all routes but those with `@SkipIdempotency()`; by default those with `@Idempotent()`. */
  everywhere?: boolean
}

/** For `forRootAsync` with `useClass` or `useExisting`. */
export interface IdempotencyOptionsFactory {
  createIdempotencyOptions (): IdempotencyModuleOptions | Promise<IdempotencyModuleOptions>
}

/** By which the options of the module can be injected. */
export const IDEMPOTENCY_OPTIONS = Symbol('IDEMPOTENCY_OPTIONS')

/** A problem of idempotency. Exception filters see it like any other HttpException. */
export class IdempotencyException extends HttpException {
  /** @param error what is wrong: KeyMissingError, InFlightError, and so on */
  constructor (body: Record<string, any>, status: number, readonly error: IdempotencyError) {
    super(body, status, { cause: error })
  }
}

const MARK = 'pg-idempotency:protected'

/**
 * Protect a route, or all routes of a controller.
 *
 * @param options what is different from the module's options, such as `{ lease: '30 min' }`; those of a
 *   method go before those of its class
 */
export function Idempotent<Request = any> (options: Partial<HttpOptions<Request>> = {}): MethodDecorator & ClassDecorator {
  return SetMetadata(MARK, options)
}

/** Do not protect a route, or the routes of a controller, although its class or the module says so. */
export function SkipIdempotency (): MethodDecorator & ClassDecorator {
  return SetMetadata(MARK, false)
}

interface Running {
  request: unknown
  work: Protected<any>
}

const running = new AsyncLocalStorage<Running>()

/** A parameter of a handler: the `Protected` work, with its `tx` or `claim`; undefined if the request is not protected. */
export const IdempotentWork: () => ParameterDecorator = createParamDecorator(() => running.getStore()?.work)

/** What is needed of a response of Express or Fastify. */
interface FrameworkResponse {
  statusCode: number
  getHeaders (): OutgoingHttpHeaders
  removeHeader (name: string): unknown
  /** Of Fastify: JSON, as the schema of the route says. */
  serialize? (value: unknown): string
  /** Of Express. */
  app?: { get (setting: string): any }
}

/** What is known of a protected route. */
interface Route {
  protection: HttpProtection<any, ExecutionContext>
  /** Why its answers cannot be kept, if so. */
  refusal: string | null
  /** Whether it has a fingerprint of its own, and needs no body as it came. */
  ownFingerprint: boolean
  redirects: boolean
}

/** Kept with an answer that is an exception: the name of its class. */
const EXCEPTION = 'x-nest-exception'

/**
 * Runs the handlers of protected routes once. Its protected methods are the points to override; give the
 * class that does so to the module: `forRoot({ ..., interceptor: MyInterceptor })`.
 */
export class IdempotencyInterceptor implements NestInterceptor, OnModuleInit {
  readonly #logger = new Logger(IdempotencyInterceptor.name)
  /** By class, since a handler may be inherited, and by handler. */
  readonly #routes = new Map<unknown, Map<unknown, Route | null>>()

  constructor (
    protected readonly options: IdempotencyModuleOptions,
    protected readonly reflector: Reflector,
    protected readonly host: HttpAdapterHost,
    private readonly modules: ModulesContainer
  ) {}

  /** @throws Error if a serializer stands outside */
  onModuleInit (): void {
    for (const module of this.modules.values()) {
      for (const [token, { instance }] of module.providers) {
        if (!String(token).startsWith(APP_INTERCEPTOR)) continue
        if (instance instanceof IdempotencyInterceptor) return
        if (isSerializer(instance)) {
          throw new Error(`${instance.constructor.name} would change answers after they were kept: register it by ` +
            'app.useGlobalInterceptors, or before it { provide: APP_INTERCEPTOR, useExisting: IdempotencyInterceptor }')
        }
      }
    }
  }

  /** Whose data the request is about; by default as the options say. */
  protected getTenant (context: ExecutionContext, options: HttpOptions<any>): string | null | undefined {
    return options.tenant?.(this.getRequest(context))
  }

  /** Who acts inside the tenant; by default as the options say. */
  protected getActor (context: ExecutionContext, options: HttpOptions<any>): string | null | undefined {
    return options.actor?.(this.getRequest(context))
  }

  /** The operation; by default as the options say, else method and template of the route. */
  protected getAction (context: ExecutionContext, options: HttpOptions<any>): string {
    const { action } = options
    if (typeof action === 'function') return action(this.getRequest(context))
    return action ?? `${this.getRequest(context).method} ${this.getRoute(context)}`
  }

  /** The request of Express or Fastify. */
  protected getRequest (context: ExecutionContext): any {
    return context.switchToHttp().getRequest()
  }

  /** The response of Express or Fastify. */
  protected getResponse (context: ExecutionContext): any {
    return context.switchToHttp().getResponse()
  }

  /** The template of the route, such as `/orders/:id`. */
  protected getRoute (context: ExecutionContext): string {
    const { route, routeOptions } = this.getRequest(context)
    return String(routeOptions?.url ?? route?.path)
  }

  /** The JSON of what a handler returned; by default as Express or Fastify writes it. */
  protected serialize (value: unknown, context: ExecutionContext): string | undefined {
    const response: FrameworkResponse = this.getResponse(context)
    if (response.serialize) return response.serialize(value)
    return JSON.stringify(value, response.app?.get('json replacer'), response.app?.get('json spaces'))
  }

  /** The exception that says what is wrong; the header fields of `answer` are on the response already. */
  protected exceptionOf (error: IdempotencyError, answer: HttpAnswer): HttpException {
    return new IdempotencyException(JSON.parse(answer.body as string), answer.status, error)
  }

  /**
   * A kept exception, made again for a repeat. Those of Nest come back as they were, and all others as
   * HttpException: override this if a filter catches a class of your own.
   *
   * @param name of its class
   * @param body its `getResponse()`
   */
  protected restoreException (name: string, body: string | Record<string, any>, status: number): HttpException {
    const known = (nest as Record<string, any>)[name]
    if (typeof body === 'object' && known?.prototype instanceof HttpException) return new known(body)
    return new HttpException(body, status)
  }

  async intercept (context: ExecutionContext, next: CallHandler): Promise<Observable<unknown>> {
    if (context.getType() !== 'http' || this.#isRunning(context)) return next.handle()
    const route = this.#routeOf(context)
    if (route === null) return next.handle()

    const { protection } = route
    const request = this.#requestOf(context)
    const key = this.#admit(context, protection, request)
    if (key === null) return next.handle()
    if (route.refusal !== null) throw new Error(`${nameOf(context)} cannot be protected: ${route.refusal}`)
    request.body = this.#rawBody(context, route)

    const response: FrameworkResponse = this.getResponse(context)
    const before = { ...response.getHeaders() }
    let attempts = 0
    let thrown: HttpException | undefined
    const answer = await protection.run(request, key, async work => {
      if (attempts++ > 0) this.#putBack(response, before)
      thrown = undefined
      try {
        const value = await running.run({ request: this.getRequest(context), work }, async () => await lastValueFrom(next.handle()))
        return await this.#answerOf(context, route, value)
      } catch (error) {
        if (!(error instanceof HttpException) || error.getStatus() < 400 || error.getStatus() > 499) throw error
        thrown = error
        return this.#answerOfException(context, error)
      }
    }, { rerun: !isMultipart(request) })

    if (!answer.own && attempts > 0) this.#putBack(response, before)
    return of(this.#send(context, route, answer, answer.own ? thrown : undefined))
  }

  /** Whether an interceptor outside has claimed this request already. */
  #isRunning (context: ExecutionContext): boolean {
    return running.getStore()?.request === this.getRequest(context)
  }

  #routeOf (context: ExecutionContext): Route | null {
    const routes = this.#routes.get(context.getClass()) ?? new Map<unknown, Route | null>()
    this.#routes.set(context.getClass(), routes)
    let route = routes.get(context.getHandler())
    if (route === undefined) {
      route = this.#protect(context)
      routes.set(context.getHandler(), route)
    }
    return route
  }

  #protect (context: ExecutionContext): Route | null {
    const onMethod = this.reflector.get(MARK, context.getHandler())
    const onClass = this.reflector.get(MARK, context.getClass())
    if ((onMethod ?? onClass ?? this.options.everywhere ?? false) === false) return null

    const options: HttpOptions<any> = { ...this.options, ...onClass, ...onMethod }
    const { tenant, actor, fingerprint, ...rest } = options
    const original = IdempotencyInterceptor.prototype
    const protection = new HttpProtection<any, ExecutionContext>(this.options.idempotency, {
      ...rest,
      ...(tenant || this.getTenant !== original.getTenant ? { tenant: context => this.getTenant(context, options) } : {}),
      ...(actor || this.getActor !== original.getActor ? { actor: context => this.getActor(context, options) } : {}),
      ...(fingerprint ? { fingerprint: request => fingerprint({ ...request, raw: this.getRequest(request.raw) }) } : {}),
      action: context => this.getAction(context, options),
      replayHeaders: [...options.replayHeaders ?? [], 'content-disposition', EXCEPTION]
    })
    return {
      protection,
      refusal: refusalOf(context),
      ownFingerprint: fingerprint !== undefined,
      redirects: typeof Reflect.getMetadata(REDIRECT_METADATA, context.getHandler())?.url === 'string'
    }
  }

  #requestOf (context: ExecutionContext): HttpRequest<ExecutionContext> {
    const request = this.getRequest(context)
    const message: IncomingMessage = request.raw ?? request
    return {
      raw: context,
      method: request.method,
      route: this.getRoute(context),
      params: request.params,
      query: request.query,
      header: name => valuesOf(message.rawHeaders, name),
      body: null
    }
  }

  #admit (context: ExecutionContext, protection: Route['protection'], request: HttpRequest<ExecutionContext>): string | null {
    try {
      return protection.admit(request)
    } catch (error) {
      throw error instanceof IdempotencyError ? this.#problem(context, error, protection.problem(error)) : error
    }
  }

  /**
   * The body as it came. What a parser made of it is not good enough, since numbers are rounded.
   *
   * @throws Error if the application does not keep it
   */
  #rawBody (context: ExecutionContext, { ownFingerprint }: Route): Uint8Array | null {
    const { rawBody, body, headers } = this.getRequest(context)
    if (rawBody !== undefined) return rawBody
    if (!mayHaveBody(headers) || ownFingerprint) return null
    if (body === undefined || body === null) {
      throw new UnsupportedMediaTypeException(`a body of type ${headers['content-type']} is not read here`)
    }
    throw new Error('the body was parsed, and not kept as it came, which has to be compared: ' +
      'NestFactory.create(AppModule, { rawBody: true }), or give a fingerprint')
  }

  /** What a handler returned, as it is sent. */
  async #answerOf (context: ExecutionContext, { redirects, protection: { maxAnswer } }: Route, value: unknown): Promise<HttpAnswer> {
    const response: FrameworkResponse = this.getResponse(context)
    if (this.host.httpAdapter.isHeadersSent(response)) {
      throw new Error(`${nameOf(context)} answered by itself, before its answer was kept`)
    }
    if (redirects) return this.#answerOfRedirect(context, value)

    let status = response.statusCode
    const headers = headersOf(response)
    let body: string | Buffer | null

    if (value === undefined || value === null) {
      body = null
    } else if (value instanceof StreamableFile) {
      const { type, disposition } = value.getHeaders()
      headers['content-type'] ??= type
      if (disposition !== undefined) headers['content-disposition'] ??= disposition
      body = await collect(value.getStream(), maxAnswer)
    } else if (value instanceof globalThis.Response) {
      status = value.status
      value.headers.forEach((field, name) => { headers[name] = name === 'set-cookie' ? value.headers.getSetCookie() : field })
      body = value.body && await collect(value.body, maxAnswer)
    } else if (value instanceof Uint8Array) {
      headers['content-type'] ??= 'application/octet-stream'
      body = Buffer.from(value)
    } else if (typeof value === 'string' || (typeof value !== 'object' && this.host.httpAdapter.getType() === 'express')) {
      headers['content-type'] ??= `text/${this.host.httpAdapter.getType() === 'express' ? 'html' : 'plain'}; charset=utf-8`
      body = Buffer.from(String(value))
    } else {
      headers['content-type'] ??= 'application/json; charset=utf-8'
      body = this.serialize(value, context) ?? null
    }
    return { status, headers, body }
  }

  #answerOfException (context: ExecutionContext, exception: HttpException): HttpAnswer {
    const status = exception.getStatus()
    const said = exception.getResponse()
    let body: unknown = said
    if (said instanceof Error) body = { statusCode: status, message: STATUS_CODES[status] ?? 'Error' }
    if (typeof said === 'string' && exception.errorCode !== undefined) body = { statusCode: status, message: said, errorCode: exception.errorCode }
    return {
      status,
      headers: {
        ...headersOf(this.getResponse(context)),
        'content-type': 'application/json; charset=utf-8',
        [EXCEPTION]: exception.constructor.name
      },
      body: JSON.stringify(body)
    }
  }

  /** Nest makes the redirection of what the handler returned, else of what the decorator says. */
  #answerOfRedirect (context: ExecutionContext, value: any): HttpAnswer {
    const decorated = Reflect.getMetadata(REDIRECT_METADATA, context.getHandler())
    return {
      status: value?.statusCode || decorated.statusCode || 302,
      headers: { ...headersOf(this.getResponse(context)), location: value?.url || decorated.url },
      body: null
    }
  }

  /** Send an answer: what is to be returned to Nest, or thrown. */
  #send (context: ExecutionContext, { redirects }: Route, answer: Handled, thrown: HttpException | undefined): unknown {
    const response: FrameworkResponse = this.getResponse(context)
    if (answer.error) throw this.#problem(context, answer.error, answer)

    const { status, body, headers: { [EXCEPTION]: exception, ...headers } } = answer
    if (exception !== undefined) {
      delete headers['content-type'] // is the filters' business
      this.#setHeaders(response, headers)
      throw thrown ?? this.restoreException(String(exception), JSON.parse(String(body)), status)
    }
    this.#setHeaders(response, headers)
    this.host.httpAdapter.status(response, status)
    if (redirects && headers['location'] !== undefined) return { url: headers['location'], statusCode: status }
    if (body === null || typeof body === 'string') return body ?? undefined
    return new StreamableFile(body, { length: body.length })
  }

  #problem (context: ExecutionContext, error: IdempotencyError, answer: HttpAnswer): HttpException {
    if (answer.status >= 500) this.#logger.error(error)
    this.#setHeaders(this.getResponse(context), answer.headers)
    return this.exceptionOf(error, answer)
  }

  #setHeaders (response: FrameworkResponse, headers: Headers): void {
    const there = headersOf(response)
    for (const [name, value] of Object.entries(headers)) {
      // Fastify adds to a Set-Cookie that is there already
      if (String(there[name]) !== String(value)) this.host.httpAdapter.setHeader(response, name, value as string)
    }
  }

  /** Give the response the header fields that it had before the handler was called. */
  #putBack (response: FrameworkResponse, before: OutgoingHttpHeaders): void {
    for (const name of Object.keys(response.getHeaders())) response.removeHeader(name)
    for (const [name, value] of Object.entries(before)) this.host.httpAdapter.setHeader(response, name, value as string)
  }
}

Injectable()(IdempotencyInterceptor)
Inject(IDEMPOTENCY_OPTIONS)(IdempotencyInterceptor, undefined, 0)
Inject(Reflector)(IdempotencyInterceptor, undefined, 1)
Inject(HttpAdapterHost)(IdempotencyInterceptor, undefined, 2)
Inject(ModulesContainer)(IdempotencyInterceptor, undefined, 3)

/** Serializers of Nest; a version before 12 has only one. */
const serializers = [nest.ClassSerializerInterceptor, (nest as any).StandardSchemaSerializerInterceptor]

function isSerializer (interceptor: unknown): interceptor is object {
  return serializers.some(serializer => serializer !== undefined && interceptor instanceof serializer)
}

function nameOf (context: ExecutionContext): string {
  return `${context.getClass().name}.${context.getHandler().name}`
}

/** Why the answers of a handler cannot be kept, or null. */
function refusalOf (context: ExecutionContext): string | null {
  const handler = context.getHandler()
  if (Reflect.hasMetadata(SSE_METADATA, handler)) return '@Sse() sends before anything can be kept; use a lease'
  if (Reflect.hasMetadata(RENDER_METADATA, handler)) return '@Render() makes the answer after it would have to be kept'
  const parameters = Reflect.getMetadata(ROUTE_ARGS_METADATA, context.getClass(), handler.name) ?? {}
  const answersItself = Object.keys(parameters).some(name => {
    const type = Number(name.split(':')[0])
    return type === RouteParamtypes.RESPONSE || type === RouteParamtypes.NEXT
  })
  if (answersItself && Reflect.getMetadata(RESPONSE_PASSTHROUGH_METADATA, context.getClass(), handler.name) !== true) {
    return 'with @Res() or @Next() it answers by itself, before its answer is kept; use @Res({ passthrough: true })'
  }
  return null
}

/** What an interceptor inside reads from the connection is gone when the handler is called again. */
function isMultipart (request: HttpRequest): boolean {
  return request.header('content-type')[0]?.startsWith('multipart/') ?? false
}

function headersOf (response: FrameworkResponse): Headers {
  const headers: Headers = {}
  for (const [name, value] of Object.entries(response.getHeaders())) {
    if (value !== undefined) headers[name.toLowerCase()] = Array.isArray(value) ? value : String(value)
  }
  return headers
}

/** @throws AnswerTooLargeError */
async function collect (stream: AsyncIterable<Uint8Array | string>, limit: number): Promise<Buffer> {
  const chunks: Buffer[] = []
  let size = 0
  for await (const chunk of stream) {
    const data = Buffer.from(chunk as Uint8Array)
    size += data.length
    if (size > limit) throw answerTooLarge(limit)
    chunks.push(data)
  }
  return Buffer.concat(chunks)
}

interface Extras {
  /** Whether other modules can inject what this one exports without an import; true by default. */
  isGlobal?: boolean
  /** A class of your own that extends IdempotencyInterceptor. */
  interceptor?: Type<IdempotencyInterceptor>
}

const configurable = new ConfigurableModuleBuilder<IdempotencyModuleOptions>({ optionsInjectionToken: IDEMPOTENCY_OPTIONS })
  .setClassMethodName('forRoot')
  .setFactoryMethodName('createIdempotencyOptions')
  .setExtras<Extras>({ isGlobal: true, interceptor: IdempotencyInterceptor }, withInterceptor)
  .build()

function withInterceptor (definition: DynamicModule, { isGlobal, interceptor }: Extras): DynamicModule {
  const providers: Provider[] = [
    { provide: IdempotencyInterceptor, useClass: interceptor as Type<IdempotencyInterceptor> },
    { provide: APP_INTERCEPTOR, useExisting: IdempotencyInterceptor },
    { provide: Idempotency, inject: [IDEMPOTENCY_OPTIONS], useFactory: (options: IdempotencyModuleOptions) => options.idempotency }
  ]
  return {
    ...definition,
    global: isGlobal ?? true,
    providers: [...definition.providers ?? [], ...providers],
    exports: [IdempotencyInterceptor, Idempotency, IDEMPOTENCY_OPTIONS]
  }
}

/**
 * The module: `forRoot(options)`, or `forRootAsync` with `useFactory` (and `inject`), `useClass` or
 * `useExisting` (an IdempotencyOptionsFactory), and `imports`.
 */
export class IdempotencyModule extends configurable.ConfigurableModuleClass {}

Module({})(IdempotencyModule)
