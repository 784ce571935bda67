// Requests to the service this page came from. Every failure is an ApiError with the one line to show.
import type { Problem } from "./types";

export class ApiError extends Error {
  constructor(
    readonly status: number,
    message: string,
  ) {
    super(message);
  }
}

const TIMEOUT_MS = 30_000;

export async function request<T>(method: string, path: string, body?: unknown): Promise<T> {
  const init: RequestInit = { method, credentials: "same-origin", signal: AbortSignal.timeout(TIMEOUT_MS) };
  if (body !== undefined) {
    init.body = JSON.stringify(body);
    init.headers = { "Content-Type": "application/json" };
  }
  let response: Response;
  try {
    response = await fetch(path, init);
  } catch {
    throw new ApiError(0, "the service does not answer");
  }
  const text = await response.text();
  if (!response.ok) throw new ApiError(response.status, problemMessage(response.status, text));
  return (text === "" ? undefined : JSON.parse(text)) as T;
}

export const get = <T>(path: string): Promise<T> => request<T>("GET", path);
export const post = <T>(path: string, body?: unknown): Promise<T> => request<T>("POST", path, body);
export const put = <T>(path: string, body: unknown): Promise<T> => request<T>("PUT", path, body);
export const del = (path: string): Promise<void> => request<void>("DELETE", path);

export const guestPath = (name: string, rest = ""): string => `/v1/guests/${encodeURIComponent(name)}${rest}`;

export function problemMessage(status: number, text: string): string {
  try {
    const found = JSON.parse(text) as Partial<Problem>;
    if (typeof found.message === "string" && found.message) return found.message;
  } catch {
    // Not the service's own words: a proxy's page.
  }
  return `the service answered ${status}`;
}
