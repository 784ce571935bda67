"""`ostler image`: what guests boot, built, pulled, imported, listed and removed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

if TYPE_CHECKING:
    from ostler.images.importer import Boot
    from ostler.images.store import Image

app = typer.Typer(help="Images that guests boot: build, pull, import, list, remove.", no_args_is_help=True)

_Size = Annotated[
    str | None, typer.Option("--size", help="How large the root disk may grow: 8G. It costs only what is used.")
]
_Kernel = Annotated[str | None, typer.Option("--kernel", help="Which kernel it boots; see `ostler kernel ls`.")]
_Name = Annotated[str | None, typer.Option("--name", "-n", help="The name it gets; without it, its reference.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_Insecure = Annotated[
    bool, typer.Option("--insecure", help="Allow a registry without TLS, or with an unknown certificate.")
]


def complete_names(incomplete: str) -> list[str]:
    """Names in the store, for the shell."""
    from ostler.images import store

    return [name for name in store.names() if name.startswith(incomplete)]


_Which = Annotated[str, typer.Argument(help="Name, or digest (12 digits are enough).", autocompletion=complete_names)]


@app.command("build")
def build_image(
    reference: Annotated[str, typer.Argument(help="debian, or debian:RELEASE (12, bookworm, 13, trixie).")],
    include: Annotated[
        list[str] | None, typer.Option("--include", help="Packages to add: a,b. May be given more than once.")
    ] = None,
    size: _Size = None,
    kernel: _Kernel = None,
    name: _Name = None,
    json: _Json = False,  # noqa: FBT002
) -> None:
    """Build an image from Debian packages, through the host's own mirror.

    [bold]Example:[/bold]  ostler image build debian:13 --include nginx,curl --name web
    """
    from ostler.cli import progress
    from ostler.images import debian

    packages = [package for given in include or () for package in given.split(",") if package]
    _check_packages(packages)
    if packages and not name:
        name = reference  # a tailored image must not become what its release's other names mean
    with progress.shown() as shown:
        image = debian.build(
            reference, include=packages, name=name, size_bytes=_bytes(size), kernel=kernel, progress=shown
        )
    _made(image, json=json)


@app.command("pull")
def pull_image(
    reference: Annotated[str, typer.Argument(help="HOST/NAME:TAG, or HOST/NAME@sha256:DIGEST.")],
    insecure: _Insecure = False,  # noqa: FBT002
    size: _Size = None,
    kernel: _Kernel = None,
    name: _Name = None,
    json: _Json = False,  # noqa: FBT002
) -> None:
    """Pull an image from an OCI registry.

    [bold]Example:[/bold]  ostler image pull localhost:5000/tools:2 --insecure --name tools
    """
    from ostler.cli import progress
    from ostler.images import DEFAULT_KERNEL, oci

    with progress.shown() as shown:
        image = oci.pull(
            reference, name=name, insecure=insecure, kernel=kernel or DEFAULT_KERNEL, size_bytes=_bytes(size),
            progress=shown,
        )  # fmt: skip
    _made(image, json=json)


@app.command("import")
def import_image(
    file: Annotated[Path, typer.Argument(help="A raw or qcow2 disk, a tar archive, or a folder with a root tree.")],
    name: _Name = None,
    format: Annotated[  # noqa: A002 - the option's name
        str, typer.Option("--format", help="raw, qcow2, tar or tree, where the name does not say it.")
    ] = "auto",
    boot: Annotated[
        str | None, typer.Option("--boot", help="Who is the first process: agent, or the image's own init.")
    ] = None,
    size: _Size = None,
    kernel: _Kernel = None,
    json: _Json = False,  # noqa: FBT002
) -> None:
    """Make an image of a disk, an archive or a folder. Disks with partitions start their own init.

    [bold]Example:[/bold]  ostler image import cloud.qcow2 --name cloud
    """
    from ostler.cli import progress
    from ostler.errors import BadRequest
    from ostler.images import DEFAULT_KERNEL, importer

    if boot not in (None, "agent", "init"):
        raise BadRequest(f"boot {boot!r}: expected agent or init")
    with progress.shown() as shown:
        image = importer.load(
            file, name=name, format=format, boot=cast("Boot | None", boot), kernel=kernel or DEFAULT_KERNEL,
            size_bytes=_bytes(size) if size else None, progress=shown,
        )  # fmt: skip
    _made(image, json=json)


@app.command("ls")
def list_images(json: _Json = False) -> None:  # noqa: FBT002
    """List the images there are. One without a name is what an older image of that name was."""
    from ostler.cli.output import print_json, print_table

    rows = _rows()
    if json:
        print_json(rows)
        return
    table = [
        (", ".join(row["names"]) or "-", row["digest"][:12], row.get("os", "damaged"), row.get("kernel", ""),
         _shown_size(row.get("disk_bytes")), str(row.get("created", ""))[:10])
        for row in rows
    ]  # fmt: skip
    print_table(("NAME", "DIGEST", "SYSTEM", "KERNEL", "ON DISK", "MADE"), table)


@app.command("inspect")
def inspect_image(
    name: _Which,
    json: _Json = False,  # noqa: ARG001, FBT002
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file of it first.")] = False,  # noqa: FBT002
) -> None:
    """Print everything about an image, as JSON."""
    from ostler.cli.output import print_json
    from ostler.images import store

    image = store.get(name)
    if verify:
        store.verify(image)
    print_json(_described(image))


@app.command("rm")
def remove_images(
    names: Annotated[list[str], typer.Argument(help="Names or digests.", autocompletion=complete_names)],
    json: _Json = False,  # noqa: FBT002
) -> None:
    """Remove names, and each image with the last of its names. One that a guest uses stays."""
    from ostler.cli.output import print_json
    from ostler.images import store

    removed = []
    for name in names:
        removed += (gone := store.remove(name))
        if not json:  # at once: the next may be in use, and that ends the command
            typer.echo("\n".join(gone))
    if json:
        print_json({"removed": removed})


@app.command("prune")
def prune_images(json: _Json = False) -> None:  # noqa: FBT002
    """Remove images that have no name and that no guest uses, and what killed builds left."""
    from ostler.cli.output import print_json
    from ostler.images import store

    removed, freed_bytes = store.prune()
    if json:
        print_json({"removed": removed, "freed_bytes": freed_bytes})
    else:
        typer.echo(f"{len(removed)} removed, {_shown_size(freed_bytes)} given back")


def _rows() -> list[dict[str, Any]]:
    from ostler.errors import ImageError
    from ostler.images import store

    names = store.names()
    rows = []
    for digest in store.stored():
        row: dict[str, Any] = {"digest": digest, "names": sorted(name for name, its in names.items() if its == digest)}
        try:
            image = store.get(digest)
            system = image.config.os.pretty_name or image.config.os.id or image.config.source
            row |= {"os": system, "kernel": image.config.kernel.release, "disk_bytes": image.disk_bytes,
                    "created": image.config.created.isoformat(timespec="seconds"), "boot": image.config.boot,
                    "reference": image.config.reference, "damaged": False}  # fmt: skip
        except ImageError as error:
            row |= {"damaged": True, "reason": str(error)}
        rows.append(row)
    return sorted(rows, key=lambda row: (not row["names"], row["names"], row["digest"]))


def _described(image: Image) -> dict[str, Any]:
    from ostler.images import store

    names = sorted(name for name, digest in store.names().items() if digest == image.digest)
    paths = {"path": str(image.path), "disk_bytes": image.disk_bytes}
    return {"digest": image.digest, "names": names, **paths, **image.config.model_dump(mode="json")}


def _made(image: Image, *, json: bool) -> None:
    from ostler.cli.output import print_json

    if json:
        print_json(_described(image))
    else:
        typer.echo(f"{image.name} {image.digest[:12]}")


def _bytes(size: str | None) -> int:
    from ostler.config.sizes import parse_size
    from ostler.errors import BadRequest
    from ostler.images.rootdisk import DEFAULT_SIZE_BYTES

    if size is None:
        return DEFAULT_SIZE_BYTES
    try:
        return parse_size(size) // 4096 * 4096
    except ValueError as error:
        raise BadRequest(f"size {size!r}: {error}") from error


def _check_packages(packages: list[str]) -> None:
    import re

    from ostler.errors import BadRequest

    for package in packages:
        if not re.fullmatch(r"[a-z0-9][a-z0-9+.:-]*", package, re.ASCII):
            raise BadRequest(f"package {package!r}: expected the name of a Debian package")


def _shown_size(size_bytes: int | None) -> str:
    if size_bytes is None:
        return "-"
    return f"{size_bytes / (1 << 30):.1f} GiB" if size_bytes >= 1 << 30 else f"{size_bytes >> 20} MiB"
