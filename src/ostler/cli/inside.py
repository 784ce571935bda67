"""The commands that reach into a running guest: exec, cp."""

from __future__ import annotations

from typing import Annotated

import typer

from ostler.cli.guests import Running, complete_running

Env = Annotated[
    list[str] | None, typer.Option("--env", "-e", metavar="NAME=VALUE", help="For the command; repeatable.")
]
Workdir = Annotated[str | None, typer.Option("--workdir", "-w", metavar="FOLDER", help="Where the command runs.")]
User = Annotated[str | None, typer.Option("--user", "-u", metavar="NAME", help="Who runs the command.")]
Tty = Annotated[
    bool | None, typer.Option("--tty/--no-tty", "-t/-T", help="A terminal for the command; by default as here.")
]

REACH_TIMEOUT_S = 30.0


def execute(
    context: typer.Context,
    name: Running,
    command: Annotated[list[str] | None, typer.Argument(metavar="COMMAND", help="And its arguments.")] = None,
    env: Env = None,
    workdir: Workdir = None,
    user: User = None,
    tty: Tty = None,
) -> None:
    """Run a command in a guest: its streams, its terminal, its exit status.

    [bold]Examples:[/bold]  ostler exec web -- ls -l /etc     ostler exec web sh     tar c . | ostler exec web -- tar x
    """
    from ostler.cli import relay
    from ostler.client import guests
    from ostler.client.job import Job
    from ostler.config import parse_request
    from ostler.control import runtime
    from ostler.errors import BadRequest

    command = [*(command or []), *(context.obj or ())]
    if not command:
        raise BadRequest("command: missing, expected what to run in the guest")
    wish = parse_request(command=command, env=env, workdir=workdir, user=user)
    entry = runtime.find(name)
    job = Job(wish.command, wish.env, wish.workdir, wish.user)
    with guests.reach_agent(entry, timeout_s=REACH_TIMEOUT_S) as agent:
        raise typer.Exit(relay.run(agent, job, tty=tty))


def _complete_place(incomplete: str) -> list[str]:
    return [f"{name}:" for name in complete_running(incomplete)]


def copy(
    source: Annotated[str, typer.Argument(metavar="[GUEST:]SOURCE", autocompletion=_complete_place)],
    target: Annotated[str, typer.Argument(metavar="[GUEST:]TARGET", autocompletion=_complete_place)],
) -> None:
    """Copy files and folders into a guest or out of it.

    [bold]Examples:[/bold]  ostler cp site web:/srv     ostler cp web:/var/log/syslog .
    """
    from ostler.client import guests
    from ostler.control import runtime
    from ostler.errors import AgentRefused, BadRequest

    from_guest, from_path = _place(source)
    to_guest, to_path = _place(target)
    if bool(from_guest) == bool(to_guest):
        raise BadRequest(f"cp {source!r} {target!r}: expected GUEST: before one of the two, and not before the other")
    entry = runtime.find(from_guest or to_guest)
    with guests.reach_agent(entry, timeout_s=REACH_TIMEOUT_S) as agent:
        try:
            if from_guest:
                agent.get(from_path, to_path)
            else:
                agent.put(from_path, to_path)
        except AgentRefused as error:
            # Which of the two sides has no such file is what one wants to know.
            raise AgentRefused(f"guest {entry.name!r}: {error}", code=error.code) from error


def _place(text: str) -> tuple[str, str]:
    """The guest and the path; a colon after a slash is a path's own."""
    guest, colon, path = text.partition(":")
    return (guest, path or "/") if colon and guest and "/" not in guest else ("", text)
