/**
 * Sends e-mails by a mail server that is reached over HTTP: MAIL_URL.
 *
 * A message has an id that the sender makes, and the server can be asked whether it has one. That is what
 * it takes to send once: when a connection breaks after the message left, nobody else knows.
 */
import { Injectable } from '@nestjs/common'
import type { OnModuleDestroy, OnModuleInit } from '@nestjs/common'
import { MailServer } from './mail-server.js'

export interface Message {
  id: string
  to: string
  subject: string
}

/** In milliseconds, and less than the lease: when somebody takes over, nothing of ours may be on its way. */
const TIMEOUT = 30_000

@Injectable()
export class Mailer implements OnModuleInit, OnModuleDestroy {
  #url = process.env.MAIL_URL
  #own: MailServer | undefined

  /** Without MAIL_URL there is a mail server inside this process, which forgets everything at its end. */
  async onModuleInit (): Promise<void> {
    if (this.#url !== undefined) return
    this.#own = await MailServer.start()
    this.#url = this.#own.url
  }

  async onModuleDestroy (): Promise<void> {
    await this.#own?.stop()
  }

  /** @throws Error if it is not known whether the message was taken */
  async send (message: Message): Promise<void> {
    const { status } = await fetch(`${this.#url}/messages`, { method: 'POST', body: JSON.stringify(message), signal: AbortSignal.timeout(TIMEOUT) })
    if (status !== 202) throw new Error(`the mail server answered ${status}`)
  }

  /** Whether the server has taken a message. */
  async hasSent (id: string): Promise<boolean> {
    const { status } = await fetch(`${this.#url}/messages/${id}`, { signal: AbortSignal.timeout(TIMEOUT) })
    if (status !== 200 && status !== 404) throw new Error(`the mail server answered ${status}`)
    return status === 200
  }
}
