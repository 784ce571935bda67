import { describe, expect, it } from "vitest";
import { bytes, cpus, duration, percent, rate } from "../src/model/format";

describe("format", () => {
  it.each([
    [0, "0 B"],
    [999, "999 B"],
    [1000, "0.98 KiB"],
    [1536, "1.5 KiB"],
    [512 * 2 ** 20, "512 MiB"],
    [23.5 * 2 ** 30, "23.5 GiB"],
    [5000 * 2 ** 40, "5000 TiB"],
    [-5, "0 B"],
  ])("bytes %d are %s", (count, expected) => expect(bytes(count)).toBe(expected));

  it("says an en dash for what is not known", () => {
    expect([bytes(null), rate(undefined), percent(Number.NaN), cpus(null), duration(undefined)]).toEqual(
      Array.from({ length: 5 }, () => "–"),
    );
  });

  it.each([
    [59.9, "59 s"],
    [61, "1 min 1 s"],
    [7322, "2 h 2 min"],
    [90_000, "1 d 1 h"],
  ])("%d seconds are %s", (seconds, expected) => expect(duration(seconds)).toBe(expected));

  it.each([
    [0.366, "0.37"],
    [1.24, "1.2"],
    [13.6, "14"],
  ])("%d CPUs are %s", (value, expected) => expect(cpus(value)).toBe(expected));
});
