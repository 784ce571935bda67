"""Doorbells: a guest's write to a notification address becomes a call on the event loop.

Each is one eventfd, tied to the address in the accelerator (KVM_IOEVENTFD), so that the processor that rings it
goes on at once. Where the accelerator refuses (it has a limit), the write leaves the guest and rings here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import TracebackType
from typing import Self

from ostler.accel.api import VM
from ostler.errors import AccelError
from ostler.host.eventfd import EventFd
from ostler.machine.board import Wiring

NOTIFY_SIZE = 2


class EventDoorbell:
    """One eventfd and the address it listens at."""

    def __init__(self, vm: VM, event: EventFd) -> None:
        self._vm = vm
        self._event = event
        self._address: int | None = None

    def attach(self, address: int) -> None:
        if address == self._address:
            return
        self.detach()
        with contextlib.suppress(AccelError):
            self._vm.ioeventfd(self._event.fd, address, NOTIFY_SIZE)
            self._address = address

    def detach(self) -> None:
        if self._address is not None:
            self._vm.ioeventfd(self._event.fd, self._address, NOTIFY_SIZE, deassign=True)
            self._address = None

    def ring(self) -> None:
        self._event.signal()


class Doorbells:
    """Makes them and owns their eventfds; a context manager."""

    def __init__(self, vm: VM, wiring: Wiring) -> None:
        self._vm = vm
        self._wiring = wiring
        self._events: list[EventFd] = []

    def new(self, callback: Callable[[], None]) -> EventDoorbell:
        """A doorbell that calls back on the event loop under the board's lock."""
        event, lock = EventFd(), self._wiring.lock
        self._events.append(event)

        def rung() -> None:
            event.drain()
            with lock:
                callback()

        self._wiring.add_reader(event.fd, rung)
        return EventDoorbell(self._vm, event)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for event in self._events:
            self._wiring.remove_reader(event.fd)
            event.close()
