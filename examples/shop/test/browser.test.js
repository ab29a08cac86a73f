// The pages in Chromium, by the ticket "No Idempotency Keys on State-Changing Actions": whatever a user and
// the network do to a form, its server action is done once.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import path from 'node:path'
import { after, before, beforeEach, afterEach, describe, test } from 'node:test'
import pg from 'pg'
import { chromium } from 'playwright-core'
import { client, until } from '../../harness/index.js'
import { openShop } from './support.js'

const flags = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
  '--disable-component-update', '--disable-sync']

let shop, profile, browser
before(async () => {
  shop = await openShop({ IDEMPOTENCY_LEASE: '2 s' })
  profile = await mkdtemp(path.join(tmpdir(), 'chromium-'))
  browser = await chromium.launchPersistentContext(profile, { executablePath: '/usr/bin/chromium', headless: true, args: flags })
})
after(async () => {
  await browser.close()
  await rm(profile, { recursive: true, force: true })
  await shop.close()
})

/** The user of a test, and a tab in which the user is logged in. */
let user, tab, sent
beforeEach(async () => {
  user = randomUUID()
  await browser.clearCookies()
  await browser.addCookies([{ name: 'login', value: `acme:${user}`, url: shop.service.url }])
  tab = await browser.newPage()
  sent = []
  tab.on('request', request => { if (request.method() === 'POST') sent.push(request) })
})
afterEach(async () => await tab.close())

async function open (page, where = tab) {
  await where.goto(new URL(page, shop.service.url).href, { waitUntil: 'networkidle' })
}

const subscribe = (where = tab) => where.getByRole('button', { name: 'Subscribe' })
const begin = () => tab.getByRole('button', { name: 'Begin' })
const submit = () => tab.getByRole('button', { name: 'Submit' })
const alert = () => tab.locator('form [role=alert]')
const isDone = (where = tab) => where.waitForURL('**/checkout/done')

function keysSent () {
  return new Set(sent.map(request => JSON.parse(request.postData())[0].idempotencyKey))
}

/** Which rows of a table are the user's. */
const ofUser = {
  subscriptions: 'user_id = $1',
  practice_sessions: 'user_id = $1',
  answers: 'session_id IN (SELECT id FROM practice_sessions WHERE user_id = $1)'
}

async function mine (table) {
  return await shop.count(table, ofUser[table], [user])
}

async function removeMine (table) {
  await shop.database.query(`DELETE FROM ${table} WHERE ${ofUser[table]}`, [user])
}

async function checkoutsAtProvider () {
  return await shop.database.query("SELECT calls FROM provider_operations WHERE kind = 'checkout' AND key LIKE $1", [`%${user}%`])
}

/** One subscription, and the provider was asked once. */
async function assertOneSubscription () {
  assert.equal(await mine('subscriptions'), 1)
  assert.deepEqual(await checkoutsAtProvider(), [{ calls: 1 }])
  await open('/checkout/done')
  assert.equal(await tab.getByRole('listitem').count(), 1)
}

/** Lose the connection of the next server action: when it has been answered, or when `lost` resolves. */
async function loseNextAction (lost) {
  let isNext = true
  await tab.route('**/*', async route => {
    if (!isNext || route.request().method() !== 'POST') return await route.fallback()
    isNext = false
    const answered = route.fetch().catch(() => {}) // that the server reads it, and goes on, is what matters
    await (lost ?? answered)
    await route.abort('connectionreset')
  })
}

async function lockedTable (table) {
  const connection = new pg.Client(shop.database.url)
  await connection.connect()
  await connection.query(`BEGIN; LOCK TABLE ${table} IN SHARE MODE`)
  return {
    isWaitedFor: async () => await until(async () => await shop.count('pg_locks', `NOT granted AND relation = '${table}'::regclass`) > 0),
    unlock: async () => await connection.end()
  }
}

describe('createCheckoutSession', () => {
  test('a user logs in, and subscribes', async () => {
    await browser.clearCookies()
    await open('/checkout')
    assert.equal(new URL(tab.url()).pathname, '/')
    await tab.getByLabel('TENANT:USER').fill(`acme:${user}`)
    await tab.getByRole('button', { name: 'Log in' }).click()
    await tab.waitForURL('**/checkout')
    await tab.getByLabel('Plan').selectOption('pro')
    await subscribe().click()
    await isDone()
    assert.match(await tab.getByRole('listitem').textContent(), /^pro /)
    assert.equal(await mine('subscriptions'), 1)
  })

  test('a double click sends two requests with one key, and there is one subscription', async () => {
    await open('/checkout')
    await subscribe().dblclick()
    await isDone()
    await until(() => sent.length === 2)
    assert.equal(keysSent().size, 1)
    const [key] = keysSent()
    await until(() => shop.logOf(key).length === 2)
    assert.deepEqual(shop.logOf(key).map(({ outcome }) => outcome), ['completed', 'replayed'])
    await assertOneSubscription()
  })

  test('going back and submitting again gives one subscription', async () => {
    await open('/checkout')
    await subscribe().click()
    await isDone()
    await tab.goBack()
    await subscribe().click()
    await isDone()
    assert.equal(sent.length, 2)
    assert.equal(keysSent().size, 1)
    await assertOneSubscription()
  })

  test('a reload and submitting again gives one subscription', async () => {
    await open('/checkout')
    await loseNextAction()
    await subscribe().click()
    await alert().waitFor()
    await tab.reload({ waitUntil: 'networkidle' })
    await subscribe().click()
    await isDone()
    assert.equal(keysSent().size, 1)
    await assertOneSubscription()
  })

  test('the network is lost after the work was done: the user is told, submits again, and there is one subscription', async () => {
    await open('/checkout')
    await loseNextAction()
    await subscribe().click()
    assert.match(await alert().textContent(), /The connection was lost/)
    assert.equal(await mine('subscriptions'), 1)
    await subscribe().click()
    await isDone()
    assert.equal(keysSent().size, 1)
    await assertOneSubscription()
  })

  test('the network is lost in the middle of the work: the second request waits for the first, and there is one subscription', async () => {
    await open('/checkout')
    const lock = await lockedTable('subscriptions')
    await loseNextAction(lock.isWaitedFor())
    await subscribe().click()
    await alert().waitFor()
    await subscribe().click()
    const [key] = keysSent()
    await until(() => shop.logOf(key).some(({ outcome }) => outcome === 'in_flight'))
    await lock.unlock()
    await isDone()
    assert.equal(keysSent().size, 1)
    await assertOneSubscription()
  })

  test('the service is killed in the middle of the work: the user submits again, and there is one subscription', async () => {
    await open('/checkout')
    const lock = await lockedTable('subscriptions')
    await subscribe().click()
    await lock.isWaitedFor()
    await shop.service.restart()
    await lock.unlock()
    await alert().waitFor()
    await subscribe().click()
    await isDone()
    assert.equal(keysSent().size, 1)
    await assertOneSubscription()
  })

  test('BUG-047: two tabs have two keys, and there is one subscription all the same', async () => {
    const second = await browser.newPage()
    second.on('request', request => { if (request.method() === 'POST') sent.push(request) })
    await open('/checkout')
    await open('/checkout', second)
    await Promise.all([subscribe().click(), subscribe(second).click()])
    await Promise.all([isDone(), isDone(second)])
    await second.close()
    assert.equal(keysSent().size, 2)
    assert.equal(await mine('subscriptions'), 1)
    assert.equal((await checkoutsAtProvider()).length, 1)
  })
})

describe('createPracticeSession', () => {
  test('a double click begins one session, and goes there', async () => {
    await open('/practice')
    await begin().dblclick()
    await tab.waitForURL('**/practice/*')
    await until(() => sent.length === 2)
    assert.equal(keysSent().size, 1)
    await until(() => shop.logOf([...keysSent()][0]).length === 2)
    assert.equal(await mine('practice_sessions'), 1)
  })

  test('the network is lost after the work was done: the repeat goes to the same page', async () => {
    await open('/practice')
    await loseNextAction()
    await begin().click()
    await alert().waitFor()
    await begin().click()
    await tab.waitForURL('**/practice/*')
    const [{ id }] = await shop.database.query('SELECT id FROM practice_sessions WHERE user_id = $1', [user])
    assert.equal(new URL(tab.url()).pathname, `/practice/${id}`)
    assert.equal(await mine('practice_sessions'), 1)
  })
})

describe('submitAnswer', () => {
  beforeEach(async () => {
    await open('/practice')
    await begin().click()
    await tab.waitForURL('**/practice/*')
    sent = []
  })

  test('a double click records one answer, and the next answer is another one', async () => {
    await submit().dblclick()
    await tab.getByText('1 recorded').waitFor()
    await until(() => sent.length === 2 && shop.logOf([...keysSent()][0]).length === 2)
    assert.equal(keysSent().size, 1)
    assert.equal(await mine('answers'), 1)
    await submit().click()
    await tab.getByText('2 recorded').waitFor()
    assert.equal(await mine('answers'), 2)
  })

  test('the network is lost after the work was done: the repeat is told the same', async () => {
    await loseNextAction()
    await submit().click()
    await alert().waitFor()
    await submit().click()
    await tab.getByText('1 recorded').waitFor()
    assert.equal(await mine('answers'), 1)
  })
})

// the actions as the browser calls them, but ten at once, and with other arguments

/** What the browser sends for an action, to be sent with other arguments. */
async function recorded (page, button) {
  await open(page)
  await button().click()
  await until(() => sent.length > 0)
  const [request] = sent
  const headers = await request.allHeaders()
  const [args] = JSON.parse(request.postData())
  const { pathname } = new URL(request.url())
  const names = ['accept', 'content-type', 'cookie', 'next-action', 'next-router-state-tree', 'origin']
  const kept = Object.fromEntries(names.filter(name => headers[name]).map(name => [name, headers[name]]))
  return async changed => await client(shop.service.url).post(pathname, JSON.stringify([{ ...args, ...changed }]), { headers: kept })
}

/** What an action returned, or where it redirected to. */
function resultOf ({ headers, text }) {
  return headers['x-action-redirect'] ?? text.split('\n').find(line => /^1:/.test(line))
}

for (const [action, table, page, button] of [
  ['createCheckoutSession', 'subscriptions', '/checkout', subscribe],
  ['createPracticeSession', 'practice_sessions', '/practice', begin],
  ['submitAnswer', 'answers', null, submit]
]) {
  describe(`verification, ${action}`, () => {
    let call, other
    beforeEach(async () => {
      if (page === null) {
        await open('/practice')
        await begin().click()
        await tab.waitForURL('**/practice/*')
        sent = []
      }
      call = await recorded(page ?? new URL(tab.url()).pathname, button)
      await until(async () => await mine(table) === 1)
      await removeMine(table)
      other = action === 'submitAnswer' ? { answer: 'other' } : action === 'createPracticeSession' ? { topic: 'other' } : { plan: 'pro' }
    })

    test('all state-changing server actions accept an idempotency key, and need it', async () => {
      for (const idempotencyKey of [undefined, null, '', 'a b', 7, { a: 1 }]) {
        const answer = await call({ idempotencyKey })
        assert.match(answer.text, /The idempotency key is (?:missing|malformed)/)
      }
      assert.equal(await mine(table), 0)
    })

    test('duplicate requests return the same result', async () => {
      const idempotencyKey = randomUUID()
      const first = await call({ idempotencyKey })
      const second = await call({ idempotencyKey })
      assert.equal(first.status, 200)
      assert.ok(resultOf(first))
      assert.equal(resultOf(second), resultOf(first))
      assert.equal(await mine(table), 1)
    })

    test('race condition: fire 10 concurrent requests, and there is 1 result', async () => {
      const idempotencyKey = randomUUID()
      const answers = await Promise.all(Array.from({ length: 10 }, async () => await call({ idempotencyKey })))
      assert.deepEqual(answers.map(({ status }) => status), Array(10).fill(200))
      assert.equal(new Set(answers.map(resultOf)).size, 1)
      assert.ok(resultOf(answers[0]))
      assert.equal(await mine(table), 1)
    })

    test('keys expire after 24 hours', async () => {
      const idempotencyKey = randomUUID()
      await call({ idempotencyKey })
      const [{ kept }] = await shop.database.query(
        'SELECT extract(epoch FROM expires_at - finished_at) / 3600 AS kept FROM idempotency.idempotency_key WHERE key = $1', [idempotencyKey])
      assert.ok(kept >= 24 && kept <= 27, `kept for ${kept} hours`) // of a lease up to an eighth longer
      await shop.database.query("UPDATE idempotency.idempotency_key SET expires_at = now() - interval '1 s' WHERE key = $1", [idempotencyKey])
      await removeMine(table)
      await call({ idempotencyKey })
      assert.equal(await mine(table), 1)
    })

    test('the same key with something else is refused', async () => {
      const idempotencyKey = randomUUID()
      await call({ idempotencyKey })
      assert.match((await call({ idempotencyKey, ...other })).text, /The idempotency key was used with a different request/)
      assert.equal(await mine(table), 1)
    })
  })
}
