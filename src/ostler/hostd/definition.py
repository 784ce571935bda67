"""A guest as the host service knows it: the description `ostler run -f` reads, and a table `[host]` beside it.

    image = "debian"
    memory = "1G"
    command = ["postgres"]

    [host]
    autostart = true
    depends_on = ["storage"]
    restart = { policy = "on-failure" }
    reserve = { cpu = 0.5, disk = "10G" }

Values are judged here and nowhere else. A definition is kept as it was given, so that a newer Ostler judges it anew.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from ostler.config import parse_size
from ostler.config.complaints import bad_request
from ostler.config.request import GuestRequest, read_table, validate_request
from ostler.errors import BadRequest

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,39}$"
MAX_CPUS_RESERVED = 4096
MAX_BYTES = 1 << 60
MAX_DEPENDENCIES = 64
_NAME = re.compile(NAME_PATTERN, re.ASCII)


def _size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


def _guest_name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError("expected up to 40 letters, digits, '_', '.' and '-'")
    return value


Size = Annotated[
    int, BeforeValidator(_size), Field(strict=True, ge=0, le=MAX_BYTES),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0, "maximum": MAX_BYTES},
                              {"type": "string", "pattern": r"^[0-9]{1,6}[KMG]$"}]}),
]  # fmt: skip
GuestName = Annotated[str, AfterValidator(_guest_name), WithJsonSchema({"type": "string", "pattern": NAME_PATTERN})]
Seconds = Annotated[float, Field(strict=True, ge=0, le=86_400, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Reserve(_Part):
    """What is kept for a guest, whether it uses it or not. Its memory and its ports always are."""

    cpu: Annotated[float, Field(strict=True, ge=0, le=MAX_CPUS_RESERVED, allow_inf_nan=False)] = 0
    """Processors' time, in processors: 0.5 is half of one. `cpu_reserve = 50` says the same."""
    disk: Size = 0
    """Bytes on the file system where throw-away disks grow."""
    disk_bandwidth: Size = 0
    """Bytes a second, of all disks together."""
    network_bandwidth: Size = 0
    """Bytes a second, each way."""


class Restart(_Part):
    """Whether a guest that has ended begins again, and after how long."""

    policy: Literal["never", "on-failure", "always"] = "never"
    """`on-failure`: after a crash, or an exit status other than 0. Who stops a guest has it stopped."""
    delay_s: Seconds = 1
    """Before the first restart; doubled before each further one."""
    max_delay_s: Seconds = 60
    reset_after_s: Seconds = 300
    """A guest that ran this long has proved itself: its next end is a first one."""
    limit: Annotated[int, Field(strict=True, ge=0, le=1_000_000)] = 0
    """Give up after so many in a row; 0: never."""


class HostSection(_Part):
    """How the host service treats the guest."""

    autostart: Annotated[bool, Field(strict=True)] = False
    """Start it with the service; what it reserves is kept for it even while it does not run."""
    depends_on: Annotated[tuple[GuestName, ...], Field(max_length=MAX_DEPENDENCIES)] = ()
    """Guests that have to be ready before this one starts, and that end after it."""
    delay_s: Seconds = 0
    """Waited between its dependencies' readiness and its start."""
    readiness: Literal["agent", "none"] = "agent"
    """`agent`: ready when its agent answers, is configured, and the command runs. `none`: as soon as it runs."""
    ready_timeout_s: Annotated[float, Field(strict=True, gt=0, le=86_400, allow_inf_nan=False)] = 600
    stop_grace_s: Annotated[float, Field(strict=True, ge=0, le=3600, allow_inf_nan=False)] = 30
    restart: Restart = Restart()
    reserve: Reserve = Reserve()


class Definition:
    """One judged definition: `request` for the guest, `host` for the service, `table` as it was given."""

    __slots__ = ("host", "name", "request", "table")

    def __init__(self, name: str, request: GuestRequest, host: HostSection, table: dict[str, Any]) -> None:
        self.name, self.request, self.host, self.table = name, request, host, table


def parse(name: str | None, table: dict[str, Any], *, folder: Path = Path("/")) -> Definition:
    """Judge a definition; relative paths in it start at `folder`. Raises BadRequest of one line.

    A name in the table and one beside it have to agree.
    """
    rest = dict(table)
    section = rest.pop("host", {})
    named = rest.get("name")
    chosen = name if name is not None else named
    if chosen is None:
        raise BadRequest("name: missing, expected the guest's name")
    if named is not None and named != chosen:
        raise BadRequest(f"name {named!r}: expected {chosen!r}, under which it is to be defined")
    host = _host_section(section)
    request = validate_request({**rest, **_shares(host, rest), "name": chosen}, folder=folder)
    if request.image is None and request.kernel is None:
        raise BadRequest(f"guest {chosen!r}: image: missing, expected the name of one, or a kernel")
    if chosen in host.depends_on:
        raise BadRequest(f"guest {chosen!r}: host.depends_on: depends on itself")
    return Definition(str(chosen), request, host, {**request_table(request, rest), "host": dict(section)})


def _shares(host: HostSection, given: dict[str, Any]) -> dict[str, float]:
    """What is reserved of processors is kept by those who share them out (docs/scheduling.md), in their unit."""
    if not host.reserve.cpu:
        return {}
    if "cpu_reserve" in given:
        raise BadRequest(f"cpu_reserve {given['cpu_reserve']!r}: expected either this or host.reserve.cpu, not both")
    return {"cpu_reserve": host.reserve.cpu * 100}


def request_table(request: GuestRequest, given: dict[str, Any]) -> dict[str, Any]:
    """What was given, with paths made absolute, as JSON can hold it."""
    found: dict[str, Any] = request.model_dump(mode="json", include=set(given) | {"name"})
    return found


def read(path: Path, *, name: str | None = None) -> Definition:
    """The definition in a TOML file. Raises BadRequest."""
    return parse(name, read_table(path), folder=path.parent)


def _host_section(section: object) -> HostSection:
    if not isinstance(section, dict):
        raise BadRequest(f"host {section!r}: expected a table")
    try:
        return HostSection.model_validate(section)
    except ValidationError as error:
        found = str(bad_request(error, whole="host"))
        raise BadRequest(found if found.startswith("host") else f"host.{found}") from error
