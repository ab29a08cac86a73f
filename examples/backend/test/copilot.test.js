// "Copilot streaming: duplicate keys immediately return 409": the stream is
// recorded, and a duplicate gets the same events.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import http from 'node:http'
import { after, afterEach, before, describe, test } from 'node:test'
import { retry } from '../../harness/index.js'
import { ModelServer } from '../dist/copilot/model-server.js'
import { startBackend } from './backend.js'

let model, backend, alice
before(async () => {
  model = await ModelServer.start({ delay: 0 })
  backend = await startBackend({ env: { MODEL_URL: model.url } })
  alice = backend.as('acme:alice')
})
afterEach(() => { model.onWord = () => {} })
after(async () => {
  await backend.stop()
  await model.stop()
})

const chat = (prompt, key, options) => alice.post('/copilot/chat', { prompt }, { key, ...options })

/** Something to wait for until it is opened. */
function gate () {
  let open
  const opened = new Promise(resolve => { open = resolve })
  return { opened, open }
}

/** Read a stream until there are some events, and call a function then; what was read, in the end. */
async function read (prompt, key, events, then) {
  let text = ''
  await new Promise((resolve, reject) => {
    const request = http.request(new URL('/copilot/chat', backend.service.url), {
      method: 'POST',
      agent: false,
      headers: { authorization: 'Bearer acme:alice', 'content-type': 'application/json', 'x-idempotency-key': key }
    })
    request.on('error', reject)
    request.on('response', response => {
      let called = false
      response.setEncoding('utf8')
      response.on('error', resolve)
      response.on('close', resolve)
      response.on('data', data => {
        text += data
        if (called || text.split('\n\n').length <= events) return
        called = true
        Promise.resolve(then(request)).catch(reject)
      })
    })
    request.end(JSON.stringify({ prompt }))
  })
  return text
}

describe('Copilot: POST /copilot/chat', () => {
  test('a duplicate gets the recorded events, the same bytes, and the model is not asked again', async () => {
    const key = randomUUID()
    const first = await chat('how are we?', key)
    assert.equal(first.status, 200)
    assert.match(first.headers['content-type'], /^text\/event-stream/)
    assert.match(first.text, /^id: 1\ndata: \{"word":"About \\"how are we\?\\":"\}\n\n/)
    assert.match(first.text, /event: done\ndata: \{\}\n\n$/)
    const again = await chat('how are we?', key)
    assert.equal(again.headers['idempotent-replayed'], 'true')
    assert.deepEqual([again.status, again.headers['content-type'], again.text], [200, first.headers['content-type'], first.text])
    assert.notEqual((await chat('how are we?', randomUUID())).text, first.text)
  })

  test('the events leave as they come; a duplicate meanwhile is 409 with Retry-After', async () => {
    const key = randomUUID()
    const asked = gate()
    model.onWord = async number => { if (number === 4) await asked.opened }
    let meanwhile
    const text = await read('live', key, 3, async () => {
      meanwhile = await chat('live', key)
      asked.open()
    })
    assert.equal(meanwhile.status, 409)
    assert.equal(meanwhile.json.code, 'DUPLICATE_IN_PROGRESS')
    assert.ok(Number(meanwhile.headers['retry-after']) >= 1)
    assert.match(meanwhile.headers['content-type'], /^application\/problem\+json/)
    assert.equal((await chat('live', key)).text, text)
  })

  test('another prompt under the same key is 422; no key is 400; no log-in is 401', async () => {
    const key = randomUUID()
    await chat('one', key)
    assert.equal((await chat('two', key)).status, 422)
    assert.equal((await chat('one')).json.code, 'IDEMPOTENCY_KEY_MISSING')
    assert.equal((await backend.as().post('/copilot/chat', { prompt: 'one' }, { key })).status, 401)
  })

  test('another user\'s key is another conversation', async () => {
    const key = randomUUID()
    const first = await chat('mine', key)
    const other = await backend.as('acme:bob').post('/copilot/chat', { prompt: 'mine' }, { key })
    assert.equal(other.status, 200)
    assert.notEqual(other.text, first.text)
  })

  test('whoever hangs up gets the rest with the same key', async () => {
    const key = randomUUID()
    const gone = gate()
    model.onWord = async number => { if (number === 4) await gone.opened }
    const seen = await read('hang up', key, 3, request => request.destroy())
    gone.open()
    assert.match(seen, /id: 3\n/)
    assert.doesNotMatch(seen, /event: done/)
    const whole = await retry(async () => await chat('hang up', key))
    assert.equal(whole.headers['idempotent-replayed'], 'true')
    assert.ok(whole.text.startsWith(seen))
    assert.match(whole.text, /event: done/)
  })

  test('kill -9 in the middle of a stream: the next attempt goes on from what was said', async () => {
    const key = randomUUID()
    model.onWord = async number => { if (number === 6) await new Promise(() => {}) }
    const seen = await read('crash', key, 5, async () => await backend.service.kill())
    assert.match(seen, /id: 5\n/)
    model.onWord = () => {}
    await backend.service.start()
    assert.equal((await chat('crash', key)).status, 409, 'the lease of the dead attempt')
    await backend.endLease(key)
    const whole = await chat('crash', key)
    assert.equal(whole.status, 200)
    assert.equal(whole.headers['idempotent-replayed'], undefined)
    assert.ok(whole.text.startsWith(seen), 'what was seen is how it begins')
    assert.match(whole.text, /event: done/)
    assert.equal((await chat('crash', key)).text, whole.text)
  })

  test('the model fails in the middle: the stream breaks, and the next attempt goes on at once', async () => {
    const key = randomUUID()
    const heard = gate()
    model.onWord = async number => {
      if (number < 6) return
      await heard.opened
      throw new Error('overloaded')
    }
    const seen = await read('fail', key, 5, heard.open)
    assert.match(seen, /id: 5\n/)
    assert.doesNotMatch(seen, /event: done/)
    model.onWord = () => {}
    const whole = await retry(async () => await chat('fail', key))
    assert.equal(whole.headers['idempotent-replayed'], undefined)
    assert.ok(whole.text.startsWith(seen))
    assert.match(whole.text, /event: done/)
  })

  test('the answer outlives the process', async () => {
    const key = randomUUID()
    const first = await chat('remember', key)
    await backend.service.restart()
    assert.equal((await chat('remember', key)).text, first.text)
  })
})
