"""`ostler plan`: which guests belong on which hosts, so that the fewest run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ostler.cli.output import Json, print_json, size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ostler.planning.estate import Estate
    from ostler.planning.report import HostLoad, Plan
    from ostler.planning.solve import Outcome

_WIDE_ENOUGH, _INTERRUPTED = 100, 130
_ARROW = {"move": "→", "detour": "⤳", "blocked": "⇢", "start": "+"}


def command(
    files: Annotated[list[Path] | None, typer.Argument(metavar="FILE", show_default=False)] = None,
    drain: Annotated[
        list[str] | None, typer.Option("--drain", metavar="HOST", help="Plan for this host empty.")
    ] = None,
    power: Annotated[bool, typer.Option("--power", help="Least power at idle instead of fewest hosts.")] = False,  # noqa: FBT002
    time_limit: Annotated[float, typer.Option("--time-limit", metavar="SECONDS", help="How long to search.")] = 5.0,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="Draw it: .png, .svg, .pdf.")
    ] = None,
    export: Annotated[bool, typer.Option("--export", help="Print this host's records as an estate file.")] = False,  # noqa: FBT002
    as_json: Json = False,  # noqa: FBT002
) -> int:
    """Plan on how few hosts all guests fit, with headroom, and what that saves.

    Reads estate files (docs/planning.md; several are put together), or this host's own records where none is named.
    Ctrl-C ends the search and shows the best plan found so far.

    [bold]Examples:[/bold]  ostler plan estate.toml --picture plan.png     ostler plan --export >$(hostname).json
    """
    from ostler.cli.progress import shown
    from ostler.errors import BadRequest
    from ostler.planning import picture as drawing
    from ostler.planning.report import as_json as plain
    from ostler.planning.report import make_plan
    from ostler.planning.solve import solve

    if not 0 < time_limit <= 86_400:
        raise BadRequest(f"--time-limit {time_limit:g}: expected more than 0 and at most 86400 seconds")
    if export:
        return _export()
    if picture is not None:
        drawing.check_name(picture)
    estate = _estate(files or [], drain or [])
    with shown() as progress:
        solution = solve(estate, time_limit_s=time_limit, goal="power" if power else "hosts", progress=progress)
    plan = make_plan(estate, solution)
    if picture is not None:
        drawing.draw(plan, picture)
    if as_json:
        print_json(plain(plan))
    else:
        _show(plan)
    if solution.interrupted:
        sys.stderr.write("ostler: interrupted: this is the best plan found so far\n")
        return _INTERRUPTED
    return 0


def _estate(files: list[Path], drain: list[str]) -> Estate:
    from ostler.planning import records, schema

    return schema.read_files(files, drain=drain) if files else schema.assemble([records.from_history()], drain=drain)


def _export() -> int:
    from ostler.planning import history, records

    records.from_history()
    print_json(records.this_host(history.read(history.default_path())))
    return 0


def _show(plan: Plan) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        # What a script reads is never folded.
        console.width = max(console.width, _WIDE_ENOUGH)
    console.print(_headline(plan))
    console.print(_hosts_table(plan.hosts))
    if plan.steps:
        console.print(_steps_table(plan))
    _show_savings(console, plan)
    _show_assumptions(console, plan)


def _headline(plan: Plan) -> str:
    solution = plan.solution
    unit = "fewest hosts" if solution.goal == "hosts" else "least power at idle"
    return (
        f"[bold]{plan.savings.before.hosts_on} hosts on → {plan.savings.after.hosts_on}[/bold]   "
        f"{unit}: {_proof(solution.first)}; moves: {_proof(solution.second)}; searched {solution.elapsed_s:.1f} s"
    )


def _proof(outcome: Outcome) -> str:
    return "optimal" if outcome.is_optimal else f"gap {outcome.gap:.1%} ({outcome.value}, none below {outcome.bound})"


def _hosts_table(hosts: list[HostLoad]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table("host", "guests", box=box.SIMPLE_HEAD, pad_edge=False)
    resources = [name for name in ("cpu", "memory", "disk", "network") if any(name in host.before for host in hosts)]
    for name in resources:
        table.add_column(name, justify="right")
    for host in hosts:
        shares = [f"{100 * host.before.get(each, 0):.0f} → {100 * host.after.get(each, 0):.0f} %" for each in resources]
        # An estate's names are text, not Rich's markup.
        name = host.name.replace("[", r"\[")
        off = not host.on_after
        cells = [f"{name} (off)" if off else name, f"{host.guests_before} → {host.guests_after}", *shares]
        table.add_row(*cells, style="dim" if off else None)
    return table


def _steps_table(plan: Plan) -> Table:
    from rich import box
    from rich.table import Table

    table = Table("step", "guest", "from", "", "to", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("sends", justify="right")
    for number, step in enumerate(plan.steps, 1):
        names = (each.replace("[", r"\[") for each in (step.guest.name, step.source or "new", step.target))
        guest, source, target = names
        table.add_row(str(number), guest, source, _ARROW[step.kind], target, size(step.sent_bytes))
    return table


def _show_savings(console: Console, plan: Plan) -> None:
    saved, given = plan.savings, plan.estate.assumptions
    console.print(f"Sends {size(plan.sent_bytes)}, {plan.move_s:.0f} s at {given.move_bits_per_s / 1e9:g} Gbit/s.")
    if any(step.kind == "detour" for step in plan.steps):
        console.print("⤳ is a stop on the way: guests change places.")
    if any(step.kind == "blocked" for step in plan.steps):
        console.print("⇢ has no room on its target before others have left: stop that guest, or lend it a host.")
    console.print(
        f"Power {saved.before.total_w:,.0f} W → {saved.after.total_w:,.0f} W. [bold]Saved a year: "
        f"{saved.total_kwh:,.0f} kWh[/bold] ({saved.servers_kwh:,.0f} servers, {saved.cooling_kwh:,.0f} cooling and "
        f"distribution), [bold]{saved.money:,.0f} {given.currency}[/bold], {saved.co2_kg:,.0f} kg CO₂.",
        soft_wrap=True,
    )


def _show_assumptions(console: Console, plan: Plan) -> None:
    given = plan.estate.assumptions
    console.print(
        f"[dim]Assumed: headroom {given.headroom_cpu:.0%} CPU, {given.headroom_memory:.0%} memory, "
        f"{given.headroom_disk:.0%} disk, {given.headroom_network:.0%} network; CPU at the {given.percentile:g}th "
        f"percentile; {size(given.guest_overhead_bytes)} for each guest's process; PUE {given.pue:g}; "
        f"{given.price_per_kwh:g} {given.currency}/kWh; {given.kg_co2_per_kwh:g} kg CO₂/kWh; "
        f"{given.hours_per_year:g} h; power linear in CPU load between idle_w and full_w; {given.off_w:g} W "
        "for a host that is off.[/dim]",
        soft_wrap=True,
    )
