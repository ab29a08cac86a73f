// A proxy that cuts connections, for tests of what is lost on the way.
//
// It stands between a client and PostgreSQL and passes on what either sends,
// one message of the protocol after the other.  A test says at which message a
// connection ends, such as the one that tells the client of its COMMIT: the
// server has committed then, and the client does not know.
//
// What was passed on before the cut still arrives.  After it, both sides find
// the connection closed, as when a process in the middle died, and nothing more
// of the client reaches the server.  The client finds it last: its transaction
// is over by then, and what it does next does not depend on who is faster.
//
// Encryption is refused, as the messages could not be read; drivers then go on
// in plain text, unless they insist on it.
import net from 'node:net'

const encryptionRequests = [80877103, 80877104]

/**
 * Start a proxy in front of a server.
 *
 * @param {string} databaseUrl where PostgreSQL is, such as
 *   `postgres://postgres@127.0.0.1:5432/shop`
 * @returns {Promise<CutProxy>} its `url` is the same database through the proxy
 */
export async function cutProxy (databaseUrl) {
  const proxy = new CutProxy(new URL(databaseUrl))
  await proxy.listen()
  return proxy
}

/**
 * A condition for `cutWhen`: after this many messages of the client.  All of
 * them arrive.  The first message of a connection is number one.
 */
export function afterClientMessages (count) {
  return message => message.from === 'client' && message.number === count && message.length
}

/**
 * A condition for `cutWhen`: after this many bytes of the client, be it within
 * a message.
 */
export function afterClientBytes (count) {
  return message => message.from === 'client' &&
    message.offset + message.length >= count && count - message.offset
}

/**
 * A condition for `cutWhen`: before a statement of the client reaches the
 * server, so that it is never run.
 *
 * @param {RegExp} pattern what the text of the statement matches
 */
export function beforeStatement (pattern) {
  return message => message.from === 'client' &&
    ['Q', 'P'].includes(message.type) && pattern.test(message.text)
}

/**
 * A condition for `cutWhen`: before the client hears that the server has run a
 * command, which it then has.
 *
 * @param {string} tag the command tag or its beginning, such as `COMMIT`
 */
export function beforeAnswer (tag) {
  return message => message.from === 'server' && message.type === 'C' &&
    message.text.startsWith(tag)
}

class CutProxy {
  /** How many connections `cutWhen` has cut so far. */
  cuts = 0

  #target
  #listener
  #connections = new Set()
  #unnoticed = new Set()
  #condition
  #times = 0
  #noticed = true

  constructor (target) {
    this.#target = target
  }

  /** The URL of the database through this proxy. */
  get url () {
    const url = new URL(this.#target)
    url.hostname = '127.0.0.1'
    url.port = this.#listener.address().port
    return url.href
  }

  /** How many connections are open now. */
  get connections () {
    return this.#connections.size
  }

  /**
   * Cut a connection at the first message that meets a condition, from now on.
   *
   * The condition is called with each message: `from` is 'client' or 'server';
   * `type` is its letter in the protocol, or 'startup' for the first of a
   * connection, which has none; `text` is its content and `length` its size in
   * bytes; `number` counts the messages of its side of the connection, from
   * one; `offset` is how many bytes came before it.  The condition returns true
   * to cut before this message is passed on, or how many bytes of it are still
   * passed on before the cut, or false.
   *
   * @param {(message: object) => boolean | number} condition
   * @param {object} [options]
   * @param {number} [options.times] how many connections to cut, by default one
   * @param {boolean} [options.noticed] false if only the client finds the
   *   connection closed, and the server not before `letServerNotice`
   */
  cutWhen (condition, { times = 1, noticed = true } = {}) {
    this.#condition = condition
    this.#times = times
    this.#noticed = noticed
  }

  /** Close the server's side of connections that were cut unnoticed. */
  letServerNotice () {
    for (const server of this.#unnoticed) server.end()
    this.#unnoticed.clear()
  }

  /** Cut all connections that are open now, whatever the server is at. */
  cutAll () {
    for (const connection of this.#connections) connection.close()
  }

  /** Cut all connections, and take no more. */
  async close () {
    const closed = new Promise(resolve => this.#listener.close(resolve))
    this.cutAll()
    await closed
  }

  async listen () {
    this.#listener = net.createServer(client => this.#accept(client))
    await new Promise((resolve, reject) => {
      this.#listener.once('error', reject)
      this.#listener.listen(0, '127.0.0.1', resolve)
    })
  }

  #accept (client) {
    const server = net.connect(Number(this.#target.port || 5432), this.#target.hostname)
    const connection = {
      isOpen: true,
      // the server closes its side in turn, and then the client's is closed
      cut: () => {
        connection.isOpen = false
        if (this.#noticed) return server.end()
        this.#unnoticed.add(server)
        client.off('close', connection.close)
        client.destroy()
      },
      close: () => {
        connection.isOpen = false
        for (const socket of [client, server]) socket.end(() => socket.destroy())
      }
    }

    this.#connections.add(connection)
    client.on('close', () => this.#connections.delete(connection))
    for (const socket of [client, server]) {
      socket.setNoDelay(true)
      socket.on('error', connection.close)
      socket.on('close', connection.close)
    }
    this.#passOn('client', client, server, connection)
    this.#passOn('server', server, client, connection)
  }

  // Pass on what comes from one side, until the connection is closed
  #passOn (from, source, destination, connection) {
    let rest = Buffer.alloc(0)
    let hasType = from === 'server'
    let number = 0
    let offset = 0

    source.on('data', chunk => {
      rest = Buffer.concat([rest, chunk])
      while (connection.isOpen) {
        const message = readMessage(rest, hasType)
        if (message === undefined) return
        const bytes = rest.subarray(0, message.length)
        rest = rest.subarray(message.length)

        if (isEncryptionRequest(message, bytes)) {
          source.write('N')
          continue
        }
        hasType = true
        number += 1
        const cut = this.#whereToCut({ ...message, from, number, offset })
        offset += message.length
        destination.write(bytes.subarray(0, cut))
        if (cut !== undefined) connection.cut()
      }
    })
  }

  // After how many bytes of the message to cut, or undefined
  #whereToCut (message) {
    if (this.#times === 0) return undefined
    const answer = this.#condition(message)
    if (answer === false || answer === undefined) return undefined
    this.#times -= 1
    this.cuts += 1
    return answer === true ? 0 : answer
  }
}

// The first message of what has come so far, or undefined while it is not whole
function readMessage (bytes, hasType) {
  const header = hasType ? 5 : 4
  if (bytes.length < header) return undefined
  const length = bytes.readInt32BE(header - 4) + header - 4
  if (bytes.length < length) return undefined
  return {
    type: hasType ? String.fromCharCode(bytes[0]) : 'startup',
    text: bytes.toString('utf8', header, length),
    length
  }
}

function isEncryptionRequest (message, bytes) {
  return message.type === 'startup' && message.length === 8 &&
    encryptionRequests.includes(bytes.readInt32BE(4))
}
