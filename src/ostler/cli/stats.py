"""`ostler stats`: what guests use, and what the software CPU does for them."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from ostler.cli.guests import complete_running
from ostler.cli.output import Json, count, print_json, print_table, size

_RATE_OVER_S = 0.5
_HEADINGS = (
    "NAME", "UP", "CPUS", "RUN / WAIT / HALT", "MEMORY", "PROCESS", "READ / WRITTEN", "RECEIVED / SENT",
)  # fmt: skip
_ENGINE_HEADINGS = (
    "NAME", "INSTRUCTIONS", "PER SECOND", "BLOCKS", "TRANSLATED", "CODE", "FLUSHES", "TLB MISSES",
    "INVALIDATED", "EXITS",
)  # fmt: skip
_ENGINE_COUNTERS = ("blocks", "translations", "code_bytes", "flushes", "tlb_misses", "invalidations", "exits")


def command(
    names: Annotated[list[str] | None, typer.Argument(metavar="GUEST", autocompletion=complete_running)] = None,
    engine: Annotated[bool, typer.Option("--engine", help="What the software CPU did for them.")] = False,  # noqa: FBT002
    as_json: Json = False,  # noqa: FBT002
) -> None:
    """Show what guests use: processor time, memory, disks, networks; or how the software CPU runs them.

    With --engine, instructions a second are those of the guest's last moment, the rest counts from its start.

    [bold]Examples:[/bold]  ostler stats --json web | jq '.web.vcpus'     ostler stats --engine web
    """
    from ostler.client import guests
    from ostler.control import runtime

    entries = [runtime.find(name) for name in names] if names else [e for e in runtime.entries() if e.is_running()]
    found = {entry.name: guests.request(entry, "stats") for entry in entries}
    if engine:
        time.sleep(_RATE_OVER_S)
        for entry in entries:
            _add_rate(found[entry.name], guests.request(entry, "stats"))
    if as_json:
        print_json(found)
        return
    if engine:
        print_table(_ENGINE_HEADINGS, [_engine_row(name, each) for name, each in found.items()])
        return
    rows = []
    for name, each in found.items():
        spent = [sum(vcpu.get(key, 0) for vcpu in each["vcpus"]) / 1e9 for key in ("cpu_time_ns", "wait_ns", "halt_ns")]
        disks, nets = each.get("disks", []), each.get("nets", [])
        read, written = (sum(disk.get(key, 0) for disk in disks) for key in ("read_bytes", "written_bytes"))
        received, sent = (sum(net.get(key, 0) for net in nets) for key in ("received_bytes", "sent_bytes"))
        memory = each["memory"]
        rows.append((
            name, f"{each['uptime_ns'] / 1e9:.0f} s", str(len(each["vcpus"])),
            " / ".join(f"{seconds:.1f}" for seconds in spent) + " s",
            f"{size(memory['touched_bytes'])} / {size(memory['size_bytes'])}", size(memory["process_rss_bytes"]),
            f"{size(read)} / {size(written)}", f"{size(received)} / {size(sent)}",
        ))  # fmt: skip
    print_table(_HEADINGS, rows)


def _add_rate(first: dict[str, Any], later: dict[str, Any]) -> None:
    """Bring the first look up to date with a later one, and add how quick the guest was between them."""
    if "engine" in first and "engine" in later:
        took_s = (later["uptime_ns"] - first["uptime_ns"]) / 1e9
        done = later["engine"]["instructions"] - first["engine"]["instructions"]
        later["engine"]["instructions_per_s"] = round(done / took_s)
    first.update(later)


def _engine_row(name: str, stats: dict[str, Any]) -> tuple[str, ...]:
    engine = stats.get("engine")
    if engine is None:
        return (name, *["-"] * (len(_ENGINE_HEADINGS) - 1))
    counts = (
        size(engine.get(key, 0)) if key == "code_bytes" else count(engine.get(key, 0)) for key in _ENGINE_COUNTERS
    )
    return (name, count(engine["instructions"]), count(engine.get("instructions_per_s", 0)), *counts)
