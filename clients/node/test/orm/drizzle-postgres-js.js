// Drizzle on postgres.js.
import { drizzle } from 'drizzle-orm/postgres-js'
import postgres from 'postgres'
import { drizzleOn } from './drizzle.js'

export async function open (url) {
  const client = postgres(url, { max: 4, onnotice: () => {} })
  return { ...drizzleOn(drizzle(client)), close: async () => await client.end() }
}
