/** The client of the PostgreSQL extension idempotency. */
export { Idempotency, createIdempotency, findSchema } from './idempotency.js'
export type { Begun, CommonOptions, Lifetime, RunOptions } from './idempotency.js'
export type { CheckpointOptions, Claim, LeaseOptions } from './lease.js'
export { fromPool } from './pool.js'
export type { PgClient, PgPool, PoolOptions } from './pool.js'
export { JsonRequest } from './types.js'
export type {
  Answer, Database, Headers, Outcome, OutcomeEvent, Queryable, Recovery, Request, Result, Row, Scope, Statement,
  Status, Transaction
} from './types.js'
export * from './errors.js'
