"""`ostler run`: one guest from the command line to its end.

Everything given is text until `ostler.config` has parsed it, so that there is one parser and one kind of complaint.
Values are judged before anything is fetched, and files before an accelerator is opened: a typing mistake costs no wait.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ostler.cli.phases import Phases
    from ostler.config import GuestSpec
    from ostler.images.progress import Progress
    from ostler.vmm import RunResult

CONSOLE = "console=ttyS0"

_EXAMPLES = """
[bold]A shell on Debian 12's kernel:[/bold]  ostler run

[bold]On Debian 13's, with two processors:[/bold]  ostler run debian-13-cloud --cpus 2

[bold]A report instead of a shell:[/bold]  ostler run </dev/null

[bold]Your own:[/bold]  ostler run --kernel bzImage --initrd my.img --append "console=ttyS0 quiet"

[bold]Keys:[/bold]  Ctrl-] q ends the guest at once; Ctrl-] Ctrl-] sends Ctrl-] to it.

[bold]Exit status:[/bold]  0 orderly power-off, 1 the host refused something, 2 bad request, 3 the guest crashed.
"""


def _complete_image(incomplete: str) -> list[str]:
    from ostler.images import KERNELS

    return [name for name in KERNELS if name.startswith(incomplete)]


def _complete_cpu(incomplete: str) -> list[str]:
    from ostler.accel.models import MODELS

    return [name for name in MODELS if name.startswith(incomplete)]


def command(  # noqa: PLR0913 - one parameter per option
    image: Annotated[
        str | None,
        typer.Argument(help="A kernel that Ostler fetches; see `ostler kernel ls`.", autocompletion=_complete_image),
    ] = None,
    kernel: Annotated[
        str | None, typer.Option(metavar="FILE", help="bzImage, ELF (PVH or 64-bit) or multiboot program.")
    ] = None,
    initrd: Annotated[str | None, typer.Option(metavar="FILE", help="Initial RAM disk.")] = None,
    append: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Kernel command line; without a kernel of yours, added to it.")
    ] = None,
    memory: Annotated[str, typer.Option(metavar="SIZE", help="Guest memory: 512M, 2G.")] = "512M",
    cpus: Annotated[str, typer.Option(metavar="N", help="Virtual processors.")] = "1",
    cpu: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Processor model.", autocompletion=_complete_cpu)
    ] = None,
    disk: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[,ro][,overlay][,serial=TEXT]", help="A disk, raw; repeatable."),
    ] = None,
    accel: Annotated[str, typer.Option(metavar="auto|kvm|soft", help="What runs the processors.")] = "auto",
    timing: Annotated[bool, typer.Option("--timing", help="Say how long each phase took.")] = False,  # noqa: FBT002
    test_devices: Annotated[bool, typer.Option("--test-devices", hidden=True)] = False,  # noqa: FBT002
    debug: Annotated[  # noqa: FBT002
        bool, typer.Option("--debug", help="Show tracebacks, registers of a crashed guest, and debug logs.")
    ] = False,
) -> None:
    """Run a guest; its console is standard input and output."""
    from ostler.cli import logs, progress
    from ostler.cli.phases import Phases
    from ostler.config import parse_guest

    logs.configure(debug=debug)
    phases = Phases()
    # Judged before the kernel is there, which may take a while to fetch.
    spec = parse_guest(
        kernel=kernel or os.devnull, initrd=initrd, append=append or "", memory=memory, cpus=cpus, cpu=cpu,
        accel=accel, disks=disk, test_devices=test_devices,
    )  # fmt: skip
    with progress.shown() as shown:
        spec = with_material(spec, image=image, kernel=kernel, append=append, progress=shown)
    phases.end("fetch")
    result = run(spec, phases if timing else None)
    if timing:
        sys.stderr.write(phases.table() + "\n")
    raise typer.Exit(result.exit_status)


command.__doc__ = f"{command.__doc__}\n{_EXAMPLES}"


def with_material(
    spec: GuestSpec, *, image: str | None, kernel: str | None, append: str | None, progress: Progress
) -> GuestSpec:
    """Complete `spec` with what the user left open: kernel, initrd, command line."""
    from ostler.errors import BadRequest
    from ostler.images import DEFAULT_KERNEL, initrd, kernels

    if kernel is not None:
        if image is not None:
            raise BadRequest(f"image {image!r} and --kernel {kernel!r}: only one kernel can be booted")
        return spec if append is not None else spec.model_copy(update={"append": CONSOLE})
    ours = kernels.fetch(image or DEFAULT_KERNEL, progress)
    words = [CONSOLE, *([append] if append else [])]
    if spec.initrd is None:
        words += guest_words(append or "")
    ramdisk = spec.initrd or initrd.busybox(ours, progress)
    return spec.model_copy(update={"kernel": ours.image, "initrd": ramdisk, "append": " ".join(words)})


def guest_words(append: str) -> list[str]:
    """What Ostler's own initrd is to know: a shell and its terminal, or that there is nobody to give one."""
    from ostler.cli import terminal

    if not os.isatty(0):
        return [] if "ostler." in append else ["ostler.report"]
    size = terminal.size(0)
    words = [f"ostler.tty={size.lines}x{size.columns}"] if size else []
    return [*words, f"ostler.term={os.environ.get('TERM', 'linux')}"]


def run(spec: GuestSpec, phases: Phases | None = None) -> RunResult:
    """Run the guest with this process's terminal as its console."""
    from ostler import vmm
    from ostler.cli import logs, terminal
    from ostler.cli.phases import Tap

    with ExitStack() as stack:
        stack.enter_context(terminal.orderly_signals())
        stack.enter_context(terminal.raw(0))
        keys = terminal.EscapeFilter() if os.isatty(0) else None
        tap = stack.enter_context(Tap(1)) if phases else None
        result = vmm.run(spec, console_in=_standard_input(), console_out=tap.fd if tap else 1, keys=keys)
        ended = time.monotonic()
    if phases and tap:
        phases.guest(ended=ended, run_s=result.timings_s["run"], marks=tap.marks)
    if result.masked_features:
        logs.event("processor model reduced", missing=" ".join(result.masked_features))
    return result


def _standard_input() -> int | None:
    """Standard input, or None where the caller closed it."""
    try:
        os.fstat(0)
    except OSError:
        return None
    return 0
