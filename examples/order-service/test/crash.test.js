// kill -9 of the service and of PostgreSQL while clients are at work: nothing is doubled, and nothing is lost.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { afterEach, beforeEach, test } from 'node:test'
import { restartDatabase, retry, until } from '../../harness/index.js'
import { orderOf, startOrderService } from './support.js'

const CLIENTS = 8
const ORDERS = 20
const REFUNDS = 5

let orders
// a refund whose process died is free again after a few seconds
beforeEach(async () => { orders = await startOrderService({ env: { PROCESSING_WINDOW: '3 seconds' } }) })
afterEach(async () => await orders.stop())

/**
 * Clients that send requests one after the other, and do not give up.
 *
 * @param {number} each how many requests each client sends
 * @param {(api: object, n: number) => Promise<[string, string, object?]>} next the path and the body of a request
 * @param {() => Promise<void>} disturb is called each time that a quarter of the work is done
 * @returns the answers by their keys
 */
async function load (each, next, disturb) {
  const answers = new Map()
  let disturbed = 0
  let disturbing = Promise.resolve()

  async function work (client) {
    const api = orders.as(`user${client}`)
    for (let n = 0; n < each; n++) {
      const key = randomUUID()
      const [path, body] = await next(api)
      const send = () => retry(() => api.post(path, body, { key }))
      answers.set(key, { send, answer: await send() })
      if (disturbed < 3 && answers.size >= (disturbed + 1) * CLIENTS * each / 4) {
        disturbed++
        disturbing = disturbing.then(disturb)
      }
    }
  }
  await Promise.all(Array.from({ length: CLIENTS }, (_, client) => work(client)))
  await disturbing
  assert.deepEqual([answers.size, disturbed], [CLIENTS * each, 3])
  return answers
}

const disturbances = {
  'the service': async () => await orders.service.restart(),
  'PostgreSQL': async () => await restartDatabase()
}

for (const [what, disturb] of Object.entries(disturbances)) {
  test(`kill -9 of ${what}: each order that was promised is there once, and no other`, async () => {
    const answers = await load(ORDERS, async () => ['/orders', orderOf('book')], disturb)
    const rows = await orders.database.query('SELECT id, idempotency_key AS key FROM orders')
    assert.deepEqual(rows.map(({ id, key }) => `${key} ${id}`).sort(),
      [...answers].map(([key, { answer }]) => `${key} ${answer.json.id}`).sort())
    for (const { send, answer } of answers.values()) {
      const repeat = await send()
      assert.deepEqual([answer.status, repeat.status, repeat.headers['idempotent-replayed'], repeat.text], [201, 201, 'true', answer.text])
    }
    await assertEventsOnce(answers.size)
  })

  test(`kill -9 of ${what}: each refund is paid back once`, async () => {
    const answers = await load(REFUNDS, async api => {
      const key = randomUUID()
      const { json: { id } } = await retry(() => api.post('/orders', orderOf('book', 'pen'), { key }))
      return [`/orders/${id}/refund`]
    }, disturb)
    for (const { answer } of answers.values()) {
      assert.deepEqual([answer.status, answer.json.status, answer.json.refunded], [200, 'refunded', 2000])
    }
    const payments = await orders.database.query(
      `SELECT order_id, provider_refunds.amount, provider_refunds.reference
         FROM provider_refunds FULL JOIN refunds ON key = refunds.id::text`)
    assert.deepEqual(payments.map(({ order_id: id, amount, reference }) => `${id} ${amount} ${reference}`).sort(),
      [...answers.values()].map(({ answer: { json } }) => `${json.id} 2000 ${json.refund.reference}`).sort())
    await assertEventsOnce(2 * answers.size)
  })
}

/** Wait until all events were delivered, and see that each led to one notification. */
async function assertEventsOnce (count) {
  await until(async () => {
    const [{ waiting }] = await orders.database.query('SELECT count(*)::int AS waiting FROM order_events WHERE acknowledged_at IS NULL')
    return waiting === 0
  }, { what: 'all events to be delivered' })
  const [row] = await orders.database.query(
    `SELECT (SELECT count(*)::int FROM order_events) AS events, count(*)::int AS notifications, count(DISTINCT event_id)::int AS of FROM notifications`)
  assert.deepEqual(row, { events: count, notifications: count, of: count })
}
