import { describe, expect, it } from "vitest";
import type { GuestStats, HostStats } from "../src/api/types";
import { CAPACITY, Series, guestPoint, hostPoint, keptPoint, stacked } from "../src/model/series";

const stats = (time: number, rest: Partial<GuestStats> = {}): GuestStats => ({
  name: "web",
  time,
  uptime_s: time,
  cpu_time_ns: 0,
  vcpu_time_ns: [0, 0],
  vcpu_wait_ns: null,
  memory_bytes: 512,
  memory_touched_bytes: 0,
  memory_resident_bytes: 100,
  disk_read_bytes: 0,
  disk_written_bytes: 0,
  net_received_bytes: 0,
  net_sent_bytes: 0,
  ...rest,
});

describe("guestPoint", () => {
  it("makes rates of counters", () => {
    const after = stats(12, {
      cpu_time_ns: 3e9,
      vcpu_time_ns: [1e9, 1e9],
      vcpu_wait_ns: [0, 5e8],
      disk_read_bytes: 200,
      net_sent_bytes: 50,
    });

    const point = guestPoint(stats(10, { vcpu_wait_ns: [0, 0] }), after);

    expect(point).toMatchObject({ time: 12, run: 1, wait: 0.25, other: 0.5, memory: 100, diskRead: 100, netSent: 25 });
  });

  it("is none for another run of the guest, and for looks out of order", () => {
    expect(guestPoint(stats(10, { uptime_s: 50 }), stats(12, { uptime_s: 1 }))).toBeNull();
    expect(guestPoint(stats(10, { cpu_time_ns: 5 }), stats(12, { cpu_time_ns: 4 }))).toBeNull();
    expect(guestPoint(stats(10), stats(10))).toBeNull();
  });

  it("never is below zero where a device was reset", () => {
    expect(guestPoint(stats(1, { disk_read_bytes: 9 }), stats(2))?.diskRead).toBe(0);
  });
});

describe("hostPoint", () => {
  it("counts what is not available as used", () => {
    const host = (time: number, busy: number): HostStats => ({
      time,
      cpus: 2,
      cpu_busy_ns: busy,
      cpu_idle_ns: 0,
      cpu_steal_ns: busy / 2,
      memory_bytes: 1000,
      memory_available_bytes: 300,
      disk_read_bytes: 0,
      disk_written_bytes: 0,
      net_received_bytes: 0,
      net_sent_bytes: 0,
    });
    expect(hostPoint(host(1, 0), host(3, 3e9))).toMatchObject({ run: 1.5, wait: 0.75, memory: 700 });
  });
});

describe("Series", () => {
  it("keeps the newest, in order", () => {
    const series = new Series();
    const point = guestPoint(stats(0), stats(1));
    if (!point) throw new Error("expected a point");
    for (let at = 1; at <= CAPACITY + 5; at++) series.add({ ...point, time: at });
    series.add({ ...point, time: 3 });

    expect(series.length).toBe(CAPACITY);
    expect(series.times()[0]).toBe(6);
    expect(series.last?.time).toBe(CAPACITY + 5);
  });

  it("stacks layers on top of one another", () => {
    expect(stacked([[1, 2], [10, 20], [100, 200]])).toEqual([[1, 2], [11, 22], [111, 222]]);
  });
});

describe("keptPoint", () => {
  it("makes rates of a minute's amounts", () => {
    const point = keptPoint({
      time: 60,
      interval_s: 60,
      guest: "web",
      cpu_time_ns: 45e9,
      run_ns: 30e9,
      wait_ns: 6e9,
      memory_bytes: 100,
      disk_read_bytes: 600,
      disk_written_bytes: 0,
      net_received_bytes: 0,
      net_sent_bytes: 60,
    });

    expect(point).toMatchObject({ time: 60, run: 0.5, other: 0.25, wait: 0.1, memory: 100, diskRead: 10, netSent: 1 });
  });
});
