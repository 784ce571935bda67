import { render } from "preact";
import type { JSX } from "preact";
import { dismiss, notices, route } from "./commands";
import { onKey } from "./keys";
import { begin, link, session } from "./state";
import "./style.css";
import { applyTheme, theme, watchSystemTheme } from "./ui/theme";
import { Activity, JobCards } from "./views/Activity";
import { Dialogs } from "./views/Dialogs";
import { Guest } from "./views/Guest";
import { Host } from "./views/Host";
import { SignIn } from "./views/SignIn";
import { Snapshots } from "./views/Snapshots";
import { Top } from "./views/Top";

function App(): JSX.Element {
  if (session.value === "out") return <SignIn />;
  if (session.value === "unknown") {
    return <p class="empty">{link.value === "lost" ? "The service does not answer; trying again." : "…"}</p>;
  }
  return (
    <>
      <Top />
      <Page />
      <Dialogs />
      <JobCards />
      <div class="notices" role="alert">
        {notices.value.map((notice) => (
          <div key={notice.id} class="card bad">
            <span>{notice.text}</span>
            <button class="plain" aria-label="Dismiss" onClick={() => dismiss(notice.id)}>
              ×
            </button>
          </div>
        ))}
      </div>
    </>
  );
}

function Page(): JSX.Element {
  const here = route.value;
  switch (here.page) {
    case "guest":
      return <Guest key={here.name} name={here.name} tab={here.tab} />;
    case "snapshots":
      return <Snapshots />;
    case "activity":
      return <Activity />;
    case "host":
      return <Host />;
  }
}

applyTheme(theme.value);
watchSystemTheme();
addEventListener("keydown", onKey);
const place = document.getElementById("app");
if (place) render(<App />, place);
void begin();
