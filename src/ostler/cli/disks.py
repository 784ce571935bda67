"""`ostler disk`: disk files created, resized, described, converted, by qemu-img."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ostler.images.qemu_img import DiskInfo

app = typer.Typer(help="Disk files: create, resize, describe, convert.", no_args_is_help=True)

_File = Annotated[Path, typer.Argument(help="The disk file.")]
_Format = Annotated[
    str, typer.Option("--format", "-f", help="raw or qcow2; without it, what the file's name says (*.qcow2, else raw).")
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("create")
def create_disk(
    file: _File,
    size: Annotated[str, typer.Argument(help="Such as 10G.")],
    format: _Format = "auto",  # noqa: A002 - the option's name
    json: _Json = False,  # noqa: FBT002
) -> None:
    """Make an empty disk. It takes space as it is written.

    [bold]Example:[/bold]  ostler disk create data.qcow2 20G
    """
    from ostler.images import qemu_img

    qemu_img.create(file, _bytes(size), given=format)
    _show(qemu_img.info(file, format), json=json)


@app.command("resize")
def resize_disk(
    file: _File,
    size: Annotated[str, typer.Argument(help="The whole new size, such as 40G.")],
    format: _Format = "auto",  # noqa: A002
    shrink: Annotated[bool, typer.Option("--shrink", help="Allow a smaller size; what lies beyond is lost.")] = False,  # noqa: FBT002
    json: _Json = False,  # noqa: FBT002
) -> None:
    """Give a disk another size. Partitions and file systems in it stay as they are."""
    from ostler.images import qemu_img

    qemu_img.resize(file, _bytes(size), given=format, shrink=shrink)
    _show(qemu_img.info(file, format), json=json)


@app.command("info")
def describe_disk(
    file: _File,
    format: _Format = "auto",  # noqa: A002
    json: _Json = False,  # noqa: FBT002
) -> None:
    """Say what a disk is, how large, and who uses it."""
    from ostler.images import qemu_img

    _show(qemu_img.info(file, format), json=json)


@app.command("convert")
def convert_disk(
    source: Annotated[Path, typer.Argument(help="The disk to copy.")],
    target: Annotated[Path, typer.Argument(help="The new file.")],
    from_format: Annotated[str, typer.Option("--from", help="raw or qcow2, where the name does not say it.")] = "auto",
    to_format: Annotated[str, typer.Option("--to", help="raw or qcow2, where the name does not say it.")] = "auto",
    compress: Annotated[bool, typer.Option("--compress", help="Compress a qcow2 target.")] = False,  # noqa: FBT002
    json: _Json = False,  # noqa: FBT002
) -> None:
    """Copy a disk into a new file of another format.

    [bold]Example:[/bold]  ostler disk convert cloud.qcow2 cloud.raw
    """
    from ostler.cli import progress
    from ostler.images import qemu_img

    with progress.shown() as shown:
        step = f"converting {source.name}"
        qemu_img.convert(
            source, target, source_format=from_format, target_format=to_format, compress=compress,
            report=lambda done: shown(step, done),
        )  # fmt: skip
    _show(qemu_img.info(target, to_format), json=json)


@app.command("ls")
def list_persistent(json: _Json = False) -> None:  # noqa: FBT002
    """List the persistent disks that `ostler run --persist NAME` has made."""
    from ostler.cli.output import print_json, print_table
    from ostler.images import persist

    rows = [{"name": name, **persist.origin(name), "path": str(persist.root())} for name in persist.names()]
    if json:
        print_json(rows)
    else:
        print_table(
            ("NAME", "IMAGE", "SINCE"),
            [(row["name"], row.get("image", "damaged"), row.get("since", "")[:10]) for row in rows],
        )


@app.command("rm")
def remove_persistent(names: Annotated[list[str], typer.Argument(help="Names of persistent disks.")]) -> None:
    """Remove persistent disks for good. One that a guest uses stays."""
    from ostler.images import persist

    for name in names:
        persist.remove(name)
        typer.echo(name)


def _show(info: DiskInfo, *, json: bool) -> None:
    from ostler.cli.output import print_json

    if json:
        print_json(info.as_dict())
        return
    size = f"{info.size_bytes} bytes ({_shown(info.size_bytes)})"
    rows = [("file", info.path), ("format", info.format), ("size", size),
            ("on the host", _shown(info.disk_bytes)), ("based on", info.backing), ("data in", info.data_file),
            ("in use by", info.in_use_by), ("warning", info.warning)]  # fmt: skip
    rows += [
        (f"partition {part['number']}", f"{_shown(part['size_bytes'])} at {part['start_bytes']}, {part['kind']}")
        for part in info.partitions
    ]
    typer.echo("\n".join(f"{name:<12} {value}" for name, value in rows if value))


def _bytes(size: str) -> int:
    from ostler.config.sizes import parse_size
    from ostler.errors import BadRequest

    try:
        size_bytes = parse_size(size) // 512 * 512
    except ValueError as error:
        raise BadRequest(f"size {size!r}: {error}") from error
    if not size_bytes:
        raise BadRequest(f"size {size!r}: expected at least one sector of 512 bytes")
    return size_bytes


def _shown(size_bytes: int) -> str:
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size_bytes >= 1 << shift:
            return f"{size_bytes / (1 << shift):.1f} {unit}"
    return f"{size_bytes} bytes"
