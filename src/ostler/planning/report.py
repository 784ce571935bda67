"""A plan as plain data: what `ostler plan --json` prints and every other presentation is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ostler.planning.estate import Dimension, Estate, Placement, dimensions, hosts_used
from ostler.planning.savings import Savings, savings
from ostler.planning.solve import Outcome, Solution
from ostler.planning.steps import Step, ordered

FORMAT = "ostler-plan-1"


@dataclass(frozen=True, slots=True)
class HostLoad:
    """One host, today and in the plan: shares of what it has below its headroom, 0 to 1."""

    name: str
    on_before: bool
    on_after: bool
    guests_before: int
    guests_after: int
    before: dict[str, float]
    after: dict[str, float]


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer."""

    estate: Estate
    solution: Solution
    steps: list[Step]
    hosts: list[HostLoad]
    savings: Savings

    @property
    def sent_bytes(self) -> int:
        """What all steps send, detours included."""
        return sum(step.sent_bytes for step in self.steps)

    @property
    def move_s(self) -> float:
        """How long that takes, one after another at the assumed rate."""
        return self.sent_bytes * 8 / self.estate.assumptions.move_bits_per_s


def make_plan(estate: Estate, solution: Solution) -> Plan:
    """Everything that follows from a placement."""
    sizes = dimensions(estate)
    used_before = hosts_used(estate.today())
    used_after = hosts_used(solution.placement)
    before, after = _shares(sizes, estate.today()), _shares(sizes, solution.placement)
    count_before, count_after = _counts(estate.today()), _counts(solution.placement)
    hosts = [
        HostLoad(
            name=host.name,
            on_before=host.on or host.name in used_before,
            on_after=host.name in used_after,
            guests_before=count_before.get(host.name, 0),
            guests_after=count_after.get(host.name, 0),
            before=before[host.name],
            after=after[host.name],
        )
        for host in estate.hosts
    ]
    steps = ordered(estate, solution.placement)
    return Plan(estate, solution, steps, hosts, savings(estate, solution.placement))


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan for programs; docs/planning.md says what the fields mean."""
    solution, saved = plan.solution, plan.savings
    return {
        "format": FORMAT,
        "goal": solution.goal,
        "hosts_before": saved.before.hosts_on,
        "hosts_after": saved.after.hosts_on,
        "search": {
            "goal": _outcome(solution.first),
            "moves": _outcome(solution.second),
            "elapsed_s": round(solution.elapsed_s, 3),
            "interrupted": solution.interrupted,
        },
        "hosts": [
            {**asdict(host), "before": _rounded(host.before), "after": _rounded(host.after)} for host in plan.hosts
        ],
        "steps": [
            {"kind": step.kind, "guest": step.guest.name, "from": step.source, "to": step.target,
             "sent_bytes": step.sent_bytes}
            for step in plan.steps
        ],
        "sent_bytes": plan.sent_bytes,
        "move_s": round(plan.move_s, 1),
        "placement": dict(sorted(solution.placement.items())),
        "power": {
            "before_w": round(saved.before.total_w, 1),
            "after_w": round(saved.after.total_w, 1),
            "servers_before_w": round(saved.before.servers_w, 1),
            "servers_after_w": round(saved.after.servers_w, 1),
        },
        "saved_per_year": {
            "servers_kwh": round(saved.servers_kwh, 1),
            "cooling_kwh": round(saved.cooling_kwh, 1),
            "total_kwh": round(saved.total_kwh, 1),
            "money": round(saved.money, 2),
            "currency": plan.estate.assumptions.currency,
            "co2_kg": round(saved.co2_kg, 1),
        },
        "assumptions": asdict(plan.estate.assumptions),
    }  # fmt: skip


def _shares(sizes: Sequence[Dimension], placement: Placement) -> dict[str, dict[str, float]]:
    hosts = {host for each in sizes for host in each.has}
    found: dict[str, dict[str, float]] = {host: {} for host in hosts}
    for each in sizes:
        used = dict.fromkeys(each.has, 0)
        for guest, host in placement.items():
            if host in used:
                used[host] += each.needs[guest]
        for host, has in each.has.items():
            found[host][each.name] = used[host] / has if has else 0.0
    return found


def _counts(placement: Placement) -> dict[str, int]:
    found: dict[str, int] = {}
    for host in placement.values():
        found[host] = found.get(host, 0) + 1
    return found


def _outcome(outcome: Outcome) -> dict[str, Any]:
    return {"value": outcome.value, "bound": outcome.bound, "optimal": outcome.is_optimal,
            "gap": round(outcome.gap, 4)}  # fmt: skip


def _rounded(shares: dict[str, float]) -> dict[str, float]:
    return {name: round(share, 4) for name, share in shares.items()}
