// What the tests of the examples share.
//
// A test starts a service as its users do, by its `npm start`, drives it over
// HTTP, and kills it or its database.  DATABASE_URL names a server on which each
// test file makes a database of its own; PGDATA is the folder of that server, if
// a test may kill it.  `scripts/examples test` sets both.
//
// Test files that kill the database disturb all others on that server, so an
// example with such a file runs its files one by one: `node --test
// --test-concurrency=1`.
export { client } from './client.js'
export { createDatabase, crashDatabase, restartDatabase, startDatabase } from './database.js'
export { retry } from './retry.js'
export { startService } from './service.js'
export { until } from './until.js'
export {
  afterClientBytes, afterClientMessages, beforeAnswer, beforeStatement, cutProxy
} from '../../clients/node/test/support/proxy.js'
