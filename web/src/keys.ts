// The keyboard: one letter each, where nobody types text.
import { act, dialog, go, route } from "./commands";
import type { GuestView } from "./api/types";
import { actionsFor, allows } from "./model/actions";
import { TABS } from "./model/route";
import { caller, guests } from "./state";
import { filter, selected, shownGuests } from "./views/Host";

export function onKey(event: KeyboardEvent): void {
  if (event.ctrlKey || event.metaKey || event.altKey || dialog.value || typesText(event.target)) return;
  if (pageKey(event.key) || guestKey(event.key)) event.preventDefault();
}

function typesText(target: EventTarget | null): boolean {
  if (!(target instanceof HTMLElement)) return false;
  if (target.id === "filter") return false;
  return target.isContentEditable || ["INPUT", "TEXTAREA", "SELECT"].includes(target.tagName);
}

function pageKey(key: string): boolean {
  const at = document.activeElement;
  if (at instanceof HTMLInputElement && at.id === "filter") {
    if (key === "Escape") filter.value = "";
    if (key === "Escape" || key === "Enter") at.blur();
    return key === "Escape" || key === "Enter";
  }
  switch (key) {
    case "?":
      dialog.value = { kind: "help" };
      return true;
    case "g":
      go({ page: "host" });
      return true;
    case "t":
      go({ page: "snapshots" });
      return true;
    case "a":
      go({ page: "activity" });
      return true;
    case "c":
      if (!allows(caller.value?.role ?? "viewer", "admin")) return false;
      dialog.value = { kind: "define" };
      return true;
    case "/":
      go({ page: "host" });
      // After the page has been drawn.
      setTimeout(() => document.getElementById("filter")?.focus());
      return true;
    case "Escape":
      if (route.value.page === "host") return false;
      go({ page: "host" });
      return true;
    default:
      return false;
  }
}

function guestKey(key: string): boolean {
  const here = route.value;
  if (here.page === "host" && (key === "j" || key === "k")) {
    select(key === "j" ? 1 : -1);
    return true;
  }
  const name = here.page === "guest" ? here.name : here.page === "host" ? selected.value : null;
  const guest = name === null ? undefined : guests.value.get(name);
  if (!guest) return false;
  if (key === "Enter" && here.page === "host") {
    go({ page: "guest", name: guest.name, tab: "charts" });
    return true;
  }
  const tab = TABS[Number(key) - 1];
  if (tab) {
    go({ page: "guest", name: guest.name, tab });
    return true;
  }
  return guestAction(key, guest);
}

function guestAction(key: string, guest: GuestView): boolean {
  const action = actionsFor(guest, caller.value?.role ?? "viewer").find((each) => each.key === key);
  if (!action) return false;
  act(action.id, guest);
  return true;
}

function select(step: number): void {
  const names = shownGuests().map((guest) => guest.name);
  if (names.length === 0) return;
  const at = selected.value === null ? -1 : names.indexOf(selected.value);
  const next = at === -1 ? (step > 0 ? 0 : names.length - 1) : Math.min(names.length - 1, Math.max(0, at + step));
  selected.value = names[next] ?? null;
  setTimeout(() => document.querySelector("tr.selected")?.scrollIntoView({ block: "nearest" }));
}
