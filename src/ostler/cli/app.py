"""The commands of `ostler`. Each is a file of its own; heavy imports happen when it is called."""

from __future__ import annotations

from typing import Annotated

import typer

from ostler.cli import disks, doctor, guests, images, inside, kernels, moving, run, snapshots, stats

app = typer.Typer(
    name="ostler",
    help="The hypervisor you can pip install: guests under KVM, or on Ostler's own software CPU.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run")(run.command)
for command in guests.COMMANDS:
    app.command()(command)
app.command("stats")(stats.command)
app.command("console")(guests.attach_console)
app.command("exec", context_settings={"allow_interspersed_args": False})(inside.execute)
app.command("cp")(inside.copy)
app.command("restore")(snapshots.restore)
app.command("fork")(snapshots.fork)
app.add_typer(snapshots.app, name="snapshot")
app.command("migrate")(moving.migrate)
app.command("receive")(moving.receive)
app.command("doctor")(doctor.command)
app.add_typer(kernels.app, name="kernel")
app.add_typer(images.app, name="image")
app.add_typer(disks.app, name="disk")


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
