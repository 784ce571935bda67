"""Hosts, guests and rules of a consolidation, as plain data. docs/planning.md says what each field means.

Left out on purpose: where the figures come from (`schema`, `history`) and what to do with them (`solve`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Amounts:
    """What a host has or a guest asks for. None: the host does not limit it, or nobody has measured it."""

    cpus: float
    """Host CPUs kept busy: 1.5 is one and a half."""
    memory_bytes: int
    disk_bytes: int | None = None
    network_bits_per_s: int | None = None


@dataclass(frozen=True, slots=True)
class Host:
    """A server."""

    name: str
    has: Amounts
    capabilities: frozenset[str] = frozenset()
    idle_w: float = 100.0
    full_w: float = 250.0
    """Electric power at no and at full CPU load, without cooling."""
    on: bool = True
    """Whether it is switched on today."""
    drain: bool = False
    """Whether it must end up empty."""


@dataclass(frozen=True, slots=True)
class Guest:
    """A guest and what it is known to use."""

    name: str
    needs: Amounts
    host: str | None = None
    """Where it runs today; None for one that is yet to come."""
    mean_cpus: float = 0.0
    capabilities: frozenset[str] = frozenset()
    """What its host must have."""
    apart: frozenset[str] = frozenset()
    """Groups: no two guests of a group share a host."""
    pinned: bool = False
    only_on: frozenset[str] | None = None
    moved_bytes: int = 0
    """What a move sends: its memory, and its disks where hosts do not share them."""


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What a plan takes for granted; every answer prints them."""

    headroom_cpu: float = 0.25
    headroom_memory: float = 0.10
    headroom_disk: float = 0.10
    headroom_network: float = 0.25
    percentile: float = 95.0
    guest_overhead_bytes: int = 64 * MIB
    pue: float = 1.5
    price_per_kwh: float = 0.30
    currency: str = "EUR"
    kg_co2_per_kwh: float = 0.25
    hours_per_year: float = 8760.0
    move_bits_per_s: int = 10_000_000_000
    off_w: float = 5.0
    """What a host draws that is switched off, for its management controller."""


Placement = dict[str, str]
"""Guest's name → host's name."""


@dataclass(frozen=True, slots=True)
class Estate:
    """Everything a plan is made of."""

    hosts: tuple[Host, ...]
    guests: tuple[Guest, ...]
    assumptions: Assumptions = field(default_factory=Assumptions)

    def today(self) -> Placement:
        """Where guests run now, without those that run nowhere."""
        return {guest.name: guest.host for guest in self.guests if guest.host is not None}

    def may_run(self, guest: Guest, host: Host) -> bool:
        """Whether the rules that concern this guest alone let it end up there."""
        if host.drain or (guest.pinned and host.name != guest.host):
            return False
        return guest.capabilities <= host.capabilities and (guest.only_on is None or host.name in guest.only_on)


@dataclass(frozen=True, slots=True)
class Dimension:
    """One resource in the whole numbers a solver computes with: hosts' rounded down, guests' rounded up."""

    name: str
    unit: str
    has: dict[str, int]
    """Host → what may be used of it, headroom taken off. A host without a limit is not in it."""
    needs: dict[str, int]


def dimensions(estate: Estate) -> tuple[Dimension, ...]:
    """The resources that limit a placement. Those that no host limits are left out."""
    given, overhead = estate.assumptions, estate.assumptions.guest_overhead_bytes
    rows: tuple[tuple[str, str, int | Fraction, float, Callable[[Amounts], float | None], int], ...] = (
        ("cpu", "millicpu", 1000, given.headroom_cpu, lambda amounts: amounts.cpus, 0),
        ("memory", "MiB", Fraction(1, MIB), given.headroom_memory, lambda amounts: amounts.memory_bytes, overhead),
        ("disk", "MiB", Fraction(1, MIB), given.headroom_disk, lambda amounts: amounts.disk_bytes, 0),
        ("network", "kbit/s", Fraction(1, 1000), given.headroom_network, lambda amounts: amounts.network_bits_per_s, 0),
    )
    found = []
    for name, unit, scale, headroom, of, extra in rows:
        limits = {host.name: of(host.has) for host in estate.hosts}
        has = {
            host: math.floor(_exact(limit) * scale * (1 - _exact(headroom)))
            for host, limit in limits.items()
            if limit is not None
        }
        needs = {guest.name: math.ceil((_exact(of(guest.needs) or 0) + extra) * scale) for guest in estate.guests}
        if has:
            found.append(Dimension(name, unit, has, needs))
    return tuple(found)


def hosts_used(placement: Placement) -> frozenset[str]:
    """Hosts with a guest."""
    return frozenset(placement.values())


def moves(estate: Estate, placement: Placement) -> list[Guest]:
    """Guests that run somewhere else today."""
    return [guest for guest in estate.guests if guest.host is not None and guest.host != placement[guest.name]]


def bytes_moved(guests: Iterable[Guest]) -> int:
    """What their moves send."""
    return sum(guest.moved_bytes for guest in guests)


def _exact(value: float) -> Fraction:
    """The decimal number that was written: 0.1 and not the nearest double above it."""
    return Fraction(str(value))
