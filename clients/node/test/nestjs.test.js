// The adapter for NestJS, on Express and on Fastify.
//
// Each test makes an application of its own.  Decorators are applied by hand, as
// JavaScript has none: `routes` lists the handlers of a controller, with what
// stands above them.
import 'reflect-metadata'
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import http from 'node:http'
import { createRequire } from 'node:module'
import { Readable } from 'node:stream'
import { after, afterEach, before, beforeEach, describe, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import {
  BadRequestException, Body, Catch, ClassSerializerInterceptor, ConflictException, Controller, Get, Header, HttpCode,
  HttpException, Inject, Injectable, InternalServerErrorException, Module, NotFoundException, Param, Post, Put, Query,
  Redirect, Render, Req, Res, Sse, StreamableFile, UnauthorizedException, UnprocessableEntityException, UseGuards,
  UseInterceptors
} from '@nestjs/common'
import { APP_INTERCEPTOR, BaseExceptionFilter, NestFactory, Reflector } from '@nestjs/core'
import { ExpressAdapter } from '@nestjs/platform-express'
import { FastifyAdapter, RouteSchema } from '@nestjs/platform-fastify'
import { Exclude } from 'class-transformer'
import pg from 'pg'
import { Idempotency, Refusal, createIdempotency } from 'pg-idempotency'
import { codeErrorDetails } from 'pg-idempotency/http'
import {
  IDEMPOTENCY_OPTIONS, Idempotent, IdempotencyException, IdempotencyInterceptor, IdempotencyModule, IdempotentWork,
  SkipIdempotency
} from 'pg-idempotency/nestjs'
import { map, of } from 'rxjs'
import { createDatabase } from './support/database.js'
import { beforeAnswer, cutProxy } from './support/proxy.js'

const adapters = {
  Express: () => new ExpressAdapter(),
  Fastify: () => new FastifyAdapter()
}

let database
before(async () => {
  database = await createDatabase()
  await database.pool.query(`
    CREATE TABLE orders (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, note text);
    CREATE TABLE parents (id int PRIMARY KEY);
    CREATE TABLE children (parent int REFERENCES parents DEFERRABLE INITIALLY DEFERRED);
    CREATE TABLE conflicts (a int);
    CREATE FUNCTION conflict() RETURNS trigger LANGUAGE plpgsql AS
      $$ BEGIN RAISE EXCEPTION 'conflict' USING ERRCODE = '40001'; END $$;
    CREATE CONSTRAINT TRIGGER conflict AFTER INSERT ON conflicts
      DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION conflict()`)
})
after(async () => await database.drop())

/** Apply decorators to a class, or to a method of it. */
function decorate (target, decorators, name) {
  if (name === undefined) {
    for (const decorator of decorators) decorator(target)
    return
  }
  const descriptor = Object.getOwnPropertyDescriptor(target.prototype, name)
  for (const decorator of decorators) decorator(target.prototype, name, descriptor)
}

/**
 * A controller.
 *
 * @param {object} routes by name of the handler: `on`, its decorators; `parameters`, a decorator for each;
 *   `handle`, what it does
 */
function controllerOf (routes, decorators = []) {
  class TestController {}
  for (const [name, { on, parameters = [], handle }] of Object.entries(routes)) {
    const method = { [name] (...given) { return handle.apply(this, given) } }[name]
    Object.defineProperty(TestController.prototype, name, { value: method, writable: true, configurable: true })
    decorate(TestController, on, name)
    parameters.forEach((parameter, position) => parameter(TestController.prototype, name, position))
  }
  decorate(TestController, [Controller(), ...decorators])
  return TestController
}

/** A guard that takes `Bearer TENANT:USER`. */
class LoginGuard {
  canActivate (context) {
    const request = context.switchToHttp().getRequest()
    const [, tenant, user] = /^Bearer (\w+):(\w+)$/.exec(request.headers.authorization ?? '') ?? []
    if (user === undefined) throw new UnauthorizedException()
    request.user = { tenant, user }
    return true
  }
}
Injectable()(LoginGuard)

function send (url, path, { method = 'POST', body, key, login = 'acme:alice', headers = {}, signal } = {}) {
  const message = http.request(new URL(path, url), {
    method,
    agent: false,
    signal,
    headers: {
      ...(login === null ? {} : { authorization: `Bearer ${login}` }),
      ...(body === undefined ? {} : { 'content-type': 'application/json' }),
      ...(key === undefined ? {} : { 'idempotency-key': key }),
      ...headers
    }
  })
  return new Promise((resolve, reject) => {
    message.on('error', reject)
    message.on('response', async response => {
      const chunks = []
      for await (const chunk of response) chunks.push(chunk)
      const bytes = Buffer.concat(chunks)
      resolve({ status: response.statusCode, headers: response.headers, bytes, text: bytes.toString(), get json () { return JSON.parse(bytes) } })
    })
    message.end(typeof body === 'object' && !Buffer.isBuffer(body) ? JSON.stringify(body) : body)
  })
}

/** What an answer and its replay have in common; what belongs to one of them is left out. */
function kept ({ status, headers, text }) {
  const { date, connection, 'keep-alive': _, 'idempotent-replayed': __, ...rest } = headers
  return { status, headers: rest, text }
}

function assertReplay (first, again) {
  assert.equal(first.headers['idempotent-replayed'], undefined)
  assert.equal(again.headers['idempotent-replayed'], 'true')
  assert.deepEqual(kept(again), kept(first))
}

async function countOf (note) {
  const { rows: [{ count }] } = await database.pool.query('SELECT count(*)::int FROM orders WHERE note = $1', [note])
  return count
}

async function recordOf (key) {
  const { rows: [row] } = await database.pool.query('SELECT * FROM idempotency.idempotency_key WHERE key = $1', [key])
  return row
}

async function until (condition) {
  while (!condition()) await sleep(5)
}

/** Something to wait for until it is opened. */
function gate () {
  let open
  const opened = new Promise(resolve => { open = resolve })
  return { opened, open }
}

for (const [adapter, makeAdapter] of Object.entries(adapters)) {
  describe(`NestJS on ${adapter}`, () => {
    let pool, idempotency, apps

    beforeEach(() => {
      pool = new pg.Pool({ connectionString: database.url })
      idempotency = createIdempotency({ pool })
      apps = []
    })
    afterEach(async () => {
      for (const app of apps) await app.close()
      await pool.end()
    })

    /**
     * Start an application with one controller, whose routes need a log-in.
     *
     * @returns {Promise<{ url: string, errors: string[] }>} `errors` is what was logged as errors
     */
    async function serve (routes, {
      options = {}, module, controllers, rawBody = true, setUp = () => {}, providers = [], ofClass = []
    } = {}) {
      class AppModule {}
      Module({
        imports: [module ?? IdempotencyModule.forRoot(optionsOf(options))],
        controllers: controllers ?? [controllerOf(routes, [UseGuards(LoginGuard), ...ofClass])],
        providers
      })(AppModule)

      const errors = []
      const ignore = () => {}
      const logger = { log: ignore, warn: ignore, debug: ignore, verbose: ignore, error: (...parts) => errors.push(parts.map(String).join(' ')) }
      const app = await NestFactory.create(AppModule, makeAdapter(), { rawBody, logger, abortOnError: false })
      setUp(app)
      await app.listen(0, '127.0.0.1')
      apps.push(app)
      return { url: await app.getUrl(), errors, app }
    }

    function optionsOf (options) {
      return { idempotency, tenant: request => request.user?.tenant, actor: request => request.user?.user, ...options }
    }

    /** A route that inserts a row for the note in the body, through the transaction of the request. */
    const create = {
      on: [Post('orders'), Idempotent()],
      parameters: [Body()],
      async handle ({ note }) {
        const { rows: [{ id }] } = await idempotency.current().query('INSERT INTO orders (note) VALUES ($1) RETURNING id', [note])
        return { id, note }
      }
    }

    test('the first answer and its replay are the same bytes, and the work is done once', async () => {
      const { url } = await serve({ create })
      const key = randomUUID()
      const first = await send(url, '/orders', { key, body: { note: key } })
      const again = await send(url, '/orders', { key, body: { note: key } })
      assert.equal(first.status, 201)
      assert.equal(first.json.note, key)
      assert.match(first.headers['content-type'], /^application\/json/)
      assertReplay(first, again)
      assert.equal(await countOf(key), 1)
      const record = await recordOf(key)
      assert.deepEqual([record.tenant, record.actor, record.action], ['acme', 'alice', 'POST /orders'])
    })

    test('ten at the same time do the work once', async () => {
      const { url } = await serve({ create }, { options: { wait: '10s' } })
      const key = randomUUID()
      const answers = await Promise.all(Array.from({ length: 10 }, async () => await send(url, '/orders', { key, body: { note: key } })))
      assert.deepEqual(answers.map(answer => answer.status), Array(10).fill(201))
      assert.equal(new Set(answers.map(answer => answer.text)).size, 1)
      assert.equal(answers.filter(answer => answer.headers['idempotent-replayed']).length, 9)
      assert.equal(await countOf(key), 1)
    })

    test('the answer leaves after COMMIT, not if that fails', async () => {
      const { url, errors } = await serve({
        orphan: {
          on: [Post('orphans'), Idempotent()],
          async handle () {
            await idempotency.current().query('INSERT INTO children VALUES (1)')
            return { fine: true }
          }
        }
      })
      const key = randomUUID()
      const answer = await send(url, '/orphans', { key })
      assert.equal(answer.status, 500)
      assert.equal(answer.json.fine, undefined)
      assert.match(errors.join(), /foreign key/)
      assert.equal(await recordOf(key), undefined)
    })

    test('a connection lost in COMMIT is answered, and the work is done once', async () => {
      const proxy = await cutProxy(database.url)
      const through = new pg.Pool({ connectionString: proxy.url })
      idempotency = createIdempotency({ pool: through })
      try {
        const { url } = await serve({ create })
        const key = randomUUID()
        proxy.cutWhen(beforeAnswer('COMMIT'))
        const answer = await send(url, '/orders', { key, body: { note: key } })
        assert.equal(answer.status, 201)
        assert.equal(proxy.cuts, 1)
        assert.equal(await countOf(key), 1)
      } finally {
        await through.end()
        await proxy.close()
      }
    })

    describe('problems', () => {
      const problems = {
        'a key that is missing': [{}, 400, 'IDEMPOTENCY_KEY_MISSING'],
        'a key that is empty': [{ key: '' }, 400, 'IDEMPOTENCY_KEY_MISSING'],
        'a key that is too long': [{ key: 'k'.repeat(256) }, 400, 'IDEMPOTENCY_KEY_INVALID'],
        'a key that was sent twice': [{ key: ['one', 'two'] }, 400, 'IDEMPOTENCY_KEY_INVALID']
      }
      for (const [name, [request, status, code]] of Object.entries(problems)) {
        test(`${name} is refused`, async () => {
          const { url } = await serve({ create })
          const answer = await send(url, '/orders', { ...request, body: { note: 'never' } })
          assert.equal(answer.status, status)
          assert.match(answer.headers['content-type'], /^application\/problem\+json/)
          assert.equal(answer.json.code, code)
          assert.equal(answer.json.status, status)
          assert.equal(await countOf('never'), 0)
        })
      }

      test('a different request under the same key is refused, by 422 or as the decorator says', async () => {
        const { url } = await serve({
          create,
          other: { on: [Post('others'), Idempotent({ mismatchStatus: 409 })], handle: () => ({}) }
        })
        for (const [path, status] of [['/orders', 422], ['/others', 409]]) {
          const key = randomUUID()
          await send(url, path, { key, body: { note: key } })
          const answer = await send(url, path, { key, body: { note: 'another' } })
          assert.equal(answer.status, status)
          assert.match(answer.headers['content-type'], /^application\/problem\+json/)
          assert.equal(answer.json.code, 'IDEMPOTENCY_KEY_REUSED')
          assert.equal(answer.headers['retry-after'], undefined)
        }
      })

      test('numbers that a parser rounds to the same are different requests', async () => {
        const { url } = await serve({ create })
        const key = randomUUID()
        const one = `{"note": "${key}", "amount": 9007199254740993}`
        assert.equal((await send(url, '/orders', { key, body: one })).status, 201)
        assert.equal((await send(url, '/orders', { key, body: one.replace('993', '992') })).status, 422)
        assert.equal((await send(url, '/orders', { key, body: one.replaceAll(' ', '') })).status, 201)
      })

      test('parameters of path and query count', async () => {
        const { url } = await serve({
          pay: { on: [Post('orders/:id/pay'), Idempotent()], parameters: [Param('id'), Query('by')], handle: (id, by) => ({ id, by }) }
        })
        const key = randomUUID()
        assert.deepEqual((await send(url, '/orders/1/pay?by=card', { key })).json, { id: '1', by: 'card' })
        assert.equal((await send(url, '/orders/2/pay?by=card', { key })).status, 422)
        assert.equal((await send(url, '/orders/1/pay?by=cash', { key })).status, 422)
        assert.equal((await recordOf(key)).action, 'POST /orders/:id/pay')
      })

      test('a request in flight is 409 with Retry-After', async () => {
        const started = gate()
        const go = gate()
        const { url } = await serve({
          slow: { on: [Post('slow'), Idempotent()], handle: async () => { started.open(); await go.opened; return { done: true } } }
        })
        const key = randomUUID()
        const first = send(url, '/slow', { key })
        await started.opened
        const meanwhile = await send(url, '/slow', { key })
        go.open()
        assert.equal(meanwhile.status, 409)
        assert.equal(meanwhile.json.code, 'DUPLICATE_IN_PROGRESS')
        assert.ok(Number(meanwhile.headers['retry-after']) >= 1)
        assert.match(meanwhile.headers['content-type'], /^application\/problem\+json/)
        assertReplay(await first, await send(url, '/slow', { key }))
      })

      test('they are written as the option says', async () => {
        const { url } = await serve({ create }, { options: { problem: codeErrorDetails, header: 'X-Idempotency-Key' } })
        const { status, headers, json } = await send(url, '/orders', { body: { note: 'never' } })
        assert.equal(status, 400)
        assert.match(headers['content-type'], /^application\/json/)
        assert.equal(json.code, 'IDEMPOTENCY_KEY_MISSING')
        assert.match(json.details.reason, /X-Idempotency-Key/)
      })

      test('exception filters can write them anew', async () => {
        class Teapot {
          catch (exception, host) {
            apps[0].getHttpAdapter().reply(host.switchToHttp().getResponse(), { teapot: exception.error.code }, 418)
          }
        }
        Catch(IdempotencyException)(Teapot)
        const { url } = await serve({ create }, { setUp: app => app.useGlobalFilters(new Teapot()) })
        const answer = await send(url, '/orders', { body: { note: 'never' } })
        assert.equal(answer.status, 418)
        assert.deepEqual(answer.json, { teapot: 'IDEMPOTENCY_KEY_MISSING' })
      })

      test('those of the service are logged', async () => {
        const { url, errors } = await serve({
          nested: { on: [Post('nested'), Idempotent()], handle: async () => await idempotency.run({ action: 'a', key: 'k' }, null, () => {}) }
        })
        const answer = await send(url, '/nested', { key: randomUUID() })
        assert.equal(answer.status, 500)
        assert.match(answer.headers['content-type'], /^application\/problem\+json/)
        assert.match(errors.join(), /inside a transaction of this client/)
      })

      test('a page of another origin may see the headers', async () => {
        const { url } = await serve({ create })
        const answer = await send(url, '/orders', { key: randomUUID(), body: { note: 'cors' }, headers: { origin: 'http://shop.example' } })
        assert.equal(answer.status, 201)
        assert.equal(answer.headers['access-control-expose-headers'], 'Idempotency-Key, Idempotent-Replayed, Retry-After')
      })
    })

    describe('the body as it came', () => {
      test('an application that does not keep it is told so, and nothing is done', async () => {
        let called = false
        const { url, errors } = await serve({
          create: { ...create, handle: () => { called = true } }
        }, { rawBody: false })
        const answer = await send(url, '/orders', { key: randomUUID(), body: { note: 'never' } })
        assert.equal(answer.status, 500)
        assert.match(errors.join(), /rawBody: true/)
        assert.equal(called, false)
      })

      test('is not needed with a fingerprint of your own', async () => {
        const { url } = await serve({
          create: { ...create, on: [Post('orders'), Idempotent({ fingerprint: ({ raw }) => ({ note: raw.body.note }) })] }
        }, { rawBody: false })
        const key = randomUUID()
        const first = await send(url, '/orders', { key, body: { note: key, at: 1 } })
        assert.equal(first.status, 201)
        assertReplay(first, await send(url, '/orders', { key, body: { note: key, at: 2 } }))
        assert.equal((await send(url, '/orders', { key, body: { note: 'another' } })).status, 422)
      })

      test('nor where there is none', async () => {
        const { url } = await serve({ empty: { on: [Post('empty'), Idempotent()], handle: () => ({ done: true }) } }, { rawBody: false })
        assert.equal((await send(url, '/empty', { key: randomUUID() })).status, 201)
      })

      test('of a type that nobody reads is 415', async () => {
        let called = false
        const { url } = await serve({ create: { ...create, handle: () => { called = true } } })
        const answer = await send(url, '/orders', { key: randomUUID(), body: 'a', headers: { 'content-type': 'text/csv' } })
        assert.equal(answer.status, 415)
        assert.equal(called, false)
      })
    })

    describe('who asks', () => {
      test('guards come first: a stranger is told 401, also for a key that was answered', async () => {
        const { url } = await serve({ create })
        const key = randomUUID()
        assert.equal((await send(url, '/orders', { key, login: null, body: { note: key } })).status, 401)
        assert.equal(await recordOf(key), undefined)
        assert.equal((await send(url, '/orders', { key, body: { note: key } })).status, 201)
        assert.equal((await send(url, '/orders', { key, login: null, body: { note: key } })).status, 401)
        assert.equal((await send(url, '/orders', { login: null, body: { note: key } })).status, 401)
      })

      test('each tenant and each user has keys of its own', async () => {
        const { url } = await serve({ create })
        const key = randomUUID()
        const answers = []
        for (const login of ['acme:alice', 'acme:bob', 'umbrella:alice']) {
          answers.push(await send(url, '/orders', { key, login, body: { note: key } }))
        }
        assert.deepEqual(answers.map(answer => answer.status), [201, 201, 201])
        assert.equal(new Set(answers.map(answer => answer.json.id)).size, 3)
      })

      test('options that do not say are refused', async () => {
        const { url, errors } = await serve({ create }, { options: { tenant: undefined, actor: undefined } })
        assert.equal((await send(url, '/orders', { key: randomUUID(), body: { note: 'never' } })).status, 500)
        assert.match(errors.join(), /say whose request it is/)
      })

      test('the interceptor can be told otherwise by a class of your own', async () => {
        class Mine extends IdempotencyInterceptor {
          getTenant () { return 'mine' }
          getActor (context) { return this.getRequest(context).headers['x-user'] }
          getAction (context) { return `${context.getClass().name}.${context.getHandler().name}` }
        }
        const { url } = await serve({ create }, { module: IdempotencyModule.forRoot({ idempotency, interceptor: Mine }) })
        const key = randomUUID()
        await send(url, '/orders', { key, body: { note: key }, headers: { 'x-user': 'carol' } })
        const { tenant, actor, action } = await recordOf(key)
        assert.deepEqual({ tenant, actor, action }, { tenant: 'mine', actor: 'carol', action: 'TestController.create' })
      })
    })

    describe('what handlers throw', () => {
      /** A route that inserts a row and throws. */
      function failing (makeError) {
        return {
          on: [Post('orders'), Idempotent()],
          parameters: [Body()],
          async handle (body) {
            await create.handle(body)
            throw makeError(body)
          }
        }
      }

      test('a 4xx is kept, and what was written is rolled back', async () => {
        let calls = 0
        const { url } = await serve({ create: failing(() => { calls++; return new UnprocessableEntityException({ sku: 'sold-out', at: calls }) }) })
        const key = randomUUID()
        const first = await send(url, '/orders', { key, body: { note: key } })
        const again = await send(url, '/orders', { key, body: { note: key } })
        assert.equal(first.status, 422)
        assert.deepEqual(first.json, { sku: 'sold-out', at: 1 })
        assertReplay(first, again)
        assert.equal(calls, 1)
        assert.equal(await countOf(key), 0)
        assert.equal((await recordOf(key)).state, 'errored')
      })

      const exceptions = {
        'one of Nest with a text': () => new NotFoundException('no such order'),
        'one of Nest with nothing': () => new BadRequestException(),
        'one of Nest with a list': () => new BadRequestException(['a must be a string', 'b too']),
        'one with a text': () => new HttpException('gone away', 410),
        'one with a text and a code': () => new HttpException('gone away', 410, { errorCode: 'GONE' }),
        'one around an error': () => new HttpException(new Error('a secret'), 404)
      }
      for (const [name, make] of Object.entries(exceptions)) {
        test(`${name} is the same for the repeat, as filters see it and as it is sent`, async () => {
          const made = []
          const seen = []
          class Watching extends BaseExceptionFilter {
            catch (exception, host) {
              const said = exception.getResponse()
              assert.equal(made.includes(exception), seen.length === 0, 'the first is the one that was thrown')
              seen.push({ name: exception.constructor.name, status: exception.getStatus(), said: said instanceof Error ? 'an error' : said, message: exception.message })
              super.catch(exception, host)
            }
          }
          const { url } = await serve({ create: failing(() => made[made.push(make()) - 1]) }, { setUp: app => app.useGlobalFilters(new Watching(app.getHttpAdapter())) })
          const key = randomUUID()
          const first = await send(url, '/orders', { key, body: { note: key } })
          assertReplay(first, await send(url, '/orders', { key, body: { note: key } }))
          assert.equal(first.status, make().getStatus())
          assert.doesNotMatch(first.text, /secret/)
          assert.equal(seen.length, 2)
          if (!(make().getResponse() instanceof Error) && make().errorCode === undefined) assert.deepEqual(seen[1], seen[0])
        })
      }

      test('a filter for a class of Nest writes both answers', async () => {
        class Polite {
          catch (exception, host) {
            apps[0].getHttpAdapter().reply(host.switchToHttp().getResponse(), `sorry: ${exception.message}`, 404)
          }
        }
        Catch(NotFoundException)(Polite)
        const { url } = await serve({ create: failing(() => new NotFoundException('order')) }, { setUp: app => app.useGlobalFilters(new Polite()) })
        const key = randomUUID()
        const first = await send(url, '/orders', { key, body: { note: key } })
        assert.equal(first.text, 'sorry: order')
        assert.match(first.headers['content-type'], /^text/)
        assertReplay(first, await send(url, '/orders', { key, body: { note: key } }))
      })

      test('an exception of your own comes back as the interceptor makes it', async () => {
        class SoldOut extends HttpException {
          constructor (sku) { super({ sku }, 422) }
        }
        class Mine extends IdempotencyInterceptor {
          restoreException (name, body, status) {
            return name === 'SoldOut' ? new SoldOut(body.sku) : super.restoreException(name, body, status)
          }
        }
        class Filter {
          catch (exception, host) {
            apps[0].getHttpAdapter().reply(host.switchToHttp().getResponse(), { soldOut: exception.getResponse().sku }, 422)
          }
        }
        Catch(SoldOut)(Filter)
        const { url } = await serve({ create: failing(() => new SoldOut('hat')) }, {
          options: { interceptor: Mine }, setUp: app => app.useGlobalFilters(new Filter())
        })
        const key = randomUUID()
        const first = await send(url, '/orders', { key, body: { note: key } })
        assert.deepEqual(first.json, { soldOut: 'hat' })
        assertReplay(first, await send(url, '/orders', { key, body: { note: key } }))
      })

      const notKept = {
        'an error': () => new Error('bug'),
        'a 5xx': () => new InternalServerErrorException('down'),
        'a 409': () => new ConflictException('not now'),
        'a 429': () => new HttpException('too many', 429)
      }
      for (const [name, make] of Object.entries(notKept)) {
        test(`${name} is not kept, and a repeat runs`, async () => {
          let calls = 0
          const { url } = await serve({
            create: {
              ...create,
              async handle (body) {
                const order = await create.handle(body)
                if (++calls === 1) throw make()
                return order
              }
            }
          })
          const key = randomUUID()
          const first = await send(url, '/orders', { key, body: { note: key } })
          assert.equal(first.status, make().getStatus?.() ?? 500)
          assert.equal(await countOf(key), 0)
          const again = await send(url, '/orders', { key, body: { note: key } })
          assert.equal(again.status, 201)
          assert.equal(again.headers['idempotent-replayed'], undefined)
          assert.equal(await countOf(key), 1)
        })
      }

      test('a Refusal from deep inside is an answer as it is', async () => {
        const { url } = await serve({ create: failing(() => new Refusal({ status: 402, json: { balance: 0 } })) })
        const key = randomUUID()
        const first = await send(url, '/orders', { key, body: { note: key } })
        assert.deepEqual([first.status, first.json], [402, { balance: 0 }])
        assertReplay(first, await send(url, '/orders', { key, body: { note: key } }))
        assert.equal(await countOf(key), 0)
      })

      test('what a pipe refuses is kept as well', async () => {
        const whole = { transform: value => { if (!/^\d+$/.test(value)) throw new BadRequestException('not a number'); return Number(value) } }
        const { url } = await serve({ pay: { on: [Post('pay/:id'), Idempotent()], parameters: [Param('id', whole)], handle: id => ({ id }) } })
        const key = randomUUID()
        const first = await send(url, '/pay/x', { key })
        assert.equal(first.status, 400)
        assertReplay(first, await send(url, '/pay/x', { key }))
      })
    })

    describe('what handlers answer', () => {
      /** A route without parameters. */
      const route = (handle, on = [], parameters = []) => ({ answer: { on: [Post('answer'), Idempotent(), ...on], parameters, handle } })

      async function twice (routes, serving = {}) {
        const { url } = await serve(routes, serving)
        const key = randomUUID()
        const first = await send(url, '/answer', { key })
        const again = await send(url, '/answer', { key })
        assertReplay(first, again)
        assert.deepEqual(again.bytes, first.bytes)
        return first
      }

      test('the status of @HttpCode', async () => {
        assert.equal((await twice(route(() => ({ a: 1 }), [HttpCode(202)]))).status, 202)
      })

      test('status and header fields that the handler sets', async () => {
        const { url } = await serve(route(response => {
          response.status(203)
          for (const [name, value] of [['Location', '/orders/1'], ['Set-Cookie', 'a=1'], ['X-Trace', 'abc']]) apps[0].getHttpAdapter().setHeader(response, name, value)
          return { a: 1 }
        }, [Header('ETag', '"one"')], [Res({ passthrough: true })]))
        const key = randomUUID()
        const first = await send(url, '/answer', { key })
        const again = await send(url, '/answer', { key })
        for (const { status, headers, text } of [first, again]) {
          assert.equal(status, 203)
          assert.equal(headers.location, '/orders/1')
          assert.equal(headers.etag, '"one"')
          assert.equal(text, '{"a":1}')
        }
        assert.deepEqual([first.headers['set-cookie'], first.headers['x-trace']], [['a=1'], 'abc'])
        assert.deepEqual([again.headers['set-cookie'], again.headers['x-trace']], [undefined, undefined])
      })

      test('nothing, with 201 and with 204', async () => {
        for (const [on, status] of [[[], 201], [[HttpCode(204)], 204]]) {
          const first = await twice(route(() => {}, on))
          assert.equal(first.status, status)
          assert.equal(first.bytes.length, 0)
        }
      })

      test('null, a text, a number', async () => {
        assert.equal((await twice(route(() => null))).text, '')
        assert.equal((await twice(route(() => 'hello'))).text, 'hello')
        assert.equal((await twice(route(() => 42))).text, '42')
      })

      test('are of the content type that they have without protection', async () => {
        for (const value of ['hello', 42, { a: 1 }]) {
          const { url } = await serve({ ...route(() => value), plain: { on: [Post('plain')], handle: () => value } })
          const plain = await send(url, '/plain')
          const first = await send(url, '/answer', { key: randomUUID() })
          assert.equal(first.text, plain.text)
          assert.equal(first.headers['content-type'], plain.headers['content-type'])
        }
      })

      test('are JSON as the framework is told to write it', async () => {
        const schema = { response: { '2xx': { type: 'object', properties: { a: { type: 'integer' } } } } }
        const [on, setUp, expected] = adapter === 'Express'
          ? [[], app => app.set('json spaces', 1), '{\n "a": 1,\n "b": 2\n}']
          : [[RouteSchema(schema)], () => {}, '{"a":1}']
        assert.equal((await twice(route(() => ({ a: 1, b: 2 }), on), { setUp })).text, expected)
      })

      test('JSON of a type of its own', async () => {
        const first = await twice(route(() => ({ a: 1 }), [Header('Content-Type', 'application/hal+json')]))
        assert.match(first.headers['content-type'], /^application\/hal\+json/)
        assert.equal(first.text, '{"a":1}')
      })

      test('bytes', async () => {
        const bytes = Buffer.from([0, 255, 10, 13, 128])
        const first = await twice(route(() => bytes))
        assert.equal(first.headers['content-type'], 'application/octet-stream')
        assert.deepEqual(first.bytes, bytes)
      })

      test('a StreamableFile, with its header fields', async () => {
        const first = await twice(route(() => new StreamableFile(Readable.from(['a;b\n', '1;2\n']), { type: 'text/csv', disposition: 'attachment; filename="a.csv"' })))
        assert.match(first.headers['content-type'], /^text\/csv/)
        assert.equal(first.headers['content-disposition'], 'attachment; filename="a.csv"')
        assert.equal(first.text, 'a;b\n1;2\n')
      })

      test('a stream that fails or is too large is no answer', async () => {
        async function * endless () { for (;;) yield 'x'.repeat(1000) }
        async function * broken () { yield 'a'; throw new Error('disk') }
        for (const [source, code] of [[endless, 'ANSWER_TOO_LARGE'], [broken, undefined]]) {
          const { url } = await serve(route(() => new StreamableFile(Readable.from(source()))), { options: { maxAnswer: 10_000 } })
          const key = randomUUID()
          const answer = await send(url, '/answer', { key })
          assert.equal(answer.status, 500)
          assert.equal(answer.json.code, code)
          assert.equal(await recordOf(key), undefined)
        }
      })

      test('a Response of the web', async () => {
        const { url } = await serve(route(() => new Response('a,b', {
          status: 202, headers: [['content-type', 'text/csv'], ['etag', '"e"'], ['set-cookie', 'a=1'], ['set-cookie', 'b=2']]
        })))
        const key = randomUUID()
        const first = await send(url, '/answer', { key })
        const again = await send(url, '/answer', { key })
        assert.deepEqual([first.headers['set-cookie'], again.headers['set-cookie']], [['a=1', 'b=2'], undefined])
        delete first.headers['set-cookie']
        assertReplay(first, again)
        assert.equal(first.status, 202)
        assert.equal(first.text, 'a,b')
        assert.equal(first.headers.etag, '"e"')
      })

      test('an Observable', async () => {
        assert.equal((await twice(route(() => of({ a: 1 }, { a: 2 })))).text, '{"a":2}')
      })

      test('a redirection', async () => {
        const first = await twice(route(() => ({ url: '/there' }), [Redirect('/elsewhere', 303)]))
        assert.equal(first.status, 303)
        assert.equal(first.headers.location, '/there')
        assert.equal((await twice(route(() => {}, [Redirect('/elsewhere')]))).headers.location, '/elsewhere')
      })

      test('what interceptors inside make of it', async () => {
        const wrap = { intercept: (_, next) => next.handle().pipe(map(data => ({ data }))) }
        assert.equal((await twice(route(() => 1), { ofClass: [UseInterceptors(wrap)] })).text, '{"data":1}')
      })

      class User {
        constructor () { Object.assign(this, { name: 'alice', password: 'secret' }) }
      }
      Exclude()(User.prototype, 'password')

      test('what a serializer leaves of it', async () => {
        const setUp = app => app.useGlobalInterceptors(new ClassSerializerInterceptor(app.get(Reflector)))
        assert.equal((await twice(route(() => new User()), { setUp })).text, '{"name":"alice"}')
      })

      test('a serializer outside, which would be too late, is refused', async () => {
        const outside = { provide: APP_INTERCEPTOR, useClass: ClassSerializerInterceptor }
        await assert.rejects(serve(route(() => new User()), { providers: [outside] }), /ClassSerializerInterceptor would change answers/)
        const before = { provide: APP_INTERCEPTOR, useExisting: IdempotencyInterceptor }
        assert.equal((await twice(route(() => new User()), { providers: [before, outside] })).text, '{"name":"alice"}')
      })

      const refused = {
        '@Res()': [[], [Res()], response => { apps[0].getHttpAdapter().reply(response, { a: 1 }) }],
        '@Render()': [[Render('page')], [], () => ({})],
        '@Sse()': [[Sse('answer')], [], () => of({ data: 'a' })]
      }
      for (const [name, [on, parameters, handle]] of Object.entries(refused)) {
        test(`${name} is refused`, async () => {
          let called = false
          const { url, errors } = await serve({ answer: { on: [...on, Post('answer'), Idempotent()], parameters, handle (...args) { called = true; return handle(...args) } } })
          const answer = await send(url, '/answer', { key: randomUUID() })
          assert.equal(answer.status, 500)
          assert.equal(called, false)
          assert.match(errors.join(), /TestController.answer cannot be protected/)
        })
      }
    })

    test('a handler that answers by itself all the same keeps nothing, and that is logged', async () => {
      const { url, errors } = await serve({
        create: {
          on: [Post('orders'), Idempotent()],
          parameters: [Body(), Res({ passthrough: true })],
          async handle (body, response) {
            await create.handle(body)
            await apps[0].getHttpAdapter().reply(response, { early: true })
          }
        }
      })
      const key = randomUUID()
      await send(url, '/orders', { key, body: { note: key } })
      await until(() => errors.length > 0)
      assert.match(errors.join(), /TestController.create answered by itself/)
      assert.equal(await countOf(key), 0)
      assert.equal(await recordOf(key), undefined)
    })

    describe('the work', () => {
      test('has the transaction, as a parameter and wherever it is asked for', async () => {
        class Orders {
          constructor (client) { this.client = client }
          transaction () { return this.client.current() }
        }
        Injectable()(Orders)
        Inject(Idempotency)(Orders, undefined, 0)
        const { url, app } = await serve({
          look: {
            on: [Post('look'), Idempotent()],
            parameters: [IdempotentWork()],
            handle: async work => {
              const orders = app.get(Orders)
              await new Promise(resolve => setImmediate(resolve))
              return { key: work.key, tenant: work.scope.tenant, same: work.tx === orders.transaction(), claim: work.claim === undefined }
            }
          },
          unprotected: { on: [Post('unprotected')], parameters: [IdempotentWork()], handle: work => ({ none: work === undefined }) }
        }, { providers: [Orders] })
        const key = randomUUID()
        assert.deepEqual((await send(url, '/look', { key })).json, { key, tenant: 'acme', same: true, claim: true })
        assert.deepEqual((await send(url, '/unprotected')).json, { none: true })
        assert.equal(app.get(IDEMPOTENCY_OPTIONS).idempotency, idempotency)
      })

      test('has the claim of a lease, and goes on from its last checkpoint', async () => {
        const points = []
        const { url } = await serve({
          charge: {
            on: [Post('charge'), Idempotent({ lease: '10 min' })],
            parameters: [IdempotentWork()],
            async handle ({ claim, tx }) {
              assert.equal(tx, undefined)
              points.push(claim.recovery?.point ?? null)
              if (claim.recovery === null) {
                await claim.checkpoint('charged', { charge: 7 })
                throw new Error('the process died')
              }
              return claim.recovery.state
            }
          }
        })
        const key = randomUUID()
        assert.equal((await send(url, '/charge', { key })).status, 500)
        const second = await send(url, '/charge', { key })
        assert.deepEqual(second.json, { charge: 7 })
        assertReplay(second, await send(url, '/charge', { key }))
        assert.deepEqual(points, [null, 'charged'])
      })

      /** A route whose first call, or its COMMIT, is in conflict. */
      function conflicting (conflict) {
        const calls = []
        return {
          calls,
          on: [Post('orders'), Idempotent()],
          parameters: [Body(), Res({ passthrough: true })],
          async handle (body, response) {
            calls.push(body.note)
            apps[0].getHttpAdapter().setHeader(response, 'Set-Cookie', `call=${calls.length}`)
            const order = await create.handle(body)
            if (calls.length === 1) await conflict()
            return { ...order, calls: calls.length }
          }
        }
      }

      test('is done again after a conflict, with pipes and interceptors inside', async () => {
        const routes = {
          create: conflicting(async () => await idempotency.current().query("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40001'; END $$"))
        }
        let intercepted = 0
        const counting = { intercept: (_, next) => { intercepted++; return next.handle() } }
        const { url } = await serve(routes, { ofClass: [UseInterceptors(counting)] })
        const key = randomUUID()
        const first = await send(url, '/orders', { key, body: { note: key } })
        assert.equal(first.status, 201)
        assert.equal(first.json.calls, 2)
        assert.deepEqual(first.headers['set-cookie'], ['call=2'])
        assert.deepEqual(routes.create.calls, [key, key])
        assert.equal(intercepted, 2)
        assert.equal(await countOf(key), 1)
        assert.equal((await send(url, '/orders', { key, body: { note: key } })).json.calls, 2)
      })

      test('is done again after a conflict in COMMIT', async () => {
        const routes = { create: conflicting(async () => await idempotency.current().query('INSERT INTO conflicts VALUES (1)')) }
        const { url } = await serve(routes)
        const key = randomUUID()
        const first = await send(url, '/orders', { key, body: { note: key } })
        assert.equal(first.status, 201)
        assert.equal(first.json.calls, 2)
        assert.deepEqual(first.headers['set-cookie'], ['call=2'])
        assert.equal(await countOf(key), 1)
      })

      test('is not done again if it may have read from the connection', async () => {
        let calls = 0
        const { url } = await serve({
          upload: {
            on: [Post('files'), Idempotent({ fingerprint: () => null })],
            async handle () {
              calls++
              await idempotency.current().query("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40001'; END $$")
            }
          }
        }, { setUp: app => app.useBodyParser(...adapter === 'Express' ? ['raw', { type: 'multipart/form-data' }] : ['multipart/form-data']) })
        const answer = await send(url, '/files', { key: randomUUID(), body: '--a--', headers: { 'content-type': 'multipart/form-data; boundary=a' } })
        assert.equal(answer.status, 503)
        assert.equal(calls, 1)
      })

      test('a conflict that remains is 503 with Retry-After, and nothing of the work is sent', async () => {
        const { url, errors } = await serve({
          create: {
            on: [Post('orders'), Idempotent()],
            parameters: [Res({ passthrough: true })],
            async handle (response) {
              apps[0].getHttpAdapter().setHeader(response, 'Set-Cookie', 'a=1')
              await idempotency.current().query("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40P01'; END $$")
            }
          }
        })
        const answer = await send(url, '/orders', { key: randomUUID() })
        assert.equal(answer.status, 503)
        assert.equal(answer.json.code, 'TRANSACTION_CONFLICT')
        assert.equal(answer.headers['retry-after'], '1')
        assert.equal(answer.headers['set-cookie'], undefined)
        assert.match(errors.join(), /in conflict with others/)
      })

      test('goes on when the client hangs up, and a repeat gets its answer', async () => {
        const started = gate()
        const go = gate()
        const gone = gate()
        const { url } = await serve({
          create: {
            ...create,
            parameters: [Body(), Req()],
            async handle (body, request) {
              (request.raw ?? request).socket.once('close', gone.open)
              started.open()
              await go.opened
              return await create.handle(body)
            }
          }
        })
        const key = randomUUID()
        const hangUp = new AbortController()
        const first = send(url, '/orders', { key, body: { note: key }, signal: hangUp.signal })
        await started.opened
        hangUp.abort()
        await assert.rejects(first, { name: 'AbortError' })
        await gone.opened
        go.open()
        let again
        do again = await send(url, '/orders', { key, body: { note: key } })
        while (again.status === 409)
        assert.equal(again.status, 201)
        assert.equal(again.headers['idempotent-replayed'], 'true')
        assert.equal(await countOf(key), 1)
      })
    })

    describe('which routes', () => {
      let calls
      const counted = on => ({ on, handle: () => ({ call: ++calls }) })
      beforeEach(() => { calls = 0 })

      async function isProtected (url, path, options = {}) {
        const key = randomUUID()
        const first = await send(url, path, { key, ...options })
        const again = await send(url, path, { key, ...options })
        assert.ok(first.status < 300, first.text)
        return first.text === again.text
      }

      test('those with @Idempotent(), and no others', async () => {
        const { url } = await serve({ yes: counted([Post('yes'), Idempotent()]), no: counted([Post('no')]) })
        assert.equal(await isProtected(url, '/yes'), true)
        assert.equal(await isProtected(url, '/no'), false)
      })

      test('all of a class, except those with @SkipIdempotency()', async () => {
        const { url } = await serve({ yes: counted([Put('yes')]), no: counted([Post('no'), SkipIdempotency()]) }, { ofClass: [Idempotent()] })
        assert.equal(await isProtected(url, '/yes', { method: 'PUT' }), true)
        assert.equal(await isProtected(url, '/no'), false)
      })

      test('all, with the option `everywhere`; the nearest decorator decides', async () => {
        const { url } = await serve({ yes: counted([Post('yes'), Idempotent()]), no: counted([Post('no')]) }, {
          options: { everywhere: true }, ofClass: [SkipIdempotency()]
        })
        assert.equal(await isProtected(url, '/yes'), true)
        assert.equal(await isProtected(url, '/no'), false)
        const other = await serve({ plain: counted([Post('plain')]) }, { options: { everywhere: true } })
        assert.equal(await isProtected(other.url, '/plain'), true)
      })

      test('not those that are safe, also with @Sse() and @Res()', async () => {
        const { url } = await serve({
          plain: counted([Get('plain')]),
          events: { on: [Sse('events')], handle: () => of({ data: 'a' }) },
          own: { on: [Get('own')], parameters: [Res()], handle: response => { apps[0].getHttpAdapter().reply(response, { a: 1 }) } }
        }, { options: { everywhere: true } })
        assert.equal(await isProtected(url, '/plain', { method: 'GET' }), false)
        assert.match((await send(url, '/events', { method: 'GET' })).text, /data: a/)
        assert.deepEqual((await send(url, '/own', { method: 'GET' })).json, { a: 1 })
      })

      test('a key may be optional', async () => {
        const { url } = await serve({ maybe: counted([Post('maybe'), Idempotent({ required: false })]) })
        assert.equal(await isProtected(url, '/maybe'), true)
        assert.equal((await send(url, '/maybe')).json.call, 2)
        assert.equal((await send(url, '/maybe')).json.call, 3)
      })

      test('options of the method go before those of the class, and those before the module\'s', async () => {
        const { url } = await serve({
          named: counted([Post('named'), Idempotent({ action: 'of.method' })]),
          other: counted([Post('other')])
        }, { ofClass: [Idempotent({ action: 'of.class', tenant: () => 'of class' })], options: { action: 'of.module', ttl: { 201: '10 min' } } })
        const [one, two] = [randomUUID(), randomUUID()]
        await send(url, '/named', { key: one })
        await send(url, '/other', { key: two })
        const records = [await recordOf(one), await recordOf(two)]
        assert.deepEqual(records.map(record => [record.tenant, record.action]), [['of class', 'of.method'], ['of class', 'of.class']])
        for (const { expires_at: expires, finished_at: finished } of records) assert.equal(expires - finished, 600_000)
      })

      test('an interceptor that is registered twice protects once', async () => {
        const { url } = await serve({ yes: counted([Post('yes'), Idempotent(), UseInterceptors(IdempotencyInterceptor)]) })
        assert.equal(await isProtected(url, '/yes'), true)
        assert.equal(calls, 1)
      })
    })

    describe('forRootAsync', () => {
      class Factory {
        createIdempotencyOptions () { return optionsOf({ tenant: () => 'by factory' }) }
      }
      Injectable()(Factory)
      class FactoryModule {}
      Module({ providers: [Factory], exports: [Factory] })(FactoryModule)

      const forms = {
        useFactory: () => ({ imports: [FactoryModule], inject: [Factory], useFactory: async factory => factory.createIdempotencyOptions() }),
        useClass: () => ({ useClass: Factory }),
        useExisting: () => ({ imports: [FactoryModule], useExisting: Factory })
      }
      for (const [name, form] of Object.entries(forms)) {
        test(name, async () => {
          const { url } = await serve({ create }, { module: IdempotencyModule.forRootAsync(form()) })
          const key = randomUUID()
          const first = await send(url, '/orders', { key, body: { note: key } })
          assertReplay(first, await send(url, '/orders', { key, body: { note: key } }))
          assert.equal((await recordOf(key)).tenant, 'by factory')
        })
      }
    })
  })
}

test('is there for CommonJS as well', () => {
  const nestjs = createRequire(import.meta.url)('pg-idempotency/nestjs')
  assert.equal(typeof nestjs.IdempotencyModule.forRoot, 'function')
  assert.deepEqual(Object.keys(nestjs).sort(), [
    'IDEMPOTENCY_OPTIONS', 'Idempotent', 'IdempotencyException', 'IdempotencyInterceptor', 'IdempotencyModule', 'IdempotentWork', 'SkipIdempotency'
  ].sort())
})
