"""What guests and the host use, now and over time."""

from __future__ import annotations

from typing import Any

from ostler.hostd.models.base import View


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
