/** The application: what happens to every request, in this order, and then the routes. */
import cors from '@fastify/cors'
import Fastify from 'fastify'
import type { FastifyInstance } from 'fastify'
import type pg from 'pg'
import { createIdempotency, findSchema } from 'pg-idempotency'
import idempotencyPlugin from 'pg-idempotency/fastify'
import { createTables } from './database.js'
import { answerErrors } from './errors.js'
import { EventConsumer } from './events.js'
import { logIn } from './login.js'
import { PaymentProvider } from './payments.js'
import { HEADER, protection } from './protection.js'
import { refundRoutes } from './refunds.js'
import { routes } from './routes.js'

/**
 * Make the application, with its tables.
 *
 * @param pool of a database that has the extension
 */
export async function createApp (pool: pg.Pool): Promise<FastifyInstance> {
  const idempotency = createIdempotency({ pool, schema: await findSchema(pool) })
  const provider = new PaymentProvider(pool)
  const consumer = new EventConsumer(pool, idempotency)
  await createTables(pool)

  const app = Fastify({ logger: { level: process.env.LOG_LEVEL ?? 'warn' } })
  answerErrors(app)
  // a page of another origin may send the key; the plugin below lets it see what comes back
  await app.register(cors, { origin: true, allowedHeaders: ['Content-Type', 'Authorization', HEADER] })
  // first who it is, and then whether it is a repeat: a stranger is never answered from a record
  logIn(app)
  await app.register(idempotencyPlugin, { idempotency, ...protection })

  routes(app, pool, idempotency)
  refundRoutes(app, pool, provider)

  consumer.start(app.log)
  app.addHook('onClose', async () => { await consumer.stop() })
  return app
}
