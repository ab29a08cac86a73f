/** GET /health: 200 when the service can work. */
import { Controller, Get } from '@nestjs/common'
import { Public } from './auth/login.js'
import { Database } from './database/database.js'

@Controller('health')
export class HealthController {
  constructor (private readonly database: Database) {}

  @Public()
  @Get()
  async health (): Promise<{ status: string }> {
    await this.database.prisma.$queryRaw`SELECT 1`
    return { status: 'ok' }
  }
}
