// bench/http/client.js
//   What load.js and faults.js share: the programs they start, and their client.
//
// The client speaks just enough of HTTP for our own server, which always sends
// a Content-Length.  It takes a fifth of the CPU time that Node's own client
// takes, and so leaves the machine to what is measured.

import { fork, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp } from 'node:fs/promises'
import { connect } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'

//
// Programs.  They end when they are killed, by SIGKILL, and not before.
//

const running = new Set()
process.on('exit', () => running.forEach(child => child.kill('SIGKILL')))

function watch (child) {
  running.add(child)
  child.on('exit', (code, signal) => {
    running.delete(child)
    if (signal !== 'SIGKILL') throw new Error(`${child.spawnargs.join(' ')} has ended`)
  })
  return child
}

async function kill (child) {
  child.kill('SIGKILL')
  await once(child, 'exit')
}

// Start the order service; it has the port
export async function startServer (peer, redis) {
  const child = watch(fork(new URL('server.js', import.meta.url).pathname, [peer], {
    env: { ...process.env, REDIS_SOCKET: redis?.socket },
    stdio: ['ignore', 'ignore', 'inherit', 'ipc']
  }))
  const [port] = await once(child, 'message')
  return { port, kill: () => kill(child) }
}

// Start a Redis with its default configuration, or that of one that was killed
export async function startRedis (options = [], folder) {
  folder ??= await mkdtemp(join(tmpdir(), 'redis-'))
  const socket = join(folder, 'socket')
  const child = watch(spawn('redis-server',
    ['--port', '0', '--unixsocket', socket, '--dir', folder, ...options],
    { stdio: 'ignore' }))
  await untilItWorks(() => open(connect(socket)).then(it => it.destroy()))
  return { socket, kill: () => kill(child), restart: () => startRedis(options, folder) }
}

export async function untilItWorks (attempt) {
  for (;;) {
    try {
      return await attempt()
    } catch {
      await sleep(20)
    }
  }
}

async function open (socket) {
  await once(socket, 'connect')
  return socket
}

//
// The client
//

// A connection for one request at a time
export class Connection {
  static async open (port) {
    return new Connection(await open(connect(port, '127.0.0.1')))
  }

  #socket
  #received = ''
  #resolve
  #reject

  constructor (socket) {
    this.#socket = socket.setNoDelay().setEncoding('latin1')
    socket.on('data', data => this.#receive(data))
    socket.on('error', () => {})
    socket.on('close', () => this.#reject?.(new Error('connection closed')))
    socket.setTimeout(10000, () => socket.destroy())
  }

  // post an order; the result has the status and the body of the answer
  post (key) {
    const body = JSON.stringify({ reference: key, customer: 7, skus: ['A-1', 'B-2'] })
    return new Promise((resolve, reject) => {
      this.#resolve = resolve
      this.#reject = reject
      this.#socket.write('POST /orders HTTP/1.1\r\nHost: localhost\r\n' +
        `Content-Type: application/json\r\nContent-Length: ${body.length}\r\n` +
        `Idempotency-Key: ${key}\r\n\r\n${body}`)
      if (this.#socket.destroyed) reject(new Error('connection closed'))
    })
  }

  #receive (data) {
    this.#received += data
    const end = this.#received.indexOf('\r\n\r\n') + 4
    if (end < 4) return
    const length = Number(/\r\ncontent-length: (\d+)/i.exec(this.#received)[1])
    if (this.#received.length < end + length) return
    this.#resolve({ status: Number(this.#received.slice(9, 12)), body: this.#received.slice(end) })
    this.#received = ''
  }

  close () {
    this.#socket.destroy()
  }
}
