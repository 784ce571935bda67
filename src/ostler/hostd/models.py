"""What the host service says and takes: the JSON of the REST API, and nothing that knows HTTP.

Sizes are bytes, times are seconds since 1970, durations say their unit in their name. A field that does not apply is
null. Fields are added in later versions, never removed or given another meaning under `/v1`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from ostler.hostd.definition import GuestName, Seconds, Size

MAX_LIST = 1000
MAX_WORDS, MAX_WORD = 256, 64 << 10
MAX_COPIES = 100
# Without NUL, which no program's argument can hold, and without what is no character.
TEXT_PATTERN = r"^[^\x00]*$"
Word = Annotated[str, Field(max_length=MAX_WORD, pattern=TEXT_PATTERN)]
Flag = Annotated[bool, Field(strict=True)]
Line = Annotated[str, Field(max_length=256, pattern=r"^[^\x00-\x1f\x7f]*$")]


class Role(StrEnum):
    """What a caller may do. Each may do what those before it may."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"

    def allows(self, wanted: Role) -> bool:
        """Whether this role is enough where `wanted` is asked for."""
        order = list(Role)
        return order.index(self) >= order.index(wanted)


class GuestState(StrEnum):
    """Where a guest is in its life."""

    DEFINED = "defined"
    """Known, not running, nothing planned."""
    WAITING = "waiting"
    """To be started: for a dependency, its delay, or its turn."""
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    UNREACHABLE = "unreachable"
    """Its process lives and does not answer."""
    STOPPING = "stopping"
    ENDED = "ended"
    """In order; `status` says with what."""
    FAILED = "failed"
    """It could not be started, crashed, or its process was killed; `reason` says which."""
    BACKING_OFF = "backing-off"
    """Ended, and will be restarted at `next_start`."""
    BROKEN = "broken"
    """Its definition, kept by an earlier service, is no good; `reason` says why. It waits to be defined anew."""


class JobState(StrEnum):
    """Where a job is."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"
    """The service ended before the job did, and what it was doing did not come to its end."""


class View(BaseModel):
    """Something the service says."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="null")


class Wish(BaseModel):
    """Something a caller asks for; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Problem(View):
    """Why something was not done: the body of every answer of 400 and above."""

    status: int
    kind: str
    """A class of `ostler.errors`, or `Unauthorized`, `Forbidden`, `NotFound`, `TooLarge`, `NoSpace`, `Internal`."""
    message: str
    """One line: what failed, the value, what was expected."""
    refusal: Refusal | None = None
    """Of admission only."""


class Refusal(View):
    """What admission refused: `asked` is more than `left` of `capacity`, over-commitment included."""

    resource: str
    """`memory`, `cpu` (thousandths of a processor), `disk`, `disk_bandwidth`, `network_bandwidth`, or what only one
    guest can have: `port tcp/8080`, `address 10.0.0.2`, `disk /srv/data.img`, `persist web`."""
    asked: int
    left: int
    capacity: int
    holder: str | None = None
    """Who has it, of what only one can have."""


class GuestView(View):
    """A guest, defined here or not. Those that were started without the service are shown, and can be acted on."""

    name: str
    state: GuestState
    ready: bool
    defined: bool
    autostart: bool
    depends_on: list[str]
    image: str | None
    command: list[str]
    memory_bytes: int
    cpus: int
    ports: list[str]
    accelerator: str | None
    pid: int | None
    created: float | None
    """When its process was started."""
    ready_at: float | None
    next_start: float | None
    restarts: int
    """Since the last time it proved itself."""
    status: int | None
    """Exit status of one that has ended."""
    reason: str | None
    """Why it ended, failed or waits, in one line."""
    job: str | None
    """What is being done with it: a job's id."""


class GuestList(View):
    guests: list[GuestView]
    version: int
    """Grows with every change of any guest; the same number is the same list."""


class GuestDetail(View):
    """All that is known of a guest."""

    guest: GuestView
    definition: dict[str, Any] | None
    """As it was given, also where it is broken: a table of `ostler schema`, and `host`."""
    facts: dict[str, Any]
    """What its process says of itself (`ostler inspect`); empty while it does not run."""


class GuestStats(View):
    """What a guest uses, from its start on. Rates are a reader's to form from two of these."""

    name: str
    time: float
    uptime_s: float
    cpu_time_ns: int
    """Of its whole process."""
    vcpu_time_ns: list[int]
    """Of each virtual processor's thread."""
    vcpu_wait_ns: list[int] | None = None
    """How long each wanted a processor of the host's and had none, where the kernel or the scheduler counts it."""
    vcpu_halt_ns: list[int] | None = None
    memory_bytes: int
    memory_touched_bytes: int
    memory_resident_bytes: int
    disk_read_bytes: int
    disk_written_bytes: int
    net_received_bytes: int
    net_sent_bytes: int
    raw: dict[str, Any] | None = None
    """The whole reply of the control protocol's `stats`; only where it was asked for with `raw=true`."""


class HostStats(View):
    """What the host uses, Ostler's guests and everything else together."""

    time: float
    cpus: int
    cpu_busy_ns: int
    """All processors together since the host's boot: user, nice, system, interrupts, steal left out."""
    cpu_idle_ns: int
    cpu_steal_ns: int
    memory_bytes: int
    memory_available_bytes: int
    disk_read_bytes: int
    disk_written_bytes: int
    net_received_bytes: int
    net_sent_bytes: int


class StatsSample(View):
    """One message of the statistics' stream."""

    host: HostStats
    guests: list[GuestStats]


class SampleRow(View):
    """One guest's use in one interval of the kept history; `guest` is null for the whole host."""

    time: float
    """The interval's end."""
    interval_s: float
    guest: str | None
    cpu_time_ns: int
    """Of its whole process; of the host, all that was busy."""
    run_ns: int
    """Of its virtual processors; of the host, all that was busy."""
    wait_ns: int
    """How long they wanted a processor of the host's and had none; of the host, what was stolen from it."""
    memory_bytes: int
    """Resident; of the host, what is not available."""
    disk_bytes: int
    """Read and written."""
    disk_read_bytes: int
    disk_written_bytes: int
    net_bytes: int
    """Received and sent."""
    net_received_bytes: int
    net_sent_bytes: int


class SampleList(View):
    samples: list[SampleRow]


class StopWish(Wish):
    grace_s: Annotated[float, Field(strict=True, ge=0, le=3600, allow_inf_nan=False)] | None = None
    """How long it may take to shut down before it is killed; by default what its definition says, else 30."""


class ExecWish(Wish):
    """A command in a guest, without a terminal. What it says is kept up to 1 MiB a stream."""

    argv: Annotated[list[Word], Field(min_length=1, max_length=MAX_WORDS)]
    env: Annotated[dict[str, Word], Field(max_length=MAX_WORDS)] = {}
    cwd: Word | None = None
    user: Word | None = None
    stdin: Annotated[str, Field(max_length=1 << 20)] = ""
    timeout_s: Annotated[float, Field(strict=True, gt=0, le=86_400, allow_inf_nan=False)] | None = None


class SnapshotWish(Wish):
    name: GuestName
    incremental: Flag = False
    freeze: Flag = False
    replace: Flag = False


class RestoreWish(Wish):
    name: GuestName | None = None
    """Of the new guest; made up where there is none. With a count, the names are numbered."""
    count: Annotated[int, Field(strict=True, ge=1, le=MAX_COPIES)] = 1
    accel: Literal["auto", "kvm", "soft"] | None = None


class ForkWish(Wish):
    name: GuestName | None = None
    count: Annotated[int, Field(strict=True, ge=1, le=MAX_COPIES)] = 1


class MigrateWish(Wish):
    """Where `ostler receive` listens; the files are this host's."""

    address: Line
    tls_cert: Line | None = None
    tls_key: Line | None = None
    tls_ca: Line | None = None
    insecure: Flag = False
    streams: Annotated[int, Field(strict=True, ge=1, le=16)] = 1
    compression: Literal["none", "zlib", "zstd"] = "none"
    bytes_per_s: Size = 0
    downtime_ms: Annotated[float, Field(strict=True, ge=0, le=60_000, allow_inf_nan=False)] = 40
    post_copy: Literal["never", "auto", "now"] = "never"
    name: GuestName | None = None


class ScheduleWish(Wish):
    """Shares of the host's processors (docs/scheduling.md). What is not named stays; null takes away."""

    weight: Annotated[int, Field(strict=True, ge=1, le=10_000)] | None = None
    cap: Annotated[float, Field(strict=True, ge=1, le=102_400, allow_inf_nan=False)] | None = None
    """Percent of one processor, at most."""
    reserve: Annotated[float, Field(strict=True, ge=0, le=102_400, allow_inf_nan=False)] | None = None
    """Percent of one processor, at least."""
    pin: (
        Annotated[list[Annotated[int, Field(strict=True, ge=0, le=1023)]], Field(min_length=1, max_length=64)] | None
    ) = None


class ScheduleView(View):
    shares: dict[str, Any]
    """As the control protocol's `schedule` has it."""


class BalloonWish(Wish):
    guest_bytes: Size


class DefineWish(Wish):
    """A definition: a table of `ostler schema` with a table `host`."""

    definition: Annotated[dict[str, Any], Field(max_length=MAX_WORDS)]
    start: Flag = False
    """Start it at once, too."""


class SnapshotView(View):
    name: str
    guest: str | None = None
    image: str | None = None
    created: float | None = None
    memory_bytes: int | None = None
    disk_bytes: int | None = None
    parent: str | None = None
    frozen: bool | None = None
    error: str | None = None
    """Why it cannot be read."""


class SnapshotList(View):
    snapshots: list[SnapshotView]


class ImageView(View):
    name: str
    digest: str
    size_bytes: int | None


class ImageList(View):
    images: list[ImageView]


class JobView(View):
    """Long work. It goes on when its caller has gone, and is remembered when the service has."""

    id: str
    kind: str
    """`start`, `stop`, `restart`, `exec`, `snapshot`, `restore`, `fork`, `migrate`, `remove`."""
    guest: str | None
    state: JobState
    progress: float | None
    """From 0 to 1, where it can be said."""
    message: str
    """What it does now, or how it ended, in one line."""
    created: float
    started: float | None
    ended: float | None
    by: str
    """Who asked for it: see `Caller`."""
    result: dict[str, Any] | None
    """What came of it; see docs/rest-api.md for each kind's."""
    problem: Problem | None


class JobList(View):
    jobs: list[JobView]


class EventView(View):
    """Something that happened."""

    id: int
    """Grows by one with each; goes on counting after a restart of the service."""
    time: float
    kind: str
    """`guest`, `job`, `definition`, `host`, or what a guest's process says: `guest.device`, `guest.panic`, …"""
    guest: str | None
    data: dict[str, Any]
    """`guest`: a GuestView. `job`: a JobView. Else what docs/rest-api.md says."""


class EventList(View):
    events: list[EventView]
    last: int
    """The newest event's id; 0 before the first."""


class Quantity(View):
    """How much there is of a resource, and how much of it is promised."""

    capacity: int
    """With over-commitment."""
    ratio: float
    promised: int
    left: int


class DiskFacts(View):
    path: str
    size_bytes: int
    free_bytes: int


class NetworkFacts(View):
    name: str
    mac: str | None
    mtu: int
    is_up: bool
    speed_bytes_per_s: int | None
    addresses: list[str]


class AcceleratorFacts(View):
    name: str
    usable: bool
    detail: str


class CpuFacts(View):
    """The host's processors as this process may use them."""

    count: int
    online: int
    model: str
    sockets: int
    cores: int
    threads_per_core: int
    numa_nodes: int


class MemoryFacts(View):
    size_bytes: int
    available_bytes: int
    swap_bytes: int
    huge_page_bytes: int
    huge_pages: int
    huge_pages_free: int


class Inventory(View):
    hostname: str
    kernel: str
    cpu: CpuFacts
    memory: MemoryFacts
    disks: list[DiskFacts]
    networks: list[NetworkFacts]
    accelerators: list[AcceleratorFacts]


class HostView(View):
    """The host and what it has promised."""

    version: str
    started: float
    """When the service did."""
    inventory: Inventory
    resources: dict[str, Quantity]
    guests: dict[str, int]
    """How many are in each state."""


class Caller(View):
    """Who asks, as the service knows it."""

    name: str
    """`uid 1000`, `token ci`, `certificate alice`."""
    role: Role
    by: Literal["peer", "token", "certificate", "session"]


class SessionWish(Wish):
    token: Annotated[str, Field(max_length=200)]


class TokenWish(Wish):
    name: GuestName
    role: Role
    expires_in_s: Seconds | None = None


class TokenView(View):
    """A token without its secret."""

    id: str
    name: str
    role: Role
    created: float
    expires: float | None
    last_used: float | None


class NewToken(View):
    token: str
    """Shown once; the service keeps a hash."""
    view: TokenView


class TokenList(View):
    tokens: list[TokenView]


class AuditEntry(View):
    """One request that changed something, or was refused for who asked it."""

    time: float
    caller: str
    role: str | None
    address: str
    method: str
    path: str
    status: int
    detail: str


class AuditList(View):
    entries: list[AuditEntry]


class Logs(View):
    """What a guest has said, as text; bytes that are none are replaced."""

    text: str
    source: Literal["console", "command"]


class Empty(View):
    """Done, and nothing to say."""


AnyTable = Annotated[dict[str, Any], WithJsonSchema({"type": "object"})]
Problem.model_rebuild()
