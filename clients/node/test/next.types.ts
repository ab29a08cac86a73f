// What TypeScript knows of the handlers of fetch and Next.js: compiled, and not run.
import pg from 'pg'
import { createIdempotency } from 'pg-idempotency'
import { idempotentFetch } from 'pg-idempotency/fetch'
import { createNext } from 'pg-idempotency/next'

const idempotency = createIdempotency({ pool: new pg.Pool() })
const { route, withIdempotency } = createNext(() => idempotency, { actor: async request => request.headers.get('user') })

// a handler has its own kinds of request and context
class NextRequest extends Request { readonly nextUrl = new URL(this.url) }
export const POST: (request: NextRequest, context: { params: Promise<{ id: string }> }) => Promise<Response> =
  route(async (request: NextRequest, { params }: { params: Promise<{ id: string }> }, { tx }) => {
    await tx.query('SELECT $1, $2', [request.nextUrl.pathname, (await params).id])
    return new Response()
  })

// with a lease there is a claim, and no transaction
route(async (_request, _context, { claim, tx }) => {
  tx satisfies undefined
  await claim.checkpoint('charging')
  return await claim.finish(async tx => { await tx.query('SELECT 1') })
}, { lease: '5 min' })
createNext(idempotency, { actor: () => 'alice', lease: '5 min' }).route(async (_request, _context, { claim }) => {
  await claim.release()
  return new Response()
})

// without a key that is required, there may be neither
route(async (_request, _context, work) => {
  // @ts-expect-error: null
  work.tx
  await work?.tx.query('SELECT 1')
  return new Response()
}, { required: false })

// an action returns what its work returns
withIdempotency('key', 'alice', 'act', async tx => (await tx.query('SELECT 1')).rowCount) satisfies Promise<number | null>
withIdempotency('key', 'alice', 'act', async () => {}, { ttl: '1 h' }) satisfies Promise<void>
withIdempotency('key', 'alice', 'act', async claim => await claim.finish(async tx => String(await tx.query('SELECT 1'))), { lease: '5 min' }) satisfies Promise<string>
// @ts-expect-error: there is no claim without a lease
withIdempotency('key', 'alice', 'act', async claim => { await claim.checkpoint('charging') })

idempotentFetch(idempotency, { tenant: (_request, context: { tenant: string }) => context.tenant, route: '/orders' },
  async (request, { tenant }, { tx }) => {
    await tx.query('SELECT $1, $2', [tenant, await request.text()])
    return new Response()
  }) satisfies (request: Request, context: { tenant: string }) => Promise<Response>
