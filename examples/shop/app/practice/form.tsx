'use client'

import { createPracticeSession } from '../actions'
import { useIdempotencyKey } from '../use-idempotency-key'
import { useTold } from '../use-told'

/** Each visit of this form is for a session of its own. */
export function PracticeForm () {
  const [idempotencyKey] = useIdempotencyKey()
  const [problem, tell] = useTold()

  async function submit (form: FormData) {
    await tell(async () => await createPracticeSession({ idempotencyKey, topic: String(form.get('topic')) }))
  }

  return (
    <form action={submit}>
      <input name='topic' aria-label='Topic' defaultValue='fractions' required />
      <button>Begin</button>
      {problem && <p role='alert'>{problem}</p>}
    </form>
  )
}
