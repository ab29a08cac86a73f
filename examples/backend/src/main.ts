/** Starts the service: DATABASE_URL says with which database, PORT and HOST where. */
import 'reflect-metadata'
import { NestFactory } from '@nestjs/core'
import { AppModule } from './app.module.js'

// rawBody: the request is compared as it came, and not as a parser has rounded its numbers
const app = await NestFactory.create(AppModule, { rawBody: true, logger: ['warn', 'error'] })
app.enableShutdownHooks()
await app.listen(Number(process.env.PORT ?? 3000), process.env.HOST ?? '127.0.0.1')
