/** The language model that is reached over HTTP: MODEL_URL. */
import { Readable } from 'node:stream'
import { Injectable } from '@nestjs/common'
import type { OnModuleDestroy, OnModuleInit } from '@nestjs/common'
import { ModelServer } from './model-server.js'

@Injectable()
export class Model implements OnModuleInit, OnModuleDestroy {
  #url = process.env.MODEL_URL
  #own: ModelServer | undefined

  /** Without MODEL_URL there is a model inside this process. */
  async onModuleInit (): Promise<void> {
    if (this.#url !== undefined) return
    this.#own = await ModelServer.start()
    this.#url = this.#own.url
  }

  async onModuleDestroy (): Promise<void> {
    await this.#own?.stop()
  }

  /**
   * An answer, word by word.
   *
   * @param said the words that were said already; it goes on from there
   */
  async * answer (prompt: string, said: readonly string[]): AsyncGenerator<string> {
    const { body } = await fetch(String(this.#url), { method: 'POST', body: JSON.stringify({ prompt, said }) })
    if (body === null) throw new Error('the model said nothing')
    const stream = Readable.fromWeb(body as import('node:stream/web').ReadableStream)
    stream.setEncoding('utf8')
    let rest = ''
    for await (const text of stream) {
      const lines = (rest + text).split('\n')
      rest = lines.pop() as string
      yield * lines
    }
  }
}
