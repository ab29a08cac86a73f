// A client that does not give up, as an application's own client should.
//
// It repeats the same request, with the same key, for as long as the outcome is
// unknown or another attempt is at work: after a lost connection, 409 with
// Retry-After, 429 and 5xx.  Any other answer is final, also a 4xx.
import { setTimeout as sleep } from 'node:timers/promises'

/**
 * Repeat a request until it is answered.
 *
 * @template T
 * @param {() => Promise<T>} send sends the request; it must use one key for all
 *   of its calls, as in `const key = randomUUID()` and
 *   `retry(() => api.post('/orders', order, { key }))`
 * @param {object} [options]
 * @param {number} [options.timeout] milliseconds after which it gives up, by
 *   default a minute
 * @returns {Promise<T>} the first answer that is final
 * @throws {Error} the last error, or one that tells the last answer, if none was
 *   final in time
 */
export async function retry (send, { timeout = 60_000 } = {}) {
  const end = Date.now() + timeout

  for (let attempt = 0; ; attempt++) {
    let answer, error
    try {
      answer = await send()
    } catch (problem) {
      if (!isLostConnection(problem)) throw problem
      error = problem
    }
    if (answer !== undefined && isFinal(answer)) return answer
    if (Date.now() > end) {
      throw error ?? new Error(`no final answer: ${answer.status} ${answer.text}`)
    }
    await sleep(delay(attempt, answer))
  }
}

function isFinal ({ status, headers }) {
  if (status === 409) return headers['retry-after'] === undefined
  return status !== 429 && status < 500
}

function isLostConnection (error) {
  return ['ECONNREFUSED', 'ECONNRESET', 'EPIPE', 'ETIMEDOUT'].includes(error.code)
}

// Some milliseconds that double with each attempt, up to a second, of which half
// is chance: clients that failed together should not come back together.  What
// the server asks for is waited for, but at most a second of it: a claim may be
// leased for minutes, and its work be done in a moment.
function delay (attempt, answer) {
  const longest = Math.min(25 * 2 ** attempt, 1000)
  const asked = Math.min(Number(answer?.headers['retry-after'] ?? 0), 1) * 1000
  return Math.max(asked, longest / 2) + Math.random() * longest / 2
}
