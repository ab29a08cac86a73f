'use client'

import { useRouter } from 'next/navigation'
import { createCheckoutSession } from '../actions'
import { useIdempotencyKey } from '../use-idempotency-key'
import { useTold } from '../use-told'

/** The button is not disabled while the request runs: the key is what protects, also where a button cannot. */
export function CheckoutForm () {
  const [idempotencyKey] = useIdempotencyKey('checkout')
  const [problem, tell] = useTold()
  const router = useRouter()

  async function submit (form: FormData) {
    const subscription = await tell(async () => await createCheckoutSession({ idempotencyKey, plan: String(form.get('plan')) }))
    if (subscription) router.push('/checkout/done')
  }

  return (
    <form action={submit}>
      <select name='plan' aria-label='Plan'>
        <option>basic</option>
        <option>pro</option>
      </select>
      <button>Subscribe</button>
      {problem && <p role='alert'>{problem}</p>}
    </form>
  )
}
