"""A host whose processors and clock are arithmetic: guests' governors without guests, and without waiting.

Time goes in steps of a millisecond. In each, host CPUs are divided among the virtual processors that want to run and
may, evenly, as a kernel does that knows nothing of guests. Everything above that is the real thing: table, ledger,
policy, governor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ostler.sched.governor import Governor, HostView
from ostler.sched.policy import NS_PER_MS, Claim, fair_rates
from ostler.sched.table import Share, Table
from ostler.sched.usage import Usage

Wants = Callable[[int], float]
"""At a time in ms: the part of the time its virtual processors want to run."""


def always(_ms: int) -> float:
    """A guest that is never satisfied."""
    return 1.0


class SimulatedGuest:
    """Implements `sched.governor.Processors`."""

    def __init__(self, vcpus: int, wants: Wants, cpus: frozenset[int]) -> None:
        self.vcpus, self.wants, self.cpus = vcpus, wants, cpus
        self.is_barred = False
        self.times = [[0, 0, 0] for _ in range(vcpus)]  # run, delay, barred
        self.wall_ns = 0
        self.governor: Governor
        self.next_ns: int | None = 0

    @property
    def run_ns(self) -> int:
        """All it had."""
        return sum(run for run, _, _ in self.times)

    def usage(self) -> Sequence[Usage]:
        return [Usage(self.wall_ns, run, delay, barred) for run, delay, barred in self.times]

    def bar(self) -> None:
        self.is_barred = True

    def unbar(self) -> None:
        self.is_barred = False

    def spend(self, step_ns: int, ms: int, part: float) -> None:
        """A step of which each virtual processor gets `part` of a host CPU."""
        self.wall_ns += step_ns
        wanted = self.wants(ms)
        for times in self.times:
            if self.is_barred:
                times[2] += step_ns
            else:
                times[0] += int(step_ns * part)
                times[1] += int(step_ns * max(0.0, wanted - part))


class SimulatedHost:
    """Its guests and its time."""

    def __init__(self, folder: Path, cpus: int, *, others: float = 0.0) -> None:
        """`others` is the part of each CPU that programs take which are no guests, and which come first."""
        self._path = folder / "shares.table"
        self.cpus = frozenset(range(cpus))
        self.others = others
        self.now_ns = 10**9
        self.idle_ns = dict.fromkeys(range(cpus), 0)
        self.guests: list[SimulatedGuest] = []
        self._tables: list[Table] = []

    def add(self, share: Share, *, vcpus: int = 1, wants: Wants = always) -> SimulatedGuest:
        """Start a guest."""
        guest, table = SimulatedGuest(vcpus, wants, share.cpus), Table(self._path)
        table.claim()
        host = HostView(cpus=lambda: self.cpus, idle_ns=lambda: dict(self.idle_ns), now_ns=lambda: self.now_ns)
        guest.governor = Governor(guest, table, share=share, vcpus=vcpus, host=host)
        self.guests.append(guest)
        self._tables.append(table)
        self.wake_all()
        return guest

    def kill(self, guest: SimulatedGuest) -> None:
        """Its process goes without a word."""
        number = self.guests.index(guest)
        del self.guests[number]
        # The kernel lets go of the slot's lock; what is written in it stays.
        table = self._tables.pop(number)
        table.slot = None
        table.close()

    def wake_all(self) -> None:
        """What `Table.announce` does."""
        for guest in self.guests:
            guest.next_ns = self.now_ns

    def run(self, ms: int, *, step_ms: int = 1) -> list[float]:
        """Go on for so long; the CPUs each guest had on average."""
        before = [guest.run_ns for guest in self.guests]
        for at in range(0, ms, step_ms):
            for guest in self.guests:
                if guest.next_ns is not None and guest.next_ns <= self.now_ns:
                    guest.next_ns = guest.governor.step(self.now_ns)
            self._step(step_ms * NS_PER_MS, at)
        return [
            (guest.run_ns - had) / (ms * NS_PER_MS) for guest, had in zip(self.guests, before, strict=True)
        ]  # fmt: skip

    def _step(self, step_ns: int, ms: int) -> None:
        wanted = [0.0 if guest.is_barred else guest.vcpus * guest.wants(ms) for guest in self.guests]
        # The kernel's own fairness is by thread: a guest weighs as much as it has threads that want to run.
        claims = [
            Claim(want, weight=guest.vcpus, cpus=guest.cpus) for want, guest in zip(wanted, self.guests, strict=True)
        ]
        free = dict.fromkeys(self.cpus, 1.0 - self.others)
        rates = [due.rate for due in fair_rates(claims, free)]
        for guest, rate in zip(self.guests, rates, strict=True):
            guest.spend(step_ns, ms, rate / guest.vcpus)
        # Where exactly the idle time is does not matter to anybody here but by its sum.
        idle = int((sum(free.values()) - sum(rates)) * step_ns / len(self.cpus))
        self.idle_ns = {cpu: had + idle for cpu, had in self.idle_ns.items()}
        self.now_ns += step_ns

    def close(self) -> None:
        """Give the table back."""
        for table in self._tables:
            table.close()
