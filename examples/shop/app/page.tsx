import { logIn } from './actions'

export default function Home () {
  return (
    <main>
      <h1>Shop</h1>
      <form action={logIn}>
        <label>TENANT:USER <input name='login' defaultValue='acme:alice' pattern='[^:]+:.+' required /></label>
        <button>Log in</button>
      </form>
      <p><a href='/checkout'>Subscribe</a>, <a href='/practice'>practise</a></p>
    </main>
  )
}
