"""Booting real guests from tests: the `ostler` command as a user runs it, and what its output must not contain."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

# A stock kernel at full loglevel must not have found fault with the machine, nor have chosen a mitigation that costs
# every system call a hundred instructions (see `ostler.accel.models`).
COMPLAINTS = re.compile(
    r"WARNING:|BUG:|Oops|Call Trace|general protection|segfault|soft lockup|rcu.*stall|self.?test.*FAIL"
    r"|Marking clocksource .* unstable|clocksource: .* unstable|lost interrupt|No irq handler|nobody cared"
    r"|unchecked MSR access|ACPI (BIOS )?(Error|Warning|Exception)|Firmware Bug|TSC warp|read-back delay"
    r"|blocked for more than|Spectre BHI mitigation: SW",
    re.IGNORECASE,
)
OSTLER = (sys.executable, "-m", "ostler")
Boot = Callable[..., "Run"]


@dataclass(frozen=True, slots=True)
class Run:
    """One finished `ostler run`."""

    status: int
    console: str
    log: str

    @property
    def complaints(self) -> list[str]:
        """Lines of the guest's log that say something is wrong with the machine."""
        return [line for line in self.console.splitlines() if COMPLAINTS.search(line)]
