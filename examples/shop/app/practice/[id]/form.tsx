'use client'

import { useState } from 'react'
import { submitAnswer } from '../../actions'
import { useIdempotencyKey } from '../../use-idempotency-key'
import { useTold } from '../../use-told'

/** Each answer is an operation of its own, so that the key changes when one was recorded. */
export function AnswerForm ({ sessionId }: { sessionId: string }) {
  const [idempotencyKey, renew] = useIdempotencyKey()
  const [problem, tell] = useTold()
  const [answers, setAnswers] = useState<number | null>(null)

  async function submit (form: FormData) {
    const recorded = await tell(async () => await submitAnswer({ idempotencyKey, sessionId, answer: String(form.get('answer')) }))
    if (!recorded) return
    setAnswers(recorded.answers)
    renew()
  }

  return (
    <form action={submit}>
      <input name='answer' aria-label='Answer' defaultValue='42' required />
      <button>Submit</button>
      {answers !== null && <p role='status'>{answers} recorded</p>}
      {problem && <p role='alert'>{problem}</p>}
    </form>
  )
}
