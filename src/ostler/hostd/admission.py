"""Whether what a guest asks for is there: one rule for every resource. Pure; amounts are integers.

Of a quantity (memory, processors' time, …) the host has so much, times the ratio of over-commitment it was explicitly
given; everything promised and the asked together may not be more. What only one can have (a port, an address, a disk
that is written) has one holder. A quantity the host knows no limit of cannot be promised at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from ostler.errors import AdmissionRefused

MEMORY, CPU, DISK = "memory", "cpu", "disk"
DISK_BANDWIDTH, NETWORK_BANDWIDTH = "disk_bandwidth", "network_bandwidth"
QUANTITIES = (MEMORY, CPU, DISK, DISK_BANDWIDTH, NETWORK_BANDWIDTH)


@dataclass(frozen=True, slots=True)
class Claim:
    """What one guest holds, or asks for."""

    holder: str
    quantities: Mapping[str, int] = field(default_factory=dict)
    """CPU in thousandths of a processor, all else in bytes or bytes a second. Zero asks for nothing."""
    exclusives: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Lack:
    """Why not: the first resource, in the order of the claim, that is not there."""

    resource: str
    asked: int
    left: int
    capacity: int
    holder: str | None = None


def limits(capacities: Mapping[str, int], ratios: Mapping[str, Fraction]) -> dict[str, int]:
    """What may be promised of each quantity, cut to whole units."""
    return {name: int(amount * ratios.get(name, 1)) for name, amount in capacities.items()}


def check(limit: Mapping[str, int], promised: Iterable[Claim], asked: Claim) -> Lack | None:
    """None where `asked` can be promised beside all that is. What its holder had before it gives back."""
    others = [claim for claim in promised if claim.holder != asked.holder]
    for resource, amount in asked.quantities.items():
        if amount <= 0:
            continue
        capacity = limit.get(resource, 0)
        left = capacity - total(others, resource)
        if amount > left:
            return Lack(resource, amount, max(0, left), capacity)
    for resource in sorted(asked.exclusives):
        for claim in others:
            if resource in claim.exclusives:
                return Lack(resource, 1, 0, 1, claim.holder)
    return None


def require(limit: Mapping[str, int], promised: Iterable[Claim], *asked: Claim) -> None:
    """Raise AdmissionRefused for the first that cannot be promised beside all that is, and beside those before it."""
    beside = [*promised]
    for claim in asked:
        if (lack := check(limit, beside, claim)) is not None:
            raise AdmissionRefused(sentence(claim.holder, lack), lack=lack)
        beside = [*(each for each in beside if each.holder != claim.holder), claim]


def total(claims: Iterable[Claim], resource: str) -> int:
    """All that is promised of a quantity."""
    return sum(claim.quantities.get(resource, 0) for claim in claims)


def sentence(guest: str, lack: Lack) -> str:
    """The refusal as one line: which resource, how much is asked, how much is left."""
    if lack.holder is not None:
        return f"guest {guest!r}: {lack.resource}: is {lack.holder!r}'s already"
    if lack.capacity == 0 and lack.resource in {DISK_BANDWIDTH, NETWORK_BANDWIDTH}:
        return (
            f"guest {guest!r}: {lack.resource}: asked {_shown(lack.resource, lack.asked)}, "
            "and the host's is not known; [capacity] of host.toml names it"
        )
    asked, left, whole = (_shown(lack.resource, each) for each in (lack.asked, lack.left, lack.capacity))
    return f"guest {guest!r}: {lack.resource}: asked {asked}, {left} left of {whole}"


def _shown(resource: str, amount: int) -> str:
    if resource == CPU:
        return f"{amount / 1000:g} processors"
    per_second = "/s" if resource.endswith("bandwidth") else ""
    mib, rest = divmod(amount, 1 << 20)
    return f"{mib} MiB{per_second}" if not rest or mib >= 10 else f"{amount} bytes{per_second}"
