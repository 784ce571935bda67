import { describe, expect, it } from "vitest";
import { problemMessage } from "../src/api/client";
import { MAX_DELAY_MS, backoffMs } from "../src/api/stream";
import type { GuestView } from "../src/api/types";
import { ACTIONS, actionsFor, stateText, tone } from "../src/model/actions";
import { EMPTY_FORM, definitionOf, splitWords } from "../src/model/definition";
import { formatRoute, parseRoute } from "../src/model/route";

const guest = (rest: Partial<GuestView>): GuestView => ({
  name: "web",
  state: "running",
  ready: true,
  defined: true,
  autostart: false,
  depends_on: [],
  image: "debian",
  command: [],
  memory_bytes: 1,
  cpus: 1,
  ports: [],
  accelerator: null,
  pid: 1,
  created: 0,
  next_start: null,
  restarts: 0,
  status: null,
  reason: null,
  job: null,
  ...rest,
});
const ids = (found: { id: string }[]): string[] => found.map((each) => each.id);

describe("actions", () => {
  it("are those of the state and of the role", () => {
    expect(ids(actionsFor(guest({}), "admin"))).toEqual(["stop", "restart", "pause", "snapshot", "fork", "migrate", "kill"]);
    expect(ids(actionsFor(guest({}), "operator"))).not.toContain("migrate");
    expect(actionsFor(guest({}), "viewer")).toEqual([]);
    expect(ids(actionsFor(guest({ state: "ended" }), "admin"))).toEqual(["start", "remove"]);
  });

  it("of a guest without a definition leave out what would need one", () => {
    expect(ids(actionsFor(guest({ defined: false, state: "ended" }), "admin"))).toEqual(["remove"]);
    expect(ids(actionsFor(guest({ defined: false }), "admin"))).not.toContain("restart");
  });

  it("have one key each in every state", () => {
    for (const state of new Set(ACTIONS.flatMap((action) => action.states))) {
      const keys = actionsFor(guest({ state }), "admin").map((action) => action.key);
      expect(new Set(keys).size).toBe(keys.length);
    }
  });

  it("show a guest that runs and is not ready as booting", () => {
    expect([stateText(guest({ ready: false })), tone(guest({ ready: false }))]).toEqual(["booting", "busy"]);
    expect([stateText(guest({ state: "backing-off" })), tone(guest({}))]).toEqual(["backing off", "good"]);
  });
});

describe("routes", () => {
  it.each(["#/", "#/snapshots", "#/activity", "#/guest/a%20b/console"])("%s comes back", (hash) => {
    expect(formatRoute(parseRoute(hash))).toBe(hash);
  });

  it("are the host's page for what is not known, charts for a tab that is none", () => {
    expect(parseRoute("#/nonsense/x")).toEqual({ page: "host" });
    expect(parseRoute("#/guest/%E0%A4%A/zzz")).toEqual({ page: "guest", name: "%E0%A4%A", tab: "charts" });
  });
});

describe("definitionOf", () => {
  it("leaves out what was not said", () => {
    expect(definitionOf({ ...EMPTY_FORM, name: " db " })).toEqual({ name: "db", image: "debian", memory: "512M", cpus: 1 });
  });

  it("puts everything where `ostler schema` has it", () => {
    const form = {
      ...EMPTY_FORM,
      name: "db",
      cpus: "2",
      command: "sh -c 'echo \"hi\"'",
      ports: "8080:80, 53:53",
      autostart: true,
      extra: '{"host": {"delay_s": 2}, "rng": false}',
    };
    expect(definitionOf(form)).toEqual({
      name: "db",
      image: "debian",
      memory: "512M",
      cpus: 2,
      command: ["sh", "-c", 'echo "hi"'],
      ports: ["8080:80", "53:53"],
      rng: false,
      host: { autostart: true, delay_s: 2 },
    });
  });

  it.each([
    [{ name: "" }, "name: expected"],
    [{ name: "a", cpus: "0" }, "processors 0"],
    [{ name: "a", cpus: "1.5" }, "processors 1.5"],
    [{ name: "a", extra: "{" }, "no JSON"],
    [{ name: "a", extra: "[1]" }, "expected a JSON object"],
    [{ name: "a", command: "echo 'x" }, "a quote ' that is not closed"],
  ])("refuses %j", (rest, expected) => {
    expect(() => definitionOf({ ...EMPTY_FORM, ...rest })).toThrow(expected);
  });

  it.each([
    ["a  b", ["a", "b"]],
    [`'a b' "c\\"d" e\\ f`, ["a b", 'c"d', "e f"]],
    [`''`, [""]],
    ["  ", []],
    [`x'y'"z"`, ["xyz"]],
  ])("splits %s like a shell", (text, expected) => expect(splitWords(text)).toEqual(expected));
});

describe("the service's words", () => {
  it("are shown as they are, and a stranger's page is not", () => {
    expect(problemMessage(409, '{"message": "guest \'a\': runs"}')).toBe("guest 'a': runs");
    expect(problemMessage(502, "<html>")).toBe("the service answered 502");
  });
});

describe("backoffMs", () => {
  it("grows to its limit, and chance takes at most half of it", () => {
    expect([backoffMs(0, 1), backoffMs(3, 1), backoffMs(50, 1)]).toEqual([500, 4000, MAX_DELAY_MS]);
    expect(backoffMs(50, 0)).toBe(MAX_DELAY_MS / 2);
  });
});
