"""Guests that compete for the host's processors: whether each gets its share, by run loops and by control groups.

    python -m benches.sched [--by loops,cgroup] [--accel soft] [--seconds 30] [--only weights-1,…] [--json FILE]

The guests are programs of a few instructions that never rest. What a guest had is the processor time of its vCPUs'
threads, read from the kernel by this process and not taken from what the guest's process says; that is compared too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from benches.report import note
from rich.console import Console
from rich.table import Table

from ostler.client import guests
from ostler.config import parse_guest
from ostler.control import launch
from ostler.control.launch import Launched
from ostler.host.threads import usable_cpus
from ostler.sched.policy import Claim, fair_rates
from ostler.sched.table import Share
from ostler.testing import kernels
from ostler.testing.simulated_host import SimulatedHost
from ostler.testing.simulated_policy import simulate

# 32-bit: a loop at 0x8000, INIT and SIPI to every other processor, which begin there, and a loop.
SPIN = bytes.fromhex(
    "66c70500800000ebfe c705f000e0feff010000 c7050003e0fe00450c00 c7050003e0fe08460c00 ebfe".replace(" ", "")
)
SETTLE_S = 3.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """A guest and what it is to get, in CPUs; `within` is relative unless it `is_points`, percent of a CPU."""

    name: str
    part: float
    within: float
    is_points: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def is_met(self, got: float) -> bool:
        """Whether that is near enough."""
        return abs(got - self.part) <= (self.within / 100 if self.is_points else self.part * self.within / 100)


@dataclass(frozen=True, slots=True)
class Scenario:
    """Guests at the same time. Shares are of what all of them had together, unless they are of a CPU."""

    name: str
    guests: tuple[Wanted, ...]
    of_cpu: bool = False
    cpus: int = 1
    """Host CPUs that they use."""


@dataclass(slots=True)
class Result:
    """What came of it."""

    scenario: str
    by: str
    accel: str
    seconds: float
    rows: list[dict[str, Any]]
    used_cpus: float
    """Host CPUs' worth of time that vCPUs had."""
    overhead_percent: float
    """Of a CPU: all other threads of all VM processes."""
    accounting_percent: float
    """Largest difference between a guest's own account and the kernel's, and between wall time and its parts."""


def scenarios(cpus: int) -> list[Scenario]:
    """For a host with so many CPUs."""
    weights = [(100, 1 / 7), (200, 2 / 7), (400, 4 / 7)]

    def by_weight(places: int) -> tuple[Wanted, ...]:
        return tuple(
            Wanted(f"w{weight}", part, 5, options={"cpu_weight": weight, "cpus": places}) for weight, part in weights
        )

    greedy = tuple(Wanted(f"greedy{number}", 0.07, 100) for number in range(10))
    found = [
        Scenario("weights-1", by_weight(1)),
        Scenario("cap", (Wanted("capped", 0.25, 2, True, {"cpu_cap": 25}), Wanted("free", 0.75, 100)), of_cpu=True),
        Scenario("cap-alone", (Wanted("capped", 0.25, 2, True, {"cpu_cap": 25}),), of_cpu=True),
        Scenario("reserve", (Wanted("reserved", 0.30, 2, True, {"cpu_reserve": 30}), *greedy), of_cpu=True),
    ]
    if cpus > 1:
        found.insert(1, Scenario("weights-2", by_weight(2), cpus=2))
        one_each = tuple(
            Wanted(f"w{weight}", part, 5, options={"cpu_weight": weight})
            for weight, part in ((100, 1 / 6), (200, 1 / 3), (400, 1 / 2))
        )
        found.insert(2, Scenario("weights-2-one-vcpu", one_each, cpus=2))
    return found


@contextmanager
def running(scenario: Scenario, kernel: Path, accel: str) -> Iterator[list[Launched]]:
    """Its guests, started."""
    pin = sorted(usable_cpus())[: scenario.cpus]
    made: list[Launched] = []
    try:
        for wanted in scenario.guests:
            spec = parse_guest(kernel=kernel, memory="64M", accel=accel, cpu_pin=pin, **wanted.options)
            facts = {"remove": True}
            name = f"bench-{wanted.name}-{os.getpid()}"
            made.append(launch.launch(name, spec.model_dump_json(), facts=facts, leash=True))
        yield made
    finally:
        for each in made:
            guests.kill(each.entry)


def vcpu_threads(launched: Launched) -> list[int]:
    """The threads that run the guest."""
    return [vcpu["thread_id"] for vcpu in guests.request(launched.entry, "stats")["vcpus"]]


def thread_ns(pid: int, tid: int) -> int:
    """Processor time of a thread, by the scheduler's own count."""
    return int(Path(f"/proc/{pid}/task/{tid}/schedstat").read_text().split()[0])


def process_ns(pid: int) -> int:
    """Of all threads of a process."""
    return sum(thread_ns(pid, int(each.name)) for each in Path(f"/proc/{pid}/task").iterdir())


def measure(scenario: Scenario, kernel: Path, *, by: str, accel: str, seconds: float) -> Result:
    """Run it once."""
    os.environ["OSTLER_SHARES"] = by
    with running(scenario, kernel, accel) as made:
        time.sleep(SETTLE_S)
        threads = [(each.process.pid, vcpu_threads(each)) for each in made]
        first = [look(each, pid, tids) for each, (pid, tids) in zip(made, threads, strict=True)]
        began = time.monotonic()
        time.sleep(seconds)
        last = [look(each, pid, tids) for each, (pid, tids) in zip(made, threads, strict=True)]
        took_s = time.monotonic() - began
        enforced = {guests.schedule(each.entry)["enforcement"] for each in made}
    had = [(after["threads"] - before["threads"]) / 1e9 / took_s for before, after in zip(first, last, strict=True)]
    whole = 1.0 if scenario.of_cpu else sum(had)
    rows = [
        {"guest": wanted.name, "wanted": wanted.part, "got": got / whole, "within": wanted.within,
         "points": wanted.is_points, "met": wanted.is_met(got / whole)}
        for wanted, got in zip(scenario.guests, had, strict=True)
    ]  # fmt: skip
    other = sum(
        after["process"] - before["process"] - after["threads"] + before["threads"]
        for before, after in zip(first, last, strict=True)
    )
    return Result(
        scenario.name, " ".join(sorted(enforced)), accel, took_s, rows, sum(had), other / 1e7 / took_s,
        max(account_error(before, after) for before, after in zip(first, last, strict=True)),
    )  # fmt: skip


def look(launched: Launched, pid: int, tids: Sequence[int]) -> dict[str, int]:
    """One guest's clocks, the kernel's first."""
    before = sum(thread_ns(pid, tid) for tid in tids)
    vcpus = guests.request(launched.entry, "stats")["vcpus"]
    after = sum(thread_ns(pid, tid) for tid in tids)
    told = {key: sum(vcpu[key] for vcpu in vcpus) for key in ("run_ns", "wait_ns", "halt_ns", "held_ns", "wall_ns")}
    return {"threads": (before + after) // 2, "process": process_ns(pid), **told}


def account_error(before: dict[str, int], after: dict[str, int]) -> float:
    """Percent."""
    spent = {key: after[key] - before[key] for key in before}
    by_kernel = abs(spent["run_ns"] - spent["threads"]) / max(spent["threads"], 1)
    parts = spent["run_ns"] + spent["wait_ns"] + spent["halt_ns"] + spent["held_ns"]
    return 100 * max(by_kernel, abs(parts - spent["wall_ns"]) / max(spent["wall_ns"], 1))


def timed(do: Callable[[], object], *, runs: int) -> float:
    """Median time of a call, in µs."""
    taken = []
    for _ in range(runs):
        began = time.perf_counter_ns()
        do()
        taken.append((time.perf_counter_ns() - began) / 1000)
    return statistics.median(taken)


def decisions() -> list[tuple[str, float]]:
    """What a decision costs, in µs of this host's time."""
    random, found = Random(7), []
    for count in (3, 10, 100, 1_000, 10_000):
        claims = [Claim(1.0, random.randint(1, 10_000)) for _ in range(count)]
        host = dict.fromkeys(range(max(1, count // 10)), 1.0)
        runs = 5 if count >= 10_000 else 50
        found.append((f"division among {count} vCPUs", timed(lambda c=claims, h=host: fair_rates(c, h), runs=runs)))  # type: ignore[misc]
    claims = [Claim(1.0, random.choice((50, 100, 200, 400))) for _ in range(10_000)]
    due = [each.rate for each in fair_rates(claims, dict.fromkeys(range(1_000), 1.0))]
    had = simulate(claims, 1_000, steps=500)
    worst = max(abs(got - wanted) / wanted for got, wanted in zip(had, due, strict=True))
    print(f"10,000 vCPUs on 1,000 CPUs, simulated for 5 s: {sum(had) / 10:.2f} % of the host used, "
          f"worst share {100 * worst:.1f} % off")  # fmt: skip
    for count in (3, 11):
        with tempfile.TemporaryDirectory() as folder:
            host_of = SimulatedHost(Path(folder), 1)
            for _ in range(count):
                host_of.add(Share(200))
            host_of.run(500)
            governor = host_of.guests[0].governor

            def step(governor: Any = governor, host_of: SimulatedHost = host_of) -> None:
                host_of.now_ns += 100_000_000
                governor.step(host_of.now_ns)

            found.append((f"a governor's whole step, {count} guests", timed(step, runs=50)))
            host_of.close()
    return found


def show(results: Sequence[Result]) -> None:
    """A table of what was wanted and what came of it."""
    drawn = Table(title="shares of the vCPUs' processor time", title_justify="left")
    for heading in ("scenario", "by", "guest", "wanted", "got", "off", "bar", ""):
        drawn.add_column(heading, justify="left" if heading in ("scenario", "by", "guest") else "right")
    for result in results:
        for row in result.rows:
            points = (row["got"] - row["wanted"]) * 100
            off = f"{points:+.2f} points" if row["points"] else f"{points / row['wanted']:+.1f} %"
            bar = f"{row['within']:g} {'points' if row['points'] else '%'}" if row["within"] < 100 else "-"
            drawn.add_row(
                result.scenario, result.by, row["guest"], f"{row['wanted']:.4f}", f"{row['got']:.4f}", off, bar,
                ("met" if row["met"] else "MISSED") if bar != "-" else "",
            )  # fmt: skip
        drawn.add_row(
            "", "", "all", "", f"{result.used_cpus:.3f} CPUs", f"{result.overhead_percent:.1f} % beside",
            f"accounts within {result.accounting_percent:.2f} %", "met" if result.accounting_percent <= 1 else "MISSED",
            end_section=True,
        )  # fmt: skip
    Console(width=130).print(drawn)


def main() -> int:
    """The bench; 0 where every bar is met."""
    arguments = argparse.ArgumentParser(prog="python -m benches.sched", description=__doc__.splitlines()[0])
    arguments.add_argument("--by", default="loops,cgroup")
    arguments.add_argument("--accel", default="soft")
    arguments.add_argument("--seconds", type=float, default=30)
    arguments.add_argument("--only", default="")
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args()
    results: list[Result] = []
    only = [each for each in given.only.split(",") if each]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        kernel = folder / "spin"
        kernel.write_bytes(kernels.elf64(SPIN + b"\xf4" * 30, note=kernels.xen_note(0x10_0000)))
        for by in given.by.split(","):
            for scenario in scenarios(len(usable_cpus())):
                if not only or scenario.name in only:
                    note(f"{scenario.name} by {by}, {given.seconds:g} s")
                    results.append(measure(scenario, kernel, by=by, accel=given.accel, seconds=given.seconds))
    show(results)
    costs = decisions() if not only or "decisions" in only else []
    for what, cost_us in costs:
        print(f"{what}: {cost_us:.0f} µs")
    if given.json:
        given.json.write_text(json.dumps({"results": [asdict(each) for each in results], "decisions_us": costs}))
    met = all(row["met"] for each in results for row in each.rows) and all(
        each.accounting_percent <= 1 for each in results
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
