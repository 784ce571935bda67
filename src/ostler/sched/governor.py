"""One guest's part in sharing the host: what it measures, says in the table, and allows its virtual processors.

A thread of the VM process that sleeps on the table's futex as long as no guest of this user was given anything but the
default. Then the host kernel divides fairly by itself, and Ostler adds nothing. As soon as one guest has a weight, a
cap or a reservation, every guest's governor is awake:

1. Every 50 ms (200 where the guest is idle, or a control group enforces) it measures how much of the time its vCPUs
   wanted to run, writes that and the time used into its slot, reads all slots, and has `policy.fair_rates` say what
   its guest is due.
2. Enforcement by a control group: the group's weight and limit are set to that, and the kernel does the rest.
3. Enforcement by the run loops: the guest's `Ledger` is settled against the clocks of the vCPUs' threads. Who is ahead
   is kicked out of the guest and barred until it is due again. The governor sleeps until the ledger must turn, so that
   a guest at its share costs a few wake-ups in 100 ms, and one below it none but the look at the table.

`Governor.step` is all of it without the thread: time comes in, the next time to look comes out.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ostler.errors import OstlerError
from ostler.host.threads import IdleTimes, usable_cpus
from ostler.sched.capacity import Capacity
from ostler.sched.groups import Group
from ostler.sched.policy import NS_PER_MS, Claim, Due, Ledger, drift, fair_rates
from ostler.sched.table import Entry, Share, Table
from ostler.sched.usage import Usage

REVIEW_NS, IDLE_REVIEW_NS = 50 * NS_PER_MS, 200 * NS_PER_MS
SHORTEST_NS = 2 * NS_PER_MS
STALE_NS, GONE_NS = 1000 * NS_PER_MS, 2000 * NS_PER_MS
"""A guest that has not said anything for so long wants nothing; for so long, its process may be gone."""
BORROW_NS = 10 * NS_PER_MS
"""How often a guest that is ahead looks whether a CPU lies idle."""
IDLE_DEMAND, SPARE_CPUS, TINY = 0.02, 0.05, 1e-9
# What a guest is thought to want: a little more than it did, so that it may grow; a rest is not believed at once.
HEADROOM, HEADROOM_CPUS, MEMORY = 1.1, 0.05, 0.6


class Processors(Protocol):
    """A guest's virtual processors, all of them."""

    def usage(self) -> Sequence[Usage]:
        """Of each."""

    def bar(self) -> None:
        """Keep them out of the guest."""

    def unbar(self) -> None:
        """Let them in again."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a guest is due at the moment, for people and tests."""

    engaged: bool = False
    rate: float = math.inf
    """CPUs it may use."""
    demand: float = 0.0
    """CPUs it wants."""
    capacity: float = 1.0
    """Of each CPU, for guests."""


@dataclass(slots=True)
class HostView:
    """What a governor sees of the host."""

    cpus: Callable[[], frozenset[int]] = usable_cpus
    idle_ns: Callable[[], dict[int, int]] = field(default_factory=lambda: IdleTimes().read_ns)
    now_ns: Callable[[], int] = time.monotonic_ns


class Governor:
    """See above. `step` and `set_share` may come from different threads."""

    def __init__(
        self, processors: Processors, table: Table, *, share: Share, vcpus: int, group: Group | None = None,
        host: HostView | None = None,
    ) -> None:  # fmt: skip
        """`group` is a control group to enforce by; without one, or where it fails, the run loops do it."""
        self._processors = processors
        self._table = table
        self._host = host or HostView()
        self._vcpus = vcpus
        self._share = share
        self._group = group
        self._ledger = Ledger(vcpus)
        self._capacity = Capacity()
        self._lock = threading.Lock()
        self._before: Sequence[Usage] = ()
        self._demands = [1.0] * vcpus
        self._settled_ns = self._settled_used_ns = 0
        self._review_ns = self._generation = 0
        self._rivals: Sequence[int] = ()
        self._due = Due(math.inf, math.inf)
        self._engaged = False
        self.trouble: str | None = None
        """Why the control group was given up."""
        # The others are to find it here before they are woken.
        self._write(self._host.now_ns(), processors.usage())

    # -- settings ---------------------------------------------------------------------------

    @property
    def share(self) -> Share:
        """What the guest has been given."""
        return self._share

    def set_share(self, share: Share) -> None:
        """Give it something else; everybody's governor takes notice at once."""
        with self._lock:
            self._share = share
            self._review_ns = 0
            self._write(self._host.now_ns(), self._processors.usage())
        self._table.announce()
        # Whoever asked is to see what it comes to.
        self.step(self._host.now_ns())

    @property
    def verdict(self) -> Verdict:
        """What it comes to at the moment."""
        return Verdict(self._engaged, self._due.rate, math.fsum(self._demands), self._capacity.part)

    @property
    def enforcement(self) -> str:
        """What holds the guest to its share: `none`, `loops`, `cgroup v1`, `cgroup v2`."""
        if not self._engaged:
            return "none"
        return self._group.kind if self._group is not None else "loops"

    # -- one step ---------------------------------------------------------------------------

    def step(self, now_ns: int) -> int | None:
        """Look, decide, enforce. Returns when to come again; None: when somebody announces something."""
        with self._lock:
            usage, generation = self._processors.usage(), self._table.generation
            if now_ns >= self._review_ns or generation != self._generation:
                self._generation = generation
                self._review(now_ns, usage)
            if not self._engaged:
                return None
            return self._review_ns if self._group is not None else self._settle(now_ns, usage)

    def _settle(self, now_ns: int, usage: Sequence[Usage]) -> int:
        """Enforcement by the run loops."""
        used_ns = sum(each.run_ns for each in usage)
        ledger, rate = self._ledger, self._due.rate
        was_open = ledger.is_open
        ledger.settle(
            elapsed_ns=now_ns - self._settled_ns, rate=min(rate, self._vcpus), used_ns=used_ns - self._settled_used_ns
        )
        self._settled_ns, self._settled_used_ns = now_ns, used_ns
        turn_ns = min(ledger.turns_in_ns(rate, speed=self._vcpus), IDLE_REVIEW_NS)
        if not ledger.is_open and rate < self._share.cap - TINY:
            turn_ns = min(turn_ns, BORROW_NS)
            self._borrow(was_open=was_open)
        if ledger.is_open != was_open:
            self._processors.unbar() if ledger.is_open else self._processors.bar()
            self._table.write_barred(is_barred=not ledger.is_open, lag_ns=ledger.lag_ns)
        return min(self._review_ns, now_ns + int(max(SHORTEST_NS, turn_ns)))

    def _borrow(self, *, was_open: bool) -> None:
        """Go on although ahead if the others, as they are at this moment, would leave one of its CPUs idle.

        Of those who wait, the least ahead begins; who runs goes on until another does.
        """
        mine, ahead = self._share.cpus or self._host.cpus(), -self._ledger.lag_ns / self._share.weight
        pressure, is_owed = 0.0, False
        for entry in self._table.look_at(self._rivals):
            if entry.share.cpus and not entry.share.cpus & mine:
                continue
            if not entry.is_barred:
                pressure += _as_measured(entry)
            elif _as_measured(entry) > IDLE_DEMAND:
                is_owed = True
                if not was_open and -entry.lag_ns / entry.share.weight < ahead:
                    return
        if pressure < len(mine) - SPARE_CPUS:
            self._ledger.borrow(is_owed=is_owed)

    def _review(self, now_ns: int, usage: Sequence[Usage]) -> None:
        self._measure(usage)
        self._write(now_ns, usage)
        entries = [*self._table.entries()]
        engaged = not self._share.is_default
        for entry in entries:
            if entry.slot != self._table.slot and not self._is_gone(entry, now_ns):
                engaged = engaged or not entry.share.is_default
        if engaged != self._engaged:
            self._engage(now_ns, usage) if engaged else self._disengage()
        if engaged:
            self._divide(now_ns, entries)
        busy = not self._ledger.is_open or math.fsum(self._demands) > IDLE_DEMAND
        # A kernel that was told weights needs no more than to be told new ones.
        self._review_ns = now_ns + (REVIEW_NS if busy and self._group is None else IDLE_REVIEW_NS)

    def _is_gone(self, entry: Entry, now_ns: int) -> bool:
        return now_ns - entry.written_ns > GONE_NS and self._table.forget_gone(entry)

    def _measure(self, usage: Sequence[Usage]) -> None:
        if len(self._before) == len(usage):
            for number, (before, after) in enumerate(zip(self._before, usage, strict=True)):
                if (wanted := after.demand_since(before)) is not None:
                    self._demands[number] = max(wanted, self._demands[number] * MEMORY)
        self._before = usage

    def _write(self, now_ns: int, usage: Sequence[Usage]) -> None:
        demand = min(self._vcpus, math.fsum(self._demands) * HEADROOM + HEADROOM_CPUS)
        used_ns = sum(each.run_ns for each in usage)
        self._table.write(self._share, vcpus=self._vcpus, demand=demand, used_ns=used_ns, written_ns=now_ns,
                          is_barred=not self._ledger.is_open, lag_ns=self._ledger.lag_ns,
        )  # fmt: skip

    def _engage(self, now_ns: int, usage: Sequence[Usage]) -> None:
        self._engaged = True
        self._capacity = Capacity()
        self._ledger = Ledger(self._vcpus)
        self._settled_ns, self._settled_used_ns = now_ns, sum(each.run_ns for each in usage)
        self._by_group(lambda group: group.join())

    def _disengage(self) -> None:
        self._engaged = False
        self._due = Due(math.inf, math.inf)
        self._ledger = Ledger(self._vcpus)
        self._processors.unbar()
        self._table.write_barred(is_barred=False, lag_ns=0.0)
        self._by_group(lambda group: group.relax())

    def _divide(self, now_ns: int, entries: Sequence[Entry]) -> None:
        """What this guest is due, by everybody's claims."""
        others = [entry for entry in entries if entry.slot != self._table.slot]
        awake = [entry for entry in others if now_ns - entry.written_ns <= STALE_NS]
        # It may want all of its vCPUs at the next moment; of the others it knows what they wanted at the last.
        own = Entry(self._table.slot or 0, 0, self._share, self._vcpus, self._vcpus, 0, now_ns).claim()
        self._rivals = [entry.slot for entry in awake]
        claims = [own, *(entry.claim() for entry in awake)]
        usable = self._host.cpus()
        if self._capacity.is_due(now_ns):
            where = usable if any(not claim.cpus for claim in claims) else _union(claims) & usable
            self._capacity.look(now_ns, idle_ns=self._host.idle_ns(), entries=entries, cpus=where)
        everywhere = usable | _union(claims)
        dues = fair_rates(claims, dict.fromkeys(everywhere, self._capacity.part))
        self._due = dues[0]
        if _is_by_weight(own, dues[0]):
            lags = [(own.weight, self._ledger.lag_ns)]
            lags += [
                (claim.weight, entry.lag_ns)
                for entry, claim, due in zip(awake, claims[1:], dues[1:], strict=True)
                if due.level == dues[0].level and _is_by_weight(claim, due)
            ]
            self._ledger.shift(drift(own.weight, lags))
        weights = sum(claim.weight for claim in claims if claim.demand > IDLE_DEMAND + HEADROOM_CPUS)
        self._by_group(lambda group: group.apply(self._share, self._due, weights=weights))

    def _by_group(self, do: Callable[[Group], None]) -> None:
        """Have the control group do it; one that does not is given up for good."""
        if self._group is None:
            return
        try:
            do(self._group)
        except (OSError, OstlerError) as error:
            self.trouble = f"control group {self._group.path}: {error}; the run loops enforce this guest's share"
            group, self._group = self._group, None
            with contextlib.suppress(OSError, OstlerError):
                group.leave()

    def let_in(self) -> None:
        """Nobody looks any more: the guest goes as it likes."""
        self._processors.unbar()

    def leave(self) -> None:
        """The guest has ended: give slot and control group back, and tell the others where that matters to them."""
        with self._lock:
            self._by_group(lambda group: group.leave())
            mattered = not self._share.is_default
            self._table.release()
        if mattered:
            self._table.announce()


def _union(claims: Sequence[Claim]) -> frozenset[int]:
    return frozenset[int]().union(*(claim.cpus for claim in claims))


def _is_by_weight(claim: Claim, due: Due) -> bool:
    """Whether it is virtual time that sets the rate, and neither limit nor reservation."""
    return math.isfinite(due.level) and abs(due.rate - claim.weight * due.level) <= TINY


def _as_measured(entry: Entry) -> float:
    """What it wants, without the headroom it is given beyond that."""
    return max(0.0, (entry.demand - HEADROOM_CPUS) / HEADROOM) if entry.demand < entry.vcpus else entry.demand


class GovernorThread:
    """Runs a governor until it is closed."""

    def __init__(self, governor: Governor, table: Table) -> None:
        self._governor = governor
        self._table = table
        self._stopping = False
        self._thread = threading.Thread(target=self._main, name="governor", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def _main(self) -> None:
        try:
            while not self._stopping:
                # Before the step: what is announced during it is not slept over.
                generation = self._table.generation
                next_ns = self._governor.step(time.monotonic_ns())
                if not self._stopping:
                    limit_ns = None if next_ns is None else next_ns - time.monotonic_ns()
                    self._table.wait(generation, timeout_ns=limit_ns)
        finally:
            # However this ends, no guest stays locked out for want of anybody to let it in.
            self._governor.let_in()

    def close(self) -> None:
        """Stop, and give everything back."""
        self._stopping = True
        if self._thread.is_alive():
            self._table.announce()
            self._thread.join()
        self._governor.leave()
        self._table.close()
