/**
 * A mail server for the demonstration: it takes every message, also one that it has already, and can be
 * told to crash before or after it takes the next one.
 */
import { once } from 'node:events'
import http from 'node:http'
import type { AddressInfo } from 'node:net'
import type { Message } from './mailer.js'

export class MailServer {
  /** What it has taken; a message that was sent twice is here twice. */
  readonly messages: Message[] = []
  /** Is called when a message was taken, before the sender is told. */
  onMessage: (message: Message) => unknown = () => {}
  #crash: 'before' | 'after' | null = null
  readonly #server = http.createServer((request, response) => {
    this.#answer(request, response).catch(() => request.destroy())
  })

  static async start (): Promise<MailServer> {
    const mail = new MailServer()
    mail.#server.listen(0, '127.0.0.1')
    await once(mail.#server, 'listening')
    return mail
  }

  get url (): string {
    return `http://127.0.0.1:${(this.#server.address() as AddressInfo).port}`
  }

  /** Break the connection of the next sender, before or after its message is taken. */
  crashNext (when: 'before' | 'after'): void {
    this.#crash = when
  }

  async stop (): Promise<void> {
    this.#server.closeAllConnections()
    await new Promise(resolve => this.#server.close(resolve))
  }

  async #answer (request: http.IncomingMessage, response: http.ServerResponse): Promise<void> {
    if (request.method === 'GET') {
      const id = request.url?.split('/').at(-1)
      response.writeHead(this.messages.some(message => message.id === id) ? 200 : 404).end()
      return
    }
    const crash = this.#crash
    this.#crash = null
    let text = ''
    for await (const chunk of request) text += chunk
    if (crash !== 'before') {
      const message: Message = JSON.parse(text)
      this.messages.push(message)
      await this.onMessage(message)
    }
    if (crash !== null) throw new Error('crashed')
    response.writeHead(202).end()
  }
}
