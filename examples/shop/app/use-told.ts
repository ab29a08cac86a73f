'use client'
/** Calling a server action from a form, and saying what became of it where it did not succeed. */

import { useState } from 'react'
import type { Told } from './actions'

/**
 * @returns what to tell the user, or null; and a function that calls an action, and returns its result or
 *   undefined. It does not repeat by itself: the user may, and the key sees to the rest.
 */
export function useTold (): [problem: string | null, tell: <T>(action: () => Promise<Told<T>>) => Promise<T | undefined>] {
  const [problem, setProblem] = useState<string | null>(null)

  async function tell<T> (action: () => Promise<Told<T>>): Promise<T | undefined> {
    setProblem(null)
    try {
      const told = await action()
      if (told === undefined) return undefined // it has redirected
      if ('done' in told) return told.done
      setProblem(told.problem)
    } catch (error) {
      if (typeof (error as { digest?: unknown }).digest === 'string') throw error // of Next's own, or hidden by it
      setProblem('The connection was lost. Send it again: nothing is done twice.')
    }
  }
  return [problem, tell]
}
