// What the page knows: filled by requests and the service's streams, read by views through signals.
import { computed, signal } from "@preact/signals";
import { ApiError, get, post, request } from "./api/client";
import { Stream } from "./api/stream";
import type {
  Caller,
  EventList,
  EventView,
  GuestList,
  GuestStats,
  GuestView,
  HostStats,
  HostView,
  JobList,
  JobView,
  SampleList,
  StatsSample,
} from "./api/types";
import { Series, WINDOW_S, guestPoint, hostPoint, keptPoint } from "./model/series";

const KEPT_EVENTS = 300;
const KEPT_JOBS = 200;
const STATS_INTERVAL_S = 1;
const HOST_REFRESH_MS = 15_000;

export type Session = "unknown" | "out" | "in";
export type Link = "connecting" | "live" | "lost";

export const session = signal<Session>("unknown");
export const caller = signal<Caller | null>(null);
export const link = signal<Link>("connecting");
export const host = signal<HostView | null>(null);
export const guests = signal<ReadonlyMap<string, GuestView>>(new Map());
export const jobs = signal<ReadonlyMap<string, JobView>>(new Map());
export const events = signal<readonly EventView[]>([]);
/** Counts samples: whoever draws series reads it to be drawn again. */
export const tick = signal(0);
export const hostSeries = signal(new Series());
export const latest = signal<StatsSample | null>(null);

export const guestList = computed(() => [...guests.value.values()].sort((a, b) => a.name.localeCompare(b.name)));

const series = new Map<string, Series>();
let lastHost: HostStats | undefined;
const lastGuests = new Map<string, GuestStats>();
let lastEvent = 0;
let streams: Stream[] = [];
let refresher: ReturnType<typeof setInterval> | undefined;

export function seriesOf(name: string): Series {
  let found = series.get(name);
  if (!found) series.set(name, (found = new Series()));
  return found;
}

/** Ask who we are; where nobody, show the sign-in. */
export async function begin(): Promise<void> {
  try {
    caller.value = await get<Caller>("/v1/me");
  } catch (error) {
    if (error instanceof ApiError && (error.status === 401 || error.status === 403)) {
      session.value = "out";
      return;
    }
    link.value = "lost";
    setTimeout(() => void begin(), 3000);
    return;
  }
  session.value = "in";
  await refresh();
  openStreams();
}

export async function signIn(token: string): Promise<void> {
  caller.value = await post<Caller>("/v1/session", { token });
  await begin();
}

export async function signOut(): Promise<void> {
  closeStreams();
  try {
    await request<void>("DELETE", "/v1/session");
  } finally {
    caller.value = null;
    guests.value = new Map();
    jobs.value = new Map();
    events.value = [];
    session.value = "out";
  }
}

async function refresh(): Promise<void> {
  const [theHost, theGuests, theJobs, theEvents] = await Promise.all([
    get<HostView>("/v1/host"),
    get<GuestList>("/v1/guests"),
    get<JobList>("/v1/jobs?limit=100"),
    get<EventList>("/v1/events?limit=1000"),
  ]);
  host.value = theHost;
  guests.value = new Map(theGuests.guests.map((guest) => [guest.name, guest]));
  jobs.value = new Map(theJobs.jobs.map((job) => [job.id, job]));
  lastEvent = theEvents.last;
  events.value = theEvents.events.slice(-KEPT_EVENTS);
  await fillCharts();
}

/** What was kept before this page was opened, or while it was cut off. Charts do without where it cannot be had. */
async function fillCharts(): Promise<void> {
  try {
    // The service's clock, for the browser's may be wrong.
    const now = await get<StatsSample>("/v1/stats");
    const kept = await get<SampleList>(`/v1/samples?since=${now.host.time - WINDOW_S}&limit=100000`);
    for (const row of kept.samples) {
      if (row.guest === null) hostSeries.value.add(keptPoint(row));
      else if (guests.value.has(row.guest)) seriesOf(row.guest).add(keptPoint(row));
    }
    takeSample(now);
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
  }
}

function openStreams(): void {
  closeStreams();
  let opened = 0;
  const goOn = (code: number): boolean => {
    if (code === 4401 || code === 4403) {
      closeStreams();
      session.value = "out";
      return false;
    }
    link.value = "lost";
    return true;
  };
  streams = [
    new Stream({
      path: () => `/v1/events/stream?since=${lastEvent}`,
      onOpen: () => {
        link.value = "live";
        // More may have been missed than the service keeps.
        if (opened++) void refresh().catch(() => undefined);
      },
      onMessage: (data) => takeEvent(JSON.parse(String(data)) as EventView),
      onClose: goOn,
    }),
    new Stream({
      path: () => `/v1/stats/stream?interval_s=${STATS_INTERVAL_S}`,
      onMessage: (data) => takeSample(JSON.parse(String(data)) as StatsSample),
      onClose: (code) => code !== 4401 && code !== 4403,
    }),
  ];
  refresher = setInterval(() => {
    void get<HostView>("/v1/host").then(
      (found) => (host.value = found),
      () => undefined,
    );
  }, HOST_REFRESH_MS);
}

function closeStreams(): void {
  clearInterval(refresher);
  for (const stream of streams) stream.close();
  streams = [];
}

export function takeJob(job: JobView): void {
  const next = new Map(jobs.value);
  next.set(job.id, job);
  if (next.size > KEPT_JOBS) {
    const oldest = [...next.values()].sort((a, b) => a.created - b.created)[0];
    if (oldest) next.delete(oldest.id);
  }
  jobs.value = next;
}

function takeEvent(event: EventView): void {
  if (event.id <= lastEvent) return;
  lastEvent = event.id;
  events.value = [...events.value, event].slice(-KEPT_EVENTS);
  if (event.kind === "job") {
    takeJob(event.data as unknown as JobView);
  } else if (event.kind === "guest" && event.guest !== null) {
    const next = new Map(guests.value);
    if (event.data["removed"] === true) next.delete(event.guest);
    else next.set(event.guest, event.data as unknown as GuestView);
    guests.value = next;
  }
}

function takeSample(sample: StatsSample): void {
  const point = lastHost && hostPoint(lastHost, sample.host);
  if (point) hostSeries.value.add(point);
  lastHost = sample.host;
  const present = new Set<string>();
  for (const stats of sample.guests) {
    present.add(stats.name);
    const before = lastGuests.get(stats.name);
    const between = before && guestPoint(before, stats);
    if (between) seriesOf(stats.name).add(between);
    lastGuests.set(stats.name, stats);
  }
  for (const name of [...lastGuests.keys()]) if (!present.has(name)) lastGuests.delete(name);
  for (const name of [...series.keys()]) if (!guests.value.has(name)) series.delete(name);
  latest.value = sample;
  tick.value += 1;
}
