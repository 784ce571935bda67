"""`ostler run` without an image: one kernel in this very process, its console on standard input and output.

Values are judged before anything is fetched, and files before an accelerator is opened: a typing mistake costs no wait.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ostler.cli.phases import Phases, Tap
    from ostler.config import GuestRequest, GuestSpec
    from ostler.images.progress import Progress
    from ostler.vmm import RunResult

CONSOLE = "console=ttyS0"
# What a guest has of its image and its agent.
_NEEDS_IMAGE = ("name", "hostname", "volumes", "env", "workdir", "user", "persist", "dns", "ssh_keys")


def run_kernel(request: GuestRequest, *, timing: bool) -> int:
    """Run the guest to its end; the exit status."""
    from ostler.cli import progress
    from ostler.cli.phases import Phases
    from ostler.config import parse_guest
    from ostler.errors import BadRequest

    for field in _NEEDS_IMAGE:
        if getattr(request, field):
            raise BadRequest(f"{field}: expected an image beside it; a kernel alone has nobody inside to do that")
    phases = Phases()
    kernel = str(request.kernel) if request.kernel else None
    # Judged before the kernel is there, which may take a while to fetch.
    spec = parse_guest(
        kernel=kernel or os.devnull, initrd=request.initrd, append=request.append or "", memory=request.memory,
        cpus=request.cpus, cpu=request.cpu, accel=request.accel, disks=request.paced(*request.disks), nets=request.nets,
        ports=request.ports, test_devices=request.test_devices, **request.treatment,
    )  # fmt: skip
    with progress.shown() as shown:
        spec = with_material(spec, image=request.image, kernel=kernel, append=request.append, progress=shown)
    phases.end("fetch")
    result = run(spec, phases if timing else None)
    if timing:
        sys.stderr.write(phases.table() + "\n")
    return result.exit_status


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

    if spec.accel == "kvm":
        _warn_of_kvm()
    with ExitStack() as stack:
        stack.enter_context(terminal.orderly_signals())
        stack.enter_context(terminal.raw(0))
        keys = terminal.EscapeFilter() if os.isatty(0) else None
        tap = stack.enter_context(_tap()) if phases else None
        result = vmm.run(spec, console_in=terminal.standard_input(), console_out=tap.fd if tap else 1, keys=keys)
        ended = time.monotonic()
    if phases and tap:
        phases.guest(ended=ended, run_s=result.timings_s["run"], marks=tap.marks)
    if result.masked_features:
        logs.event("processor model reduced", missing=" ".join(result.masked_features))
    return result


def _warn_of_kvm() -> None:
    """A KVM that emulates its guests works, and is not what anybody who asks for KVM expects."""
    from ostler.accel.probe import warning

    if text := warning("kvm"):
        sys.stderr.write(f"ostler: warning: {text}\n")


def _tap() -> Tap:
    from ostler.cli.phases import Tap

    return Tap(1)
