/**
 * The copilot's answer is a stream of server-sent events, and a repeat gets the same events.
 *
 * An answer may leave only after it is kept, and a stream leaves piece by piece. So each piece is kept
 * before it leaves: a checkpoint of the lease holds all that was said. The attempt that comes after a
 * crash says first what was said before, and then lets the model go on. So what a client has seen of a
 * stream that broke is always the beginning of what it gets with the same key later.
 *
 * `event: done` leaves when the whole recording is kept as the answer. A client that has not seen it asks
 * again. While the stream is running, a repeat is 409 with Retry-After.
 *
 * The interceptor sends an answer as a whole, so this route goes to the layer below it, HttpProtection.
 */
import { BadRequestException, Body, Controller, Inject, Post, Req, Res } from '@nestjs/common'
import type { RawBodyRequest } from '@nestjs/common'
import type { Request, Response } from 'express'
import type { Claim } from 'pg-idempotency'
import { HttpProtection } from 'pg-idempotency/http'
import type { HttpAnswer, HttpRequest } from 'pg-idempotency/http'
import { IDEMPOTENCY_OPTIONS, SkipIdempotency } from 'pg-idempotency/nestjs'
import type { IdempotencyModuleOptions } from 'pg-idempotency/nestjs'
import type { Transaction } from '../database/database.js'
import { Model } from './model.js'

type Chat = RawBodyRequest<Request>

const DONE = 'event: done\ndata: {}\n\n'

@Controller('copilot')
export class CopilotController {
  readonly #protection: HttpProtection<Transaction, Chat>

  constructor (@Inject(IDEMPOTENCY_OPTIONS) options: IdempotencyModuleOptions<Chat>, private readonly model: Model) {
    this.#protection = new HttpProtection<Transaction, Chat>(options.idempotency, {
      ...options, action: 'copilot.chat', lease: '5 min'
    })
  }

  @SkipIdempotency()
  @Post('chat')
  async chat (@Req() raw: Chat, @Res() response: Response, @Body() { prompt }: { prompt?: unknown } = {}): Promise<void> {
    if (typeof prompt !== 'string') throw new BadRequestException('prompt must be a text')
    const request = requestOf(raw)
    const key = this.#protection.admit(request) as string
    const handled = await this.#protection.run(request, key, async ({ claim }) => await this.#speak(claim!, prompt, response))

    if (handled.own) response.end(DONE)
    else if (response.headersSent) response.destroy() // what was said is not the answer: the client has to ask again
    else response.status(handled.status).set(handled.headers).end(handled.body ?? undefined)
  }

  /** Have the model answer, and send each piece once it is kept; the whole is the answer of the request. */
  async #speak (claim: Claim<Transaction>, prompt: string, response: Response): Promise<HttpAnswer> {
    const said: string[] = claim.recovery?.state ?? []
    const headers = { 'content-type': 'text/event-stream; charset=utf-8' }
    response.status(200).set({ ...headers, 'cache-control': 'no-store' })
    response.write(events(said))
    try {
      for await (const word of this.model.answer(prompt, said)) {
        said.push(word)
        await claim.checkpoint('speaking', said)
        response.write(eventOf(word, said.length))
      }
    } catch (error) {
      response.destroy() // a status cannot be sent any more
      throw error
    }
    return { status: 200, headers, body: events(said) + DONE }
  }
}

function events (words: readonly string[]): string {
  return words.map((word, position) => eventOf(word, position + 1)).join('')
}

function eventOf (word: string, id: number): string {
  return `id: ${id}\ndata: ${JSON.stringify({ word })}\n\n`
}

function requestOf (raw: Chat): HttpRequest<Chat> {
  return {
    raw,
    method: raw.method,
    route: '/copilot/chat',
    params: raw.params,
    query: raw.query,
    header: name => raw.headersDistinct[name] ?? [],
    body: raw.rawBody ?? null
  }
}
