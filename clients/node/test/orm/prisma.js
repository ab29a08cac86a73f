// Prisma, whose client is generated from a schema.
//
// The generator makes TypeScript, and needs no engine for that; but it wants to
// download one unless it is told of a program to use instead, which it then
// does not run.
import { execFileSync } from 'node:child_process'
import { mkdirSync, readFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs'
import path from 'node:path'
import { fileURLToPath, pathToFileURL } from 'node:url'
import { PrismaPg } from '@prisma/adapter-pg'
import typescript from 'typescript'
import { fromPrisma, prismaDatabase } from 'pg-idempotency/orm'

// below node_modules, where the client finds its run-time library
const modules = fileURLToPath(new URL('node_modules', import.meta.url))
const directory = path.join(modules, '.cache', 'orm-test-prisma')

const schema = `
generator client {
  provider     = "prisma-client"
  output       = "client"
  engineType   = "client"
  runtime      = "nodejs"
  moduleFormat = "esm"
  importFileExtension = "js"
}

datasource db {
  provider = "postgresql"
}

model Order {
  id   Int    @id @default(autoincrement())
  name String @unique

  @@map("orders")
}
`

async function generate () {
  rmSync(directory, { recursive: true, force: true })
  mkdirSync(directory, { recursive: true })
  writeFileSync(path.join(directory, 'package.json'), '{"type":"module"}')
  writeFileSync(path.join(directory, 'schema.prisma'), schema)
  execFileSync(process.execPath, [path.join(modules, 'prisma/build/index.js'), 'generate', '--no-hints'], {
    cwd: directory,
    stdio: 'pipe',
    env: { ...process.env, PRISMA_SCHEMA_ENGINE_BINARY: process.execPath, CHECKPOINT_DISABLE: '1', PRISMA_HIDE_UPDATE_MESSAGE: '1' }
  })
  for (const file of readdirSync(directory, { recursive: true }).filter(name => name.endsWith('.ts'))) {
    const { outputText } = typescript.transpileModule(readFileSync(path.join(directory, file), 'utf8'), {
      compilerOptions: { module: 'esnext', target: 'es2022' }
    })
    writeFileSync(path.join(directory, file.replace(/\.ts$/, '.js')), outputText)
  }
  return await import(pathToFileURL(path.join(directory, 'client/client.js')))
}

export async function open (url) {
  const { PrismaClient } = await generate()
  const prisma = new PrismaClient({ adapter: new PrismaPg({ connectionString: url, max: 4 }) })
  return {
    database: options => prismaDatabase(prisma, options),
    queryable: fromPrisma,
    transaction: work => prisma.$transaction(work),
    insert: async (tx, name) => await tx.order.create({ data: { name } }),
    serializable: 'Serializable',
    close: async () => await prisma.$disconnect()
  }
}
