/** Keys for orders, events and deliveries: deterministic, random, or in the order of time. */
import { createHash, randomBytes, randomUUID } from 'node:crypto'

/** The namespace of the keys of events. It never changes, or consumers would see every event again. */
export const ORDER_EVENT_NAMESPACE = '5d1f3f0e-6c3f-4f6b-9a43-1f0a8d6b7c21'

/**
 * The same inputs make the same key (UUID version 5): whoever sends the event again sends the same key.
 * The extension's `idempotency_event_key` makes the same of them.
 */
export function deterministicKey (eventType: string, orderId: string, sequenceNumber: number): string {
  const hash = createHash('sha1')
    .update(Buffer.from(ORDER_EVENT_NAMESPACE.replaceAll('-', ''), 'hex'))
    .update(`${eventType}:${orderId}:${sequenceNumber}`)
    .digest()
  return uuidOf(hash, 5)
}

/** A key that nobody can guess, and that says nothing (version 4). */
export function randomKey (): string {
  return randomUUID()
}

let time = 0
let count = 0

/** A key that is greater than those before it (version 7): new rows are next to each other in an index. */
export function timeOrderedKey (): string {
  const now = Date.now()
  count = now > time ? 0 : count + 1
  // 12 bits count the keys of one millisecond; if they do not suffice, the next one is borrowed
  time = Math.max(now, count < 4096 ? time : time + 1)
  count %= 4096

  const bytes = randomBytes(16)
  bytes.writeUIntBE(time, 0, 6)
  bytes.writeUInt16BE(count, 6)
  return uuidOf(bytes, 7)
}

function uuidOf (bytes: Buffer, version: number): string {
  bytes.writeUInt8((bytes.readUInt8(6) & 0x0f) | (version << 4), 6)
  bytes.writeUInt8((bytes.readUInt8(8) & 0x3f) | 0x80, 8)
  return bytes.toString('hex', 0, 16).replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, '$1-$2-$3-$4-$5')
}
