/** Problems of requests whose use cases ask the port, written as the interceptor writes its own. */
import { Catch } from '@nestjs/common'
import type { ArgumentsHost, ExceptionFilter } from '@nestjs/common'
import type { Response } from 'express'
import { Idempotency, IdempotencyError } from 'pg-idempotency'
import { HttpProtection } from 'pg-idempotency/http'

@Catch(IdempotencyError)
export class ProblemFilter implements ExceptionFilter {
  readonly #protection

  constructor (idempotency: Idempotency<unknown>) {
    this.#protection = new HttpProtection(idempotency, { tenant: () => null })
  }

  catch (error: IdempotencyError, host: ArgumentsHost): void {
    const { status, headers, body } = this.#protection.problem(error)
    host.switchToHttp().getResponse<Response>().status(status).set(headers).send(body)
  }
}
