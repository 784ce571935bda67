"""The commands of `ostler`. Each is a file of its own; heavy imports happen when it is called."""

from __future__ import annotations

from typing import Annotated

import typer

from ostler.cli import (
    disks,
    doctor,
    faults,
    guests,
    host,
    images,
    inside,
    kernels,
    mem,
    moving,
    plan,
    run,
    sched,
    snapshots,
    stats,
)

app = typer.Typer(
    name="ostler",
    help="The hypervisor you can pip install: guests under KVM, or on Ostler's own software CPU.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# In the order in which help shows them.
_GUESTS, _LOOK, _STATE, _MATERIAL, _HOST = (
    "Guests", "A closer look", "Guests saved, copied and moved", "What guests are made of", "This host",
)  # fmt: skip
app.command("run", rich_help_panel=_GUESTS)(run.command)
app.command("exec", rich_help_panel=_GUESTS, context_settings={"allow_interspersed_args": False})(inside.execute)
app.command("cp", rich_help_panel=_GUESTS)(inside.copy)
for command in guests.COMMANDS:
    app.command(rich_help_panel=_GUESTS)(command)
app.command("console", rich_help_panel=_LOOK)(guests.attach_console)
app.command("inspect", rich_help_panel=_LOOK)(guests.inspect)
app.command("stats", rich_help_panel=_LOOK)(stats.command)
app.command("sched", rich_help_panel=_LOOK)(sched.command)
app.command("mem", rich_help_panel=_LOOK)(mem.command)
app.command("inject", rich_help_panel=_LOOK)(faults.command)
app.command("balloon", rich_help_panel=_LOOK)(guests.balloon)
app.add_typer(snapshots.app, name="snapshot", rich_help_panel=_STATE)
app.command("restore", rich_help_panel=_STATE)(snapshots.restore)
app.command("fork", rich_help_panel=_STATE)(snapshots.fork)
app.command("migrate", rich_help_panel=_STATE)(moving.migrate)
app.command("receive", rich_help_panel=_STATE)(moving.receive)
app.add_typer(images.app, name="image", rich_help_panel=_MATERIAL)
app.add_typer(kernels.app, name="kernel", rich_help_panel=_MATERIAL)
app.add_typer(disks.app, name="disk", rich_help_panel=_MATERIAL)
app.command("schema", rich_help_panel=_MATERIAL)(guests.schema)
app.command("plan", rich_help_panel=_HOST)(plan.command)
app.add_typer(host.app, name="host", rich_help_panel=_HOST)
app.command("doctor", rich_help_panel=_HOST)(doctor.command)


def _show_version(*, wanted: bool) -> None:
    if wanted:
        from ostler import __version__

        typer.echo(f"ostler {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001, FBT002
        bool, typer.Option("--version", callback=lambda wanted: _show_version(wanted=wanted), is_eager=True,
                           help="Print the version and exit.")
    ] = False,
) -> None:  # fmt: skip
    """Without a command: this help."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
