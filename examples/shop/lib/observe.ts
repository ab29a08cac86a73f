/**
 * What is seen of protected requests: a line in the log for each, and metrics.
 *
 * The counters are those of this process, as Prometheus expects it: it asks each process and adds up. They
 * are there when the database is not. What the database has counted, of all processes together, is shown
 * beside them under other names. It is the same whichever process is asked, goes on when one is killed, and
 * counts a look at a finished request as a replay.
 */

import type { OutcomeEvent } from 'pg-idempotency'
import { mismatchStatus } from './problem'

type Outcome = OutcomeEvent['outcome']

interface Counters {
  /** By route and outcome. */
  outcomes: Map<string, Map<Outcome, number>>
  inFlight: number
}

const process = globalThis as { shopCounters?: Counters }
const counters = process.shopCounters ??= { outcomes: new Map(), inFlight: 0 }

/** To be told what became of each request: the client's `onOutcome`. */
export function record ({ scope, outcome, status, duration, error }: OutcomeEvent): void {
  const { tenant, actor, action, key } = scope
  const ofRoute = counters.outcomes.get(action) ?? new Map<Outcome, number>()
  counters.outcomes.set(action, ofRoute.set(outcome, (ofRoute.get(outcome) ?? 0) + 1))

  console.log(JSON.stringify({
    time: new Date().toISOString(),
    level: levels[outcome] ?? 'info',
    message: `request ${outcome}`,
    key,
    route: action,
    status: outcome === 'mismatched' ? mismatchStatus : status ?? 500,
    duration: Math.round(duration * 1000) / 1000,
    outcome,
    tenant,
    actor,
    ...(error instanceof Error ? { error: error.message } : {})
  }))
}

const levels: Partial<Record<Outcome, string>> = { failed: 'error', mismatched: 'warn', in_flight: 'warn' }

/** Count a request as in flight for as long as its work takes. */
export async function inFlight<T> (work: () => Promise<T>): Promise<T> {
  counters.inFlight++
  try {
    return await work()
  } finally {
    counters.inFlight--
  }
}

/** What the database counts of an action, for all processes. */
export interface DatabaseCounts {
  action: string
  replayed: string
  mismatched: string
  in_flight_now: string
}

/**
 * All metrics as Prometheus reads them.
 *
 * @param counts null if the database does not answer
 */
export function metricsText (counts: DatabaseCounts[] | null): string {
  const routes = [...counters.outcomes]
  const ofOutcome = (wanted: Outcome): Sample[] => routes.map(([route, outcomes]) => [{ route }, outcomes.get(wanted) ?? 0])
  const ofDatabase = (column: Exclude<keyof DatabaseCounts, 'action'>): Sample[] =>
    (counts ?? []).map(row => [{ route: row.action }, Number(row[column])])

  return [
    metric('idempotency_replay_count', 'counter', 'idempotency.replay.count: repeats that got the stored answer', ofOutcome('replayed')),
    metric('idempotency_conflict_count', 'counter', 'idempotency.conflict.count: different requests under a used key', ofOutcome('mismatched')),
    metric('idempotency_inflight_gauge', 'gauge', 'idempotency.inflight.gauge: protected requests that this process is handling', [[{}, counters.inFlight]]),
    metric('idempotency_outcome_count', 'counter', 'what became of protected requests',
      routes.flatMap(([route, outcomes]) => [...outcomes].map(([outcome, count]): Sample => [{ route, outcome }, count]))),
    metric('idempotency_database_up', 'gauge', 'whether the database answers', [[{}, counts === null ? 0 : 1]]),
    metric('idempotency_database_replay_count', 'counter', 'idempotency.replay.count of all processes: do not add up', ofDatabase('replayed')),
    metric('idempotency_database_conflict_count', 'counter', 'idempotency.conflict.count of all processes: do not add up', ofDatabase('mismatched')),
    metric('idempotency_database_inflight_gauge', 'gauge', 'idempotency.inflight.gauge of all processes: do not add up', ofDatabase('in_flight_now'))
  ].join('')
}

type Sample = [labels: Record<string, string>, value: number]

function metric (name: string, type: 'counter' | 'gauge', help: string, samples: Sample[]): string {
  const lines = samples.map(([labels, value]) => {
    const text = Object.entries(labels).map(([label, of]) => `${label}="${of.replace(/[\\"]/g, '\\$&').replaceAll('\n', '\\n')}"`).join(',')
    return `${name}${text === '' ? '' : `{${text}}`} ${value}\n`
  })
  return `# HELP ${name} ${help}\n# TYPE ${name} ${type}\n${lines.join('')}`
}
