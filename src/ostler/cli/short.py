"""The short way of `ostler run --kernel FILE …` and `ostler run IMAGE -- COMMAND…`: in the guest before the command
line's own libraries would be loaded.

Only plain requests take it: one kernel or image and options from the lists below, each given once and of a form that
needs no second look. Whatever else the arguments are, right or wrong, is the long way's to understand and to complain
about, so that there is one parser of all that users write and this is none beside it. Both make the same guest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ostler.config.defaults import PlainTreatment

if TYPE_CHECKING:
    from ostler.client.plan import Plan
    from ostler.config import GuestSpec
    from ostler.config.schedule import Schedule

_PLAIN = {
    "--kernel": re.compile(r"[^\0]+"),
    "--initrd": re.compile(r"[^\0]+"),
    "--append": re.compile(r"[ -~]*"),
    "--memory": re.compile(r"[1-9][0-9]{0,4}[MG]"),
    "--cpus": re.compile(r"[1-9][0-9]?"),
    "--accel": re.compile(r"kvm|soft|auto"),
}
_OF_IMAGES = {"--memory", "--cpus", "--accel"}
_IMAGE = re.compile(r"[a-z0-9][a-z0-9._:/-]*")
_UNITS = {"M": 1 << 20, "G": 1 << 30}
_CONSOLE = "console=ttyS0"
_DEFAULT_MEMORY = "512M"
_LEAST_MEMORY_BYTES = 16 << 20


@dataclass(frozen=True)
class PlainSchedule:
    """A Schedule's fields, which is made of what this way does without."""

    weight: int
    cap: float | None
    reserve: float
    pin: tuple[int, ...] | None


@dataclass(frozen=True, kw_only=True)
class PlainGuest(PlainTreatment):
    """A GuestSpec's fields, as `parse_guest` would fill them for a plain request."""

    kernel: Path
    initrd: Path | None
    append: str
    memory: int
    cpus: int
    accel: str
    cpu: str
    disks: tuple[()] = ()
    nets: tuple[()] = ()
    ports: tuple[()] = ()
    shares: tuple[()] = ()
    vsock_cid: None = None
    virtio_console: bool = False
    rng: bool = True
    balloon: bool = False
    test_devices: bool = False

    @property
    def schedule(self) -> Schedule:
        """Its share of the host's processors: nothing in particular."""
        return cast("Schedule", PlainSchedule(self.cpu_weight, self.cpu_cap, self.cpu_reserve, self.cpu_pin))

    @property
    def memory_bytes(self) -> int:
        """`memory` under a name with its unit."""
        return self.memory


def run(arguments: list[str]) -> int | None:
    """Run the guest and return its exit status; None for what has to go the long way."""
    guest = plain_guest(arguments)
    if guest is None:
        return None
    from ostler.cli import kernel_run

    return kernel_run.run(cast("GuestSpec", guest)).exit_status


def run_image(arguments: list[str], words: tuple[str, ...]) -> int | None:
    """Run the command in a guest of an image; its exit status, or None for what has to go the long way."""
    given = plain_image(arguments)
    if given is None or not words:
        return None
    import os

    plain = not given["cold"] and not os.environ.get("OSTLER_COLD")
    if plain:
        from ostler.cli import quick_run

        if (status := quick_run.run(given, words)) is not None:
            return status
    from ostler.cli import image_run
    from ostler.config import parse_request

    def planned(plan: Plan) -> None:
        image_run.leave_ticket(given, words, plan)

    request = parse_request(command=words, **given)
    return image_run.run_attached(request, tty=None, timing=False, planned=planned if plain else None)


def plain_image(arguments: list[str]) -> dict[str, object] | None:
    """What a plain request says of the guest, but for the command."""
    cold = [each for each in arguments if each == "--cold"]
    rest = [each for each in arguments[1:] if each != "--cold"]
    at = next((at for at in range(0, len(rest), 2) if not rest[at].startswith("-")), None)
    if arguments[:1] != ["run"] or len(cold) > 1 or at is None or not _IMAGE.fullmatch(rest[at]):
        return None
    options = _options(["run", *rest[:at], *rest[at + 1 :]])
    if options is None or not set(options) <= _OF_IMAGES:
        return None
    return {"image": rest[at], "cold": bool(cold), **{name[2:]: value for name, value in options.items()}}


def plain_guest(arguments: list[str]) -> PlainGuest | None:
    """The guest of a plain request."""
    given = _options(arguments)
    if given is None or "--kernel" not in given:
        return None
    import os

    from ostler.accel.models import DEFAULT_MODEL

    size = given.get("--memory", _DEFAULT_MEMORY)
    memory = int(size[:-1]) * _UNITS[size[-1]]
    if not _LEAST_MEMORY_BYTES <= memory <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        return None
    return PlainGuest(
        kernel=Path(given["--kernel"]),
        initrd=Path(given["--initrd"]) if "--initrd" in given else None,
        append=given.get("--append", _CONSOLE),
        memory=memory,
        cpus=int(given.get("--cpus", "1")),
        accel=given.get("--accel", "auto"),
        cpu=DEFAULT_MODEL,
    )


def _options(arguments: list[str]) -> dict[str, str] | None:
    """Options and their values, all plain; None where anything is not."""
    if arguments[:1] != ["run"] or len(arguments) % 2 == 0:
        return None
    given: dict[str, str] = {}
    for name, value in zip(arguments[1::2], arguments[2::2], strict=True):
        form = _PLAIN.get(name)
        if form is None or name in given or value.startswith("-") or not form.fullmatch(value):
            return None
        given[name] = value
    return given
