import { redirect } from 'next/navigation'
import { loginOfPage } from '@/lib/login'
import { PracticeForm } from './form'

export default async function Practice () {
  await loginOfPage() ?? redirect('/')
  return (
    <main>
      <h1>Practise</h1>
      <PracticeForm />
    </main>
  )
}
