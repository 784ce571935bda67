"""What a guest gets for which nobody says more, and the names of what can go wrong with it: without any library.

The short way of the command line and a VM process load this and no more of `ostler.config`; `treatment.py` judges the
same fields where somebody did say something. docs/faults.md, docs/scheduling.md and docs/hypercalls.md say what they
mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ostler.errors import BadRequest


class Fault(Enum):
    """What can go wrong, by the names that users and events have for it."""

    PANIC = "panic"
    TRIPLE_FAULT = "triple-fault"
    HANG = "hang"
    DISK_ERROR = "disk-error"
    NO_SPACE = "no-space"
    BACKEND_LOST = "backend-lost"
    MEMORY_ERROR = "memory-error"


ENDS = ("poweroff", "reset", "pause")
# The first of each is what a guest gets that asks for nothing.
POLICIES: dict[Fault, tuple[str, ...]] = {
    Fault.PANIC: (*ENDS, "ignore"),
    Fault.TRIPLE_FAULT: ENDS,
    Fault.HANG: (*ENDS, "ignore"),
    Fault.DISK_ERROR: ("report", "pause", "poweroff"),
    Fault.NO_SPACE: ("pause", "report", "poweroff"),
    Fault.BACKEND_LOST: ("report", "pause", "poweroff"),
    Fault.MEMORY_ERROR: (*ENDS, "ignore", "report"),
}
FIELDS = tuple(f"on_{fault.name.lower()}" for fault in POLICIES)
CALL_RIGHTS = ("log", "keys", "ready", "snapshot", "own")


def checked(fault: Fault, value: object) -> str:
    """The policy, if it is one of that fault's. Raises BadRequest."""
    if value not in POLICIES[fault]:
        raise BadRequest(f"policy {value!r} of {fault.value}: expected one of {', '.join(POLICIES[fault])}")
    return str(value)


@dataclass(frozen=True)
class PlainTreatment:
    """The fields of `ostler.config.treatment.Treatment`, as nobody has said anything of them."""

    cpu_weight: int = 100
    cpu_cap: float | None = None
    cpu_reserve: float = 0.0
    cpu_pin: tuple[int, ...] | None = None
    calls: tuple[str, ...] = ("log", "keys", "ready", "own")
    on_panic: str = POLICIES[Fault.PANIC][0]
    on_triple_fault: str = POLICIES[Fault.TRIPLE_FAULT][0]
    on_hang: str = POLICIES[Fault.HANG][0]
    on_disk_error: str = POLICIES[Fault.DISK_ERROR][0]
    on_no_space: str = POLICIES[Fault.NO_SPACE][0]
    on_backend_lost: str = POLICIES[Fault.BACKEND_LOST][0]
    on_memory_error: str = POLICIES[Fault.MEMORY_ERROR][0]
