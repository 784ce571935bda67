"""One port of a virtio console: bytes between a pair of queues and a back end, virtio 1.2 section 5.3.

Output that the back end does not take stays in the guest's buffer; input is read straight into it. A port whose other
end on the host is closed throws output away, as a serial line does on which nobody listens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ostler.devices.virtio.chain import Chain, QueueError
from ostler.devices.virtio.queue import Virtqueue

# Chains served in one go; then the event loop gets a turn.
BUDGET = 256
READ_BYTES = 64 << 10


class PortBackend(Protocol):
    """The host's end of a port: one peer at most, that comes and goes. Called under the board's lock; never blocks."""

    def bind(self, events: PortEvents) -> None:
        """Whom to tell; before the first `watch`."""

    def watch(self, *, read: bool, write: bool) -> None:
        """Which events are wanted now, as far as there is a peer."""

    def read_into(self, views: Sequence[memoryview]) -> int:
        """Fill the views in their order; 0 when there is nothing now."""

    def write(self, views: Sequence[memoryview]) -> int:
        """How many bytes were taken, 0 when none can be now."""

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Run on the event loop, under the board's lock."""


class PortEvents(Protocol):
    """What a back end tells its port, under the board's lock."""

    def opened(self, *, is_open: bool) -> None:
        """The peer came or went."""

    def readable(self) -> None:
        """There may be bytes to read."""

    def writable(self) -> None:
        """Bytes may be taken again."""


class Port:
    """One port. Calls must be serialised by the owner."""

    def __init__(self, name: str, backend: PortBackend, *, is_console: bool = False) -> None:
        """`name` is how the guest finds it (`/dev/virtio-ports/NAME`); a console is a terminal (`/dev/hvc0`)."""
        self.name = name
        self.is_console = is_console
        self.host_open = False
        self.guest_open = False
        self._backend = backend
        self._receive: Virtqueue | None = None
        self._transmit: Virtqueue | None = None
        # A chain that was taken in part, and how much of it.
        self._pending: Chain | None = None
        self._sent = 0
        self._starved = False
        self.on_opened: Callable[[], None] = _nothing
        self.broken: Callable[[QueueError], None] = _raise
        backend.bind(self)

    def activate(self, receive: Virtqueue, transmit: Virtqueue) -> None:
        """The driver's queues are there."""
        self._receive, self._transmit = receive, transmit
        self._starved = True

    def reset(self) -> None:
        """They are gone."""
        self._receive = self._transmit = self._pending = None
        self.guest_open = self._starved = False
        self._sent = 0

    # -- told by the back end ---------------------------------------------------------------

    def opened(self, *, is_open: bool) -> None:
        self.host_open = is_open
        self.on_opened()
        self._guarded(self.transmit)
        self._watch()

    def readable(self) -> None:
        self._guarded(self._fill)

    def writable(self) -> None:
        self._guarded(self.transmit)

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except QueueError as error:
            self.broken(error)

    # -- told by the driver -----------------------------------------------------------------

    def guest_opened(self, *, is_open: bool) -> None:
        """A program in the guest has opened the port, or closed it."""
        self.guest_open = is_open
        self._watch()

    def buffers_given(self) -> None:
        """There is room for input."""
        self._starved = False
        self._watch()

    def transmit(self) -> None:
        """Pass output on as far as it is taken. Raises QueueError."""
        queue = self._transmit
        if queue is None:
            return
        for _ in range(BUDGET):
            chain = self._pending or queue.pop()
            if chain is None:
                break
            if not self._pass_on(chain):
                break
            queue.push(chain, 0)
        else:
            self._backend.call_soon(self.writable)
        queue.flush()
        self._watch()

    def _pass_on(self, chain: Chain) -> bool:
        """Whether all of the chain is done with."""
        while self.host_open and self._sent < chain.readable_bytes:
            taken = self._backend.write(_after(chain.readable, self._sent))
            if not taken and self.host_open:
                self._pending = chain
                return False
            self._sent += taken
        self._pending, self._sent = None, 0
        return True

    def _fill(self) -> None:
        """Input into the guest's next buffer. Raises QueueError."""
        queue = self._receive
        if queue is None or (chain := queue.pop()) is None:
            self._starved = True
            self._watch()
            return
        count = self._backend.read_into(_first(chain.writable, READ_BYTES)) if chain.writable else 0
        if not count and chain.writable:
            queue.unpop()
            return
        queue.push(chain, count)
        queue.flush()

    def _watch(self) -> None:
        if self.host_open:
            # A driver throws away what comes for a port that no program has open.
            read = self.guest_open and self._receive is not None and not self._starved
            self._backend.watch(read=read, write=self._pending is not None)


def _after(views: Sequence[memoryview], start: int) -> list[memoryview]:
    """What the views hold together from `start` on."""
    rest = []
    for view in views:
        if start < len(view):
            rest.append(view[start:] if start else view)
        start = max(start - len(view), 0)
    return rest


def _first(views: Sequence[memoryview], limit: int) -> list[memoryview]:
    found = []
    for view in views:
        if limit <= 0:
            break
        found.append(view[:limit])
        limit -= len(view)
    return found


def _nothing() -> None:
    """No device yet."""


def _raise(error: QueueError) -> None:
    raise error
