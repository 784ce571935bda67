"""The whole exception tree of Ostler.

Every error a user can cause or meet derives from `OstlerError` and carries the exit status the command line
ends with. The text of an exception is one line that names what failed, the value, and what was expected: it is
printed as it stands, so it needs no prefix and no traceback around it. Bugs are any other exception.

Left out on purpose: anything that formats, logs or exits; that is the command line's work.
"""

from __future__ import annotations

from typing import ClassVar


class OstlerError(Exception):
    """Base of all expected failures; by itself a failure of the host (disk full, apt unreachable)."""

    exit_status: ClassVar[int] = 1


class BadRequest(OstlerError):
    """The user asked for something that cannot be: a value, a file, a combination."""

    exit_status = 2


class GuestNotFound(BadRequest):
    """There is no guest of that name, or it has ended and the request needs one that runs."""


class KernelError(BadRequest):
    """The file given as a kernel is not one Ostler can enter: wrong format, truncated, wrong machine."""


class AccelUnavailable(BadRequest):
    """The accelerator asked for by name cannot run guests here: no KVM, KVM too slow, no engine built."""


class HostError(OstlerError):
    """The host refused something Ostler needs: memory, a file descriptor, a system call."""


class DatabaseFull(HostError):
    """The host service's database found no space on its disk; nothing was changed."""


class DatabaseDamaged(HostError):
    """The host service's database cannot be read; guests are untouched, and the message says the way out."""


class AdmissionRefused(BadRequest):
    """The host has not got what a guest asks for; `lack` says of what, as `ostler.hostd.admission` has it."""

    def __init__(self, message: str, *, lack: object = None) -> None:
        super().__init__(message)
        self.lack = lack


class AccelError(HostError):
    """An accelerator broke its contract or refused a call the machine depends on."""


class DiskBusy(HostError):
    """Another process has the disk open in a way that excludes this one."""


class ImageError(HostError):
    """Guest material could not be fetched, verified, unpacked or built."""


class NoSuchImage(BadRequest):
    """There is no image of this name, and none can be had under it."""


class MigrationError(OstlerError):
    """A guest could not be moved: it runs on where it was, or the message says where it is now."""


class MigrationRefused(MigrationError):
    """The target does not take this guest, and says why."""

    exit_status = 2


class MigrationCancelled(MigrationError):
    """Somebody called it off; the guest runs on where it was."""


class StateError(OstlerError):
    """Saved state does not validate. It is treated as hostile input, never as a bug of the reader."""


class GuestCrash(OstlerError):
    """The guest ended itself in disorder.

    `details` is a multi-line report (registers, the faulting instruction) that only `--debug` prints.
    """

    exit_status = 3

    def __init__(self, message: str, *, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class TripleFault(GuestCrash):
    """A fault while delivering a double fault: a real machine would reset."""


class GuestPanic(GuestCrash):
    """The guest's kernel reported a panic through the panic-notification device."""


class GuestStuck(GuestCrash):
    """A vCPU cannot go on: failed entry, internal error of the accelerator."""


class KeptAlready(BadRequest):
    """A detached guest's command has somebody who stays with it: there is no second one."""


class AgentError(OstlerError):
    """The agent inside the guest could not be reached, or could not do what it was asked for."""


class AgentUnavailable(AgentError):
    """No agent answered in time: the guest has none, does not run, or is still starting."""

    exit_status = 125


class GuestPaused(AgentUnavailable):
    """The guest is paused: nobody in it can answer before it is resumed."""


class AgentLost(AgentError):
    """The connection to the agent ended in the middle of an operation."""

    exit_status = 125


class GuestNotBooted(AgentError):
    """The guest runs, but did not come to its root file system; its agent says why."""


class GuestGone(AgentError):
    """The guest ended, in order or by force, before what was asked of it was done."""

    exit_status = 125


class CommandFailed(OstlerError):
    """A command in the guest ended with a status that its caller did not expect.

    `returncode` is negative for a signal; `stdout` and `stderr` are all it said.
    """

    def __init__(self, message: str, *, returncode: int = 1, stdout: bytes = b"", stderr: bytes = b"") -> None:
        super().__init__(message)
        self.returncode = returncode
        self.stdout = stdout
        self.stderr = stderr


class AgentProtocolError(AgentError):
    """The agent broke its protocol. What a guest sends is never trusted, so the connection is closed."""

    exit_status = 125


class AgentRefused(AgentError):
    """The agent answered that it cannot: no such file, no such user, no space, not supported.

    `code` is the machine-readable reason of docs/agent-protocol.md.
    """

    def __init__(self, message: str, *, code: str = "failed") -> None:
        super().__init__(message)
        self.code = code


class CommandNotFound(AgentRefused):
    """The guest has no such command."""

    exit_status = 127


class CommandNotExecutable(AgentRefused):
    """The guest has the file, but it cannot be executed."""

    exit_status = 126


class CommandTimeout(AgentError):
    """The command did not end in time and was killed, with everything it had started.

    `stdout` and `stderr` are what it had said by then.
    """

    exit_status = 124

    def __init__(self, message: str, *, stdout: bytes = b"", stderr: bytes = b"") -> None:
        super().__init__(message)
        self.stdout = stdout
        self.stderr = stderr


_REFUSALS: dict[str, type[AgentRefused]] = {
    "command-not-found": CommandNotFound,
    "command-not-executable": CommandNotExecutable,
}


def refused(code: str, message: str) -> AgentRefused:
    """Return the exception for an agent's reason."""
    return _REFUSALS.get(code, AgentRefused)(message, code=code)
