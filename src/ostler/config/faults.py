"""What a guest's owner wants when something goes wrong: one policy for each fault; docs/faults.md."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from pydantic import AfterValidator

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
    Fault.MEMORY_ERROR: (*ENDS, "ignore"),
}


def default(fault: Fault) -> str:
    """What happens if nobody says."""
    return POLICIES[fault][0]


def checked(fault: Fault, value: object) -> str:
    """The policy, if it is one of that fault's. Raises BadRequest."""
    if value not in POLICIES[fault]:
        raise BadRequest(f"policy {value!r} of {fault.value}: expected one of {', '.join(POLICIES[fault])}")
    return str(value)


def _among(fault: Fault) -> AfterValidator:
    choices = POLICIES[fault]

    def judge(value: str) -> str:
        if value not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}")
        return value

    return AfterValidator(judge)


OnPanic = Annotated[str, _among(Fault.PANIC)]
OnTripleFault = Annotated[str, _among(Fault.TRIPLE_FAULT)]
OnHang = Annotated[str, _among(Fault.HANG)]
OnDiskError = Annotated[str, _among(Fault.DISK_ERROR)]
OnNoSpace = Annotated[str, _among(Fault.NO_SPACE)]
OnBackendLost = Annotated[str, _among(Fault.BACKEND_LOST)]
OnMemoryError = Annotated[str, _among(Fault.MEMORY_ERROR)]
FIELDS = tuple(f"on_{fault.name.lower()}" for fault in POLICIES)
