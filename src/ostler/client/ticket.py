"""What a plain `ostler run IMAGE` came to, noted for the next one: from the words to the cached guest at one look.

    <cache>/tickets/<digest of the words>.json

Finding an image, judging a specification and naming the snapshot that its guests begin with is the same each time, and
half of a second run's time is the reading of modules that do so. A ticket holds the result, and how the host's file
system knew every file that the result came from: where one of them is another now, or is gone, the ticket is none.
Nothing is decided here: what a ticket says was planned by `client.plan` and judged by `config`, and where it does not
hold those are asked again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ostler.client.job import Job
from ostler.control.pool import installation_stamp
from ostler.control.runtime import new_name
from ostler.host.folders import cache_root

if TYPE_CHECKING:
    from ostler.client.plan import Plan

KEPT = 32
MAX_BYTES = 256 << 10
FORMAT = 1
Known = tuple[str, int, int, int]
"""A file: path, inode, size, time of its last change in nanoseconds."""


@dataclass(frozen=True, slots=True)
class BriefSpec:
    """Of a specification, what a guest's starter looks at."""

    nets: tuple[object, ...]
    vsock_cid: int | None


@dataclass(frozen=True, slots=True)
class BriefPlan:
    """A `client.plan.Plan` for a guest that begins booted, with its specification unread."""

    name: str
    spec: BriefSpec
    spec_json: str
    job: Job
    folder: Path
    """The snapshot it begins with."""
    facts: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    boot: str = "agent"
    is_durable: bool = False


def find(words: Mapping[str, object], command: Sequence[str]) -> BriefPlan | None:
    """The plan for these words and this command, where a ticket holds. Any thread."""
    try:
        path = _place(words)
        if path.stat().st_size > MAX_BYTES:
            return None
        found = json.loads(path.read_bytes())
        if found["format"] != FORMAT or any(_known(each[0]) != tuple(each) for each in found["known"]):
            return None
        # Used last, so kept longest.
        for each in (path, found["folder"]):
            os.utime(each)
        return _brief(found, command)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        # Another Ostler's, or nobody's.
        return None


def _brief(found: dict[str, Any], command: Sequence[str]) -> BriefPlan:
    argv = (*found["before"], *command)
    name = new_name(str(found["stem"]))
    job = Job(argv, dict(found["env"]), found["cwd"], found["user"])
    spec = BriefSpec(tuple(found["nets"]), found["vsock_cid"])
    return BriefPlan(
        name, spec, found["spec"], job, Path(found["folder"]), facts={**found["facts"], "command": list(argv)},
        settings={**found["settings"], "hostname": name},
    )  # fmt: skip


def leave(
    words: Mapping[str, object], command: Sequence[str], plan: Plan, *, folder: Path, files: Iterable[Path]
) -> None:
    """Note what the words came to: a guest of this plan, that begins with the snapshot in `folder`.

    `files` are those that the plan was made from. What cannot be noted is not.
    """
    count = len(command)
    if plan.job.argv[-count:] != tuple(command) or plan.settings != {"hostname": plan.name} or plan.is_durable:
        return
    noted = {
        "format": FORMAT, "folder": str(folder), "known": [_known(path) for path in files],
        "stem": plan.name.rpartition("-")[0], "before": plan.job.argv[:-count], "env": plan.job.env,
        "cwd": plan.job.cwd, "user": plan.job.user, "facts": plan.facts, "settings": plan.settings,
        "spec": plan.spec_json, "nets": [net.kind for net in plan.spec.nets], "vsock_cid": plan.spec.vsock_cid,
    }  # fmt: skip
    with contextlib.suppress(OSError):
        path = _place(words)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        part.write_text(json.dumps(noted))
        part.rename(path)
        for old in sorted(path.parent.glob("*.json"), key=lambda each: each.stat().st_mtime)[:-KEPT]:
            old.unlink(missing_ok=True)


def _known(path: str | Path) -> Known:
    """How the file system knows a file; zeroes for none."""
    with contextlib.suppress(OSError):
        found = Path(path).stat()
        return str(path), found.st_ino, found.st_size, found.st_ctime_ns
    return str(path), 0, 0, 0


def _place(words: Mapping[str, object]) -> Path:
    own = sorted((name, value) for name, value in os.environ.items() if name.startswith("OSTLER_"))
    what = repr((sorted(words.items()), own, installation_stamp()))
    return cache_root() / "tickets" / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.json"
