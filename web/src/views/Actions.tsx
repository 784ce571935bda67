import type { JSX } from "preact";
import { act } from "../commands";
import type { GuestView } from "../api/types";
import { type ActionId, actionsFor } from "../model/actions";
import { caller } from "../state";

export function Actions({ guest, only }: { guest: GuestView; only?: readonly ActionId[] }): JSX.Element {
  const role = caller.value?.role ?? "viewer";
  const found = actionsFor(guest, role).filter((action) => !only || only.includes(action.id));
  return (
    <span class="actions">
      {found.map((action) => (
        <button
          key={action.id}
          class={action.danger ? "danger" : ""}
          title={`${action.label.replace("…", "")} (${action.key})`}
          data-action={action.id}
          disabled={guest.job !== null && action.id !== "kill" && action.id !== "stop"}
          onClick={() => act(action.id, guest)}
        >
          {action.label}
        </button>
      ))}
    </span>
  );
}
