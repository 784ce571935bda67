"""What a guest is made of, as a user asks for it.

`parse_guest` takes raw values from the command line, a file or a request and gives a GuestSpec
or raises BadRequest of one line: the field, the value, what was expected. Files are named here
and read by the boot loader, which complains about their contents.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from ostler.config.complaints import bad_request
from ostler.config.devices import DiskSpec, NetSpec, PortSpec, ShareSpec
from ostler.config.schedule import Schedule
from ostler.config.sizes import MIB, format_size, parse_size
from ostler.config.text import one_line
from ostler.config.treatment import Treatment
from ostler.errors import BadRequest

MIN_MEMORY_BYTES = 16 * MIB
MAX_CPUS = 255
PAGE_SIZE = 4096


def host_memory_bytes() -> int:
    """All the memory the host has, free or not."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _memory(value: object) -> int:
    size = parse_size(value) if isinstance(value, str) else value
    if not isinstance(size, int) or isinstance(size, bool):
        raise ValueError("expected a size such as 512M, 1G or 1.5G")
    limit = host_memory_bytes()
    if not MIN_MEMORY_BYTES <= size <= limit:
        raise ValueError(f"expected {format_size(MIN_MEMORY_BYTES)} to the host's {format_size(limit)}")
    return size // PAGE_SIZE * PAGE_SIZE


def _cpus(value: object) -> int:
    text = str(value).strip()
    # The length first: Python refuses to convert absurdly long digit strings in a way of its own.
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and 1 <= int(text) <= MAX_CPUS):
        raise ValueError(f"expected 1 to {MAX_CPUS}")
    return int(text)


# The command line judges many requests and opens no accelerator: their package is imported where a value needs it.
ACCELERATORS = ("auto", "kvm", "soft")


def default_cpu() -> str:
    """The model a guest gets that asks for none."""
    from ostler.accel.models import DEFAULT_MODEL

    return DEFAULT_MODEL


def _cpu_model(value: str) -> str:
    from ostler.accel.models import model

    try:
        model(value)
    except BadRequest as error:
        # Of "what is wrong: what was expected", the second half; the field and the value are put before it.
        raise ValueError(str(error).rpartition(": ")[2]) from error
    return value


def _accelerator(value: str) -> str:
    if value not in ACCELERATORS:
        raise ValueError(f"expected one of {', '.join(ACCELERATORS)}")
    return value


# The same in every place a guest is described: a guest, a request for one, a file.
Memory = Annotated[
    int, BeforeValidator(_memory), WithJsonSchema({"type": ["string", "integer"], "examples": ["512M", "2G"]})
]
Cpus = Annotated[int, BeforeValidator(_cpus), WithJsonSchema({"type": "integer", "minimum": 1, "maximum": MAX_CPUS})]
CpuModel = Annotated[str, AfterValidator(_cpu_model)]
Accelerator = Annotated[str, AfterValidator(_accelerator), WithJsonSchema({"enum": list(ACCELERATORS)})]
TextLine = Annotated[str, AfterValidator(one_line)]
DEFAULT_MEMORY_BYTES = 512 * MIB


class GuestSpec(Treatment):
    """A guest. Frozen; `parse_guest` makes it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    kernel: Path
    initrd: Path | None = None
    append: TextLine = ""
    memory: Memory = DEFAULT_MEMORY_BYTES
    """Bytes; given as text with a unit or as a number of bytes."""
    cpus: Cpus = 1
    cpu: CpuModel = Field(default_factory=default_cpu)
    accel: Accelerator = "auto"
    disks: tuple[DiskSpec, ...] = ()
    """The guest sees them in this order: vda, vdb, …"""
    nets: tuple[NetSpec, ...] = ()
    ports: tuple[PortSpec, ...] = ()
    """Led to the guest by its first passt network."""
    shares: tuple[ShareSpec, ...] = ()
    """Tagged `share0`, `share1`, … in this order."""
    vsock_cid: Annotated[int, Field(ge=3, le=2**32 - 2)] | None = None
    """None: no vsock device, and so no agent."""
    virtio_console: bool = False
    """`/dev/hvc0`, and a named port for an agent without vsock, each on a socket in the runtime folder."""
    rng: bool = True
    balloon: bool = False
    test_devices: bool = Field(default=False)
    """The ports and memory that kvm-unit-tests look for."""

    @model_validator(mode="after")
    def _shares_fit(self) -> GuestSpec:
        self.check_shares(self.cpus)
        return self

    @property
    def schedule(self) -> Schedule:
        """Its share of the host's processors."""
        return Schedule(weight=self.cpu_weight, cap=self.cpu_cap, reserve=self.cpu_reserve, pin=self.cpu_pin)

    def scheduled(self, schedule: Schedule) -> GuestSpec:
        """The same guest with another share."""
        return self.model_copy(update={f"cpu_{name}": value for name, value in schedule.model_dump().items()})

    @property
    def memory_bytes(self) -> int:
        """`memory` under a name with its unit."""
        return self.memory


def parse_guest(**values: Any) -> GuestSpec:
    """Validate raw values; None means not given. Raises BadRequest naming the first bad field."""
    given = {name: value for name, value in values.items() if value is not None}
    try:
        return GuestSpec.model_validate(given)
    except ValidationError as error:
        raise bad_request(error) from error
