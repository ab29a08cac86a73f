/** The database: its pool, its transactions, and the tables of the service. */
import pg from 'pg'
import { RolledBackError, isConnectionLost } from 'pg-idempotency'
import type { Queryable } from 'pg-idempotency'

/** A pool for DATABASE_URL. Who waits longer than two seconds for a connection is told to come back. */
export function createPool (): pg.Pool {
  const pool = new pg.Pool({
    connectionString: process.env.DATABASE_URL,
    max: Number(process.env.POOL_SIZE ?? 10),
    connectionTimeoutMillis: 2000
  })
  // a connection that breaks must not end the process; whoever uses it hears of it by the error of a query
  pool.on('error', () => {})
  pool.on('connect', client => { client.on('error', () => {}) })
  return pool
}

/** Do some work in a transaction. */
export async function inTransaction<T> (pool: pg.Pool, work: (tx: Queryable) => Promise<T>): Promise<T> {
  const client = await pool.connect()
  let broken = false
  try {
    await client.query('BEGIN')
    const result = await work(client)
    const { command } = await client.query('COMMIT')
    if (command !== 'COMMIT') throw new RolledBackError('an error in the transaction had been swallowed')
    return result
  } catch (error) {
    await client.query('ROLLBACK').catch(() => { broken = true })
    throw error
  } finally {
    client.release(broken)
  }
}

/** Whether an error says that the database cannot be reached, or has no connection left. */
export function isUnavailable (error: unknown): boolean {
  return isConnectionLost(error) || (error instanceof Error && error.message === 'timeout exceeded when trying to connect')
}

/** Create the tables that are missing; services that start together do it one after the other. */
export async function createTables (pool: pg.Pool): Promise<void> {
  await pool.query(`
    SELECT pg_advisory_xact_lock(hashtext('order-service'));

    CREATE TABLE IF NOT EXISTS orders (
      id uuid PRIMARY KEY,
      tenant text NOT NULL,
      user_id text NOT NULL,
      status text NOT NULL DEFAULT 'created',
      tier text NOT NULL DEFAULT 'standard',
      items json NOT NULL,
      total int NOT NULL,
      refunded int NOT NULL DEFAULT 0,
      idempotency_key text NOT NULL,
      created_at timestamptz NOT NULL DEFAULT now()
    );
    -- of a tenant and its user, as two users may choose the same key
    CREATE UNIQUE INDEX IF NOT EXISTS idx_orders_unique_idempotency_per_tenant
      ON orders (tenant, user_id, idempotency_key);

    CREATE TABLE IF NOT EXISTS refunds (
      id uuid PRIMARY KEY,
      order_id uuid NOT NULL REFERENCES orders,
      amount int NOT NULL,
      reference uuid
    );

    CREATE TABLE IF NOT EXISTS order_events (
      id uuid PRIMARY KEY,
      order_id uuid NOT NULL REFERENCES orders,
      sequence_number int NOT NULL,
      type text NOT NULL,
      idempotency_key uuid NOT NULL UNIQUE,
      created_at timestamptz NOT NULL DEFAULT now(),
      acknowledged_at timestamptz,
      UNIQUE (order_id, sequence_number)
    );
    CREATE INDEX IF NOT EXISTS order_events_to_deliver ON order_events (id) WHERE acknowledged_at IS NULL;

    -- what the consumer got, and what it did; no unique index would stop it from doing it twice
    CREATE TABLE IF NOT EXISTS event_deliveries (id uuid PRIMARY KEY, event_id uuid NOT NULL);
    CREATE TABLE IF NOT EXISTS notifications (event_id uuid NOT NULL, sent_at timestamptz NOT NULL DEFAULT now());
    CREATE INDEX IF NOT EXISTS event_deliveries_of_event ON event_deliveries (event_id);
    CREATE INDEX IF NOT EXISTS notifications_of_event ON notifications (event_id);

    -- the books of the payment provider, which is somebody else
    CREATE TABLE IF NOT EXISTS provider_refunds (
      key text PRIMARY KEY,
      amount int NOT NULL,
      reference uuid NOT NULL,
      requests int NOT NULL DEFAULT 1
    )`)
}
