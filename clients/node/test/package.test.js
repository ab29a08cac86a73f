// The package as it is installed: both module systems, their types, and errors that cross from one to the other.
import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { existsSync, readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { describe, test } from 'node:test'
import * as esm from 'pg-idempotency'

const require = createRequire(import.meta.url)
const cjs = require('pg-idempotency')
const { exports } = require('pg-idempotency/package.json')
const entries = Object.keys(exports).filter(path => path !== './package.json').map(path => `pg-idempotency${path.slice(1)}`)

describe('the package', () => {
  for (const entry of entries) {
    test(`${entry} is the same for import and require`, async () => {
      const imported = Object.keys(await import(entry)).filter(name => !['default', 'module.exports', '__esModule'].includes(name)).sort()
      const required = Object.keys(require(entry)).filter(name => !['default', '__esModule'].includes(name)).sort()
      assert.notEqual(required.length, 0)
      assert.deepEqual(imported, required)
    })
  }

  test('has types for all that it exports', () => {
    for (const target of Object.values(exports).filter(target => target.import)) {
      for (const { types, default: code } of [target.import, target.require]) {
        assert.ok(existsSync(new URL(`../${types}`, import.meta.url)), types)
        assert.ok(existsSync(new URL(`../${code}`, import.meta.url)), code)
      }
    }
  })

  test('has a reference that is up to date', () => {
    execFileSync('node', ['scripts/reference.js', '--check'], { cwd: new URL('..', import.meta.url) })
  })

  test('needs nothing but pg at run time', () => {
    const manifest = JSON.parse(readFileSync(new URL('../package.json', import.meta.url)))
    const needed = Object.keys(manifest.peerDependencies).filter(name => !manifest.peerDependenciesMeta[name]?.optional)
    assert.deepEqual([manifest.dependencies, needed], [undefined, ['pg']])
  })
})

describe('errors of another copy', () => {
  test('are instances of the same classes', () => {
    const error = new cjs.MismatchError('a')
    assert.notEqual(cjs.MismatchError, esm.MismatchError)
    assert.ok(error instanceof esm.MismatchError)
    assert.ok(error instanceof esm.IdempotencyError)
    assert.ok(!(error instanceof esm.InFlightError))
    assert.ok(new cjs.Refusal({ status: 402 }) instanceof esm.Refusal)
    for (const other of [null, undefined, 5, {}, new Error('x'), { code: error.code }]) {
      assert.ok(!(other instanceof esm.IdempotencyError) && !(other instanceof esm.MismatchError) && !(other instanceof esm.Refusal))
    }
  })

  test('are not those of a class that is derived', () => {
    class Own extends esm.MismatchError {}
    assert.ok(new Own('a') instanceof esm.MismatchError)
    assert.ok(!(new esm.MismatchError('a') instanceof Own))
    assert.equal(new Own('a').name, 'Own')
  })

  test('each have a code and a status of their own', () => {
    const errors = Object.values(esm).filter(value => typeof value === 'function' && Function.prototype[Symbol.hasInstance].call(esm.IdempotencyError, value.prototype))
    assert.ok(errors.length >= 12)
    const codes = errors.map(Class => new Class('x').code)
    assert.equal(new Set(codes).size, codes.length)
  })
})
