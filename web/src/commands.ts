// What buttons and keys do. Errors become notices; long work is a job, which the page hears of by itself.
import { signal } from "@preact/signals";
import { del, guestPath, post } from "./api/client";
import type { GuestView, JobView } from "./api/types";
import type { ActionId } from "./model/actions";
import { type Route, formatRoute, parseRoute } from "./model/route";
import { takeJob } from "./state";

export type Dialog =
  | { kind: "define" }
  | { kind: "help" }
  | { kind: "snapshot" | "fork" | "migrate"; guest: GuestView }
  | { kind: "confirm"; title: string; text: string; verb: string; run: () => Promise<unknown> };

export interface Notice {
  id: number;
  text: string;
}

export const dialog = signal<Dialog | null>(null);
export const notices = signal<readonly Notice[]>([]);
export const route = signal<Route>(parseRoute(location.hash));

let nextNotice = 1;

addEventListener("hashchange", () => (route.value = parseRoute(location.hash)));

/** The page from now on: the next key, which may be typed before the browser tells of the new address, is that page's. */
export function go(target: Route): void {
  route.value = target;
  location.hash = formatRoute(target);
}

export function complain(error: unknown): void {
  const text = error instanceof Error ? error.message : String(error);
  notices.value = [...notices.value, { id: nextNotice++, text }].slice(-5);
}

export function dismiss(id: number): void {
  notices.value = notices.value.filter((notice) => notice.id !== id);
}

/** Do it, say what went wrong. */
export function attempt(work: () => Promise<unknown>): void {
  void work().catch(complain);
}

/** Begin a job and know of it at once, before its first event comes. */
export async function beginJob(path: string, body?: unknown): Promise<void> {
  takeJob(await post<JobView>(path, body ?? {}));
}

export function act(id: ActionId, guest: GuestView): void {
  const path = (rest: string): string => guestPath(guest.name, rest);
  switch (id) {
    case "start":
      return attempt(() => post<JobView>(path("/start")).then(takeJob));
    case "stop":
    case "restart":
      return attempt(() => beginJob(path(`/${id}`)));
    case "pause":
    case "resume":
      return attempt(() => post(path(`/${id}`)));
    case "snapshot":
    case "fork":
    case "migrate":
      dialog.value = { kind: id, guest };
      return;
    case "kill":
      dialog.value = {
        kind: "confirm",
        title: `Kill ${guest.name}?`,
        text: "Its process ends at once: what its programs have not written to disk is lost.",
        verb: "Kill",
        run: () => post(path("/kill")),
      };
      return;
    case "remove":
      dialog.value = {
        kind: "confirm",
        title: `Remove ${guest.name}?`,
        text: "Its definition and its logs are forgotten. Named disks and snapshots stay.",
        verb: "Remove",
        run: async () => {
          await del(guestPath(guest.name));
          go({ page: "host" });
        },
      };
  }
}
