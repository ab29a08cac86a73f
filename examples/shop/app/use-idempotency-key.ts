'use client'
/**
 * The key of a form: made once, kept for all tries of one operation, and changed for the next one. It is not
 * in the page's text, so that the one that the server makes while it renders does not matter.
 */

import { useState } from 'react'

/**
 * @param remember the name under which the tab keeps the key, so that going back and a reload find the same;
 *   without it, each visit of the form is an operation of its own
 * @returns the key, and what makes a new one when its operation is over
 */
export function useIdempotencyKey (remember?: string): [key: string, renew: () => void] {
  const [key, setKey] = useState(() => (remember && kept(remember)) ?? made(remember))
  return [key, () => setKey(made(remember))]
}

function kept (name: string): string | undefined {
  return typeof window === 'undefined' ? undefined : window.sessionStorage.getItem(name) ?? undefined
}

function made (name: string | undefined): string {
  const key = crypto.randomUUID()
  if (name && typeof window !== 'undefined') window.sessionStorage.setItem(name, key)
  return key
}
