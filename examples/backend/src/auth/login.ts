/**
 * Who asks: `Authorization: Bearer TENANT:USER`, which stands for a real log-in.
 *
 * A guard looks at it. Guards come before interceptors, so nobody is answered from the records of a
 * request before it is known who asks.
 */
import { Injectable, UnauthorizedException, createParamDecorator } from '@nestjs/common'
import type { CanActivate, ExecutionContext } from '@nestjs/common'
import { Reflector } from '@nestjs/core'
import type { Request } from 'express'

export interface LoggedIn {
  tenant: string
  user: string
}

declare global {
  namespace Express {
    interface Request {
      login: LoggedIn
    }
  }
}

/** A route that needs no log-in. */
export const Public = Reflector.createDecorator<void, boolean>({ transform: () => true })

/** A parameter: who is logged in. */
export const Login = createParamDecorator((_: unknown, context: ExecutionContext) =>
  context.switchToHttp().getRequest<Request>().login)

@Injectable()
export class LoginGuard implements CanActivate {
  constructor (private readonly reflector: Reflector) {}

  canActivate (context: ExecutionContext): boolean {
    if (this.reflector.get(Public, context.getHandler())) return true
    const request = context.switchToHttp().getRequest<Request>()
    const [, tenant, user] = /^Bearer ([^:\s]+):([^:\s]+)$/.exec(request.headers.authorization ?? '') ?? []
    if (tenant === undefined || user === undefined) throw new UnauthorizedException()
    request.login = { tenant, user }
    return true
  }
}
