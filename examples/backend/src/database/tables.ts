/** The tables of the service, as prisma/schema.prisma describes them. */
import type pg from 'pg'

const tables = `
  CREATE TABLE IF NOT EXISTS accounts (
    id uuid PRIMARY KEY,
    email text NOT NULL UNIQUE,
    password text
  );
  CREATE TABLE IF NOT EXISTS expenses (
    id uuid PRIMARY KEY,
    tenant text NOT NULL,
    user_name text NOT NULL,
    amount numeric(20, 4) NOT NULL,
    currency text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
  );
  CREATE TABLE IF NOT EXISTS tax_snapshots (
    id uuid PRIMARY KEY,
    tenant text NOT NULL,
    year int NOT NULL,
    total numeric(20, 4) NOT NULL,
    locked_at timestamptz NOT NULL DEFAULT now(),
    UNIQUE (tenant, year)
  );
  CREATE TABLE IF NOT EXISTS custom_fields (
    tenant text NOT NULL,
    name text NOT NULL,
    type text NOT NULL,
    version int NOT NULL DEFAULT 1,
    PRIMARY KEY (tenant, name)
  );
  CREATE TABLE IF NOT EXISTS layouts (
    tenant text NOT NULL,
    entity_type text NOT NULL,
    fields jsonb NOT NULL,
    version int NOT NULL DEFAULT 1,
    PRIMARY KEY (tenant, entity_type)
  );
  CREATE TABLE IF NOT EXISTS invoice_email_deliveries (
    id uuid PRIMARY KEY,
    tenant text NOT NULL,
    invoice text NOT NULL,
    recipient text NOT NULL,
    status text NOT NULL,
    sent_at timestamptz
  );`

/** Create those that are missing. Two services that start at once do it one after the other. */
export async function createTables (client: pg.Client): Promise<void> {
  await client.query(`BEGIN; SELECT pg_advisory_xact_lock(hashtext('backend tables')); ${tables} COMMIT`)
}
