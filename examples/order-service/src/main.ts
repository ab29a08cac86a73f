/** Starts the service: DATABASE_URL says with which database, PORT and HOST where. */
import { createApp } from './app.js'
import { createPool } from './database.js'

const pool = createPool()
const app = await createApp(pool)

for (const signal of ['SIGINT', 'SIGTERM'] as const) {
  process.once(signal, async () => {
    await app.close()
    await pool.end()
  })
}
await app.listen({ port: Number(process.env.PORT ?? 3000), host: process.env.HOST ?? '127.0.0.1' })
