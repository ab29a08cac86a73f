// Waiting for something to become true, without guessing how long it takes.
import { setTimeout as sleep } from 'node:timers/promises'

/**
 * Ask again and again until a condition holds.
 *
 * @template T
 * @param {() => T | Promise<T>} condition what must become true
 * @param {object} [options]
 * @param {string} [options.what] what is waited for, for the message of the error
 * @param {number} [options.timeout] milliseconds after which it is given up, by
 *   default a minute: far more than it takes, so that no test depends on it
 * @returns {Promise<T>} what the condition returned at last
 * @throws {Error} if it did not hold in time
 */
export async function until (condition, { what = condition.toString(), timeout = 60_000 } = {}) {
  const end = Date.now() + timeout

  for (;;) {
    const result = await condition()
    if (result) return result
    if (Date.now() > end) throw new Error(`waited in vain: ${what}`)
    await sleep(20)
  }
}
