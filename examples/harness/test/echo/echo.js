// The smallest service, for the test of the harness: it says what it was sent.
// It is busy with its first requests, as many as BUSY says, and drops the one
// before those.
import http from 'node:http'

const busy = Number(process.env.BUSY ?? 0)
let requests = 0

const server = http.createServer(async (request, response) => {
  if (request.url === '/health') return response.end()
  requests += 1
  if (busy > 0 && requests === 1) return request.destroy()
  if (requests <= busy + 1 && busy > 0) return response.writeHead(503).end()

  const chunks = []
  for await (const chunk of request) chunks.push(chunk)
  response.setHeader('content-type', 'application/json')
  response.end(JSON.stringify({
    requests,
    method: request.method,
    url: request.url,
    headers: request.headersDistinct,
    body: Buffer.concat(chunks).toString()
  }))
})

process.on('SIGTERM', () => server.close())
server.listen(Number(process.env.PORT), process.env.HOST, () => console.log('listening'))
