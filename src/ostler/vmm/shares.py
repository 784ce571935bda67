"""A guest's share of the host's processors, in its VM process: what was asked for, and what enforces it.

OSTLER_SHARES says by what: `auto` (a control group where the host gives one, else the run loops), `cgroup`, `loops`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ostler.control import runtime
from ostler.control.wire import Message
from ostler.errors import BadRequest, OstlerError
from ostler.host.threads import pin, usable_cpus
from ostler.sched.governor import Governor, GovernorThread
from ostler.sched.groups import Group, find_group
from ostler.sched.table import NAME, Share, Table
from ostler.sched.usage import Usage
from ostler.vmm.processors import Processor

if TYPE_CHECKING:
    from ostler.config.schedule import Schedule

WAYS = ("auto", "cgroup", "loops")
PERCENT = 100


class AllProcessors:
    """Implements `sched.governor.Processors` for a guest's."""

    def __init__(self, processors: Sequence[Processor]) -> None:
        self._processors = processors

    def usage(self) -> Sequence[Usage]:
        return [each.usage() for each in self._processors]

    def bar(self) -> None:
        for each in self._processors:
            each.bar()

    def unbar(self) -> None:
        for each in self._processors:
            each.unbar()

    def thread_ids(self) -> Sequence[int]:
        """The kernel's numbers of their threads."""
        return [each.thread_id for each in self._processors if each.thread_id is not None]


class ProcessorShares:
    """From `start`, when the processors' threads are there, to `close`. A guest is never refused for want of a share:
    what cannot be had is reported."""

    def __init__(
        self, processors: Sequence[Processor], schedule: Schedule, *, name: str, report: Callable[[str, str], None]
    ) -> None:
        self._all = AllProcessors(processors)
        self._vcpus = len(processors)
        self._name = name
        self._report = report
        self._governor: Governor | None = None
        self._thread: GovernorThread | None = None
        self.schedule = schedule

    def rename(self, name: str) -> None:
        """Be known by that name; before `start`."""
        self._name = name

    def start(self) -> None:
        """Take part; the processors run."""
        self._pin(self.schedule)
        table = None
        try:
            root = runtime.root()
            table = Table(root / NAME)
            if not table.claim():
                raise BadRequest("all slots are taken")
            governor = Governor(
                self._all, table, share=share_of(self.schedule), vcpus=self._vcpus, group=self._group(root)
            )
        except (OSError, OstlerError) as error:
            if table is not None:
                table.close()
            self._report("shares", f"{error}; this guest runs without weight, cap and reservation")
            return
        self._governor, self._thread = governor, GovernorThread(governor, table)
        self._thread.start()
        if not governor.share.is_default:
            table.announce()

    def _group(self, root: Path) -> Group | None:
        way = os.environ.get("OSTLER_SHARES", "auto")
        if way not in WAYS:
            raise BadRequest(f"OSTLER_SHARES {way!r}: expected one of {', '.join(WAYS)}")
        if way == "loops":
            return None
        found = find_group(f"{self._name}-{os.getpid()}", root, self._all.thread_ids)
        if found is None and way == "cgroup":
            self._report("shares", "no control group with a CPU controller is this user's; the run loops do it")
        return found

    def change(self, schedule: Schedule) -> None:
        """Give the guest another share. Raises BadRequest for one that cannot be had."""
        if schedule.reserve > PERCENT * self._vcpus:
            raise BadRequest(
                f"reserve {schedule.reserve:g}: expected at most {PERCENT} percent for each of {self._vcpus} vCPUs"
            )
        from ostler.config.schedule import format_cpus

        if schedule.pin is not None and (missing := sorted(set(schedule.pin) - usable_cpus())):
            raise BadRequest(f"pin {missing[0]}: expected host CPUs of {format_cpus(usable_cpus())}")
        if self._governor is None and not share_of(schedule).is_default:
            raise BadRequest("shares: this guest runs without them, as its log says; it can be pinned only")
        if schedule.pin != self.schedule.pin:
            self._pin(schedule)
        self.schedule = schedule
        if self._governor is not None:
            self._governor.set_share(share_of(schedule))

    def _pin(self, schedule: Schedule) -> None:
        if schedule.pin is None and self.schedule.pin is None:
            return
        wanted = schedule.pin or usable_cpus()
        if not all(pin(tid, wanted) for tid in self._all.thread_ids()):
            self._report("shares", f"host CPUs {sorted(wanted)}: not to be had here; the guest runs on any")

    def facts(self) -> Message:
        """Settings, and what they come to: rates and demand in percent of one host CPU."""
        governor = self._governor
        found: Message = {**self.schedule.model_dump(), "enforcement": governor.enforcement if governor else "none"}
        if governor is not None:
            verdict = governor.verdict
            found["demand"] = round(verdict.demand * PERCENT, 1)
            found["due"] = None if math.isinf(verdict.rate) else round(verdict.rate * PERCENT, 1)
            if governor.trouble:
                found["trouble"] = governor.trouble
        return found

    def usage(self) -> Sequence[Usage]:
        """Of each processor."""
        return self._all.usage()

    def close(self) -> None:
        """Take part no more; before the processors' threads are waited for."""
        if self._thread is not None:
            self._thread.close()
            self._thread = self._governor = None
        self._all.unbar()


def share_of(schedule: Schedule) -> Share:
    """In CPUs."""
    return Share(
        weight=schedule.weight,
        cap=math.inf if schedule.cap is None else schedule.cap / PERCENT,
        reserve=schedule.reserve / PERCENT,
        cpus=frozenset(schedule.pin or ()),
    )
