"""Where the time of a virtual processor has gone: running, waiting, halted.

    wall = run + wait + halt + held        wait = delay + barred

Run is the processor time of its thread by the kernel's clock, in the guest and serving the guest's exits. Delay is
runnable without a host CPU (other programs, a control group's limit), barred is kept out of the guest because it was
others' turn. Held is paused on purpose. Halt is what is left: halted by the guest, or asleep in an exit.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one virtual processor, since it began, in nanoseconds."""

    wall_ns: int
    run_ns: int
    delay_ns: int | None
    """None where the kernel does not say; then it is in `halt_ns`."""
    barred_ns: int = 0
    held_ns: int = 0

    @property
    def wait_ns(self) -> int:
        """Wanted to run and did not."""
        return (self.delay_ns or 0) + self.barred_ns

    @property
    def halt_ns(self) -> int:
        """Did not want to run. The clocks are read one after the other, hence the bound."""
        return max(0, self.wall_ns - self.run_ns - self.wait_ns - self.held_ns)

    def demand_since(self, before: Usage) -> float | None:
        """The part of the time since then, when it was free to run, in which it wanted to: 0 to 1.

        None where it was not free for long enough to tell.
        """
        free_ns = self.wall_ns - before.wall_ns - (self.barred_ns - before.barred_ns) - (self.held_ns - before.held_ns)
        if free_ns < MIN_FREE_NS:
            return None
        ran_ns = self.run_ns - before.run_ns
        if self.delay_ns is None or before.delay_ns is None:
            # Whoever runs at all may have waited for the rest of the time.
            return 1.0 if ran_ns > free_ns * SOME else ran_ns / free_ns
        wanted_ns = ran_ns + self.delay_ns - before.delay_ns
        return min(1.0, max(0.0, wanted_ns / free_ns))

    def as_message(self) -> dict[str, int]:
        """As the control protocol has it."""
        return {"run_ns": self.run_ns, "wait_ns": self.wait_ns, "halt_ns": self.halt_ns, "held_ns": self.held_ns,
                "wall_ns": self.wall_ns}  # fmt: skip


MIN_FREE_NS = 2_000_000
SOME = 0.05
