/**
 * The database of the shop: one pool, the client of the extension on it, and the tables.
 *
 * Next loads modules once for each kind of page and route, and when it builds, where there is no database.
 * So what a process has one of is kept on `globalThis`, and opened when it is first asked for.
 */

import { Pool } from 'pg'
import type { PoolClient } from 'pg'
import { createIdempotency, findSchema } from 'pg-idempotency'
import type { Idempotency, Transaction } from 'pg-idempotency'
import { record } from './observe'

export type Tx = Transaction<PoolClient>

export interface Database {
  pool: Pool
  /** The schema of the extension, as it stands in SQL. */
  schema: string
  idempotency: Idempotency<Tx>
}

const process = globalThis as { shopDatabase?: Promise<Database> }

/**
 * The database, ready to be used.
 *
 * @throws what the driver throws, if it cannot be reached; the next call tries again
 */
export async function database (): Promise<Database> {
  process.shopDatabase ??= open().catch(error => {
    delete process.shopDatabase
    throw error
  })
  return await process.shopDatabase
}

async function open (): Promise<Database> {
  const { DATABASE_URL, IDEMPOTENCY_TTL } = globalThis.process.env
  const pool = new Pool({
    connectionString: DATABASE_URL,
    connectionTimeoutMillis: 5_000,
    ...(IDEMPOTENCY_TTL ? { options: `-c idempotency.ttl=${IDEMPOTENCY_TTL.replaceAll(' ', '\\ ')}` } : {})
  })
  pool.on('error', error => console.error(JSON.stringify({ level: 'error', message: error.message })))
  try {
    await createTables(pool)
    const schema = await findSchema(pool)
    const quoted = `"${schema.replaceAll('"', '""')}"`
    await checkLifetime(pool, quoted)
    return { pool, schema: quoted, idempotency: createIdempotency({ pool, schema, onOutcome: record }) }
  } catch (error) {
    await pool.end()
    throw error
  }
}

/**
 * How long answers are kept is a setting of the server, with limits that only its administrator can change.
 * Out of them, each request would fail; better that the service does not start.
 */
async function checkLifetime (pool: Pool, schema: string): Promise<void> {
  // the call loads the extension, which knows the settings
  const { rows: [{ ttl, least, most, allowed }] } = await pool.query(
    `SELECT ttl, least, most, ttl::interval BETWEEN least::interval AND most::interval AS allowed
       FROM (SELECT current_setting('idempotency.ttl') AS ttl, current_setting('idempotency.min_ttl') AS least,
                    current_setting('idempotency.max_ttl') AS most
              WHERE ${schema}.idempotency_request_hash('{}') IS NOT NULL) AS settings`)
  if (!allowed) throw new Error(`idempotency.ttl is ${ttl}, and must be from ${least} to ${most}`)
}

/** Create what is missing. Of processes that start together, one does it while the others wait for the lock. */
async function createTables (pool: Pool): Promise<void> {
  await pool.query(`
    BEGIN;
    SELECT pg_advisory_xact_lock(hashtext('shop'));
    CREATE TABLE IF NOT EXISTS orders (
      id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
      tenant text NOT NULL,
      user_id text NOT NULL,
      items jsonb NOT NULL,
      status text NOT NULL DEFAULT 'created',
      created_at timestamptz NOT NULL DEFAULT now()
    );
    CREATE TABLE IF NOT EXISTS payments (
      id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
      tenant text NOT NULL,
      user_id text NOT NULL,
      order_id uuid NOT NULL REFERENCES orders,
      amount numeric NOT NULL CHECK (amount > 0),
      charge text NOT NULL UNIQUE,
      created_at timestamptz NOT NULL DEFAULT now()
    );
    CREATE TABLE IF NOT EXISTS refunds (
      id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
      tenant text NOT NULL,
      user_id text NOT NULL,
      payment_id uuid NOT NULL UNIQUE REFERENCES payments,
      refund text NOT NULL UNIQUE,
      created_at timestamptz NOT NULL DEFAULT now()
    );
    CREATE TABLE IF NOT EXISTS stock (
      tenant text NOT NULL,
      sku text NOT NULL,
      available int NOT NULL CHECK (available >= 0),
      PRIMARY KEY (tenant, sku)
    );
    CREATE TABLE IF NOT EXISTS reservations (
      id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
      tenant text NOT NULL,
      user_id text NOT NULL,
      sku text NOT NULL,
      quantity int NOT NULL CHECK (quantity > 0),
      created_at timestamptz NOT NULL DEFAULT now(),
      FOREIGN KEY (tenant, sku) REFERENCES stock
    );
    CREATE TABLE IF NOT EXISTS subscriptions (
      tenant text NOT NULL,
      user_id text NOT NULL,
      plan text NOT NULL,
      session text NOT NULL UNIQUE,
      PRIMARY KEY (tenant, user_id)
    );
    CREATE TABLE IF NOT EXISTS practice_sessions (
      id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
      tenant text NOT NULL,
      user_id text NOT NULL,
      topic text NOT NULL
    );
    CREATE TABLE IF NOT EXISTS answers (
      id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
      session_id uuid NOT NULL REFERENCES practice_sessions,
      answer text NOT NULL
    );
    CREATE TABLE IF NOT EXISTS provider_operations (
      key text PRIMARY KEY,
      id text NOT NULL DEFAULT 'op_' || gen_random_uuid(),
      kind text NOT NULL,
      amount numeric,
      calls int NOT NULL DEFAULT 1
    );
    COMMIT`)
}
