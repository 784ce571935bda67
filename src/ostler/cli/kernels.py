"""`ostler kernel`: the Debian kernels Ostler can fetch, and those it has."""

from __future__ import annotations

from typing import Annotated

import typer

from ostler.cli.output import Json, print_json

app = typer.Typer(help="Kernels to boot, fetched from Debian by apt.", no_args_is_help=False)


def _complete(incomplete: str) -> list[str]:
    from ostler.images import KERNELS

    return [name for name in KERNELS if name.startswith(incomplete)]


@app.command("ls")
def list_kernels(as_json: Json = False) -> None:  # noqa: FBT002
    """List the kernels there are, and what of them is in the cache."""
    from rich.console import Console
    from rich.table import Table

    from ostler.images import DEFAULT_KERNEL, KERNELS, kernels

    cached = {kernel.name: kernel for kernel in kernels.cached()}
    if as_json:
        facts = {name: {"release": each.release, "version": each.package_version} for name, each in cached.items()}
        print_json([
            {"name": name, "summary": source.summary, "default": name == DEFAULT_KERNEL, "cached": facts.get(name)}
            for name, source in KERNELS.items()
        ])  # fmt: skip
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("NAME", "WHAT", "IN THE CACHE"):
        table.add_column(heading, no_wrap=True)
    for name, source in KERNELS.items():
        here = cached.get(name)
        mark = " (default)" if name == DEFAULT_KERNEL else ""
        table.add_row(name + mark, source.summary, f"{here.release} ({here.package_version})" if here else "-")
    Console(width=None if Console().is_terminal else 200).print(table)


@app.command("fetch")
def fetch_kernel(
    name: Annotated[
        str | None, typer.Argument(help="Which one; see `ostler kernel ls`.", autocompletion=_complete)
    ] = None,
) -> None:
    """Fetch a kernel and print where it is. A second call only verifies it.

    [bold]Example:[/bold]  ostler run --kernel "$(ostler kernel fetch debian-13-cloud)" --initrd my.img
    """
    from ostler.cli import progress
    from ostler.images import DEFAULT_KERNEL, kernels

    with progress.shown() as shown:
        kernel = kernels.fetch(name or DEFAULT_KERNEL, shown)
    typer.echo(kernel.image)


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    """Kernels to boot, fetched from Debian by apt."""
    if context.invoked_subcommand is None:
        list_kernels()
