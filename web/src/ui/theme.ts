// Light, dark, or as the system has it; remembered by this browser.
import { signal } from "@preact/signals";

export type Theme = "auto" | "light" | "dark";
const KEY = "ostler.theme";
const ORDER: readonly Theme[] = ["auto", "light", "dark"];

export const theme = signal<Theme>(stored());
/** Changes whenever colours did: canvases have to be drawn anew. */
export const themeCount = signal(0);

export function applyTheme(next: Theme): void {
  theme.value = next;
  if (next === "auto") document.documentElement.removeAttribute("data-theme");
  else document.documentElement.setAttribute("data-theme", next);
  try {
    localStorage.setItem(KEY, next);
  } catch {
    // A browser that keeps nothing.
  }
  themeCount.value += 1;
}

export const nextTheme = (now: Theme): Theme => ORDER[(ORDER.indexOf(now) + 1) % ORDER.length] ?? "auto";

export function watchSystemTheme(): void {
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => (themeCount.value += 1));
}

function stored(): Theme {
  try {
    return ORDER.find((each) => each === localStorage.getItem(KEY)) ?? "auto";
  } catch {
    return "auto";
  }
}
