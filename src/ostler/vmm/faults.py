"""What becomes of a guest when something goes wrong: docs/faults.md. `ostler.vmm.injection` makes it go wrong.

Whatever notices a fault (a processor, the watchdog, a disk) stops the processors and leaves the rest to the loop,
where the policy is carried out and everybody is told by an event. Without this service, as in `ostler run` of a kernel
alone, every crash ends the guest.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ostler.config.defaults import POLICIES, Fault, checked
from ostler.control.wire import Message
from ostler.devices.virtio.blk import Block
from ostler.errors import BadRequest, OstlerError
from ostler.vmm.crash import panic_line
from ostler.vmm.processors import End, EndKind
from ostler.vmm.run import GuestProcess
from ostler.vmm.server import Connection

if TYPE_CHECKING:
    from ostler.vmm.service import GuestService

OF_END = {EndKind.PANIC: Fault.PANIC, EndKind.TRIPLE_FAULT: Fault.TRIPLE_FAULT, EndKind.HANG: Fault.HANG}
MEANING = {
    Fault.PANIC: "the guest's kernel reported a panic", Fault.TRIPLE_FAULT: "triple fault",
    Fault.HANG: "the guest did not feed its watchdog",
}  # fmt: skip
RETRY_NS = 1_000_000_000
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})


class FaultService:
    """Adds `fault-policy` to the guest's service, and carries policies out."""

    def __init__(self, process: GuestProcess, service: GuestService) -> None:
        self._process, self._service = process, service
        spec = process.machine.spec
        self.policies: dict[Fault, str] = {fault: getattr(spec, f"on_{fault.name.lower()}") for fault in POLICIES}
        self.by_request: set[Fault] = set()
        """Faults that somebody asked for, until they are told."""
        self.when_paused: Callable[[], None] = _nothing
        """Called before a fault pauses the guest."""
        self._waiting: dict[str, Block] = {}
        self._retry = process.loop.new_timer()
        self._retry.call(self._try_again)
        process.on_fault = self._intercept
        process.when_resumed = self._resumed
        for name, device in process.machine.devices.items():
            if isinstance(device, Block):
                device.judge = partial(self._judge, name, device)
        for name, backend in backends(process).items():
            backend.when_died = partial(self._backend_died, name)
        service.add_operations({"fault-policy": self._policy})

    # -- faults as they come ------------------------------------------------------------------------

    def _intercept(self, end: End) -> bool:
        """Whether the end is a fault with a policy: then it is not the end yet. Any thread."""
        if end.kind is EndKind.RESET and panic_line(self._process.console.tail) is not None:
            # How a kernel without a driver for pvpanic says it.
            end = replace(end, kind=EndKind.PANIC)
        fault = OF_END.get(end.kind)
        if fault is None:
            return False
        policy = self.policies[fault]
        if policy != "ignore":
            for processor in self._process.processors:
                processor.hold()
        self._process.loop.call_soon(lambda: self.act(fault, policy, end, MEANING[fault]))
        return True

    def _judge(self, name: str, device: Block, error: OSError) -> bool:
        """Whether the disk is to keep a request it could not do. On the loop's thread or a processor's, locked."""
        if error.errno is None:
            # The guest's own mistake: there is no such sector.
            return False
        fault = Fault.NO_SPACE if error.errno in NO_SPACE else Fault.DISK_ERROR
        policy = self.policies[fault]
        text = f"{name}: {error.strerror or error}"
        is_known = name in self._waiting
        if policy != "report":
            self._waiting[name] = device
        if not is_known:
            end = End(EndKind.STUCK, text=text)
            self._process.loop.call_soon(lambda: self.act(fault, policy, end, text))
        return policy != "report"

    def act(self, fault: Fault, policy: str, end: End, text: str) -> None:
        """Say it and do what the policy wants; on the loop's thread."""
        injected = fault in self.by_request
        self.by_request.discard(fault)
        self._service.announce(
            "fault", fault=fault.value, policy=policy, message=text, vcpu=end.vcpu, injected=injected
        )
        try:
            if policy == "pause":
                self._pause(fault)
            elif policy == "reset":
                self._process.reset()
                self._service.announce("reset", fault=fault.value)
            elif policy == "poweroff":
                self._process.end(end)
            if fault is Fault.HANG:
                with self._process.lock:
                    self._process.machine.board.watchdog.feed()
        except OstlerError as error:
            self._service.report("faults", f"{fault.value}: {policy} failed: {error}")
            self._process.end(end)

    def _pause(self, fault: Fault) -> None:
        self.when_paused()
        # Held already, perhaps, by whoever noticed: what is missing is that everybody knows.
        self._process.pause()
        self._service.announce("paused", fault=fault.value)
        if fault is Fault.NO_SPACE:
            self._retry.arm(time.monotonic_ns() + RETRY_NS)

    # -- requests that wait -------------------------------------------------------------------------

    def _try_again(self) -> None:
        """Once a second: is there space now? Then the guest goes on."""
        if not self._waiting or not self._process.is_paused:
            return
        self._retry_all(self._waiting.values())
        if any(device.is_waiting for device in self._waiting.values()):
            self._retry.arm(time.monotonic_ns() + RETRY_NS)
            return
        self._waiting.clear()
        self._process.resume()
        self._service.announce("resumed", fault=Fault.NO_SPACE.value)

    def _retry_all(self, devices: Iterable[Block]) -> None:
        for device in devices:
            with self._process.lock:
                device.retry()

    def _resumed(self) -> None:
        """Somebody let the guest go on: what could not be done is tried again, and may fail anew."""
        waiting, self._waiting = self._waiting, {}
        self._retry_all(waiting.values())

    # -- asked for ---------------------------------------------------------------------------------

    def _policy(self, _connection: Connection, _number: object, arguments: Message) -> Message:
        """Change what is to happen; says what holds."""
        for name, value in arguments.items():
            if name in ("id", "op"):
                continue
            fault = next((each for each in POLICIES if each.value == name), None)
            if fault is None:
                raise BadRequest(f"fault {name!r}: expected one of {', '.join(each.value for each in POLICIES)}")
            if checked(fault, value) == "reset" and not self._process.can_reset:
                raise BadRequest(f"policy 'reset' of {name}: expected a guest that was started with such a policy")
            self.policies[fault] = value
        return {fault.value: policy for fault, policy in self.policies.items()}

    def _backend_died(self, name: str) -> None:
        """It is started again where it can be; the policy says what the guest does meanwhile."""
        text, fault = f"{name}: the program that serves it has ended", Fault.BACKEND_LOST
        end = End(EndKind.STUCK, text=text)
        self._process.loop.call_soon(lambda: self.act(fault, self.policies[fault], end, text))


def backends(process: GuestProcess) -> dict[str, Any]:
    """Other programs that serve this guest, by their devices' names."""
    found: dict[str, Any] = {each.name: each.device.backend for each in process.networks}
    served = ((name, getattr(device, "server", None)) for name, device in process.machine.devices.items())
    found |= {name: server for name, server in served if server is not None}
    return {name: backend for name, backend in found.items() if hasattr(backend, "when_died")}


def _nothing() -> None:
    """Nobody wants to know."""
