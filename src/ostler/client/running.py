"""A guest that was started here: brought up, at hand, and put away again.

Bringing up is: start the VM process, wait for the agent, hand over the settings. Putting away is an orderly shutdown
where the guest could write to something that stays, else the plug: a throw-away disk needs no `sync`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from ostler.agent.client import AgentClient
from ostler.client import guests
from ostler.client.watch import Watch
from ostler.control.launch import Launched, launch
from ostler.control.runtime import Entry
from ostler.errors import AgentError, HostError, OstlerError

if TYPE_CHECKING:
    from ostler.client.plan import Plan

GuestT = TypeVar("GuestT", bound="RunningGuest")

# A guest under emulation on a busy machine takes its time; whoever waits can interrupt.
BOOT_TIMEOUT_S = 600.0
SHUTDOWN_GRACE_S = 30.0


class RunningGuest:
    """Owns the guest unless `release` was called; a context manager that ends it."""

    def __init__(self, launched: Launched, plan: Plan) -> None:
        self.entry: Entry = launched.entry
        self.plan = plan
        self._launched = launched
        self._watch = Watch(launched.entry)
        self._agent: AgentClient | None = None
        self.troubles: list[str] = []
        """What the guest has to do without, one line each; known once it is configured."""

    @property
    def agent(self) -> AgentClient:
        """The guest's agent. Raises AgentUnavailable, or how the guest ended."""
        if self._agent is None:
            self._agent = self.wait_for_agent()
        return self._agent

    def wait_for_agent(self, timeout_s: float = BOOT_TIMEOUT_S) -> AgentClient:
        """Wait until the agent answers."""
        try:
            return AgentClient.connect(self.entry.vsock_socket, timeout_s=timeout_s, alive=self.is_running)
        except AgentError as error:
            raise self.explain(error) from error

    def is_running(self) -> bool:
        """Whether the VM process lives."""
        return self._launched.process.poll() is None

    def explain(self, error: OstlerError) -> OstlerError:
        """The guest's own end, where that is why something failed."""
        return error if self.is_running() and self._watch.end(timeout_s=0.2) is None else self._watch.explain(error)

    def ended_in_order(self) -> bool:
        """Whether the guest has powered off or rebooted by itself."""
        end = self._watch.end(timeout_s=0.2)
        return end is not None and end.get("reason") in {"power-off", "reset"}

    def wait(self, timeout_s: float | None) -> dict[str, Any]:
        """Wait until the guest ends by itself; how it did. Raises HostError after the time-out."""
        end = self._watch.end(timeout_s=timeout_s)
        if end is None:
            raise HostError(f"guest {self.entry.name!r}: still runs after {timeout_s:g} s")
        return end

    def configure(self) -> None:
        """Hand the settings over: hostname, network, name servers, keys, mounts."""
        self._say({**self._network(), **self.plan.settings})

    def reconnect(self) -> None:
        """The guest was reset: wait for its new agent and hand the settings over again."""
        if self._agent is not None:
            self._agent.close()
            self._agent = None
        RunningGuest.configure(self)

    def _say(self, settings: dict[str, Any]) -> None:
        try:
            self.agent.configure(**settings)
        except AgentError as error:
            raise self.explain(error) from error

    def _network(self) -> dict[str, Any]:
        """What the VM process says of the guest's interfaces: their addresses are chosen where the network is."""
        if not self.plan.spec.nets:
            return {}
        network, self.troubles = network_of(self.entry)
        return network

    def release(self) -> None:
        """Let the guest go on by itself."""
        self._close()
        # Nobody here waits for it any more.
        self._launched.process.returncode = 0

    def end(self) -> dict[str, Any]:
        """Put the guest away; returns how it ended."""
        try:
            if not self.is_running():
                return self._watch.end() or {}
            if self.plan.is_durable:
                return guests.stop(self.entry, grace_s=SHUTDOWN_GRACE_S)
            return guests.kill(self.entry)
        finally:
            self._close()
            self._launched.process.wait()

    def _close(self) -> None:
        if self._agent is not None:
            self._agent.close()
        self._watch.close()
        if self._launched.leash_fd is not None:
            with contextlib.suppress(OSError):
                os.close(self._launched.leash_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


def network_of(entry: Entry) -> tuple[dict[str, Any], list[str]]:
    """A guest's addresses, for its agent, and what it has to do without."""
    facts = guests.request(entry, "inspect")
    known: dict[str, Any] = facts.get("network", {})
    return {name: value for name, value in known.items() if value}, [str(each) for each in facts.get("troubles", [])]


def start(plan: Plan, *, leash: bool, remove: bool) -> RunningGuest:
    """Start the VM process. With `leash` the guest does not outlive this process; with `remove` it leaves nothing."""
    launched = launch_plan(plan, leash=leash, remove=remove)
    return hold(launched, lambda: RunningGuest(launched, plan))


def launch_plan(plan: Plan, *, leash: bool, remove: bool, origin: dict[str, Any] | None = None) -> Launched:
    """Start the VM process; `origin` is where a guest that is not to boot goes on from."""
    return launch(plan.name, plan.spec_json, facts={**plan.facts, "remove": remove}, leash=leash, origin=origin)


def hold(launched: Launched, make: Callable[[], GuestT]) -> GuestT:
    """What `make` makes of a guest just started, which does not outlive its failure."""
    try:
        return make()
    except BaseException:
        launched.process.kill()
        launched.process.wait()
        raise
