// "Invoices: SendInvoiceUseCase dedupes via InvoiceEmailDelivery": one e-mail for
// each key, whatever crashes.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { after, afterEach, before, describe, test } from 'node:test'
import { until } from '../../harness/index.js'
import { MailServer } from '../dist/invoices/mail-server.js'
import { startBackend } from './backend.js'

let mail, backend, alice
before(async () => {
  mail = await MailServer.start()
  backend = await startBackend({ env: { MAIL_URL: mail.url } })
  alice = backend.as('acme:alice')
})
afterEach(() => { mail.onMessage = () => {} })
after(async () => {
  await backend.stop()
  await mail.stop()
})

const invoiceOf = () => `inv-${randomUUID()}`
const send = (invoice, key) => alice.post(`/invoices/${invoice}/send`, undefined, { key })
const mailsOf = invoice => mail.messages.filter(message => message.subject === `Invoice ${invoice}`)

describe('Invoices: POST /invoices/:id/send', () => {
  test('a duplicate gets the status of the delivery, and no second e-mail leaves', async () => {
    const [invoice, key] = [invoiceOf(), randomUUID()]
    const first = await send(invoice, key)
    assert.equal(first.status, 200)
    assert.equal(first.json.status, 'sent')
    const again = await send(invoice, key)
    assert.equal(again.headers['idempotent-replayed'], 'true')
    assert.deepEqual([again.status, again.text], [200, first.text])
    assert.equal(mailsOf(invoice).length, 1)
    const { json: deliveries } = await alice.get(`/invoices/${invoice}/deliveries`)
    assert.deepEqual(deliveries.map(({ id, status }) => [id, status]), [[first.json.id, 'sent']])
  })

  test('ten at the same time send one e-mail', async () => {
    const [invoice, key] = [invoiceOf(), randomUUID()]
    const answers = await Promise.all(Array.from({ length: 10 }, async () => await send(invoice, key)))
    for (const answer of answers) assert.ok(answer.status === 200 || answer.json.code === 'DUPLICATE_IN_PROGRESS', answer.text)
    assert.equal(answers.filter(answer => answer.status === 409 && !answer.headers['retry-after']).length, 0)
    assert.equal(mailsOf(invoice).length, 1)
  })

  test('another key sends again, such as a reminder', async () => {
    const invoice = invoiceOf()
    const [one, two] = [await send(invoice, randomUUID()), await send(invoice, randomUUID())]
    assert.notEqual(one.json.id, two.json.id)
    assert.equal(mailsOf(invoice).length, 2)
  })

  test('the key of another invoice is 422', async () => {
    const key = randomUUID()
    await send(invoiceOf(), key)
    const invoice = invoiceOf()
    assert.equal((await send(invoice, key)).status, 422)
    assert.equal(mailsOf(invoice).length, 0)
  })

  test('another tenant does not see the deliveries', async () => {
    const invoice = invoiceOf()
    await send(invoice, randomUUID())
    assert.deepEqual((await backend.as('umbrella:alice').get(`/invoices/${invoice}/deliveries`)).json, [])
  })

  for (const when of ['before', 'after']) {
    test(`the mail server crashes ${when} it takes the e-mail: 502, and the repeat sends what is missing`, async () => {
      const [invoice, key] = [invoiceOf(), randomUUID()]
      mail.crashNext(when)
      assert.equal((await send(invoice, key)).status, 502)
      const { json: [{ id, status }] } = await alice.get(`/invoices/${invoice}/deliveries`)
      assert.equal(status, 'sending')
      const again = await send(invoice, key)
      assert.deepEqual([again.status, again.json.id, again.json.status], [200, id, 'sent'])
      assert.deepEqual(mailsOf(invoice).map(message => message.id), [id])
    })
  }

  test('while the e-mail is on its way, a duplicate is 409 with Retry-After', async () => {
    const [invoice, key] = [invoiceOf(), randomUUID()]
    let meanwhile
    mail.onMessage = async () => { meanwhile = await send(invoice, key) }
    assert.equal((await send(invoice, key)).status, 200)
    assert.equal(meanwhile.status, 409)
    assert.equal(meanwhile.json.code, 'DUPLICATE_IN_PROGRESS')
    assert.ok(Number(meanwhile.headers['retry-after']) >= 1)
  })

  test('kill -9 of the service between the e-mail and its record: sent once', async () => {
    const [invoice, key] = [invoiceOf(), randomUUID()]
    mail.onMessage = async () => await backend.service.kill()
    await assert.rejects(send(invoice, key), { code: 'ECONNRESET' })
    mail.onMessage = () => {}
    await backend.service.start()
    assert.equal((await send(invoice, key)).status, 409, 'the lease of the dead attempt')
    await backend.endLease(key)
    const answer = await send(invoice, key)
    assert.deepEqual([answer.status, answer.json.status], [200, 'sent'])
    assert.equal(mailsOf(invoice).length, 1)
    assert.equal(await backend.count('invoice_email_deliveries', `invoice = '${invoice}'`), 1)
  })
  test('kill -9 after the e-mail is on record as sent: nobody has to remember it', async () => {
    const [invoice, key] = [invoiceOf(), randomUUID()]
    let blocker
    mail.onMessage = async () => { blocker = await backend.block('invoice_email_deliveries') }
    const first = assert.rejects(send(invoice, key), { code: 'ECONNRESET' })
    await until(async () => await blocker?.isWaitedFor(), { what: 'the answer to be written' })
    await backend.service.kill()
    await first
    await blocker.release()
    mail.onMessage = () => {}
    mail.messages.length = 0
    await backend.service.start()
    await backend.endLease(key)
    const answer = await send(invoice, key)
    assert.deepEqual([answer.status, answer.json.status], [200, 'sent'])
    assert.equal(mailsOf(invoice).length, 0, 'it was not sent again')
  })
})
