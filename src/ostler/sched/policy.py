"""How the host's processors are divided among guests: pure arithmetic, without clocks, threads or files.

Weighted fair queueing in its fluid form (Parekh and Gallager's GPS), with the lag of EEVDF for what is discrete:

- Virtual time V is common to all guests on a set of host CPUs. While it advances by dV, a guest of weight w is due
  w·dV of processor time, but never less than its reservation, never more than its cap or than it can use. What is left
  over goes to the others by the same rule, so nothing lies idle that anybody wants. `fair_rates` finds dV/dt, the
  *level*, and each guest's *rate*: how many host CPUs' worth of time it is due in a second.
- A guest's *lag* is what it was due less what it had (`Ledger`). Who is ahead, with a lag below zero, is not eligible
  until virtual time has caught up. So a guest that overran its turn pays for it, to the nanosecond.

Guests pinned to different CPUs compete where their sets meet. That is a polymatroid, and its weighted max-min division
is found by decomposition: the most crowded set of CPUs first, its guests settled, both taken out, and so on.

Left out on purpose: which vCPU runs on which host CPU. That is the host kernel's, which moves threads better than
anybody outside of it; this module only says how much each guest may take.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

DEFAULT_WEIGHT = 100
# Sets of CPUs looked at as a possible bottleneck. Guests that are pinned in more ways than that are rare, and then only
# each set by itself and all together are.
MAX_UNIONS = 64
NS_PER_MS = 1_000_000

QUANTUM_NS = 10 * NS_PER_MS
"""How much a vCPU that had to wait is let run in a row, at least: the price of stopping it is microseconds."""
CREDIT_NS = 40 * NS_PER_MS
"""How much of what it did not use a guest may use later, per vCPU. Sleeping saves nothing up beyond it."""
DEBT_NS = 250 * NS_PER_MS
"""How far a guest may be made to pay, per vCPU: what a stopped process missed is nobody's fault."""
DRIFT_PART = 0.25


@dataclass(frozen=True, slots=True)
class Claim:
    """One guest's claim on the host."""

    demand: float
    """CPUs it could use at once: at most its vCPUs, less where they are halted."""
    weight: int = DEFAULT_WEIGHT
    cap: float = math.inf
    """CPUs it may use."""
    reserve: float = 0.0
    """CPUs it is to have whatever the others want."""
    cpus: frozenset[int] = frozenset()
    """Host CPUs it may run on; empty: all there are."""

    @property
    def limit(self) -> float:
        """The most it can take."""
        return max(0.0, min(self.demand, self.cap))

    @property
    def floor(self) -> float:
        """The least it is to have."""
        return min(self.reserve, self.limit)


@dataclass(frozen=True, slots=True)
class Due:
    """What a claim comes to."""

    rate: float
    """CPUs' worth of time it is due."""
    level: float
    """Virtual time per time where it competes: its rate per weight, were it not for cap, demand and reservation.
    Infinite where nobody has to wait, negative where reservations are over-committed."""


def fair_rates(claims: Sequence[Claim], capacity: Mapping[int, float]) -> list[Due]:
    """Divide `capacity` (by host CPU: how much of it there is for guests, 0 to 1) among the claims, in their order.

    Weighted max-min fair: no guest's rate can be raised but at the cost of one that has less per weight. It sums to all
    there is, or to all that is wanted.
    """
    dues: list[Due | None] = [None] * len(claims)
    left = dict(capacity)
    waiting = [*range(len(claims))]
    while waiting:
        everywhere = frozenset(left)
        places = {number: _place(claims[number], everywhere) for number in waiting}
        level, union, members = _bottleneck(claims, places, left)
        members = members if math.isfinite(level) else waiting
        for number in members:
            dues[number] = Due(_rate(claims[number], level), level)
        if members is waiting:
            break
        settled = set(members)
        waiting = [number for number in waiting if number not in settled]
        left = {cpu: amount for cpu, amount in left.items() if cpu not in union}
    return [due if due is not None else Due(0.0, math.inf) for due in dues]


def _place(claim: Claim, everywhere: frozenset[int]) -> frozenset[int]:
    """Where it competes; a guest whose CPUs are all gone, or are not there, is at home nowhere."""
    return claim.cpus & everywhere if claim.cpus else everywhere


def _bottleneck(
    claims: Sequence[Claim], places: Mapping[int, frozenset[int]], left: Mapping[int, float]
) -> tuple[float, frozenset[int], list[int]]:
    """The set of CPUs on which virtual time is slowest, and who has nowhere else to go."""
    worst: tuple[float, frozenset[int], list[int]] = (math.inf, frozenset(), [])
    for union in _unions(set(places.values())):
        members = [number for number, place in places.items() if place is union or place <= union]
        level = fill_level([claims[number] for number in members], math.fsum(left[cpu] for cpu in union))
        if level < worst[0]:
            worst = (level, union, members)
    return worst


def _unions(sets: set[frozenset[int]]) -> list[frozenset[int]]:
    found: set[frozenset[int]] = set()
    for each in sorted(sets, key=sorted):
        found |= {each} | {each | other for other in found}
        if len(found) > MAX_UNIONS:
            return [*sets, frozenset().union(*sets)]
    return [*found]


def fill_level(claims: Sequence[Claim], capacity: float) -> float:
    """The level at which the claims' rates sum to the capacity; see `Due.level`."""
    floors = math.fsum(claim.floor for claim in claims)
    if floors >= capacity and floors > 0:
        # Each gets that part of its reservation: 0 when they just fit, -1 when there is nothing at all.
        return capacity / floors - 1
    if math.fsum(claim.limit for claim in claims) <= capacity:
        return math.inf
    # Between a claim's two bends its rate grows with its weight: walk over the bends of all.
    bends = [(claim.floor / claim.weight, claim.weight) for claim in claims]
    bends += [(claim.limit / claim.weight, -claim.weight) for claim in claims if math.isfinite(claim.limit)]
    bends.sort()
    level, growing, total = 0.0, 0, floors
    for bend, change in bends:
        if growing and total + growing * (bend - level) >= capacity:
            break
        total += growing * (bend - level)
        level, growing = bend, growing + change
    return level + (capacity - total) / growing if growing else level


def _rate(claim: Claim, level: float) -> float:
    if level < 0:
        return claim.floor * (1 + level)
    if math.isinf(level):
        return claim.limit
    return min(max(claim.weight * level, claim.floor), claim.limit)


class Ledger:
    """One guest's account: what it is due, what it had, and whether it may go on."""

    __slots__ = ("is_open", "lag_ns", "vcpus")

    def __init__(self, vcpus: int) -> None:
        self.vcpus = vcpus
        self.lag_ns = 0.0
        self.is_open = True

    def settle(self, *, elapsed_ns: int, rate: float, used_ns: int) -> bool:
        """Enter a stretch of time; whether the guest may run from here on."""
        lag = self.lag_ns + rate * elapsed_ns - used_ns
        self.lag_ns = min(max(lag, -DEBT_NS * self.vcpus), CREDIT_NS * self.vcpus)
        # It stops as soon as it is ahead, and goes on once a whole quantum is due: no flutter at the edge.
        self.is_open = self.lag_ns > 0 if self.is_open else self.lag_ns >= self.quantum_ns
        return self.is_open

    def shift(self, by_ns: float) -> None:
        """Virtual time turned out to run slower or faster than was thought; see `drift`."""
        self.lag_ns = min(max(self.lag_ns + by_ns, -DEBT_NS * self.vcpus), CREDIT_NS * self.vcpus)

    def borrow(self, *, is_owed: bool) -> None:
        """Go on although ahead, because a host CPU would lie idle. It counts if it `is_owed` to somebody who waits."""
        self.is_open = True
        if not is_owed:
            self.lag_ns = max(self.lag_ns, 0.0)

    @property
    def quantum_ns(self) -> float:
        """What has to be due before a guest that was stopped goes on."""
        return QUANTUM_NS * self.vcpus

    def turns_in_ns(self, rate: float, *, speed: float) -> float:
        """When `is_open` would change next, if it used `speed` CPUs while open; infinite for never."""
        if self.is_open:
            return self.lag_ns / (speed - rate) if speed > rate else math.inf
        return (self.quantum_ns - self.lag_ns) / rate if rate > 0 else math.inf


def drift(weight: int, lags: Sequence[tuple[int, float]]) -> float:
    """By how much a guest's lag is to be put right, of guests that compete by weight: their weights and lags, its too.

    Dues are made of virtual time, and that of an estimate of the host's capacity. If they are right, what one guest
    lacks another has too much of, and lags sum to zero. What they sum to instead is the error of the estimate, and each
    takes its part of that by weight, a little at a time, since lags are seen late.
    """
    total = sum(each for each, _ in lags)
    return -DRIFT_PART * weight * math.fsum(lag for _, lag in lags) / total if total else 0.0
