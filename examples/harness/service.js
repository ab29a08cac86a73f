// A service as a process of its own, to be stopped, killed and started again.
//
// It is started by the script `start` of its package.json, which is one command,
// but without npm and a shell in between: those would be killed in its place.  It
// leads a process group of its own, so that what it starts dies with it.
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { readFile } from 'node:fs/promises'
import net from 'node:net'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { client } from './client.js'
import { until } from './until.js'

const running = new Set()
process.on('exit', () => { for (const child of running) killGroup(child) })

/**
 * Start a service and wait until its `GET /health` answers 200.
 *
 * @param {string | URL} folder where its package.json is, such as
 *   `new URL('..', import.meta.url)`
 * @param {object} [options]
 * @param {Record<string, string>} [options.env] what is added to its environment,
 *   such as DATABASE_URL; PORT and HOST are set
 * @returns {Promise<Service>}
 * @throws {Error} with its output, if it ends before it is ready
 */
export async function startService (folder, { env = {} } = {}) {
  const directory = typeof folder === 'string' ? folder : fileURLToPath(folder)
  const { scripts } = JSON.parse(await readFile(path.join(directory, 'package.json'), 'utf8'))
  const service = new Service(directory, scripts.start, env, await freePort())
  await service.start()
  return service
}

class Service {
  /** All that it has written so far, in all its lives. */
  output = ''

  #directory
  #command
  #env
  #port
  #child

  constructor (directory, command, env, port) {
    this.#directory = directory
    this.#command = command
    this.#env = env
    this.#port = port
  }

  /** Where it is; a restart does not change it. */
  get url () {
    return `http://127.0.0.1:${this.#port}`
  }

  /** The number of its process. */
  get pid () {
    return this.#child.pid
  }

  /**
   * Start it once more, after `kill` or `stop`.
   *
   * @param {object} [options]
   * @param {Record<string, string>} [options.env] what changes in its environment
   *   from now on
   */
  async start ({ env = {} } = {}) {
    this.#env = { ...this.#env, ...env }
    const child = spawn('sh', ['-c', `exec ${this.#command}`], {
      cwd: this.#directory,
      detached: true,
      stdio: ['ignore', 'pipe', 'pipe'],
      env: {
        ...environment(),
        ...this.#env,
        PATH: `${path.join(this.#directory, 'node_modules/.bin')}:${process.env.PATH}`,
        HOST: '127.0.0.1',
        PORT: String(this.#port)
      }
    })
    for (const stream of [child.stdout, child.stderr]) {
      stream.setEncoding('utf8').on('data', text => { this.output += text })
    }
    child.exited = once(child, 'close')
    running.add(child)
    child.on('exit', () => running.delete(child))
    this.#child = child
    await until(() => hasEnded(child) || isReady(this.url), { what: 'the service to be ready' })
    if (hasEnded(child)) throw new Error(`the service has ended:\n${this.output}`)
    setWaiting(child, false)
  }

  /** Kill it at once, as `kill -9` does, and wait until it is gone. */
  async kill () {
    setWaiting(this.#child, true)
    killGroup(this.#child)
    await this.#child.exited
  }

  /**
   * Ask it to stop, by SIGTERM, and wait until it has.
   *
   * @returns {Promise<{code: number | null, signal: string | null}>} how it ended
   * @throws {Error} if it does not stop; it is killed then
   */
  async stop () {
    const child = this.#child
    child.kill('SIGTERM')
    try {
      await until(() => hasEnded(child), { what: 'the service to stop', timeout: 30_000 })
    } finally {
      await this.kill()
    }
    return { code: child.exitCode, signal: child.signalCode }
  }

  /** Kill it, and start it again at the same address. */
  async restart (options) {
    await this.kill()
    await this.start(options)
  }
}

// The test runner tells its own child processes by this variable what they are
function environment () {
  const { NODE_TEST_CONTEXT, ...rest } = process.env
  return rest
}

// Whether this process goes on while the service does.  A test that forgets to
// stop one ends all the same, and the service with it.
function setWaiting (child, isWaiting) {
  for (const handle of [child, child.stdout, child.stderr]) {
    if (isWaiting) handle.ref()
    else handle.unref()
  }
}

function hasEnded (child) {
  return child.exitCode !== null || child.signalCode !== null
}

function killGroup (child) {
  try {
    process.kill(-child.pid, 'SIGKILL')
  } catch (error) {
    if (error.code !== 'ESRCH') throw error
  }
}

async function isReady (url) {
  try {
    const answer = await client(url).get('/health', { signal: AbortSignal.timeout(5_000) })
    return answer.status === 200
  } catch {
    return false
  }
}

async function freePort () {
  const server = net.createServer().listen(0, '127.0.0.1')
  await once(server, 'listening')
  const { port } = server.address()
  await new Promise(resolve => server.close(resolve))
  return port
}
