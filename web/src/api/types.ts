// The service's JSON, as docs/rest-api.md and src/ostler/hostd/models have it; tests/unit/web compares the two.
// Only what the dashboard reads is here.

export type Role = "viewer" | "operator" | "admin";

export type GuestState =
  | "defined"
  | "waiting"
  | "starting"
  | "running"
  | "paused"
  | "unreachable"
  | "stopping"
  | "ended"
  | "failed"
  | "backing-off"
  | "broken";

export type JobState = "queued" | "running" | "done" | "failed" | "cancelled" | "interrupted";

export interface Problem {
  status: number;
  kind: string;
  message: string;
}

export interface GuestView {
  name: string;
  state: GuestState;
  ready: boolean;
  defined: boolean;
  autostart: boolean;
  depends_on: string[];
  image: string | null;
  command: string[];
  memory_bytes: number;
  cpus: number;
  ports: string[];
  accelerator: string | null;
  pid: number | null;
  created: number | null;
  next_start: number | null;
  restarts: number;
  status: number | null;
  reason: string | null;
  job: string | null;
}

export interface GuestList {
  guests: GuestView[];
  version: number;
}

export interface GuestDetail {
  guest: GuestView;
  definition: Record<string, unknown> | null;
  facts: Record<string, unknown>;
}

export interface GuestStats {
  name: string;
  time: number;
  uptime_s: number;
  cpu_time_ns: number;
  vcpu_time_ns: number[];
  vcpu_wait_ns: number[] | null;
  memory_bytes: number;
  memory_touched_bytes: number;
  memory_resident_bytes: number;
  disk_read_bytes: number;
  disk_written_bytes: number;
  net_received_bytes: number;
  net_sent_bytes: number;
}

export interface HostStats {
  time: number;
  cpus: number;
  cpu_busy_ns: number;
  cpu_idle_ns: number;
  cpu_steal_ns: number;
  memory_bytes: number;
  memory_available_bytes: number;
  disk_read_bytes: number;
  disk_written_bytes: number;
  net_received_bytes: number;
  net_sent_bytes: number;
}

export interface StatsSample {
  host: HostStats;
  guests: GuestStats[];
}

export interface SampleRow {
  time: number;
  interval_s: number;
  guest: string | null;
  cpu_time_ns: number;
  run_ns: number;
  wait_ns: number;
  memory_bytes: number;
  disk_read_bytes: number;
  disk_written_bytes: number;
  net_received_bytes: number;
  net_sent_bytes: number;
}

export interface SampleList {
  samples: SampleRow[];
}

export interface SnapshotView {
  name: string;
  guest: string | null;
  image: string | null;
  created: number | null;
  memory_bytes: number | null;
  disk_bytes: number | null;
  parent: string | null;
  error: string | null;
}

export interface SnapshotList {
  snapshots: SnapshotView[];
}

export interface ImageView {
  name: string;
  size_bytes: number | null;
}

export interface ImageList {
  images: ImageView[];
}

export interface JobView {
  id: string;
  kind: string;
  guest: string | null;
  state: JobState;
  progress: number | null;
  message: string;
  created: number;
  started: number | null;
  ended: number | null;
  by: string;
  problem: Problem | null;
}

export interface JobList {
  jobs: JobView[];
}

export interface EventView {
  id: number;
  time: number;
  kind: string;
  guest: string | null;
  data: Record<string, unknown>;
}

export interface EventList {
  events: EventView[];
  last: number;
}

export interface Quantity {
  capacity: number;
  ratio: number;
  promised: number;
  left: number;
}

export interface AcceleratorFacts {
  name: string;
  usable: boolean;
  detail: string;
}

export interface CpuFacts {
  count: number;
  model: string;
}

export interface Inventory {
  hostname: string;
  kernel: string;
  cpu: CpuFacts;
  accelerators: AcceleratorFacts[];
}

export interface HostView {
  version: string;
  started: number;
  inventory: Inventory;
  resources: Record<string, Quantity>;
  guests: Record<string, number>;
}

export interface Caller {
  name: string;
  role: Role;
}

export interface Logs {
  text: string;
  source: "console" | "command";
}
