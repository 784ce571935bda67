"""What the operations answer. It comes from the guest, so it is validated and bounded like any input.

Apart from `requests`, as most programs that run a command in a guest need none of it, nor what it takes to read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ostler.errors import AgentProtocolError

Text = Annotated[str, Field(max_length=4096)]


class Answer(BaseModel):
    """Base of what an agent answers; fields of newer agents are ignored."""

    # Built when the first answer comes: most commands get none of most kinds.
    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)


class OperatingSystem(Answer):
    """Of the guest's os-release file."""

    id: Text = ""
    version: Text = ""
    name: Text = ""


class Memory(Answer):
    """Sizes in bytes; None where the guest's kernel does not say."""

    total_bytes: int | None = None
    available_bytes: int | None = None
    free_bytes: int | None = None
    swap_bytes: int | None = None


class Address(Answer):
    """One address of one interface."""

    interface: Text
    address: Text
    prefix: Annotated[int, Field(ge=0, le=128)] | None = None
    mac: Text | None = None


class Info(Answer):
    """What a guest is and how it does."""

    hostname: Text | None = None
    kernel: Text | None = None
    machine: Text | None = None
    os: OperatingSystem = OperatingSystem()
    uptime_s: float | None = None
    load: Annotated[list[float], Field(max_length=3)] = []
    cpus: Annotated[int, Field(ge=1)] = 1
    memory: Memory = Memory()
    addresses: Annotated[list[Address], Field(max_length=1024)] = []
    init: Text | None = None
    """`agent` where the agent is the first process, else that process's name."""


class Grown(Answer):
    """Sizes of the root file system before and after, and of its device, in bytes."""

    device_bytes: int
    before_bytes: int
    after_bytes: int


class Copied(Answer):
    """What was copied; sockets, pipes and devices are left out and counted."""

    entries: Annotated[int, Field(ge=0)]
    bytes: Annotated[int, Field(ge=0)]
    left_out: Annotated[int, Field(ge=0)] = 0


A = TypeVar("A", bound=Answer)


def parse(kind: type[A], value: Mapping[str, Any]) -> A:
    """Return a validated answer. Raises AgentProtocolError."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise AgentProtocolError(f"agent's answer, {where} {str(first['input'])[:80]!r}: {first['msg']}") from error
