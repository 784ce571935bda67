"""What a user asks for: an image or a kernel, a command, and how the guest is to be.

The command line, a TOML file (`ostler run -f`), the Python API and `ostler schema` all mean this one model. The client
makes a GuestSpec of it, which is what a VM process understands: images found, folders absolute, nothing left to choose.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ostler.config.complaints import bad_request
from ostler.config.devices import Address, DiskSpec, NetSpec, PortSpec, Rate, ShareSpec, absolute
from ostler.config.guest import DEFAULT_MEMORY_BYTES, Accelerator, CpuModel, Cpus, Memory, TextLine
from ostler.config.schedule import HostCpusHere
from ostler.config.treatment import Treatment
from ostler.errors import BadRequest

MAX_FILE_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}", re.ASCII)
_HOSTNAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?", re.ASCII)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError("expected up to 40 letters, digits, '_', '.' and '-'")
    return value


def _hostname(value: str) -> str:
    if not _HOSTNAME.fullmatch(value):
        raise ValueError("expected up to 63 letters, digits and '-'")
    return value


def _environment(value: object) -> object:
    """A table, or a list of NAME=VALUE."""
    pairs = value.items() if isinstance(value, dict) else [_split_variable(each) for each in _listed(value)]
    found: dict[str, str] = {}
    for name, content in pairs:
        if not isinstance(name, str) or not _VARIABLE.fullmatch(name) or "\0" in str(content):
            raise ValueError(f"{name!r}: expected NAME=VALUE")
        found[name] = str(content)
    return found


def _split_variable(text: object) -> tuple[str, str]:
    name, equals, content = str(text).partition("=")
    if not equals:
        raise ValueError(f"{name!r}: expected NAME=VALUE")
    return name, content


def _nets(value: object) -> object:
    """`none` stands for no network at all."""
    listed = _listed(value)
    if "none" in listed:
        if len(listed) > 1:
            raise ValueError("expected none, or networks, not both")
        return ()
    return listed


def _listed(value: object) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _words(value: object) -> object:
    if isinstance(value, str):
        raise ValueError('expected a list of words, such as ["uname", "-a"]')
    return value


def _no_nul(value: str) -> str:
    if "\0" in value:
        raise ValueError("expected text without NUL")
    return value


File = Annotated[Path, AfterValidator(absolute)]
Word = Annotated[str, AfterValidator(_no_nul)]
Hostname = Annotated[str, AfterValidator(_hostname)]


class GuestRequest(Treatment):
    """A guest as a user describes it."""

    model_config = ConfigDict(frozen=True, extra="forbid", title="A guest of Ostler")

    image: TextLine | None = Field(
        None, description="Image or Debian kernel by name, e.g. debian, debian:13, reg/app:1."
    )
    kernel: File | None = Field(None, description="A kernel of your own instead of an image's.")
    initrd: File | None = Field(None, description="Its initial RAM disk.")
    append: TextLine | None = Field(None, description="Added to the kernel's command line.")
    command: Annotated[tuple[Word, ...], BeforeValidator(_words)] = Field((), description="Run in the guest.")
    name: Annotated[str, AfterValidator(_name)] | None = Field(None, description="Of the guest on this host.")
    hostname: Hostname | None = Field(None, description="In the guest; by default the guest's name.")
    memory: Memory = DEFAULT_MEMORY_BYTES
    cpus: Cpus = 1
    cpu: CpuModel | None = Field(None, description="Processor model; by default the newest fixed one.")
    accel: Accelerator = "auto"
    disks: tuple[DiskSpec, ...] = ()
    disk_rate: Rate | None = Field(
        None, description="Bytes a second for each disk that has no rate of its own, the root disk among them."
    )
    nets: Annotated[tuple[NetSpec, ...], BeforeValidator(_nets)] | None = Field(None, description="By default passt.")
    ports: tuple[PortSpec, ...] = ()
    volumes: tuple[ShareSpec, ...] = ()
    env: Annotated[dict[str, str], BeforeValidator(_environment)] = Field({}, description="Of the command.")
    workdir: Word | None = Field(None, description="Of the command.")
    user: Word | None = Field(None, description="Who runs the command; name or number, with :group.")
    persist: Annotated[str, AfterValidator(_name)] | None = Field(
        None, description="Keep what the guest writes to its root disk under this name."
    )
    seed: File | None = Field(None, description="User data for cloud-init: a file, or a folder with user-data.")
    dns: tuple[Address, ...] = Field((), description="Name servers, instead of those of the network.")
    ssh_keys: tuple[TextLine, ...] = Field((), description="Public keys for root.")
    rng: bool = True
    balloon: bool = True
    cold: bool = Field(default=False, description="Boot, even where a snapshot of a booted guest could be had.")
    cpu_pin: HostCpusHere = Field(None, description="Host CPUs it runs on.")
    test_devices: bool = False

    def paced(self, *disks: DiskSpec) -> tuple[DiskSpec, ...]:
        """These disks, held to `disk_rate` where they have no rate of their own."""
        return tuple(
            disk if disk.rate is not None else disk.model_copy(update={"rate": self.disk_rate}) for disk in disks
        )

    @model_validator(mode="after")
    def _shares_fit(self) -> GuestRequest:
        self.check_shares(self.cpus)
        return self


def parse_request(**values: Any) -> GuestRequest:
    """Validate raw values; None means not given. Raises BadRequest naming the first bad field."""
    return validate_request({name: value for name, value in values.items() if value is not None})


def validate_request(values: dict[str, Any], *, folder: Path | None = None) -> GuestRequest:
    """Validate a table; relative paths in it start at `folder`. Raises BadRequest."""
    try:
        request = GuestRequest.model_validate(values, context={"folder": folder or Path()})
    except ValidationError as error:
        raise bad_request(error) from error
    if request.image is not None and request.kernel is not None:
        raise BadRequest(f"image {request.image!r} and --kernel {str(request.kernel)!r}: only one kernel can be booted")
    return request


def read_request(path: Path, **over: Any) -> GuestRequest:
    """The guest that a TOML file describes; what is given besides wins over it. Raises BadRequest."""
    values = read_table(path)
    # How a host service is to treat the guest: `ostler host` reads it, and one file serves both.
    values.pop("host", None)
    described = validate_request(values, folder=path.parent)
    given = {name: value for name, value in over.items() if value is not None}
    if not given:
        return described
    kept = described.model_dump(include=set(values) - set(given))
    return validate_request({**kept, **given})


def read_table(path: Path) -> dict[str, Any]:
    """What a TOML file says, not judged yet. Raises BadRequest."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise BadRequest(f"file {str(path)!r}: more than {MAX_FILE_BYTES} bytes, expected a guest's description")
        return tomllib.loads(data.decode())
    except OSError as error:
        raise BadRequest(f"file {str(path)!r}: {error.strerror or error}") from error
    except ValueError as error:
        raise BadRequest(f"file {str(path)!r}: not TOML: {error}") from error


def schema() -> dict[str, Any]:
    """The JSON schema of a guest's description."""
    found = GuestRequest.model_json_schema()
    for name, example in (("DiskSpec", "data.img,ro"), ("NetSpec", "tap=tap0,mtu=9000"), ("PortSpec", "8080:80"),
                          ("ShareSpec", "/srv:/srv:ro")):  # fmt: skip
        # Each may also be written as the command line has it.
        found["$defs"][name] = {"anyOf": [{"type": "string", "examples": [example]}, found["$defs"][name]]}
    return found
