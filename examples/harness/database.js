// Databases for tests, and the end of their server.
//
// DATABASE_URL is the server, PGDATA its folder.  A new database has the
// extension, as the template has it.
import { execFile } from 'node:child_process'
import { readdir, readFile, readlink, realpath } from 'node:fs/promises'
import path from 'node:path'
import { promisify } from 'node:util'
import { randomUUID } from 'node:crypto'
import pg from 'pg'
import { until } from './until.js'

const execute = promisify(execFile)

/**
 * Make a database of its own for a test.
 *
 * @returns {Promise<{
 *   url: string,
 *   query: (text: string, values?: unknown[]) => Promise<object[]>,
 *   drop: () => Promise<void>
 * }>} `url` is for DATABASE_URL of a service; `query` returns rows, and takes a
 *   connection of its own each time, so that it works again after a crash; `drop`
 *   removes the database, whoever still uses it
 */
export async function createDatabase () {
  const server = setting('DATABASE_URL')
  const name = `test_${randomUUID().replaceAll('-', '')}`
  const url = new URL(server)

  url.pathname = `/${name}`
  await query(server, `CREATE DATABASE ${name}`)
  return {
    url: url.href,
    query: (text, values) => query(url.href, text, values),
    drop: () => query(server, `DROP DATABASE ${name} WITH (FORCE)`)
  }
}

async function query (connectionString, text, values) {
  const connection = new pg.Client({ connectionString })

  // a lost connection fails the query; it must not end the process as well
  connection.on('error', () => {})
  try {
    await connection.connect()
    return (await connection.query(text, values)).rows
  } finally {
    await connection.end().catch(() => {})
  }
}

/**
 * Kill the whole server as a loss of power does: every process of it, by
 * SIGKILL.  Returns when the last one has left, so that it can be started again.
 */
export async function crashDatabase () {
  const folder = await realpath(setting('PGDATA'))
  const [postmaster] = (await readFile(path.join(folder, 'postmaster.pid'), 'utf8')).split('\n')

  // the first one first, lest it start others in place of those killed
  await until(async () => {
    const left = await processesIn(folder)
    left.sort((one, other) => Number(other === postmaster) - Number(one === postmaster))
    for (const pid of left) kill(pid, 'SIGKILL')

    // while the system knows its number, the next one would not take its place
    return left.length === 0 && !kill(postmaster, 0)
  }, { what: 'the server to be gone' })
}

/** Start the server again after `crashDatabase`, and wait until it is ready. */
export async function startDatabase () {
  const folder = setting('PGDATA')
  await execute('pg_ctl', ['start', '-D', folder, '-w', '-s', '-t', '300', '-l', `${folder}.log`])
}

/** Kill the whole server and start it again. */
export async function restartDatabase () {
  await crashDatabase()
  await startDatabase()
}

function setting (name) {
  const value = process.env[name]
  if (!value) throw new Error(`${name} is not set; scripts/examples test sets it`)
  return value
}

// The processes that work in a folder, as all of a server do in its own
async function processesIn (folder) {
  const processes = (await readdir('/proc')).filter(name => /^\d+$/.test(name))
  const folders = await Promise.all(processes.map(
    pid => readlink(`/proc/${pid}/cwd`).catch(() => undefined)))
  return processes.filter((_, index) => folders[index] === folder)
}

// Whether there was such a process
function kill (pid, signal) {
  try {
    return process.kill(Number(pid), signal)
  } catch (error) {
    if (error.code !== 'ESRCH') throw error
    return false
  }
}
