import type { JSX } from "preact";
import { dialog, route } from "../commands";
import { jobs, link, caller, host, signOut } from "../state";
import { applyTheme, nextTheme, theme } from "../ui/theme";

const LINK_TEXT = { connecting: "connecting", live: "live", lost: "connection lost, trying again" };
const THEME_SIGN = { auto: "◐", light: "☀", dark: "☾" };

export function Top(): JSX.Element {
  const running = [...jobs.value.values()].filter((job) => job.state === "running" || job.state === "queued").length;
  const page = route.value.page;
  const tab = (target: string, at: boolean, text: string): JSX.Element => (
    <a href={target} class={at ? "here" : ""} aria-current={at ? "page" : undefined}>
      {text}
    </a>
  );
  return (
    <header class="top">
      <a class="brand" href="#/">
        Ostler
      </a>
      <span class="host-name">{host.value?.inventory.hostname}</span>
      <nav>
        {tab("#/", page === "host" || page === "guest", "Guests")}
        {tab("#/snapshots", page === "snapshots", "Snapshots")}
        {tab("#/activity", page === "activity", running ? `Activity ${running}` : "Activity")}
      </nav>
      <span class="spacer" />
      <span class={`link ${link.value}`} role="status" title={LINK_TEXT[link.value]}>
        <i aria-hidden="true" />
        <span>{link.value === "live" ? "live" : LINK_TEXT[link.value]}</span>
      </span>
      <button
        class="plain"
        title={`Colours: ${theme.value}`}
        aria-label={`Colours: ${theme.value}`}
        onClick={() => applyTheme(nextTheme(theme.value))}
      >
        {THEME_SIGN[theme.value]}
      </button>
      <button class="plain" title="Keys (?)" aria-label="Keys" onClick={() => (dialog.value = { kind: "help" })}>
        ?
      </button>
      <span class="who" title={caller.value?.role}>
        {caller.value?.name}
      </span>
      <button class="plain sign-out" onClick={() => void signOut()}>
        Sign out
      </button>
    </header>
  );
}
