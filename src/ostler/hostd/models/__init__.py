"""What the host service says and takes: the JSON of the REST API, and nothing that knows HTTP.

Sizes are bytes, times are seconds since 1970, durations say their unit in their name. A field that does not apply is
null. Fields are added in later versions, never removed or given another meaning under `/v1`.
"""

from ostler.hostd.models.base import MAX_LIST, Empty, View, Wish
from ostler.hostd.models.callers import (
    AuditEntry,
    AuditList,
    Caller,
    NewToken,
    Role,
    SessionWish,
    TokenList,
    TokenView,
    TokenWish,
)
from ostler.hostd.models.copies import (
    ForkWish,
    ImageList,
    ImageView,
    MigrateWish,
    RestoreWish,
    SnapshotList,
    SnapshotView,
    SnapshotWish,
)
from ostler.hostd.models.guests import (
    BalloonWish,
    DefineWish,
    ExecWish,
    GuestDetail,
    GuestList,
    GuestState,
    GuestView,
    Logs,
    ScheduleView,
    ScheduleWish,
    StopWish,
)
from ostler.hostd.models.hosts import (
    AcceleratorFacts,
    CpuFacts,
    DiskFacts,
    HostView,
    Inventory,
    MemoryFacts,
    NetworkFacts,
    Quantity,
)
from ostler.hostd.models.jobs import EventList, EventView, JobList, JobState, JobView
from ostler.hostd.models.problems import Problem, Refusal
from ostler.hostd.models.usage import GuestStats, HostStats, SampleList, SampleRow, StatsSample

__all__ = [
    "MAX_LIST",
    "AcceleratorFacts",
    "AuditEntry",
    "AuditList",
    "BalloonWish",
    "Caller",
    "CpuFacts",
    "DefineWish",
    "DiskFacts",
    "Empty",
    "EventList",
    "EventView",
    "ExecWish",
    "ForkWish",
    "GuestDetail",
    "GuestList",
    "GuestState",
    "GuestStats",
    "GuestView",
    "HostStats",
    "HostView",
    "ImageList",
    "ImageView",
    "Inventory",
    "JobList",
    "JobState",
    "JobView",
    "Logs",
    "MemoryFacts",
    "MigrateWish",
    "NetworkFacts",
    "NewToken",
    "Problem",
    "Quantity",
    "Refusal",
    "RestoreWish",
    "Role",
    "SampleList",
    "SampleRow",
    "ScheduleView",
    "ScheduleWish",
    "SessionWish",
    "SnapshotList",
    "SnapshotView",
    "SnapshotWish",
    "StatsSample",
    "StopWish",
    "TokenList",
    "TokenView",
    "TokenWish",
    "View",
    "Wish",
]
