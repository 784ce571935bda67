"""What the operations are asked with and what they answer: shared by the two clients.

Answers come from the guest, so they are validated and bounded like any input.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ostler.agent.protocol import Exited
from ostler.errors import AgentProtocolError, BadRequest, CommandTimeout

Text = Annotated[str, Field(max_length=4096)]
Argument = str | bytes | os.PathLike[str]
MAX_ARGUMENTS = 4096


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


@dataclass(frozen=True, slots=True)
class Completed:
    """A command that has ended. `returncode` is negative for a signal, as in subprocess."""

    argv: tuple[str, ...]
    returncode: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        """Standard output as text; what is no UTF-8 becomes U+FFFD."""
        return self.stdout.decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class Terminal:
    """A terminal for a command; size in characters."""

    rows: int = 24
    columns: int = 80
    term: str = "linux"


def command(
    argv: Sequence[Argument],
    *,
    stdin: bool,
    env: Mapping[str, str] | None = None,
    cwd: Argument | None = None,
    user: str | None = None,
    tty: Terminal | None = None,
    timeout_s: float | None = None,
) -> dict[str, Any]:
    """Return the arguments of `exec`. Raises BadRequest for what no system could execute."""
    if isinstance(argv, str | bytes) or not argv:
        raise BadRequest(f"command {argv!r}: expected a list of a program and its arguments")
    if len(argv) > MAX_ARGUMENTS:
        raise BadRequest(f"command {argv[0]!r}: {len(argv)} arguments, expected at most {MAX_ARGUMENTS}")
    if timeout_s is not None and timeout_s < 0:
        raise BadRequest(f"time-out {timeout_s} s: expected 0 or more")
    wish: dict[str, Any] = {"argv": [plain("argument", word) for word in argv], "stdin": stdin}
    if env:
        wish["env"] = [[variable(name), plain(f"variable {name}", value)] for name, value in env.items()]
    if cwd is not None:
        wish["cwd"] = plain("folder", cwd)
    if user is not None:
        wish["user"] = plain("user", user)
    if tty is not None:
        wish["tty"] = {"rows": tty.rows, "columns": tty.columns, "term": plain("terminal type", tty.term)}
    if timeout_s is not None:
        wish["timeout_ms"] = round(timeout_s * 1000)
    return wish


def variable(name: str) -> str:
    """Return a variable's name. Raises BadRequest."""
    if not name or "=" in name:
        raise BadRequest(f"variable {name!r}: expected a name without '='")
    return plain("variable", name)


def plain(what: str, value: Argument) -> str:
    """Return a string for the guest; bytes that are no UTF-8 survive. Raises BadRequest for a zero byte."""
    text = os.fsdecode(value)
    if "\0" in text:
        raise BadRequest(f"{what} {text!r}: expected no zero byte")
    return text


def configuration(
    *,
    hostname: str | None = None,
    interfaces: Sequence[Mapping[str, Any]] = (),
    routes: Sequence[Mapping[str, Any]] = (),
    dns: Sequence[str] = (),
    search: Sequence[str] = (),
    ssh_keys: Mapping[str, Sequence[str]] | None = None,
    mounts: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Return the arguments of `configure`; docs/agent-protocol.md has the fields of each item."""
    wish: dict[str, Any] = {}
    if hostname is not None:
        wish["hostname"] = hostname
    if interfaces:
        wish["interfaces"] = [dict(each) for each in interfaces]
    if routes:
        wish["routes"] = [dict(each) for each in routes]
    if dns or search:
        wish["dns"] = {"servers": list(dns), "search": list(search)}
    if ssh_keys:
        wish["ssh_keys"] = [{"user": user, "keys": list(keys)} for user, keys in ssh_keys.items()]
    if mounts:
        wish["mounts"] = [dict(each) for each in mounts]
    return wish


def returncode(end: Exited) -> int:
    """Return the status as subprocess has it."""
    return end.code if end.code is not None else -(end.signal or 9)


def timed_out(argv: Sequence[Argument], timeout_s: float | None, stdout: bytes, stderr: bytes) -> CommandTimeout:
    """Return the exception for a command that the agent killed."""
    name = os.fsdecode(argv[0])
    return CommandTimeout(f"{name}: killed after {timeout_s:g} s in the guest", stdout=stdout, stderr=stderr)
