// What charts draw: rates between two looks at counters that only grow, kept for the last minutes.
import type { GuestStats, HostStats, SampleRow } from "../api/types";

/** What charts show at most: at opening what the service kept of it, a point a minute, then one a second. */
export const WINDOW_S = 900;
export const CAPACITY = WINDOW_S + 60;

export interface Point {
  time: number;
  /** CPUs of the host: the guest's processors ran; of the host, all of it was busy. */
  run: number;
  /** CPUs that were wanted and not had: the steal time a guest is told of. */
  wait: number;
  /** CPUs of the guest's process beside its processors: devices, the network. */
  other: number;
  memory: number;
  diskRead: number;
  diskWritten: number;
  netReceived: number;
  netSent: number;
}

export type Quantity = Exclude<keyof Point, "time">;

/** A ring of the newest points. */
export class Series {
  private readonly points: Point[] = [];

  add(point: Point): void {
    const last = this.points.at(-1);
    if (last && point.time <= last.time) return;
    this.points.push(point);
    if (this.points.length > CAPACITY) this.points.shift();
  }

  get last(): Point | undefined {
    return this.points.at(-1);
  }

  get length(): number {
    return this.points.length;
  }

  times(): number[] {
    return this.points.map((point) => point.time);
  }

  values(quantity: Quantity): number[] {
    return this.points.map((point) => point[quantity]);
  }
}

/** Null where the two are not of the same run: another process, or a look that came late and out of order. */
export function guestPoint(before: GuestStats, after: GuestStats): Point | null {
  const elapsed = after.time - before.time;
  if (elapsed <= 0 || after.uptime_s < before.uptime_s || after.cpu_time_ns < before.cpu_time_ns) return null;
  const cpuShare = (now: number, then: number): number => Math.max(0, (now - then) / 1e9 / elapsed);
  const perSecond = (now: number, then: number): number => Math.max(0, (now - then) / elapsed);
  const run = cpuShare(sum(after.vcpu_time_ns), sum(before.vcpu_time_ns));
  const all = cpuShare(after.cpu_time_ns, before.cpu_time_ns);
  return {
    time: after.time,
    run,
    wait: cpuShare(sum(after.vcpu_wait_ns ?? []), sum(before.vcpu_wait_ns ?? [])),
    other: Math.max(0, all - run),
    memory: after.memory_resident_bytes,
    diskRead: perSecond(after.disk_read_bytes, before.disk_read_bytes),
    diskWritten: perSecond(after.disk_written_bytes, before.disk_written_bytes),
    netReceived: perSecond(after.net_received_bytes, before.net_received_bytes),
    netSent: perSecond(after.net_sent_bytes, before.net_sent_bytes),
  };
}

export function hostPoint(before: HostStats, after: HostStats): Point | null {
  const elapsed = after.time - before.time;
  if (elapsed <= 0) return null;
  const perSecond = (now: number, then: number): number => Math.max(0, (now - then) / elapsed);
  return {
    time: after.time,
    run: perSecond(after.cpu_busy_ns, before.cpu_busy_ns) / 1e9,
    wait: perSecond(after.cpu_steal_ns, before.cpu_steal_ns) / 1e9,
    other: 0,
    memory: after.memory_bytes - after.memory_available_bytes,
    diskRead: perSecond(after.disk_read_bytes, before.disk_read_bytes),
    diskWritten: perSecond(after.disk_written_bytes, before.disk_written_bytes),
    netReceived: perSecond(after.net_received_bytes, before.net_received_bytes),
    netSent: perSecond(after.net_sent_bytes, before.net_sent_bytes),
  };
}

/** One of the minutes the service keeps. */
export function keptPoint(row: SampleRow): Point {
  const perSecond = (amount: number): number => amount / row.interval_s;
  const run = perSecond(row.run_ns) / 1e9;
  return {
    time: row.time,
    run,
    wait: perSecond(row.wait_ns) / 1e9,
    other: Math.max(0, perSecond(row.cpu_time_ns) / 1e9 - run),
    memory: row.memory_bytes,
    diskRead: perSecond(row.disk_read_bytes),
    diskWritten: perSecond(row.disk_written_bytes),
    netReceived: perSecond(row.net_received_bytes),
    netSent: perSecond(row.net_sent_bytes),
  };
}

/** Each on top of those before it, for areas. */
export function stacked(layers: number[][]): number[][] {
  const total: number[] = [];
  return layers.map((layer) => layer.map((value, at) => (total[at] = (total[at] ?? 0) + value)));
}

const sum = (values: number[]): number => values.reduce((total, value) => total + value, 0);
