/** The port on the client of the extension. */
import { Injectable } from '@nestjs/common'
import { Idempotency } from 'pg-idempotency'
import type { Result, Scope } from 'pg-idempotency'
import type { Transaction } from '../database/database.js'
import { IdempotencyPort } from './idempotency.port.js'
import type { RequestScope, StoredAnswer } from './idempotency.port.js'

@Injectable()
export class PostgresIdempotencyAdapter extends IdempotencyPort {
  constructor (private readonly idempotency: Idempotency<Transaction>) {
    super()
  }

  async get (scope: RequestScope, request: string): Promise<StoredAnswer | null> {
    const { result } = await this.idempotency.status(scopeOf(scope), request)
    return result && answerOf(result)
  }

  async store (scope: RequestScope, request: string, { status, body }: StoredAnswer): Promise<StoredAnswer> {
    return answerOf(await this.idempotency.store(scopeOf(scope), request, { status, json: body }))
  }

  async run (
    scope: RequestScope,
    request: string,
    work: (transaction: Transaction) => Promise<StoredAnswer>
  ): Promise<StoredAnswer & { replayed: boolean }> {
    const result = await this.idempotency.run(scopeOf(scope), request, async transaction => {
      const { status, body } = await work(transaction)
      return { status, json: body }
    })
    return { ...answerOf(result), replayed: result.replayed }
  }
}

function scopeOf ({ tenant, user, action, key }: RequestScope): Scope {
  return { tenant, actor: user, action, key }
}

function answerOf ({ status, json }: Result): StoredAnswer {
  return { status, body: json }
}
