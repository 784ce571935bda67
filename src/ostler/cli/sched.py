"""`ostler sched`: what guests are given of the host's processors, shown and changed while they run."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ostler.cli.guests import complete_running
from ostler.cli.output import Json, print_json, print_table

_HEADINGS = ("NAME", "WEIGHT", "CAP", "RESERVE", "PIN", "WANTS", "DUE", "BY")


def command(
    name: Annotated[str | None, typer.Argument(metavar="GUEST", autocompletion=complete_running)] = None,
    weight: Annotated[str | None, typer.Option(metavar="N", help="1 to 10000; 100 is what guests begin with.")] = None,
    cap: Annotated[str | None, typer.Option(metavar="PERCENT|none", help="Of one host CPU, at most: 25, 150%.")] = None,
    reserve: Annotated[
        str | None, typer.Option(metavar="PERCENT|none", help="Of one host CPU, whatever others want.")
    ] = None,
    pin: Annotated[str | None, typer.Option(metavar="LIST|none", help="Host CPUs to run on: 0,2-3.")] = None,
    as_json: Json = False,  # noqa: FBT002
) -> None:
    """Show guests' shares of the host's processors, or change one guest's. It keeps running.

    WANTS and DUE are what it would use now and what it is given, in percent of one host CPU.

    [bold]Examples:[/bold]  ostler sched web --weight 400 --cap 150%     ostler sched web --cap none     ostler sched
    """
    from ostler.client import guests
    from ostler.control import runtime
    from ostler.errors import BadRequest

    given = {"weight": weight, "cap": cap, "reserve": reserve, "pin": pin}
    wanted = {key: value for key, value in given.items() if value is not None}
    if name is None and wanted:
        raise BadRequest(f"{next(iter(wanted))}: expected the name of a guest beside it")
    entries = [runtime.find(name)] if name else [each for each in runtime.entries() if each.is_running()]
    found = {entry.name: guests.schedule(entry, **wanted) for entry in entries}
    if as_json:
        print_json(found)
    else:
        print_table(_HEADINGS, [_row(guest, each) for guest, each in found.items()])


def _row(name: str, facts: dict[str, Any]) -> tuple[str, ...]:
    from ostler.config.schedule import format_cpus

    return (
        name, str(facts["weight"]), _percent(facts["cap"]), _percent(facts["reserve"] or None),
        format_cpus(facts["pin"]) if facts["pin"] else "-", _percent(facts.get("demand")), _percent(facts.get("due")),
        facts["enforcement"],
    )  # fmt: skip


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:g}%"
