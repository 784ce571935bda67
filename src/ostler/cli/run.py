"""`ostler run`: a guest from the command line, an image's or a kernel's, attached or by itself.

Everything given is text until `ostler.config` has parsed it, so that there is one parser and one kind of complaint.
A name is an image's unless it is one of the kernels of `ostler kernel ls`, no image in the store has that name, and
nothing is asked for that only an image has (a command, `-d`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ostler.cli.inside import Env, Tty, User, Workdir

if TYPE_CHECKING:
    from ostler.config import GuestRequest

_EXAMPLES = """
[bold]One command in a throw-away guest:[/bold]  ostler run debian -- python3 -c 'print(6*7)'

[bold]A shell:[/bold]  ostler run debian

[bold]A service that stays:[/bold]  ostler run -d -p 8080:80 -v ./site:/srv debian -- python3 -m http.server -d /srv 80

[bold]From a file:[/bold]  ostler run -f guest.toml     ([italic]ostler schema[/italic] says what it may hold)

[bold]A shell on Debian 12's kernel alone:[/bold]  ostler run

[bold]A kernel of your own:[/bold]  ostler run --kernel bzImage --initrd my.img --append "console=ttyS0 quiet"

[bold]Keys on a console:[/bold]  Ctrl-] q ends the guest at once; Ctrl-] Ctrl-] sends Ctrl-] to it.

[bold]Exit status:[/bold]  the command's own; else 0 orderly power-off, 1 the host refused something, 2 bad request,
3 the guest crashed, 125 the guest was lost, 126 the command is not executable, 127 it is not there.
"""


def _complete_image(incomplete: str) -> list[str]:
    from ostler.images import KERNELS, store

    return [name for name in [*store.names(), *KERNELS] if name.startswith(incomplete)]


def _complete_cpu(incomplete: str) -> list[str]:
    from ostler.accel.models import ALIASES, MODELS

    return [name for name in (*MODELS, *ALIASES) if name.startswith(incomplete)]


Repeated = list[str] | None
_IMAGE, _MACHINE, _KERNEL = "A guest of an image", "Its machine", "A kernel of your own"
_HOST = "Its share of the host's processors"


def command(  # noqa: PLR0913 - one parameter per option
    context: typer.Context,
    image: Annotated[
        str | None, typer.Argument(help="An image, or a kernel of `ostler kernel ls`.", autocompletion=_complete_image)
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", metavar="TOML", help="The guest's description.")] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Let it run by itself; print its name.")] = False,  # noqa: FBT002
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the guest; by default made up.", rich_help_panel=_IMAGE)
    ] = None,
    remove: Annotated[  # noqa: FBT002
        bool, typer.Option("--rm", help="With -d: leave nothing when it ends.", rich_help_panel=_IMAGE)
    ] = False,
    volume: Annotated[
        Repeated,
        typer.Option(
            "--volume", "-v", metavar="HOST:GUEST[:ro]", help="Share a folder; repeatable.", rich_help_panel=_IMAGE
        ),
    ] = None,
    publish: Annotated[
        Repeated,
        typer.Option(
            "--publish",
            "-p",
            metavar="[ADDR:]HOST:GUEST[/udp]",
            help="Forward a port; repeatable.",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    env: Env = None,
    workdir: Workdir = None,
    user: User = None,
    tty: Tty = None,
    net: Annotated[
        Repeated,
        typer.Option(
            metavar="passt|tap=NAME|bridge=NAME|none", help="A network; repeatable.", rich_help_panel=_MACHINE
        ),
    ] = None,
    disk: Annotated[
        Repeated,
        typer.Option(
            metavar="FILE[,ro][,overlay][,format=…][,serial=…][,rate=SIZE]",
            help="One more disk; repeatable.",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    disk_rate: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Bytes a second for each disk without a rate of its own.", rich_help_panel=_MACHINE
        ),
    ] = None,
    persist: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Keep the root disk's changes under this name.", rich_help_panel=_IMAGE),
    ] = None,
    seed: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="cloud-init's user data: a file, or a folder with user-data.", rich_help_panel=_IMAGE
        ),
    ] = None,
    hostname: Annotated[
        str | None, typer.Option(metavar="NAME", help="In the guest; by default its name.", rich_help_panel=_IMAGE)
    ] = None,
    dns: Annotated[
        Repeated, typer.Option(metavar="ADDRESS", help="A name server; repeatable.", rich_help_panel=_IMAGE)
    ] = None,
    ssh_key: Annotated[
        Repeated, typer.Option(metavar="KEY", help="A public key for root; repeatable.", rich_help_panel=_IMAGE)
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="512M (the default), 2G, …", show_default=False, rich_help_panel=_MACHINE),
    ] = None,
    cpus: Annotated[
        str | None,
        typer.Option(metavar="N", help="Virtual processors; 1.", show_default=False, rich_help_panel=_MACHINE),
    ] = None,
    cpu: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Processor model.", autocompletion=_complete_cpu, rich_help_panel=_MACHINE),
    ] = None,
    cpu_weight: Annotated[
        str | None,
        typer.Option(metavar="N", help="Its share beside other guests: 1 to 10000; 100.", rich_help_panel=_HOST),
    ] = None,
    cpu_cap: Annotated[
        str | None,
        typer.Option(metavar="PERCENT", help="Of one host CPU, at most: 25, 150%.", rich_help_panel=_HOST),
    ] = None,
    cpu_reserve: Annotated[
        str | None,
        typer.Option(metavar="PERCENT", help="Of one host CPU, whatever others want.", rich_help_panel=_HOST),
    ] = None,
    pin: Annotated[
        str | None, typer.Option(metavar="LIST", help="Host CPUs to run on: 0,2-3.", rich_help_panel=_HOST)
    ] = None,
    accel: Annotated[
        str | None, typer.Option(metavar="auto|kvm|soft", help="What runs the processors.", rich_help_panel=_MACHINE)
    ] = None,
    kernel: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="bzImage, ELF (PVH or 64-bit) or multiboot program.", rich_help_panel=_KERNEL
        ),
    ] = None,
    initrd: Annotated[
        str | None, typer.Option(metavar="FILE", help="Initial RAM disk.", rich_help_panel=_KERNEL)
    ] = None,
    append: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="Kernel command line; without a kernel of yours, added to it.", rich_help_panel=_KERNEL
        ),
    ] = None,
    calls: Annotated[
        str | None,
        typer.Option(metavar="RIGHTS", help="Ostler's own it may make: log,keys,…; none.", rich_help_panel=_MACHINE),
    ] = None,
    on: Annotated[
        Repeated,
        typer.Option(
            "--on", metavar="FAULT=POLICY", help="panic=reset, hang=pause, …; repeatable.", rich_help_panel=_MACHINE
        ),
    ] = None,
    cold: Annotated[  # noqa: FBT002
        bool, typer.Option("--cold", help="Boot, though a booted guest is cached.", rich_help_panel=_IMAGE)
    ] = False,
    timing: Annotated[bool, typer.Option("--timing", help="Say how long each phase took.")] = False,  # noqa: FBT002
    test_devices: Annotated[bool, typer.Option("--test-devices", hidden=True)] = False,  # noqa: FBT002
    engine: Annotated[
        str | None,
        typer.Option(metavar="translate|interp|lockstep", help="How the software CPU runs.", rich_help_panel=_MACHINE),
    ] = None,
    debug_engine: Annotated[
        str | None,
        typer.Option(metavar="blocks|stats", help="What it shows on standard error.", rich_help_panel=_MACHINE),
    ] = None,
    debug: Annotated[  # noqa: FBT002
        bool, typer.Option("--debug", help="Show tracebacks, registers of a crashed guest, and debug logs.")
    ] = False,
) -> None:
    """Run a guest: a command in an image, or a kernel with its console on standard input and output."""
    from ostler.cli import logs
    from ostler.cli.engine import choose
    from ostler.cli.faults import policies
    from ostler.config import parse_request
    from ostler.config.request import read_request

    logs.configure(debug=debug)
    choose(engine, debug_engine)
    words: tuple[str, ...] | None = context.obj or None
    given = {
        "image": image, "kernel": kernel, "initrd": initrd, "append": append, "command": words, "name": name,
        "hostname": hostname, "memory": memory, "cpus": cpus, "cpu": cpu, "accel": accel, "disks": disk,
        "disk_rate": disk_rate, "nets": net, "ports": publish, "volumes": volume, "env": env, "workdir": workdir,
        "user": user, "persist": persist,
        "seed": seed, "cold": cold or None,
        "cpu_weight": cpu_weight, "cpu_cap": cpu_cap, "cpu_reserve": cpu_reserve, "cpu_pin": pin,
        "calls": calls, **policies(on), "dns": dns, "ssh_keys": ssh_key, "test_devices": test_devices or None,
    }  # fmt: skip
    request = read_request(file, **given) if file else parse_request(**given)
    if is_kernel_alone(request, detach=detach):
        from ostler.cli.kernel_run import run_kernel

        raise typer.Exit(run_kernel(request, timing=timing))
    from ostler.cli.image_run import run_attached, run_detached

    if detach:
        run_detached(request, remove=remove)
    else:
        raise typer.Exit(run_attached(request, tty=tty, timing=timing))


command.__doc__ = f"{command.__doc__}\n{_EXAMPLES}"


def is_kernel_alone(request: GuestRequest, *, detach: bool) -> bool:
    """Whether the request is for a kernel without an image. Raises BadRequest for a mixture."""
    from ostler.errors import BadRequest
    from ostler.images import KERNELS, store

    if request.image is not None and not (request.image in KERNELS and store.find(request.image) is None):
        return False
    if request.command or detach:
        what = f"command {request.command[0]!r}" if request.command else "--detach"
        raise BadRequest(f"{what}: expected an image to run it in, such as debian")
    return True
