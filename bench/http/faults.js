// bench/http/faults.js
//   What becomes of requests when a process is killed.
//
//   node faults.js ROUNDS KEYS [PEER...]
//
// In each of the ROUNDS, 50 clients post the same order at once, for each of
// some KEYS, which come one after the other, faster than the service can serve
// them.  Meanwhile, at some random moment, one process is killed by SIGKILL and
// started again.  A client repeats its request until it is told 201.  It gives
// up after 25 attempts in some 5 seconds in which everything is up, and nothing
// but the protection itself can be in its way.  At last each order is posted
// once more.  Each attempt of a client counts as a request.  Of the keys are
// counted those
//
//   made_twice     that have more than one order
//   lost_answers   that have an order, but clients were told of different ones,
//                  or of none
//   lost_orders    whose clients were told of an order that does not exist
//   stuck          that have no order, and never get one
//
// What is killed: the service; Redis, with its default configuration or, for the
// peer with -aof, with an append-only file; all processes of PostgreSQL, which
// is started again by whoever started it; or nothing, which leaves a plain race.

import { randomInt, randomUUID } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import pg from 'pg'
import { Connection, startRedis, startServer, untilItWorks } from './client.js'

const clients = 50
const patience = 25
const faults = {
  none: ['nothing'],
  'node-idempotency': ['nothing', 'node', 'redis', 'postgres'],
  'node-idempotency-aof': ['node', 'redis'],
  'express-idempotency': ['nothing', 'node', 'postgres'],
  'express-idempotency-redis': ['nothing', 'node', 'redis', 'postgres'],
  idempotency: ['nothing', 'node', 'postgres'],
  'idempotency-run': ['nothing', 'node', 'postgres']
}

//
// Killing
//

// Have a statement done, by a server that may have been killed just now
async function sql (text) {
  const client = await untilItWorks(async () => {
    const client = new pg.Client()
    await client.connect()
    return client
  })
  const { rows } = await client.query(text)
  await client.end()
  return rows
}

const killers = {
  nothing () {},

  async node (system) {
    await system.server.kill()
    system.server = await startServer(system.program, system.redis)
  },

  async redis (system) {
    await system.redis.kill()
    system.redis = await system.redis.restart()
  },

  async postgres () {
    const [pid] = readFileSync(`${process.env.PGDATA}/postmaster.pid`, 'utf8').split('\n')
    const children = readFileSync(`/proc/${pid}/task/${pid}/children`, 'utf8').split(' ')
    for (const each of [pid, ...children.filter(Boolean)]) {
      try {
        process.kill(each, 'SIGKILL')
      } catch {} // it has just ended
    }
    await sql('SELECT')
  }
}

//
// One round
//

// Post until there is an order, and note what was told
async function insist (system, key, told, attempts = patience) {
  let connection
  for (let left = attempts; left > 0; left -= system.isUp ? 1 : 0) {
    system.requests++
    try {
      connection ??= await Connection.open(system.server.port)
      const { status, body } = await connection.post(key)
      if (status === 201) {
        told.add(body)
        break
      }
    } catch {
      connection?.close()
      connection = undefined
    }
    await sleep(400 * Math.random())
  }
  connection?.close()
}

// Have all clients post all keys, while something is killed
async function playRound (system, killed, answers) {
  const keys = [...answers]
  const before = randomInt(keys.length) // how many keys are answered before that
  const answered = () => keys.filter(([, told]) => told.size).length

  const posts = keys.map(async ([key, told], i) => {
    await sleep(20 * i)
    await Promise.all(Array.from({ length: clients }, () => insist(system, key, told)))
  })
  system.isUp = false
  while (answered() < before) await sleep(1)
  await sleep(20 * Math.random())
  await killers[killed](system)
  system.isUp = true

  await Promise.all(posts)
  for (const [key, told] of keys) {
    await insist(system, key, told, told.size ? patience : 1)
  }
}

// Compare what clients were told with what is there
async function judge (answers, counts) {
  const orders = new Map([...answers.keys()].map(key => [key, []]))

  // what was abandoned may still be going on
  while ((await sql(`SELECT FROM pg_stat_activity
      WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()`)).length) {
    await sleep(20)
  }
  for (const { reference, id } of await sql('SELECT reference, id FROM orders')) {
    orders.get(reference)?.push(id)
  }
  for (const [key, told] of answers) {
    const made = orders.get(key)
    if (made.length > 1) counts.made_twice++
    if (made.length > 0 && told.size !== 1) counts.lost_answers++
    if ([...told].some(body => !made.includes(JSON.parse(body).order))) counts.lost_orders++
    if (made.length === 0 && told.size === 0) counts.stuck++
  }
}

async function count (peer, killed, rounds, keys) {
  const counts = { made_twice: 0, lost_answers: 0, lost_orders: 0, stuck: 0 }
  const system = { requests: 0, program: peer.replace('-aof', '') }

  for (let round = 0; round < rounds; round++) {
    const answers = new Map(Array.from({ length: keys }, () => [randomUUID(), new Set()]))
    system.redis = await startRedis(peer.endsWith('-aof') ? ['--appendonly', 'yes'] : [])
    system.server = await startServer(system.program, system.redis)
    await sql('TRUNCATE orders, order_line')
    await playRound(system, killed, answers)
    await system.server.kill()
    await system.redis.kill()
    await judge(answers, counts)
  }
  return [peer, killed, rounds, rounds * keys, system.requests, ...Object.values(counts)].join()
}

const [rounds, keys, ...peers] = process.argv.slice(2)
console.log('peer,killed,rounds,keys,requests,made_twice,lost_answers,lost_orders,stuck')
for (const peer of peers.length ? peers : Object.keys(faults)) {
  for (const killed of faults[peer]) {
    console.log(await count(peer, killed, Number(rounds), Number(keys)))
  }
}
process.exit()
