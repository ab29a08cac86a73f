/** Who asks: a demonstration token, `Authorization: Bearer TENANT:USER`. */
import type { FastifyInstance } from 'fastify'
import { OrderError } from './errors.js'

export interface User {
  tenant: string
  id: string
}

declare module 'fastify' {
  interface FastifyRequest {
    user: User
  }
  interface FastifyContextConfig {
    /** Whether the route is for everybody. */
    public?: boolean
  }
}

/** Let nobody in who does not say who it is. In onRequest, so before anything else is looked at. */
export function logIn (app: FastifyInstance): void {
  app.decorateRequest('user', null as unknown as User)
  app.addHook('onRequest', async (request, reply) => {
    if (request.routeOptions.config.public) return
    const [, tenant, id] = /^Bearer ([^:\s]+):([^:\s]+)$/i.exec(request.headers.authorization ?? '') ?? []
    if (tenant === undefined || id === undefined) {
      reply.header('www-authenticate', 'Bearer')
      throw new OrderError(401, 'UNAUTHENTICATED', 'Say who you are: Authorization: Bearer TENANT:USER')
    }
    request.user = { tenant, id }
  })
}
