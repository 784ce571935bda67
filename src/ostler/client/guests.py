"""This user's guests as a client sees them: listed, described, paused, stopped, waited for, removed.

A guest is reached by its control socket. One that ends in the middle of a request has done so: whoever asked gets to
know how, not that a connection was lost.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ostler.control import logfile, runtime
from ostler.control.connection import Connection, ConnectionLost
from ostler.control.runtime import Entry
from ostler.errors import BadRequest, GuestNotFound, GuestPaused, HostError, OstlerError

if TYPE_CHECKING:
    from ostler.agent.client import AgentClient

LOOK_TIMEOUT_S, ASK_TIMEOUT_S = 2.0, 5.0
DEFAULT_GRACE_S = 30.0
BACKLOG_BYTES, RECEIVE_BYTES = 4 << 20, 64 << 10
# How long a VM process may take to put its things away after it has told everyone of the end.
TIDY_S, TIDY_SLICE_S = 10.0, 0.01
# Longer than a guest stands still while it is saved or moved.
STILL_S, STILL_SLICE_S = 0.5, 0.05


@dataclass(frozen=True, slots=True)
class Summary:
    """One line of `ostler ps`."""

    name: str
    state: str
    """running, paused, unreachable, ended, died"""
    image: str
    command: tuple[str, ...]
    created: float
    """Seconds since 1970."""
    status: int | None
    """Exit status of one that has ended."""
    reason: str
    ports: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the end of a guest is to say that was there for one command."""

    status: int
    reason: str


def summaries() -> list[Summary]:
    """All guests, oldest first."""
    return [summary(entry) for entry in runtime.entries()]


def summary(entry: Entry) -> Summary:
    """What is to be said of a guest in one line."""
    facts, end = entry.facts, {}
    if entry.is_running():
        state = _state(entry)
    else:
        end = entry.end
        state = "ended" if end else "died"
    return Summary(
        name=entry.name,
        state=state,
        image=str(facts.get("image") or "-"),
        command=tuple(str(word) for word in facts.get("command", ())),
        created=float(facts.get("created", 0)),
        status=end.get("status"),
        reason=str(end.get("reason", "")),
        ports=tuple(str(port) for port in facts.get("ports", ())),
    )


def request(entry: Entry, op: str, *, timeout_s: float | None = 30.0, **arguments: object) -> dict[str, Any]:
    """One request of a running guest. Raises GuestNotFound where it has ended, HostError where it does not answer."""
    try:
        with Connection.to(entry) as connection:
            return connection.request(op, timeout_s=timeout_s, **arguments)
    except TimeoutError as error:
        raise HostError(f"guest {entry.name!r}: no answer to {op!r} within {timeout_s:g} s") from error
    except ConnectionLost as error:
        raise GuestNotFound(f"guest {entry.name!r}: has ended") from error


def schedule(entry: Entry, **shares: Any) -> dict[str, Any]:
    """Change a running guest's share of the host's processors: weight, cap, reserve, pin; how it is then.

    What is not named stays, None takes away. Raises BadRequest, GuestNotFound.
    """
    if unknown := sorted(shares.keys() - {"weight", "cap", "reserve", "pin"}):
        raise BadRequest(f"share {unknown[0]!r}: expected weight, cap, reserve or pin")
    return request(entry, "schedule", **shares)


def request_announced(entry: Entry, op: str, begun: Callable[[], None], **arguments: object) -> dict[str, Any]:
    """A request that takes long and says when its part that concerns the guest is over. Raises as `request`."""
    try:
        with Connection.to(entry) as connection:
            return connection.collect(connection.post(op, **arguments), timeout_s=None, on_event=begun)
    except ConnectionLost as error:
        raise GuestNotFound(f"guest {entry.name!r}: has ended") from error


def stop(entry: Entry, *, grace_s: float = DEFAULT_GRACE_S, verdict: Verdict | None = None) -> dict[str, Any]:
    """Shut the guest down, by its agent or else its power button, and kill it after the grace period.

    Returns its end; `verdict` is what that is to say. One that has ended already stays as it is.
    """
    # Paused guests answer nobody.
    with contextlib.suppress(GuestNotFound):
        request(entry, "resume")
    asked = ask_agent(entry)
    return _ending(entry, "stop", timeout_s=grace_s + TIDY_S, grace_s=grace_s, button=not asked, **_said(verdict))


def kill(entry: Entry, *, verdict: Verdict | None = None) -> dict[str, Any]:
    """End the guest at once; returns its end, as `stop` does."""
    return _ending(entry, "kill", timeout_s=TIDY_S, **_said(verdict))


def wait(entry: Entry, *, timeout_s: float | None = None) -> dict[str, Any]:
    """Wait for the guest's end and return it. Raises HostError after the time-out."""
    return _ending(entry, "wait", timeout_s=timeout_s)


def refuse_paused(entry: Entry) -> None:
    """Raise GuestPaused for a guest whose agent cannot answer because it is paused.

    A guest that stands still only while it is saved or moved has a moment to go on.
    """
    deadline = time.monotonic() + STILL_S
    while _state(entry) == "paused":
        if time.monotonic() < deadline:
            time.sleep(STILL_SLICE_S)
            continue
        raise GuestPaused(f"guest {entry.name!r}: is paused; `ostler resume {entry.name}` lets it go on")


def reach_agent(entry: Entry, *, timeout_s: float) -> AgentClient:
    """Connect with a running guest's agent. Raises GuestPaused at once, AgentUnavailable after the time-out."""
    from ostler.agent.client import AgentClient

    def may_answer() -> bool:
        # Somebody may pause it while it is waited for.
        refuse_paused(entry)
        return entry.is_running()

    refuse_paused(entry)
    return AgentClient.connect(entry.vsock_socket, timeout_s=timeout_s, alive=may_answer)


def ask_agent(entry: Entry) -> bool:
    """Have the agent shut the guest down; whether there was one to ask."""
    from ostler.agent.client import AgentClient

    try:
        with AgentClient.connect(entry.vsock_socket, timeout_s=ASK_TIMEOUT_S, alive=entry.is_running) as agent:
            agent.shutdown()
    except (OstlerError, OSError):
        return False
    return True


def remove(entry: Entry, *, force: bool = False) -> None:
    """Forget a guest that has ended; with `force`, kill it first."""
    if force and entry.is_running():
        kill(entry)
    runtime.remove(entry)


def follow_console(entry: Entry, *, lines: int | None, follow: bool) -> Iterator[bytes]:
    """The console's log, from its last `lines` on, and with `follow` what comes until the guest ends."""
    if follow:
        with contextlib.suppress(GuestNotFound), Connection.to(entry) as connection:
            console = connection.console(backlog_bytes=BACKLOG_BYTES)
            with console.socket as stream:
                yield _last_lines(console.backlog, lines) + console.first
                while data := stream.recv(RECEIVE_BYTES):
                    yield data
            return
    yield _last_lines(logfile.read(entry.console_log), lines)


def follow_output(entry: Entry, *, lines: int | None, follow: bool) -> Iterator[bytes]:
    """The same of what a detached guest's command says: a file that its keeper writes."""
    if not follow:
        yield _last_lines(logfile.read(entry.output_log), lines)
        return
    said = logfile.follow(entry.output_log, is_over=lambda: not entry.is_running())
    yield _last_lines(next(said, b""), lines)
    yield from said


def _said(verdict: Verdict | None) -> dict[str, Any]:
    return {} if verdict is None else {"status": verdict.status, "reason": verdict.reason}


def _last_lines(data: bytes, lines: int | None) -> bytes:
    return data if lines is None else b"".join(data.splitlines(keepends=True)[-lines:] if lines else [])


def _state(entry: Entry) -> str:
    try:
        with Connection.to(entry, timeout_s=LOOK_TIMEOUT_S) as connection:
            return str(connection.request("status", timeout_s=LOOK_TIMEOUT_S)["state"])
    except GuestNotFound:
        return "starting" if not entry.control_socket.exists() else "unreachable"
    except (OSError, OstlerError, ConnectionLost):
        return "unreachable"


def _ending(entry: Entry, op: str, *, timeout_s: float | None, **arguments: object) -> dict[str, Any]:
    end: dict[str, Any] = {}
    # That it has ended meanwhile is what was asked for.
    with contextlib.suppress(GuestNotFound):
        end = request(entry, op, timeout_s=timeout_s, **arguments)
    await_gone(entry)
    return end or entry.end or {"status": 1, "reason": "died", "message": "its VM process was killed"}


def await_gone(entry: Entry) -> None:
    """Wait until the VM process has put its things away. Raises HostError for one that does not."""
    deadline = time.monotonic() + TIDY_S
    while entry.is_running():
        if time.monotonic() > deadline:
            raise HostError(f"guest {entry.name!r}: its VM process has not ended within {TIDY_S:g} s")
        time.sleep(TIDY_SLICE_S)
