/**
 * A language model for the demonstration, reached over HTTP as real ones are: it answers a prompt in words
 * that come one by one, a line each, and never the same twice. It can go on from what was said already.
 */
import { once } from 'node:events'
import http from 'node:http'
import type { AddressInfo } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'

const words = ['cash', 'flow', 'looks', 'steady', 'while', 'costs', 'rise', 'and', 'margins', 'shrink', 'in', 'spring']
const length = 24

export class ModelServer {
  /** Is called before each word, with its number in the answer; a promise holds it back. */
  onWord: (number: number) => unknown = () => {}
  readonly #server = http.createServer((request, response) => {
    this.#answer(request, response).catch(() => response.destroy())
  })

  /** @param delay the time for each word, in milliseconds */
  private constructor (private readonly delay: number) {}

  static async start ({ delay = 100 } = {}): Promise<ModelServer> {
    const model = new ModelServer(delay)
    model.#server.listen(0, '127.0.0.1')
    await once(model.#server, 'listening')
    return model
  }

  get url (): string {
    return `http://127.0.0.1:${(this.#server.address() as AddressInfo).port}`
  }

  async stop (): Promise<void> {
    this.#server.closeAllConnections()
    await new Promise(resolve => this.#server.close(resolve))
  }

  async #answer (request: http.IncomingMessage, response: http.ServerResponse): Promise<void> {
    let text = ''
    for await (const chunk of request) text += chunk
    const { prompt, said }: { prompt: string, said: string[] } = JSON.parse(text)
    for (let n = said.length + 1; n <= length && !response.destroyed; n++) {
      await sleep(this.delay)
      await this.onWord(n)
      response.write(`${n === 1 ? `About "${prompt}":` : words[Math.floor(Math.random() * words.length)]}\n`)
    }
    response.end()
  }
}
