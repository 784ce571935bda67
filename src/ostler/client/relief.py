"""Relieving a host that is short of memory: free page reporting, balloons, equal pages, in that order.

What guests report as free has come back by itself, at no cost to anybody: it is only counted. Balloons take what
guests say they can spare, in proportion. Then pages of zeroes are given up and equal pages of several guests become
one (`ostler.vmm.merging`), or KSM's where the host's administrator has it running and the memory is of its kind.
`plan` and `match` are pure; `relieve` asks the guests.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from ostler.client import guests
from ostler.errors import BadRequest, OstlerError

if TYPE_CHECKING:
    from ostler.control.runtime import Entry

PAGE_BYTES, DIGEST_BYTES = 0x1000, 16
NOT_THERE, ZERO = bytes(DIGEST_BYTES), b"\xff" * DIGEST_BYTES
RUN, TO_ZERO = struct.Struct("<QQQ"), (1 << 64) - 1
MAX_RUNS = 20_000
KSM_RUN, MEMINFO = Path("/sys/kernel/mm/ksm/run"), Path("/proc/meminfo")
# What a guest keeps of what it calls available: it was counting on it a moment ago.
KEPT_BYTES, KEPT_SHARE = 32 << 20, 0.25
LOOK_S, STATISTICS_LIMIT_S, BALLOON_LIMIT_S, WORK_LIMIT_S = 0.2, 3.0, 20.0, 300.0
_Said = TypeVar("_Said")
STEPS = ("reporting", "balloon", "merge")


@dataclass(frozen=True, slots=True)
class Spare:
    """A guest, and what its balloon's statistics say it could do without."""

    name: str
    size_bytes: int
    ballooned_bytes: int
    available_bytes: int | None
    """None where the guest does not say."""


def plan(spares: Sequence[Spare], need_bytes: int) -> dict[str, int]:
    """How much each guest is to keep, by name: together they give `need_bytes`, or all they can spare."""
    can_give: dict[str, int] = {}
    for each in spares:
        available = each.available_bytes or 0
        can_give[each.name] = max(available - max(KEPT_BYTES, int(available * KEPT_SHARE)), 0)
    total = sum(can_give.values())
    if not total or need_bytes <= 0:
        return {}
    share = min(need_bytes / total, 1.0)
    kept: dict[str, int] = {}
    for each in spares:
        taken = int(can_give[each.name] * share) // PAGE_BYTES * PAGE_BYTES
        if taken:
            kept[each.name] = max(each.size_bytes - each.ballooned_bytes - taken, 0)
    return kept


Runs = list[tuple[int, int, int]]
"""First page of the guest, first page of the common file, number of pages."""


@dataclass(frozen=True, slots=True)
class Match:
    """Which pages become one: each guest's runs, who donates what, how long the common file is."""

    merge: dict[str, Runs]
    donate: dict[str, Runs]
    pages: int


def match(digests: Mapping[str, bytes], *, max_runs: int = MAX_RUNS) -> Match:
    """Compare digests of all guests' pages, by their names.

    Every run costs a guest two mappings, so the longest are taken. A page that only one guest would map is left alone.
    """
    holders: dict[bytes, list[tuple[str, int]]] = {}
    zero: dict[str, list[int]] = {name: [] for name in digests}
    for name, data in digests.items():
        for page in range(len(data) // DIGEST_BYTES):
            digest = data[page * DIGEST_BYTES : (page + 1) * DIGEST_BYTES]
            if digest == ZERO:
                zero[name].append(page)
            elif digest != NOT_THERE:
                holders.setdefault(digest, []).append((name, page))
    place: dict[str, list[tuple[int, int]]] = {name: [] for name in digests}
    donors: dict[str, list[tuple[int, int]]] = {name: [] for name in digests}
    pages = 0
    # In the first holder's order, so that what lies together there does in the file.
    for each in holders.values():
        if len(each) > 1:
            donors[each[0][0]].append((each[0][1], pages))
            for name, page in each:
                place[name].append((page, pages))
            pages += 1
    merge: dict[str, Runs] = {}
    for name in digests:
        empty = [(page, TO_ZERO) for page in zero[name]]
        merge[name] = sorted(_longest(_runs(place[name]) + _runs(empty), max_runs))
    return Match(merge, {name: _longest(_runs(found), max_runs) for name, found in donors.items() if found}, pages)


def _runs(pairs: list[tuple[int, int]]) -> Runs:
    found: Runs = []
    for page, source in sorted(pairs):
        if found:
            first, start, count = found[-1]
            follows = source == start if source == TO_ZERO else source == start + count
            if page == first + count and follows:
                found[-1] = (first, start, count + 1)
                continue
        found.append((page, source, 1))
    return found


def _longest(runs: Runs, most: int) -> Runs:
    return runs if len(runs) <= most else sorted(runs, key=lambda run: -run[2])[:most]


def host_available_bytes() -> tuple[int, int]:
    """MemAvailable and MemTotal."""
    lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    available, total = (int(lines[name].split()[0]) << 10 for name in ("MemAvailable", "MemTotal"))
    return available, total


def ksm_runs() -> bool:
    """Whether this host's administrator has the kernel merge pages."""
    with contextlib.suppress(OSError, ValueError):
        return int(KSM_RUN.read_text()) == 1
    return False


def relieve(entries: Sequence[Entry], *, need_bytes: int, steps: Sequence[str] = STEPS) -> dict[str, Any]:
    """Take `need_bytes` back from these guests, step by step, and stop when that is done.

    Returns what each step gave, the guests' memory before and after (`before`, `after`, bytes by name), the pages they
    have in common now (`common_bytes`), and what the host has gained (`freed_bytes`).
    Raises BadRequest for a step there is not. A guest that ends meanwhile, or cannot give, is left out and named.
    """
    for step in steps:
        if step not in STEPS:
            raise BadRequest(f"step {step!r}: expected one of {', '.join(STEPS)}")
    refused: dict[str, str] = {}
    before = _sizes(entries, refused)
    report: dict[str, Any] = {"before": before, "steps": {}, "refused": refused, "common_bytes": 0}
    for step in STEPS:
        sizes = _sizes(entries, refused)
        gained = _total(before, sizes) - _total(sizes, sizes)
        if step not in steps or gained >= need_bytes > 0:
            continue
        there = [each for each in entries if each.name not in refused]
        if step == "reporting":
            report["steps"][step] = _of_each(there, refused, lambda each: _ask(each, "memory-map")["given_back_bytes"])
        elif step == "balloon":
            report["steps"][step] = _shrink(there, need_bytes - gained, refused)
        else:
            report["steps"][step], report["common_bytes"] = _merge(there, refused)
    report["after"] = after = _sizes(entries, refused)
    report["freed_bytes"] = _total(before, after) - _total(after, after) - report["common_bytes"]
    return report


def _ask(entry: Entry, op: str, **arguments: object) -> dict[str, Any]:
    return guests.request(entry, op, timeout_s=WORK_LIMIT_S, **arguments)


def _of_each(
    entries: Sequence[Entry], refused: dict[str, str], look: Callable[[Entry], _Said]
) -> dict[str, _Said]:  # fmt: skip
    """What each guest says; who does not is named in `refused`, and nobody else is kept by it."""
    found = {}
    for entry in entries:
        try:
            found[entry.name] = look(entry)
        except (OstlerError, OSError) as error:
            refused[entry.name] = str(error)
    return found


def _sizes(entries: Sequence[Entry], refused: dict[str, str]) -> dict[str, int]:
    """What each guest's memory costs the host; pages that several have in common are nobody's."""
    return _of_each(entries, refused, lambda each: int(_ask(each, "memory-map")["touched_bytes"]))


def _total(sizes: Mapping[str, int], of: Mapping[str, int]) -> int:
    """The sum of those that are in `of`, too."""
    return sum(size for name, size in sizes.items() if name in of)


def _spare(entry: Entry) -> Spare:
    stats = _ask(entry, "stats")
    balloon = stats.get("balloon", {})
    said = balloon.get("guest", {}).get("available_memory")
    return Spare(entry.name, stats["memory"]["size_bytes"], balloon.get("held_bytes", 0), said)


def _shrink(entries: Sequence[Entry], need_bytes: int, refused: dict[str, str]) -> dict[str, Any]:
    """Ask for what guests can spare and wait until they have given it, or give no more."""
    before = _of_each(entries, refused, _spare)
    # Asking has a guest make its statistics; who has none after a moment has no driver for it.
    deadline = time.monotonic() + STATISTICS_LIMIT_S
    while time.monotonic() < deadline and any(each.available_bytes is None for each in before.values()):
        time.sleep(LOOK_S)
        before = _of_each(entries, refused, _spare)
    kept = plan([*before.values()], need_bytes)
    asked = [entry for entry in entries if entry.name in kept]
    _of_each(asked, refused, lambda each: _ask(each, "balloon", guest_bytes=kept[each.name]))
    deadline, last = time.monotonic() + BALLOON_LIMIT_S, -1
    while asked and time.monotonic() < deadline:
        time.sleep(LOOK_S)
        held = sum(each.ballooned_bytes for each in _of_each(asked, refused, _spare).values())
        if held == last:
            break
        last = held
    return {
        name: {"was_bytes": before[name].size_bytes - before[name].ballooned_bytes, "guest_bytes": kept[name],
               "held_bytes": each.ballooned_bytes}
        for name, each in _of_each(asked, refused, _spare).items()
    }  # fmt: skip


def _merge(entries: Sequence[Entry], refused: dict[str, str]) -> tuple[dict[str, Any], int]:
    """What each guest gave, and the size of what they have in common."""
    found: dict[str, Any] = {}
    taking: list[Entry] = []
    digests: dict[str, bytes] = {}
    for entry in entries:
        if ksm_runs():
            with contextlib.suppress(OstlerError):
                if _ask(entry, "memory-mergeable")["mergeable"]:
                    found[entry.name] = {"ksm": True}
                    continue
        try:
            digests[entry.name] = _digests(entry)
            taking.append(entry)
        except OstlerError as error:
            refused[entry.name] = str(error)
    matched = match(digests)
    with _sealed_file(taking, matched) as path:
        for entry in taking:
            runs = matched.merge[entry.name]
            if runs:
                found[entry.name] = _with_runs(entry, "memory-merge", path, runs)
        common = Path(path).stat().st_blocks * 512
    return found, common if any(each.get("merged_bytes") for each in found.values()) else 0


def _digests(entry: Entry) -> bytes:
    with _Unnamed("ostler-digests") as file:
        _ask(entry, "memory-digests", file=file.path)
        return os.pread(file.fd, os.fstat(file.fd).st_size, 0)


@contextlib.contextmanager
def _sealed_file(entries: Sequence[Entry], matched: Match) -> Iterator[str]:
    """The common file, filled by its donors, then sealed."""
    with _Unnamed("ostler-common") as file:
        os.ftruncate(file.fd, matched.pages * PAGE_BYTES)
        for entry in entries:
            runs = matched.donate.get(entry.name)
            if runs:
                _with_runs(entry, "memory-donate", file.path, runs)
        fcntl.fcntl(file.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        yield file.path


def _with_runs(entry: Entry, op: str, path: str, runs: Runs) -> dict[str, Any]:
    with _Unnamed("ostler-runs") as file:
        os.pwrite(file.fd, b"".join(RUN.pack(*run) for run in runs), 0)
        return _ask(entry, op, file=path, runs=file.path)


class _Unnamed:
    """A file in memory that another process of this user's can open; a context manager."""

    def __init__(self, name: str) -> None:
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.path = f"/proc/{os.getpid()}/fd/{self.fd}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        os.close(self.fd)
