// Many requests at once, fewer connections than they would like, and connections that break.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { after, before, describe, test } from 'node:test'
import { beforeAnswer, cutProxy, retry, until } from '../../harness/index.js'
import { createOrder, orderOf, startOrderService } from './support.js'

let orders, alice
before(async () => {
  orders = await startOrderService({ env: { POOL_SIZE: '2' } })
  alice = orders.as('alice')
})
after(async () => await orders.stop())

test('ten concurrent duplicates make one order, and get its answer or 409', async () => {
  const key = randomUUID()
  const send = () => alice.post('/orders', orderOf('book'), { key })
  const answers = await Promise.all(Array.from({ length: 10 }, send))
  const done = answers.filter(({ status }) => status === 201)
  assert.ok(done.length >= 1)
  assert.equal(new Set(done.map(({ text }) => text)).size, 1)
  for (const { status, json, headers } of answers) {
    if (status !== 201) assert.deepEqual([status, json.code, Number(headers['retry-after']) >= 1], [409, 'DUPLICATE_IN_PROGRESS', true])
  }
  const repeats = await Promise.all(Array.from({ length: 10 }, () => retry(send)))
  assert.deepEqual(repeats.map(({ status, text }) => [status, text]), Array(10).fill([201, done[0].text]))
  assert.equal(await orders.ordersOf(key), 1)
})

test('ten concurrent duplicates of a refund pay back once', async () => {
  const { id } = await createOrder(alice, 'slow')
  const key = randomUUID()
  const answers = await Promise.all(Array.from({ length: 10 }, () => retry(() => alice.post(`/orders/${id}/refund`, undefined, { key }))))
  assert.deepEqual(answers.map(({ status, text }) => [status, text]), Array(10).fill([200, answers[0].text]))
  assert.deepEqual(await orders.database.query('SELECT amount, requests FROM provider_refunds'), [{ amount: 1000, requests: 1 }])
})

test('fifty orders at once share two connections', async () => {
  const answers = await Promise.all(Array.from({ length: 50 }, () => {
    const key = randomUUID()
    return retry(() => alice.post('/orders', orderOf('book'), { key }))
  }))
  assert.deepEqual(answers.map(({ status }) => status), Array(50).fill(201))
  assert.equal(new Set(answers.map(({ json }) => json.id)).size, 50)
})

test('without a connection in time it is 503, nothing is done, and a repeat works', async () => {
  const busy = [1, 2].map(() => {
    const key = randomUUID()
    return { key, answer: alice.post('/orders', orderOf('slow', 'slow'), { key }) }
  })
  for (const { key } of busy) await orders.inFlight(key)
  const key = randomUUID()
  const refused = await alice.post('/orders', orderOf('book'), { key })
  assert.deepEqual([refused.status, refused.json.code, refused.headers['retry-after']], [503, 'DATABASE_UNAVAILABLE', '1'])
  assert.equal((await retry(() => alice.post('/orders', orderOf('book'), { key }))).status, 201)
  assert.equal(await orders.ordersOf(key), 1)
  for (const { answer } of busy) assert.equal((await answer).status, 201)
})

describe('a connection that breaks before COMMIT is answered', () => {
  let proxy, apart, api
  before(async () => {
    apart = await startOrderService({ through: async url => (proxy = await cutProxy(url)).url })
    api = apart.as('alice')
  })
  after(async () => {
    await apart.stop()
    await proxy.close()
  })

  /** Cut a connection at the nth COMMIT from now on. */
  function cutAtCommit (number) {
    let commits = 0
    proxy.cutWhen(message => beforeAnswer('COMMIT')(message) && ++commits === number)
    return proxy.cuts + 1
  }

  /** Wait until the consumer, which commits as well, has nothing to do. */
  async function quiet () {
    await until(async () => (await apart.database.query('SELECT FROM order_events WHERE acknowledged_at IS NULL')).length === 0)
  }

  test('of an order: it is there once, and answered', async () => {
    const key = randomUUID()
    const cuts = cutAtCommit(1)
    const { status, json } = await api.post('/orders', orderOf('book'), { key })
    assert.deepEqual([status, proxy.cuts, await apart.ordersOf(key)], [201, cuts, 1])
    assert.deepEqual((await api.get('/orders')).json.map(({ id }) => id), [json.id])
  })

  for (const [number, step] of [[1, 'sets the amount aside'], [2, 'completes the refund']]) {
    test(`of a refund, when it ${step}: it is paid back once`, async () => {
      const { id } = await createOrder(api, 'book')
      await quiet()
      const cuts = cutAtCommit(number)
      const key = randomUUID()
      const { status, json } = await retry(() => api.post(`/orders/${id}/refund`, undefined, { key }))
      assert.deepEqual([status, json.status, json.refunded, proxy.cuts], [200, 'refunded', 1000, cuts])
      assert.deepEqual(await apart.database.query('SELECT amount, requests FROM provider_refunds JOIN refunds USING (reference, amount) WHERE order_id = $1', [id]),
        [{ amount: 1000, requests: 1 }])
    })
  }
})
