"""`ostler mem`: what guests' memory is on this host, how busy it is, and taking back what can be spared."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ostler.cli.guests import complete_running
from ostler.cli.output import Json, print_json, print_table, size

if TYPE_CHECKING:
    from ostler.control.runtime import Entry

_COLUMNS = (
    ("MEMORY", "size_bytes"), ("HOST HAS GIVEN", "touched_bytes"), ("OWN", "private_bytes"),
    ("SHARED", "shared_bytes"), ("HUGE", "huge_bytes"), ("SWAPPED", "swapped_bytes"),
    ("BALLOONED", "ballooned_bytes"), ("GIVEN BACK", "given_back_bytes"), ("MERGED", "merged_bytes"),
)  # fmt: skip


def command(
    names: Annotated[list[str] | None, typer.Argument(metavar="GUEST", autocompletion=complete_running)] = None,
    working_set: Annotated[
        float | None, typer.Option("--working-set", "-w", min=0.01, max=60, metavar="S",
                                   help="Watch for so long: what is written, what is touched.")
    ] = None,
    relieve: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Take so much back from these guests: 1G, or `all`.")
    ] = None,
    steps: Annotated[
        str, typer.Option(metavar="STEPS", help="Which ways to take it back, of these.")
    ] = "reporting,balloon,merge",
    as_json: Json = False,  # noqa: FBT002
) -> None:  # fmt: skip
    """Show what guests' memory is on this host, watch it, or take back what can be spared.

    What is taken back comes from free page reporting, then balloons, then merging equal pages.

    [bold]Examples:[/bold]  ostler mem -w 5 web     ostler mem --relieve 1G     ostler mem --relieve all --steps merge
    """
    from ostler.control import runtime

    entries = [runtime.find(name) for name in names] if names else [e for e in runtime.entries() if e.is_running()]
    if relieve is not None:
        _relieve(entries, relieve, steps, as_json=as_json)
    elif working_set is not None:
        _watch(entries, working_set, as_json=as_json)
    else:
        found = {entry.name: _ask(entry, "memory-map") for entry in entries}
        if as_json:
            print_json(found)
            return
        rows = [(name, *(size(each[key]) for _, key in _COLUMNS)) for name, each in found.items()]
        print_table(("NAME", *(heading for heading, _ in _COLUMNS)), rows)


def _ask(entry: Entry, op: str, **arguments: object) -> dict[str, Any]:
    from ostler.client import guests

    return guests.request(entry, op, timeout_s=90, **arguments)


def _watch(entries: list[Entry], interval_s: float, *, as_json: bool) -> None:
    found = {entry.name: _ask(entry, "memory-watch", interval_s=interval_s) for entry in entries}
    if as_json:
        print_json(found)
        return
    rows = [
        (name, f"{each['interval_s']:.2f} s", size(each["accessed_bytes"]), size(each["dirty_bytes"]),
         f"{size(round(each['dirty_bytes_per_s']))}/s", size(each["working_set_bytes"]))
        for name, each in found.items()
    ]  # fmt: skip
    print_table(("NAME", "WATCHED", "TOUCHED", "WRITTEN", "WRITE RATE", "WORKING SET"), rows)


def _relieve(entries: list[Entry], wanted: str, steps: str, *, as_json: bool) -> None:
    from ostler.client import relief
    from ostler.config import parse_size
    from ostler.errors import BadRequest

    try:
        need = parse_size(wanted) if wanted != "all" else sum(_ask(e, "memory-map")["size_bytes"] for e in entries)
    except ValueError as error:
        raise BadRequest(f"size {wanted!r}: {error}") from error
    report = relief.relieve(entries, need_bytes=need, steps=[each.strip() for each in steps.split(",")])
    if as_json:
        print_json(report)
        return
    after = report["after"]
    rows = [(name, size(before), size(after[name])) for name, before in report["before"].items() if name in after]
    print_table(("NAME", "BEFORE", "AFTER"), rows)
    common = f"; {size(report['common_bytes'])} are common to them now" if report["common_bytes"] else ""
    sys.stdout.write(f"the host has {size(max(report['freed_bytes'], 0))} back{common}\n")
    for name, why in report["refused"].items():
        sys.stderr.write(f"{name}: {why}\n")
