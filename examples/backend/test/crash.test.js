// kill -9 of the service and of PostgreSQL while clients are at work: nothing is
// doubled, and nothing is lost.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { afterEach, beforeEach, describe, test } from 'node:test'
import { restartDatabase, retry, until } from '../../harness/index.js'
import { startBackend } from './backend.js'

const clients = 8
const each = 25

describe('crashes during load', () => {
  let backend
  beforeEach(async () => { backend = await startBackend() })
  afterEach(async () => await backend.stop())

  /** Clients that create expenses one after the other, and do not give up. @param onProgress is told how many are done */
  async function load (onProgress) {
    const answers = new Map()
    await Promise.all(Array.from({ length: clients }, async (_, n) => {
      const client = backend.as(`acme:user${n}`)
      for (let i = 0; i < each; i++) {
        const key = randomUUID()
        const body = { amount: i + 1, currency: 'EUR' }
        answers.set(key, { client, body, answer: await retry(async () => await client.post('/expenses', body, { key })) })
        onProgress(answers.size)
      }
    }))
    return answers
  }

  async function assertOnceEach (answers) {
    assert.equal(answers.size, clients * each)
    const rows = await backend.database.query('SELECT id FROM expenses')
    assert.deepEqual(rows.map(row => row.id).sort(), [...answers.values()].map(({ answer }) => answer.json.id).sort())
    for (const [key, { client, body, answer }] of answers) {
      assert.equal(answer.status, 201)
      const again = await retry(async () => await client.post('/expenses', body, { key }))
      assert.equal(again.text, answer.text)
    }
  }

  /** Do something each time that a quarter of the work is done. */
  function atQuarters (action) {
    let next = 1
    let running = Promise.resolve()
    const onProgress = done => {
      if (next > 3 || done < next * clients * each / 4) return
      next++
      running = running.then(action)
    }
    return { onProgress, finished: async () => { await running; assert.equal(next, 4) } }
  }

  test('kill -9 of the service', async () => {
    const { onProgress, finished } = atQuarters(async () => await backend.service.restart())
    const answers = await load(onProgress)
    await finished()
    await assertOnceEach(answers)
  })

  test('kill -9 of PostgreSQL', async () => {
    const { onProgress, finished } = atQuarters(restartDatabase)
    const answers = await load(onProgress)
    await finished()
    await assertOnceEach(answers)
  })

  test('the service outlives PostgreSQL', async () => {
    const { pid } = backend.service
    await restartDatabase()
    await until(async () => (await backend.as().get('/health')).status === 200, { what: 'the service to be ready again' })
    assert.equal(backend.service.pid, pid)
    const answer = await backend.as('acme:alice').post('/expenses', { amount: 1, currency: 'EUR' }, { key: randomUUID() })
    assert.equal(answer.status, 201)
  })
})
