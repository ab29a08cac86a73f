/** Opens the database once, for all modules. */
import { Global, Module } from '@nestjs/common'
import { Database } from './database.js'

@Global()
@Module({
  providers: [{
    provide: Database,
    useFactory: async () => {
      const url = process.env.DATABASE_URL
      if (!url) throw new Error('DATABASE_URL is not set')
      return await Database.open(url)
    }
  }],
  exports: [Database]
})
export class DatabaseModule {}
