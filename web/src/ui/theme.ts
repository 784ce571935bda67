// Light, dark, or as the system has it; remembered by this browser.
import { signal } from "@preact/signals";

export type Theme = "auto" | "light" | "dark";
const KEY = "ostler.theme";
const ORDER: readonly Theme[] = ["auto", "light", "dark"];

const system = matchMedia("(prefers-color-scheme: dark)");

export const theme = signal<Theme>(stored());
/** Changes whenever colours did: canvases have to be drawn anew. */
export const themeCount = signal(0);

export function applyTheme(next: Theme): void {
  theme.value = next;
  show();
  try {
    localStorage.setItem(KEY, next);
  } catch {
    // A browser that keeps nothing.
  }
}

/** The style sheet has one set of dark colours, and the root element says whether they are it. */
function show(): void {
  const isDark = theme.value === "dark" || (theme.value === "auto" && system.matches);
  document.documentElement.setAttribute("data-theme", isDark ? "dark" : "light");
  themeCount.value += 1;
}

export const nextTheme = (now: Theme): Theme => ORDER[(ORDER.indexOf(now) + 1) % ORDER.length] ?? "auto";

export function watchSystemTheme(): void {
  system.addEventListener("change", show);
}

function stored(): Theme {
  try {
    return ORDER.find((each) => each === localStorage.getItem(KEY)) ?? "auto";
  } catch {
    return "auto";
  }
}
