"""What the operations are asked with, and commands' ends: shared by the two clients. `answers` is what they answer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ostler.agent.protocol import Exited
from ostler.errors import BadRequest, CommandTimeout

if TYPE_CHECKING:
    from ostler.agent.answers import Copied, Grown, Info

Argument = str | bytes | os.PathLike[str]
MAX_ARGUMENTS = 4096


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


def copied(value: Mapping[str, Any]) -> Copied:
    """Return what a copy answered. Raises AgentProtocolError."""
    from ostler.agent import answers

    return answers.parse(answers.Copied, value)


def info(value: Mapping[str, Any]) -> Info:
    """Return what `info` answered. Raises AgentProtocolError."""
    from ostler.agent import answers

    return answers.parse(answers.Info, value)


def grown(value: Mapping[str, Any]) -> Grown:
    """Return what `grow-root` answered. Raises AgentProtocolError."""
    from ostler.agent import answers

    return answers.parse(answers.Grown, value)
