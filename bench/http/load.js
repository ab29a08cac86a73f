// bench/http/load.js
//   Requests a second, and how long they take, for each of the peers in turns.
//
//   node load.js SECONDS ROUNDS CONNECTIONS...
//
// A request is new, with a key of its own, or a repeat of one that is finished,
// which the peers that protect nothing run again.  Each number of connections
// has at most one request on each connection.  In each of the ROUNDS, each peer
// has a turn of some SECONDS of each kind.  What is printed are the medians of
// the rounds.  Any other answer than 201 ends the run.
//
// The default adapter of express-idempotency keeps the answers in a list, which
// it walks for each request: the longer the run, the slower it becomes.

import { randomInt, randomUUID } from 'node:crypto'
import { Connection, startRedis, startServer } from './client.js'

const further = ['idempot-postgres', 'idempot-redis', 'nestarc-postgres', 'nestarc-redis']
const peers = ['none', 'none-run', 'node-idempotency', 'express-idempotency',
  'express-idempotency-redis', ...(process.env.FURTHER_PEERS ? further : []), 'idempotency', 'idempotency-run']
const finished = Array.from({ length: 500 }, randomUUID)
const keys = {
  new: randomUUID,
  repeat: () => finished[randomInt(finished.length)]
}

// Post requests on some connections, until there is no key left or the time is up
async function turn (port, connections, seconds, nextKey) {
  const latencies = []
  const start = performance.now()

  await Promise.all(Array.from({ length: connections }, async () => {
    const connection = await Connection.open(port)
    let now = performance.now()
    for (let key; now < start + seconds * 1000 && (key = nextKey());) {
      const { status, body } = await connection.post(key)
      if (status !== 201) throw new Error(`answer ${status}: ${body}`)
      const then = now
      now = performance.now()
      latencies.push(now - then)
    }
    connection.close()
  }))

  const rate = latencies.length * 1000 / (performance.now() - start)
  latencies.sort((a, b) => a - b)
  return { rate, p50: percentile(latencies, 50), p99: percentile(latencies, 99) }
}

function percentile (sorted, part) {
  return sorted[Math.max(0, Math.ceil(sorted.length * part / 100) - 1)]
}

function median (numbers) {
  return percentile([...numbers].sort((a, b) => a - b), 50)
}

const [seconds, rounds, ...connections] = process.argv.slice(2).map(Number)
const redis = await startRedis()
const ports = {}
for (const peer of peers) {
  ports[peer] = (await startServer(peer, redis)).port
  const left = [...finished]
  await turn(ports[peer], 16, Infinity, () => left.pop())
}

console.log('peer,what,connections,requests_per_s,of_none,p50_ms,p99_ms')
for (const number of connections) {
  const results = { new: {}, repeat: {} }
  for (let round = 0; round < rounds; round++) {
    for (const what in keys) {
      for (const peer of peers) {
        (results[what][peer] ??= []).push(
          await turn(ports[peer], number, seconds, keys[what]))
      }
    }
  }
  for (const what in keys) {
    for (const peer of peers) {
      const turns = results[what][peer]
      console.log([peer, what, number,
        median(turns.map(turn => turn.rate)).toFixed(0),
        median(turns.map((turn, i) => turn.rate / results[what].none[i].rate)).toFixed(3),
        median(turns.map(turn => turn.p50)).toFixed(3),
        median(turns.map(turn => turn.p99)).toFixed(3)].join())
    }
  }
}
process.exit()
