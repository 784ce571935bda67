// What the address bar's fragment says is shown.
export const TABS = ["charts", "console", "log", "details"] as const;
export type Tab = (typeof TABS)[number];
export type Route =
  | { page: "host" }
  | { page: "guest"; name: string; tab: Tab }
  | { page: "snapshots" }
  | { page: "activity" };

export function parseRoute(hash: string): Route {
  const [page, name, tab] = hash.replace(/^#?\/?/, "").split("/");
  if (page === "guest" && name) {
    return { page, name: decoded(name), tab: TABS.find((each) => each === tab) ?? "charts" };
  }
  if (page === "snapshots" || page === "activity") return { page };
  return { page: "host" };
}

export function formatRoute(route: Route): string {
  if (route.page === "guest") return `#/guest/${encodeURIComponent(route.name)}/${route.tab}`;
  return route.page === "host" ? "#/" : `#/${route.page}`;
}

function decoded(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}
