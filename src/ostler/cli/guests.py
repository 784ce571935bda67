"""The commands for guests that are there: ps, inspect, logs, console, pause, resume, stop, kill, wait, rm."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ostler.cli.output import Json, ago, print_json, print_table

if TYPE_CHECKING:
    from ostler.control.runtime import Entry

SHOWN_COMMAND = 32


def complete_running(incomplete: str) -> list[str]:
    """Names of running guests, for the shell."""
    from ostler.control import runtime

    return [entry.name for entry in runtime.entries() if entry.name.startswith(incomplete) and entry.is_running()]


def complete_any(incomplete: str) -> list[str]:
    """Names of all guests, for the shell."""
    from ostler.control import runtime

    return [entry.name for entry in runtime.entries() if entry.name.startswith(incomplete)]


Running = Annotated[str, typer.Argument(metavar="GUEST", help="Its name.", autocompletion=complete_running)]
Any_ = Annotated[str, typer.Argument(metavar="GUEST", help="Its name.", autocompletion=complete_any)]
SeveralRunning = Annotated[list[str], typer.Argument(metavar="GUEST", autocompletion=complete_running)]
SeveralAny = Annotated[list[str], typer.Argument(metavar="GUEST", autocompletion=complete_any)]


def _find(name: str) -> Entry:
    from ostler.control import runtime

    return runtime.find(name)


def ps(
    everything: Annotated[bool, typer.Option("--all", "-a", help="Ended ones too.")] = False,  # noqa: FBT002
    names: Annotated[bool, typer.Option("--quiet", "-q", help="Names only.")] = False,  # noqa: FBT002
    as_json: Json = False,  # noqa: FBT002
) -> None:
    """List your guests.

    [bold]Example:[/bold]  ostler kill $(ostler ps -q)
    """
    from ostler.client import guests

    found = [each for each in guests.summaries() if everything or each.state not in {"ended", "died"}]
    if as_json:
        print_json([dataclasses.asdict(each) for each in found])
    elif names:
        sys.stdout.write("".join(f"{each.name}\n" for each in found))
    else:
        rows = []
        for each in found:
            state = f"ended ({each.status})" if each.state == "ended" else each.state
            command = shlex.join(each.command)
            shown = command if len(command) <= SHOWN_COMMAND else command[: SHOWN_COMMAND - 1] + "…"
            rows.append((each.name, each.image, state, ago(each.created), ", ".join(each.ports) or "-", shown or "-"))
        print_table(("NAME", "IMAGE", "STATE", "AGE", "PORTS", "COMMAND"), rows)


def inspect(name: Any_) -> None:
    """Print all that is known of a guest, as JSON.

    [bold]Example:[/bold]  ostler inspect web | jq .spec.memory
    """
    from ostler.client import guests

    entry = _find(name)
    known: dict[str, Any] = {**entry.facts, **dataclasses.asdict(guests.summary(entry))}
    known["folder"] = str(entry.path)
    if entry.is_running():
        known |= guests.request(entry, "inspect")
    elif end := entry.end:
        known["end"] = end
    print_json(known)


def logs(
    name: Any_,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the guest ends.")] = False,  # noqa: FBT002
    tail: Annotated[int | None, typer.Option("--tail", "-n", min=0, metavar="N", help="The last lines only.")] = None,
    console: Annotated[bool, typer.Option("--console", help="The console's, not the command's.")] = False,  # noqa: FBT002
) -> None:
    """Print what a guest's command has said, or its console where it has no command.

    [bold]Example:[/bold]  ostler logs -f -n 20 web
    """
    from ostler.client import guests

    entry = _find(name)
    read = guests.follow_output if entry.facts.get("service") and not console else guests.follow_console
    for data in read(entry, lines=tail, follow=follow):
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


def pause(names: SeveralRunning) -> None:
    """Hold guests' processors where they are."""
    _ask(names, "pause")


def resume(names: SeveralRunning) -> None:
    """Let paused guests go on."""
    _ask(names, "resume")


def _ask(names: list[str], op: str) -> None:
    from ostler.client import guests

    for name in names:
        guests.request(_find(name), op)


def stop(
    names: SeveralRunning,
    grace: Annotated[float, typer.Option("--time", "-t", min=0, max=3600, metavar="S",
                                         help="Seconds a guest gets before it is killed.")] = 30,
) -> None:  # fmt: skip
    """Shut guests down: by their agent or power button, and by force when that takes too long.

    [bold]Example:[/bold]  ostler stop -t 5 web db
    """
    from ostler.client import guests

    for entry in [_find(name) for name in names]:
        guests.stop(entry, grace_s=grace)


def kill(names: SeveralRunning) -> None:
    """End guests at once, as pulling the plug does."""
    from ostler.client import guests

    for entry in [_find(name) for name in names]:
        guests.kill(entry)


def wait(names: SeveralAny, as_json: Json = False) -> None:  # noqa: FBT002
    """Wait until guests have ended and print their exit statuses; the last one's is this command's own."""
    from ostler.client import guests

    ends = {entry.name: guests.wait(entry) for entry in [_find(name) for name in names]}
    if as_json:
        print_json(ends)
    else:
        sys.stdout.write("".join(f"{end['status']}\n" for end in ends.values()))
    raise typer.Exit(int([*ends.values()][-1]["status"]))


def rm(
    names: SeveralAny,
    force: Annotated[bool, typer.Option("--force", "-f", help="Kill those that run.")] = False,  # noqa: FBT002
) -> None:
    """Forget guests that have ended: their logs and how they ended.

    [bold]Example:[/bold]  ostler rm -f $(ostler ps -aq)
    """
    from ostler.client import guests

    for entry in [_find(name) for name in names]:
        guests.remove(entry, force=force)


def balloon(
    name: Running,
    size_text: Annotated[str, typer.Argument(metavar="SIZE", help="What the guest is to keep: 256M.")],
) -> None:
    """Take memory of a running guest back, or let it have it again; it gives what it can spare.

    [bold]Example:[/bold]  ostler balloon web 256M
    """
    from ostler.client import guests
    from ostler.config import parse_size
    from ostler.errors import BadRequest

    try:
        wanted = parse_size(size_text)
    except ValueError as error:
        raise BadRequest(f"size {size_text!r}: {error}") from error
    guests.request(_find(name), "balloon", guest_bytes=wanted)


def attach_console(
    name: Running,
    backlog: Annotated[
        int, typer.Option(min=0, max=4 << 20, metavar="BYTES", help="Show what was said before.")
    ] = 4096,
) -> None:
    """Attach to a guest's serial console. Ctrl-] q detaches; the guest goes on."""
    from ostler.cli import console as attached
    from ostler.control.connection import Connection

    with Connection.to(_find(name)) as connection:
        stream = connection.console(backlog_bytes=backlog)
    with stream.socket:
        attached.attach(stream.socket, stream.backlog + stream.first)


def schema() -> None:
    """Print the JSON schema of guests' descriptions, for `ostler run -f`."""
    from ostler.config.request import schema as described

    sys.stdout.write(json.dumps(described(), indent=2) + os.linesep)


COMMANDS = (ps, logs, stop, kill, wait, rm, pause, resume)
