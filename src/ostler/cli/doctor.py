"""`ostler doctor`: what this host can do, and why `--accel auto` chooses what it chooses."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from ostler.cli.output import Json, print_json

if TYPE_CHECKING:
    from ostler.accel.probe import ProbeReport


class Finding(NamedTuple):
    """One line of the report; `good` is None where there is nothing to judge."""

    subject: str
    good: bool | None
    text: str


def command(
    as_json: Json = False,  # noqa: FBT002
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,  # noqa: ARG001, FBT002
) -> None:
    """Say what this host can do and why `--accel auto` chose what it chose.

    The exit status is 1 where no accelerator can run a guest.
    """
    from ostler.accel.probe import probe

    report = probe(cache=False)
    findings = [*accelerators(report), *surroundings(), *helpers()]
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        _print(findings)
    if report.choice is None:
        raise typer.Exit(1)


def _print(findings: Iterable[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    marks = {True: "[green]yes[/green]", False: "[red]no[/red]", None: ""}
    for finding in findings:
        table.add_row(finding.subject, marks[finding.good], finding.text)
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)


def accelerators(report: ProbeReport) -> Iterator[Finding]:
    """What can run a guest here."""
    from ostler.accel.probe import KvmState

    yield Finding("--accel auto", report.choice is not None, report.text)
    yield Finding("KVM", report.kvm.state is KvmState.NATIVE, report.kvm.text)
    soft = f"{report.soft_text}, {engine_version()}" if report.soft_available else report.soft_text
    yield Finding("software CPU", report.soft_available, soft)


def engine_version() -> str:
    """Version and file of the engine that is built."""
    from importlib import import_module

    engine = import_module("ostler._soft")
    return f"version {getattr(engine, '__version__', 'unknown')} ({engine.__file__})"


def surroundings() -> Iterator[Finding]:
    """The rest of the host, as far as running guests depends on it."""
    from ostler import __version__

    yield Finding("Ostler", None, f"{__version__}, Python {platform.python_version()}, Linux {platform.release()}")
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cpus = len(os.sched_getaffinity(0))
    yield Finding("host", None, f"{cpus} CPUs, {pages >> 20:,} MiB of memory free, {platform.machine()}")
    yield _terminal()
    yield _apt()
    yield _cache()
    yield _runtime()


# What guests of images can have besides, the Debian package it is in, and what there is not without it.
HELPERS = {
    "mmdebstrap": ("mmdebstrap", "images built from Debian"),
    "mke2fs": ("e2fsprogs", "root disks of images"),
    "passt": ("passt", "the network that needs no privileges, forwarded ports"),
    "virtiofsd": ("qemu-system-common or virtiofsd", "shared folders"),
    "qemu-storage-daemon": ("qemu-system-common", "qcow2 disks"),
    "qemu-img": ("qemu-utils", "ostler disk, imported qcow2 images"),
    "skopeo": ("skopeo", "images from registries"),
    "umoci": ("umoci", "images from registries"),
}
HELPER_FOLDERS = ("/usr/sbin", "/sbin", "/usr/libexec", "/usr/lib/qemu")


def helpers() -> Iterator[Finding]:
    """Programs that guests of images are served by."""
    from ostler.errors import OstlerError
    from ostler.images import initrd

    try:
        yield Finding("agent", True, str(initrd.agent_program()))
    except OstlerError as error:
        yield Finding("agent", False, str(error))
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *HELPER_FOLDERS])
    for program, (package, purpose) in HELPERS.items():
        found = shutil.which(program, path=path)
        yield Finding(program, found is not None, found or f"not here; {package} has it: {purpose}")


def _runtime() -> Finding:
    from ostler.control import runtime
    from ostler.errors import OstlerError

    try:
        running = sum(entry.is_running() for entry in runtime.entries())
    except OstlerError as error:
        return Finding("guests", False, str(error))
    return Finding("guests", None, f"{running} running; their sockets are in {runtime.root()}")


def _terminal() -> Finding:
    if not sys.stdin.isatty():
        return Finding("terminal", None, "standard input is none; a guest's console is read from it as it comes")
    size = shutil.get_terminal_size()
    return Finding("terminal", True, f"{os.environ.get('TERM', 'unknown')}, {size.columns} × {size.lines}")


def _apt() -> Finding:
    from ostler.errors import ImageError
    from ostler.images import apt
    from ostler.images.initrd import BUSYBOX_RELEASE

    try:
        apt.host_sources(BUSYBOX_RELEASE)
    except ImageError as error:
        return Finding("apt", False, str(error))
    return Finding("apt", True, f"reaches Debian's archive by the sources of this host ({apt.host_release()})")


def _cache() -> Finding:
    from ostler.images import cache, kernels

    names = [kernel.name for kernel in kernels.cached()]
    root = cache.root().absolute()
    free = shutil.disk_usage(next(path for path in (root, *root.parents) if path.exists())).free
    return Finding("cache", None, f"{root}: {', '.join(names) or 'no kernels yet'}; {free >> 20:,} MiB free")
