"""Enforcement of shares by control groups, where the host lets this user have some with a CPU controller.

    <parent>/ostler-guests/            version 2: the VM processes
    <parent>/ostler-guests/<guest>     the threads of a guest's virtual processors: weight and limit

Only the virtual processors are in a guest's group: a share is one of their time, and a guest at its cap must not make
its own control socket slow. All guests of a user lie side by side, or their weights would not be comparable, so the
first says where (`shares.group` in the runtime folder).

Version 2 (Documentation/admin-guide/cgroup-v2.rst): the highest group above this process that is delegated to its user
and has the controller. Guests' groups are threaded ones. Version 1 (Documentation/scheduler/sched-bwc.rst): below this
process's own group in the hierarchy with `cpu`, which as a rule only root may write to.

Control groups have no reservations. They are weights again: a guest that is due more than its weight gives it gets
the weight that gives it what it is due.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ostler.sched.policy import DEFAULT_WEIGHT, Due
from ostler.sched.table import Share

FOLDER, PLACE_FILE = "ostler-guests", "shares.group"
PERIOD_US, LEAST_QUOTA_US = 100_000, 1_000
MIN_WEIGHT, MAX_WEIGHT = 1, 10_000
V1_SHARES_PER_WEIGHT, V1_MIN_SHARES, V1_MAX_SHARES = 1024 / DEFAULT_WEIGHT, 2, 1 << 18
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Kind:
    """How one version of control groups calls things."""

    name: str
    weight_file: str
    threads_file: str
    is_v2: bool

    def weight_text(self, weight: float) -> str:
        """A weight as the file wants it."""
        if self.is_v2:
            return str(round(min(max(weight, MIN_WEIGHT), MAX_WEIGHT)))
        return str(round(min(max(weight * V1_SHARES_PER_WEIGHT, V1_MIN_SHARES), V1_MAX_SHARES)))

    def write_cap(self, group: Path, cap: float) -> None:
        """Limit a group to so many CPUs."""
        quota = -1 if math.isinf(cap) else max(LEAST_QUOTA_US, round(cap * PERIOD_US))
        if self.is_v2:
            _write(group / "cpu.max", f"{'max' if quota < 0 else quota} {PERIOD_US}")
        else:
            _write(group / "cpu.cfs_period_us", str(PERIOD_US))
            _write(group / "cpu.cfs_quota_us", str(quota))


V2 = Kind("cgroup v2", "cpu.weight", "cgroup.threads", is_v2=True)
V1 = Kind("cgroup v1", "cpu.shares", "tasks", is_v2=False)


class Group:
    """The control group of one guest. Raises OSError from whatever the kernel refuses."""

    def __init__(self, kind: Kind, place: Path, name: str, home: Path, threads: Callable[[], Sequence[int]]) -> None:
        """`place` holds the guests' groups, `home` is where the process comes from; `threads` are the vCPUs'."""
        self._kind = kind
        self._place = place
        self._home = home
        self._threads = threads
        self.path = place / name
        self._written: tuple[str, float, str] | None = None

    @property
    def kind(self) -> str:
        """`cgroup v1` or `cgroup v2`."""
        return self._kind.name

    def join(self) -> None:
        """Make the group and move the vCPUs' threads into it."""
        if self._kind.is_v2:
            _write(self._place.parent / "cgroup.subtree_control", "+cpu")
        self._place.mkdir(exist_ok=True)
        if self._kind.is_v2:
            # Threads are only parted where the whole process is at home.
            _write(self._place / "cgroup.procs", str(os.getpid()))
        self._remove_empty()
        for attempt in range(_ATTEMPTS):
            try:
                self._move_in()
                return
            except FileNotFoundError:
                # Another guest has taken the new, empty group for one that was left behind.
                if attempt + 1 == _ATTEMPTS:
                    raise

    def _move_in(self) -> None:
        self.path.mkdir(exist_ok=True)
        if self._kind.is_v2:
            _write(self.path / "cgroup.type", "threaded")
            _write(self._place / "cgroup.subtree_control", "+cpu")
        for tid in self._threads():
            with contextlib.suppress(ProcessLookupError):
                _write(self.path / self._kind.threads_file, str(tid))
        self._written = None

    def apply(self, share: Share, due: Due, *, weights: int = DEFAULT_WEIGHT) -> None:
        """Let the kernel enforce it. `weights` is the sum of those of all guests who want something: together they have
        the weight of as many programs, not that of one."""
        weight, cap = self._kind.weight_text(effective_weight(share, due)), share.cap
        whole = self._kind.weight_text(max(weights, DEFAULT_WEIGHT))
        if (weight, cap, whole) != self._written:
            _write(self.path / self._kind.weight_file, weight)
            _write(self._place / self._kind.weight_file, whole)
            self._kind.write_cap(self.path, cap)
            self._written = weight, cap, whole

    def relax(self) -> None:
        """Nobody asks for anything any more."""
        self.apply(Share(), Due(math.inf, math.inf))

    def leave(self) -> None:
        """Go home, and leave nothing."""
        if self.path.is_dir():
            _write(self._home / "cgroup.procs", str(os.getpid()))
            _remove(self.path)
            if not self._kind.is_v2:
                _remove(self._place)  # refused while another guest is in it

    def _remove_empty(self) -> None:
        """Groups of guests that were killed. The kernel keeps those with somebody in them."""
        for each in self._place.iterdir():
            if each.is_dir():
                _remove(each)


def effective_weight(share: Share, due: Due) -> float:
    """The weight that makes a kernel without reservations give a guest what it is due."""
    if not share.reserve or math.isinf(due.level):
        return share.weight
    if due.level <= 0:
        return due.rate * MAX_WEIGHT
    return max(share.weight, due.rate / due.level) if due.rate >= share.reserve - 1e-9 else share.weight


def find_group(
    name: str, runtime: Path, threads: Callable[[], Sequence[int]], *, proc: Path = Path("/proc/self")
) -> Group | None:
    """Where a guest's control group could be; None where the host gives this user no CPU controller."""
    try:
        agreed = _agreed_place(runtime)
        for kind, home in _homes(proc):
            place = agreed.get(kind.name) or (_delegated(home) if kind.is_v2 else _writable(home))
            if place is not None:
                if kind.name not in agreed:
                    _agree(runtime, kind, place)
                return Group(kind, place, name, home, threads)
    except (OSError, ValueError, IndexError):
        pass  # what cannot be read here cannot be written either
    return None


def _agreed_place(runtime: Path) -> dict[str, Path]:
    """Where the guests before this one are, by kind."""
    try:
        kind, _, path = (runtime / PLACE_FILE).read_text().partition(": ")
    except FileNotFoundError:
        return {}
    place = Path(path)
    return {kind: place} if os.access(place.parent, os.W_OK) else {}


def _agree(runtime: Path, kind: Kind, place: Path) -> None:
    part = runtime / f".{PLACE_FILE}.{os.getpid()}"
    part.write_text(f"{kind.name}: {place}")
    part.rename(runtime / PLACE_FILE)


def _homes(proc: Path) -> list[tuple[Kind, Path]]:
    """This process's groups with a CPU controller, version 2 first; see cgroups(7), proc_pid_mountinfo(5)."""
    mounts: dict[str, Path] = {}
    for line in (proc / "mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if kind[0] == "cgroup2":
            mounts[""] = Path(fields[4])
        elif kind[0] == "cgroup" and "cpu" in kind[-1].split(","):
            mounts["cpu"] = Path(fields[4])
    found = []
    for line in (proc / "cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and "" in mounts:
            found.append((V2, mounts[""] / path.lstrip("/")))
        elif "cpu" in controllers.split(",") and "cpu" in mounts:
            found.append((V1, mounts["cpu"] / path.lstrip("/")))
    return sorted(found, key=lambda each: not each[0].is_v2)


def _delegated(home: Path) -> Path | None:
    """Version 2: the highest group above `home` that is this user's and has the controller to give on."""
    best = None
    for above in (home, *home.parents):
        files = [above / name for name in ("cgroup.controllers", "cgroup.procs", "cgroup.subtree_control")]
        if not all(file.exists() for file in files) or not all(os.access(file, os.W_OK) for file in files[1:]):
            break
        if "cpu" in files[0].read_text().split():
            best = above / FOLDER
    return best


def _writable(home: Path) -> Path | None:
    """Version 1: below the process's own group."""
    return home / FOLDER if os.access(home, os.W_OK) and (home / "cpu.shares").exists() else None


def _write(path: Path, text: str) -> None:
    # Not `write_text`: one write(2), and nothing is created where there is no such file.
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _remove(group: Path) -> None:
    with contextlib.suppress(OSError):
        group.rmdir()
