// A token becomes a session cookie; nothing is kept where scripts could read it.
import type { JSX } from "preact";
import { useState } from "preact/hooks";
import { signIn } from "../state";

export function SignIn(): JSX.Element {
  const [token, setToken] = useState("");
  const [said, setSaid] = useState("");
  const [busy, setBusy] = useState(false);

  const submit = async (event: Event): Promise<void> => {
    event.preventDefault();
    setBusy(true);
    setSaid("");
    try {
      await signIn(token.trim());
    } catch (error) {
      setSaid(error instanceof Error ? error.message : String(error));
    } finally {
      setBusy(false);
    }
  };

  return (
    <main class="sign-in">
      <form onSubmit={(event) => void submit(event)}>
        <h1>Ostler</h1>
        <label>
          Token
          <input
            type="password"
            name="token"
            autocomplete="current-password"
            value={token}
            onInput={(event) => setToken(event.currentTarget.value)}
            autofocus
            required
          />
        </label>
        {said && (
          <p class="error" role="alert">
            {said}
          </p>
        )}
        <button class="primary" disabled={busy}>
          Sign in
        </button>
        <small>
          <code>ostler host token create NAME --role operator</code> makes one.
        </small>
      </form>
    </main>
  );
}
