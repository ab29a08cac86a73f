/** Errors, and how all of them are answered: `{ code, error, details }`. */
import type { FastifyError, FastifyInstance } from 'fastify'
import { isUnavailable } from './database.js'

export interface ErrorBody {
  code: string
  error: string
  details: Record<string, unknown>
}

/** An error of the service, with the status that it is answered with. */
export class OrderError extends Error {
  constructor (readonly statusCode: number, readonly code: string, message: string, readonly details: Record<string, unknown> = {}) {
    super(message)
  }
}

/** There is an order for this key, and its record is not there any more. */
export class DuplicateOrderError extends OrderError {
  constructor (readonly orderId: string) {
    super(409, 'DUPLICATE_ORDER', 'There is an order for this idempotency key already', { orderId })
  }
}

export function answerErrors (app: FastifyInstance): void {
  app.setErrorHandler<FastifyError | OrderError>(async (error, request, reply) => {
    if (error instanceof OrderError) {
      return reply.code(error.statusCode).send(bodyOf(error.code, error.message, error.details))
    }
    if (isUnavailable(error)) {
      return reply.code(503).header('retry-after', '1').send(bodyOf('DATABASE_UNAVAILABLE', 'Nothing was done; try again'))
    }
    if (error.validation !== undefined) {
      return reply.code(400).send(bodyOf('VALIDATION_FAILED', error.message))
    }
    const status = error.statusCode ?? 500
    if (status < 500) return reply.code(status).send(bodyOf(error.code, error.message))
    request.log.error({ err: error }, 'the request failed')
    return reply.code(500).send(bodyOf('INTERNAL_ERROR', 'Something went wrong; try again'))
  })
  app.setNotFoundHandler(async (request, reply) =>
    reply.code(404).send(bodyOf('NOT_FOUND', `There is no ${request.method} ${request.url}`)))
}

function bodyOf (code: string, error: string, details: Record<string, unknown> = {}): ErrorBody {
  return { code, error, details }
}
