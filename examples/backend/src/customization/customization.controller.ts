/** The routes of custom fields and layouts. Their use cases ask the port themselves, so the interceptor does not. */
import { BadRequestException, Body, Controller, Headers, Param, Post, Put, Req, Res } from '@nestjs/common'
import type { RawBodyRequest } from '@nestjs/common'
import type { Request, Response } from 'express'
import { SkipIdempotency } from 'pg-idempotency/nestjs'
import { CustomizationService } from './customization.service.js'
import type { Answer, Command } from './customization.service.js'

interface Field {
  name?: unknown
  type?: unknown
}

@SkipIdempotency()
@Controller('customization')
export class CustomizationController {
  constructor (private readonly customization: CustomizationService) {}

  @Post('custom-fields')
  async createField (
    @Req() request: RawBodyRequest<Request>, @Headers('x-idempotency-key') key: string | undefined,
    @Body() field: Field = {}, @Res({ passthrough: true }) response: Response
  ): Promise<unknown> {
    const { name, type } = checked(field)
    return sent(response, await this.customization.createField(commandOf(request, key), name, type))
  }

  @Put('custom-fields')
  async changeField (
    @Req() request: RawBodyRequest<Request>, @Headers('x-idempotency-key') key: string | undefined,
    @Body() field: Field = {}, @Res({ passthrough: true }) response: Response
  ): Promise<unknown> {
    const { name, type } = checked(field)
    return sent(response, await this.customization.changeField(commandOf(request, key), name, type))
  }

  @Put('layouts/:entityType')
  async changeLayout (
    @Req() request: RawBodyRequest<Request>, @Headers('x-idempotency-key') key: string | undefined,
    @Param('entityType') entityType: string, @Body() { fields }: { fields?: unknown } = {}, @Res({ passthrough: true }) response: Response
  ): Promise<unknown> {
    if (!Array.isArray(fields)) throw new BadRequestException('fields must be a list')
    return sent(response, await this.customization.changeLayout(commandOf(request, key), entityType, fields.map(String)))
  }
}

function checked ({ name, type = 'text' }: Field): { name: string, type: string } {
  if (typeof name !== 'string' || name === '') throw new BadRequestException('name must be a text')
  if (typeof type !== 'string') throw new BadRequestException('type must be a text')
  return { name, type }
}

function commandOf (request: RawBodyRequest<Request>, key = ''): Command {
  const place = JSON.stringify(request.params)
  return { login: request.login, key, request: `{"params":${place},"body":${request.rawBody?.toString() ?? 'null'}}` }
}

function sent (response: Response, { status, body, replayed }: Answer): unknown {
  response.status(status)
  if (replayed) response.set('Idempotent-Replayed', 'true')
  return body
}
