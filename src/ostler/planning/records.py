"""This host's own samples as an estate file: what `ostler plan --export` writes and `ostler plan` alone looks at."""

from __future__ import annotations

import os
import shutil
import socket
from collections import defaultdict
from pathlib import Path
from typing import Any

from ostler.errors import BadRequest
from ostler.planning import history
from ostler.planning.history import HOST, Sample
from ostler.planning.schema import FORMAT, EstateFile

# A CPU sample for every so many minutes is plenty for a percentile, and keeps files small.
MAX_CPU_SAMPLES = 2_000


def this_host(samples: list[Sample]) -> dict[str, Any]:
    """An estate file's content: this host, and each guest with what it used while it was sampled."""
    by_guest: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.guest != HOST:
            by_guest[sample.guest].append(sample)
    name = socket.gethostname()
    disk = shutil.disk_usage(Path.home()).total
    host = {
        "name": name,
        "cpus": os.cpu_count() or 1,
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "disk": disk,
        "capabilities": ["kvm"] if os.access("/dev/kvm", os.R_OK | os.W_OK) else [],
    }
    return {
        "format": FORMAT,
        "hosts": [host],
        "guests": [_guest(guest, name, its) for guest, its in sorted(by_guest.items())],
    }


def from_history(path: Path | None = None) -> tuple[str, EstateFile]:
    """The same, judged as any other file. Raises BadRequest where nothing was sampled yet."""
    where = path or history.default_path()
    samples = history.read(where)
    if all(sample.guest == HOST for sample in samples):
        raise BadRequest(
            f"{where}: no samples of this host's guests yet; `ostler host serve` keeps them, or name estate files"
        )
    return str(where), EstateFile.model_validate(this_host(samples))


def _guest(name: str, host: str, samples: list[Sample]) -> dict[str, Any]:
    latest = samples[-1]
    network = max(each.received_bytes_per_s + each.sent_bytes_per_s for each in samples)
    return {
        "name": name,
        "host": host,
        "memory": latest.memory_bytes,
        "memory_used": min(latest.memory_bytes, latest.resident_bytes),
        "cpu_samples": [round(value, 3) for value in _thinned([each.cpus for each in samples])],
        "network_mbit_s": round(network * 8 / 1e6, 3),
    }


def _thinned(values: list[float]) -> list[float]:
    """At most MAX_CPU_SAMPLES, each the largest of its neighbours: peaks stay."""
    width = -(-len(values) // MAX_CPU_SAMPLES)
    return [max(values[at : at + width]) for at in range(0, len(values), width)]
