// A client of one service, logged in as one user.
//
// Each request has a connection of its own, so that a service that was killed
// and started again never meets a connection of its former life, and headers are
// sent as they are given, also twice.
import http from 'node:http'

/**
 * A client for a service.
 *
 * @param {string} url where the service is
 * @param {object} [options]
 * @param {string} [options.tenant] with `user`, the log-in that is sent as
 *   `Authorization: Bearer TENANT:USER`; without it nothing is sent
 * @param {string} [options.user]
 * @param {string} [options.keyHeader] in which header the key is sent, by default
 *   `Idempotency-Key`
 */
export function client (url, { tenant, user, keyHeader = 'Idempotency-Key' } = {}) {
  const login = user === undefined ? {} : { authorization: `Bearer ${tenant}:${user}` }

  /**
   * Send a request.
   *
   * @param {string} method
   * @param {string} path with the query
   * @param {unknown} [body] a string or a Buffer is sent as it is, anything else
   *   as JSON, undefined not at all
   * @param {object} [options]
   * @param {string | string[]} [options.key] the key; an array sends the header
   *   that many times
   * @param {Record<string, string | string[]>} [options.headers] further headers;
   *   an array sends the header that many times
   * @param {AbortSignal} [options.signal] hangs up
   * @returns {Promise<{status: number, headers: object, text: string, json: unknown}>}
   *   `headers` has lower-case names, `json` is what the text says, read anew at
   *   each use
   * @throws {Error} with the code of the system, such as ECONNRESET, if the
   *   connection is lost before the answer is complete
   */
  async function request (method, path, body, { key, headers, signal } = {}) {
    const content = encode(body)
    const message = http.request(new URL(path, url), {
      method,
      agent: false,
      signal,
      headers: {
        ...login,
        ...(content === undefined ? {} : { 'content-type': 'application/json' }),
        ...(key === undefined ? {} : { [keyHeader]: key }),
        ...headers
      }
    })
    return await new Promise((resolve, reject) => {
      message.on('error', reject)
      message.on('response', response => collect(response).then(resolve, reject))
      message.end(content)
    })
  }

  return {
    request,
    get: (path, options) => request('GET', path, undefined, options),
    post: (path, body, options) => request('POST', path, body, options),
    put: (path, body, options) => request('PUT', path, body, options),
    patch: (path, body, options) => request('PATCH', path, body, options),
    delete: (path, body, options) => request('DELETE', path, body, options)
  }
}

function encode (body) {
  if (body === undefined || typeof body === 'string' || Buffer.isBuffer(body)) return body
  return JSON.stringify(body)
}

async function collect (response) {
  const chunks = []
  for await (const chunk of response) chunks.push(chunk)
  const text = Buffer.concat(chunks).toString()
  return {
    status: response.statusCode,
    headers: response.headers,
    text,
    get json () { return JSON.parse(text) }
  }
}
