// What may be done with a guest in its state, by whom: the same table for buttons, menus and keys.
import type { GuestState, GuestView, Role } from "../api/types";

export type ActionId =
  | "start"
  | "stop"
  | "restart"
  | "pause"
  | "resume"
  | "snapshot"
  | "fork"
  | "migrate"
  | "kill"
  | "remove";

export interface Action {
  id: ActionId;
  label: string;
  key: string;
  role: Role;
  states: readonly GuestState[];
  /** Asks before it is done. */
  danger?: true;
}

const IDLE: readonly GuestState[] = ["defined", "ended", "failed", "backing-off"];
const ALIVE: readonly GuestState[] = ["running", "paused"];
const ANY_PROCESS: readonly GuestState[] = ["starting", "running", "paused", "stopping", "unreachable"];

export const ACTIONS: readonly Action[] = [
  { id: "start", label: "Start", key: "s", role: "operator", states: IDLE },
  { id: "stop", label: "Stop", key: "x", role: "operator", states: ["waiting", "starting", "running", "paused"] },
  { id: "restart", label: "Restart", key: "r", role: "operator", states: ["running"] },
  { id: "pause", label: "Pause", key: "p", role: "operator", states: ["running"] },
  { id: "resume", label: "Resume", key: "p", role: "operator", states: ["paused"] },
  { id: "snapshot", label: "Snapshot…", key: "n", role: "operator", states: ALIVE },
  { id: "fork", label: "Fork…", key: "f", role: "operator", states: ALIVE },
  { id: "migrate", label: "Migrate…", key: "m", role: "admin", states: ["running"] },
  { id: "kill", label: "Kill", key: "K", role: "operator", states: ANY_PROCESS, danger: true },
  { id: "remove", label: "Remove", key: "D", role: "admin", states: [...IDLE, "broken"], danger: true },
];

const RANK: Record<Role, number> = { viewer: 0, operator: 1, admin: 2 };

export const allows = (role: Role, wanted: Role): boolean => RANK[role] >= RANK[wanted];

export function actionsFor(guest: GuestView, role: Role): Action[] {
  return ACTIONS.filter((action) => {
    if (!allows(role, action.role) || !action.states.includes(guest.state)) return false;
    // Guests that were started without the service have nothing to start from.
    return guest.defined || !(action.id === "start" || action.id === "restart");
  });
}

export type Tone = "good" | "busy" | "idle" | "warn" | "bad";

const TONES: Record<GuestState, Tone> = {
  defined: "idle",
  waiting: "busy",
  starting: "busy",
  running: "good",
  paused: "warn",
  unreachable: "bad",
  stopping: "busy",
  ended: "idle",
  failed: "bad",
  "backing-off": "warn",
  broken: "bad",
};

export const tone = (guest: GuestView): Tone =>
  guest.state === "running" && !guest.ready ? "busy" : TONES[guest.state];

export const stateText = (guest: GuestView): string =>
  guest.state === "running" && !guest.ready ? "booting" : guest.state.replace("-", " ");
