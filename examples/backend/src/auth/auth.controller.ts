/**
 * Sign-up and sign-in.
 *
 * Nobody is logged in during sign-up, so its keys are in the one global tenant. There, tenant and actor
 * are '' and not NULL, so the same key is the same request: a unique index lets any number of rows with
 * NULL in. There is no default key either, which all that send none would share. And that keys of
 * strangers meet there does no harm, since whoever sends another body gets 422 and not an answer.
 *
 * The password is left out of the fingerprint: its hash, kept with the record, would be faster to guess
 * from than that of the account.
 */
import { randomBytes, randomUUID, scrypt, timingSafeEqual } from 'node:crypto'
import { promisify } from 'node:util'
import { BadRequestException, Body, ConflictException, Controller, HttpCode, Post, UnauthorizedException } from '@nestjs/common'
import { Idempotent, IdempotentWork, SkipIdempotency } from 'pg-idempotency/nestjs'
import type { Protected } from 'pg-idempotency/nestjs'
import { Database } from '../database/database.js'
import type { Transaction } from '../database/database.js'
import { Public } from './login.js'

interface Credentials {
  email?: unknown
  password?: unknown
}

const hash = promisify<string, Buffer, number, Buffer>(scrypt)

@Controller('auth')
export class AuthController {
  constructor (private readonly database: Database) {}

  @Public()
  @Idempotent({ action: 'identity.sign_up', tenant: () => null, actor: () => null, omit: ['body.password'] })
  @Post('sign-up')
  async signUp (@Body() body: Credentials = {}, @IdempotentWork() { tx }: Protected<Transaction>): Promise<object> {
    const { email } = body
    if (typeof email !== 'string' || !email.includes('@')) throw new BadRequestException('email must be an address')
    const account = { id: randomUUID(), email, password: typeof body.password === 'string' ? await hashed(body.password) : null }
    const { count } = await tx!.account.createMany({ data: [account], skipDuplicates: true })
    if (count === 0) throw new ConflictException('there is an account with this email')
    return { id: account.id, email }
  }

  /** Not protected: it changes nothing, and what it answers must not be kept. */
  @Public()
  @SkipIdempotency()
  @Post('sign-in')
  @HttpCode(200)
  async signIn (@Body() { email, password }: Credentials = {}): Promise<object> {
    const account = await this.database.prisma.account.findUnique({ where: { email: String(email) } })
    if (!account?.password || !await matches(String(password), account.password)) throw new UnauthorizedException()
    return { id: account.id, token: `${account.id}:${email}` }
  }
}

async function hashed (password: string): Promise<string> {
  const salt = randomBytes(16)
  return `${salt.toString('hex')}:${(await hash(password, salt, 32)).toString('hex')}`
}

async function matches (password: string, stored: string): Promise<boolean> {
  const [salt = '', expected = ''] = stored.split(':')
  return timingSafeEqual(await hash(password, Buffer.from(salt, 'hex'), 32), Buffer.from(expected, 'hex'))
}
