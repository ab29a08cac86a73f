import { redirect } from 'next/navigation'
import { loginOfPage } from '@/lib/login'
import { CheckoutForm } from './form'

export default async function Checkout () {
  const login = await loginOfPage() ?? redirect('/')
  return (
    <main>
      <h1>Subscribe</h1>
      <p>You are {login.user} of {login.tenant}.</p>
      <CheckoutForm />
    </main>
  )
}
