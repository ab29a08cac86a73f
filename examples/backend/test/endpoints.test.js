// "Endpoints using idempotency today": each of them as the audit lists it, and
// what it does instead.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { after, before, describe, test } from 'node:test'
import { until } from '../../harness/index.js'
import { startBackend } from './backend.js'

let backend, alice, nobody
before(async () => {
  backend = await startBackend()
  alice = backend.as('acme:alice')
  nobody = backend.as()
})
after(async () => await backend.stop())

function assertReplay (again, first) {
  assert.equal(again.headers['idempotent-replayed'], 'true')
  assert.deepEqual([again.status, again.text], [first.status, first.text])
}

function assertProblem ({ status, headers, json }, expected, code) {
  assert.equal(status, expected)
  assert.match(headers['content-type'], /^application\/problem\+json/)
  assert.equal(json.code, code)
}

describe('Auth: SignUpUseCase caches responses', () => {
  const signUp = (email, key, password = 'secret') => nobody.post('/auth/sign-up', { email, password }, { key })

  test('two sign-ups with one key make one account, although their tenant is null', async () => {
    const [key, email] = [randomUUID(), `${randomUUID()}@example.com`]
    const first = await signUp(email, key)
    assert.equal(first.status, 201)
    assert.equal(first.json.email, email)
    assertReplay(await signUp(email, key), first)
    assert.equal(await backend.count('accounts', `email = '${email}'`), 1)
    const { tenant, actor, action } = await backend.record(key)
    assert.deepEqual({ tenant, actor, action }, { tenant: '', actor: '', action: 'identity.sign_up' })
  })

  test('at the same time too', async () => {
    const [key, email] = [randomUUID(), `${randomUUID()}@example.com`]
    const answers = await Promise.all(Array.from({ length: 10 }, async () => await signUp(email, key)))
    for (const answer of answers) assert.ok(answer.status === 201 || answer.headers['retry-after'], answer.text)
    assert.equal(await backend.count('accounts', `email = '${email}'`), 1)
  })

  test('a missing key is 400, and not the key "default" that all share', async () => {
    for (const key of [undefined, '']) {
      const answer = await nobody.post('/auth/sign-up', { email: `${randomUUID()}@example.com`, password: 'secret' }, { key })
      assertProblem(answer, 400, 'IDEMPOTENCY_KEY_MISSING')
    }
    assert.equal(await backend.record('default'), undefined)
  })

  test('a key in the body is no key', async () => {
    assertProblem(await nobody.post('/auth/sign-up', { email: 'a@example.com', key: 'a', idempotencyKey: 'a' }), 400, 'IDEMPOTENCY_KEY_MISSING')
  })

  test('strangers who choose the same key are not answered with each other\'s account', async () => {
    const key = randomUUID()
    assert.equal((await signUp(`${randomUUID()}@example.com`, key)).status, 201)
    const other = await signUp(`${randomUUID()}@example.com`, key)
    assertProblem(other, 422, 'IDEMPOTENCY_KEY_REUSED')
    assert.doesNotMatch(other.text, /@/)
  })

  test('the password is neither kept with the record nor part of its fingerprint', async () => {
    const [key, email] = [randomUUID(), `${randomUUID()}@example.com`]
    const first = await signUp(email, key, 'one password')
    assertReplay(await signUp(email, key, 'another'), first)
    const { request_hash: hash, response } = await backend.record(key)
    const [{ expected }] = await backend.database.query(
      'SELECT idempotency.idempotency_request_hash($1::jsonb) AS expected', [{ body: { email } }])
    assert.deepEqual(hash, expected)
    assert.doesNotMatch(JSON.stringify(response), /password/)
    assert.equal((await nobody.post('/auth/sign-in', { email, password: 'one password' })).status, 200)
  })

  test('an address that is taken is 409 with another key, and can be tried again', async () => {
    const email = `${randomUUID()}@example.com`
    await signUp(email, randomUUID())
    const key = randomUUID()
    assert.equal((await signUp(email, key)).status, 409)
    await backend.database.query('DELETE FROM accounts WHERE email = $1', [email])
    assert.equal((await signUp(email, key)).status, 201)
  })
})

describe('Auth: SignInUseCase', () => {
  test('needs no key, and its answer is never kept', async () => {
    const [key, email] = [randomUUID(), `${randomUUID()}@example.com`]
    await nobody.post('/auth/sign-up', { email, password: 'secret' }, { key: randomUUID() })
    assert.equal((await nobody.post('/auth/sign-in', { email, password: 'secret' })).status, 200)
    assert.equal((await nobody.post('/auth/sign-in', { email, password: 'secret' }, { key })).status, 200)
    assert.equal((await nobody.post('/auth/sign-in', { email, password: 'wrong' }, { key })).status, 401)
    assert.equal(await backend.record(key), undefined)
  })
})

describe('Expenses: POST /expenses', () => {
  const expense = { amount: 12.5, currency: 'EUR' }

  test('a duplicate gets the first answer, with its status 201 and not 200', async () => {
    const key = randomUUID()
    const first = await alice.post('/expenses', expense, { key })
    assert.equal(first.status, 201)
    assert.deepEqual({ ...first.json, id: undefined }, { id: undefined, ...expense, createdBy: 'alice' })
    assertReplay(await alice.post('/expenses', expense, { key }), first)
    assert.equal(await backend.count('expenses', `id = '${first.json.id}'`), 1)
    assert.equal((await backend.record(key)).action, 'expenses.create')
  })

  test('ten at the same time make one expense', async () => {
    const [key, carol] = [randomUUID(), backend.as('ten:carol')]
    const answers = await Promise.all(Array.from({ length: 10 }, async () => await carol.post('/expenses', expense, { key })))
    const made = answers.filter(answer => answer.status === 201)
    assert.ok(made.length >= 1)
    assert.equal(new Set(made.map(answer => answer.text)).size, 1)
    for (const answer of answers.filter(answer => answer.status !== 201)) assertProblem(answer, 409, 'DUPLICATE_IN_PROGRESS')
    assert.equal(await backend.count('expenses', "tenant = 'ten'"), 1)
  })

  test('without a key it is 400, without a log-in 401', async () => {
    assertProblem(await alice.post('/expenses', expense), 400, 'IDEMPOTENCY_KEY_MISSING')
    const key = randomUUID()
    await alice.post('/expenses', expense, { key })
    assert.equal((await nobody.post('/expenses', expense, { key })).status, 401)
    assert.equal((await nobody.post('/expenses', expense)).status, 401)
  })

  test('what is refused is kept, and nothing of it written', async () => {
    const [key, dora] = [randomUUID(), backend.as('refused:dora')]
    const first = await dora.post('/expenses', { amount: -1, currency: 'EUR' }, { key })
    assert.equal(first.status, 400)
    assertReplay(await dora.post('/expenses', { amount: -1, currency: 'EUR' }, { key }), first)
    assert.equal((await backend.record(key)).state, 'errored')
    assert.equal(await backend.count('expenses', "tenant = 'refused'"), 0)
  })
})

describe('Tax: /tax/*', () => {
  test('lock-tax-snapshot is protected without a tenant in the body', async () => {
    const [key, bob] = [randomUUID(), backend.as('taxed:bob')]
    await bob.post('/expenses', { amount: 10, currency: 'EUR' }, { key: randomUUID() })
    const year = new Date().getUTCFullYear()
    const first = await bob.post('/tax/lock-tax-snapshot', { year }, { key })
    assert.equal(first.status, 201)
    assert.equal(first.json.total, '10')
    await bob.post('/expenses', { amount: 5, currency: 'EUR' }, { key: randomUUID() })
    assertReplay(await bob.post('/tax/lock-tax-snapshot', { year }, { key }), first)
    assert.equal((await backend.record(key)).tenant, 'taxed')
  })

  test('a tenant in the body changes nothing: the log-in says whose data it is', async () => {
    const key = randomUUID()
    const first = await backend.as('mine:bob').post('/tax/lock-tax-snapshot', { year: 2020, tenantId: 'yours' }, { key })
    assert.equal(first.status, 201)
    assert.equal((await backend.record(key)).tenant, 'mine')
    assert.equal(await backend.count('tax_snapshots', "tenant = 'yours'"), 0)
  })

  test('a year that was locked with another key is the same snapshot', async () => {
    const bob = backend.as('locked:bob')
    const answers = await Promise.all(Array.from({ length: 5 }, async () =>
      await bob.post('/tax/lock-tax-snapshot', { year: 2021 }, { key: randomUUID() })))
    assert.deepEqual(answers.map(answer => answer.status), Array(5).fill(201))
    assert.equal(new Set(answers.map(answer => answer.json.id)).size, 1)
  })
})

describe('Customization: custom fields and layouts', () => {
  test('POST /customization/custom-fields: a duplicate gets the stored body', async () => {
    const [key, name] = [randomUUID(), randomUUID()]
    const first = await alice.post('/customization/custom-fields', { name, type: 'date' }, { key })
    assert.equal(first.status, 201)
    assert.deepEqual(first.json, { name, type: 'date', version: 1 })
    assertReplay(await alice.post('/customization/custom-fields', { name, type: 'date' }, { key }), first)
    const another = await alice.post('/customization/custom-fields', { name, type: 'date' }, { key: randomUUID() })
    assert.equal(another.status, 422)
  })

  test('PUT /customization/custom-fields: a duplicate changes nothing', async () => {
    const [key, name] = [randomUUID(), randomUUID()]
    await alice.post('/customization/custom-fields', { name }, { key: randomUUID() })
    const first = await alice.put('/customization/custom-fields', { name, type: 'int' }, { key })
    assert.deepEqual([first.status, first.json], [200, { name, type: 'int', version: 2 }])
    assertReplay(await alice.put('/customization/custom-fields', { name, type: 'int' }, { key }), first)
    assert.equal(await backend.count('custom_fields', `name = '${name}' AND version = 2`), 1)
  })

  test('PUT /customization/layouts/:entityType: a duplicate changes nothing, and the path counts', async () => {
    const key = randomUUID()
    const entity = `e${randomUUID()}`
    const first = await alice.put(`/customization/layouts/${entity}`, { fields: ['a', 'b'] }, { key })
    assert.deepEqual([first.status, first.json], [200, { entityType: entity, fields: ['a', 'b'], version: 1 }])
    assertReplay(await alice.put(`/customization/layouts/${entity}`, { fields: ['a', 'b'] }, { key }), first)
    assertProblem(await alice.put('/customization/layouts/other', { fields: ['a', 'b'] }, { key }), 422, 'IDEMPOTENCY_KEY_REUSED')
  })

  test('the key is checked where the use case asks for it, too', async () => {
    assertProblem(await alice.post('/customization/custom-fields', { name: 'a' }), 400, 'IDEMPOTENCY_KEY_MISSING')
    assertProblem(await alice.post('/customization/custom-fields', { name: 'a' }, { key: ['one', 'two'] }), 400, 'IDEMPOTENCY_KEY_INVALID')
    const key = randomUUID()
    await alice.post('/customization/custom-fields', { name: key }, { key })
    assertProblem(await alice.post('/customization/custom-fields', { name: 'other' }, { key }), 422, 'IDEMPOTENCY_KEY_REUSED')
  })

  test('a duplicate while the first is at work is 409 with Retry-After', async () => {
    const [key, name] = [randomUUID(), randomUUID()]
    const blocker = await backend.block('custom_fields')
    const first = alice.post('/customization/custom-fields', { name }, { key })
    await until(async () => await blocker.isWaitedFor())
    const meanwhile = await alice.post('/customization/custom-fields', { name }, { key })
    await blocker.release()
    assertProblem(meanwhile, 409, 'DUPLICATE_IN_PROGRESS')
    assert.ok(Number(meanwhile.headers['retry-after']) >= 1)
    assert.equal((await first).status, 201)
  })
})
