/**
 * Custom fields and layouts: use cases that ask the port themselves.
 *
 * `version` counts the changes, so that a change that was applied twice would show.
 */
import { Injectable } from '@nestjs/common'
import type { LoggedIn } from '../auth/login.js'
import { IdempotencyPort } from '../idempotency/idempotency.port.js'
import type { StoredAnswer } from '../idempotency/idempotency.port.js'

/** What a use case has to know of a request to do it once. */
export interface Command {
  login: LoggedIn
  key: string
  /** JSON text: what is to be done, as it came. */
  request: string
}

/** An answer, and whether it is that of an earlier request. */
export type Answer = StoredAnswer & { replayed: boolean }

@Injectable()
export class CustomizationService {
  constructor (private readonly idempotency: IdempotencyPort) {}

  async createField ({ login, key, request }: Command, name: string, type: string): Promise<Answer> {
    const { tenant, user } = login
    return await this.idempotency.run({ tenant, user, action: 'customization.create_field', key }, request, async tx => {
      const { count } = await tx.customField.createMany({ data: [{ tenant, name, type }], skipDuplicates: true })
      if (count === 0) return { status: 422, body: { message: `there is a field ${name} already` } }
      return { status: 201, body: { name, type, version: 1 } }
    })
  }

  async changeField ({ login, key, request }: Command, name: string, type: string): Promise<Answer> {
    const { tenant, user } = login
    return await this.idempotency.run({ tenant, user, action: 'customization.change_field', key }, request, async tx => {
      const { version } = await tx.customField.upsert({
        where: { tenant_name: { tenant, name } },
        create: { tenant, name, type },
        update: { type, version: { increment: 1 } }
      })
      return { status: 200, body: { name, type, version } }
    })
  }

  async changeLayout ({ login, key, request }: Command, entityType: string, fields: string[]): Promise<Answer> {
    const { tenant, user } = login
    return await this.idempotency.run({ tenant, user, action: 'customization.change_layout', key }, request, async tx => {
      const { version } = await tx.layout.upsert({
        where: { tenant_entityType: { tenant, entityType } },
        create: { tenant, entityType, fields },
        update: { fields, version: { increment: 1 } }
      })
      return { status: 200, body: { entityType, fields, version } }
    })
  }
}
