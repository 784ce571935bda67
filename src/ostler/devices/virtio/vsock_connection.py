"""One stream connection of virtio-vsock and its credit: virtio 1.2 section 5.10.6.3.

Both sides announce how much they buffer (`buf_alloc`) and how much of what they were sent they have passed on
(`fwd_cnt`); all counters are free-running 32-bit numbers. The peer's are the guest's claims and believed only as far as
they hurt nobody but the guest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Protocol

from ostler.devices.virtio.vsock_packet import MASK_32, SHUTDOWN_BOTH, SHUTDOWN_RCV, SHUTDOWN_SEND

# What the host side buffers for one connection whose reader on the host is slow.
BUFFER_BYTES = 256 << 10
# The guest is told of room again when this much has been passed on, so that not every packet is answered.
CREDIT_STEP_BYTES = BUFFER_BYTES // 4


class Stream(Protocol):
    """The host's end of one connection: a socket that never blocks. Its owner holds the board's lock in every call.

    Errors of the socket are OSError; the connection is then reset.
    """

    def bind(self, readable: Callable[[], None], writable: Callable[[], None]) -> None:
        """Whom to call when a watched event happens; before the first `watch`."""

    def watch(self, *, read: bool, write: bool) -> None:
        """Which events are wanted now."""

    def available(self) -> int | None:
        """Bytes that `read_into` would yield now; None at the end of the stream."""

    def hung_up(self) -> bool:
        """Whether the other side takes no more bytes either; asked at the end of the stream."""

    def read_into(self, views: Sequence[memoryview]) -> int:
        """Fill the views in their order; the number of bytes."""

    def write(self, views: Sequence[memoryview]) -> int:
        """How many bytes were taken, 0 when none can be now."""

    def finish_writing(self) -> None:
        """The guest sends no more; the other direction stays open."""

    def established(self, host_port: int) -> None:
        """The guest accepted a connection that the host asked for."""

    def close(self) -> None:
        """Give it up, with what was not read."""


class Stage(Enum):
    """The life of a connection. Transitions: see `VsockDevice`."""

    REQUESTED = auto()
    """The host asked; the guest has not answered."""
    ESTABLISHED = auto()
    DRAINING = auto()
    """The guest is done with it; what it sent goes on to the host."""
    GONE = auto()


class Connection:
    """Data of one connection; `VsockDevice` decides, this counts."""

    __slots__ = (
        "announced", "buffer", "early_bytes", "forwarded", "guest_port", "guest_shutdown", "host_port",
        "host_shutdown", "peer_alloc", "peer_forwarded", "pending", "sent", "stage", "stream",
    )  # fmt: skip

    def __init__(self, stream: Stream, guest_port: int, host_port: int, stage: Stage) -> None:
        self.stream = stream
        self.guest_port = guest_port
        self.host_port = host_port
        self.stage = stage
        self.peer_alloc = self.peer_forwarded = self.sent = 0
        self.forwarded = self.announced = 0
        self.guest_shutdown = self.host_shutdown = 0
        self.early_bytes = False
        # Packets owed to the guest, each kind at most once: a set, so that a guest cannot make it grow.
        self.pending: dict[int, None] = {}
        self.buffer = bytearray()

    @property
    def key(self) -> tuple[int, int]:
        """How the guest names the connection."""
        return self.guest_port, self.host_port

    @property
    def credit(self) -> int:
        """Bytes the guest has room for. A guest that claims to have consumed more than it got has none."""
        in_flight = (self.sent - self.peer_forwarded) & MASK_32
        return max(self.peer_alloc - in_flight, 0)

    @property
    def wants_to_read(self) -> bool:
        """Whether bytes of the host could go to the guest, room in its queue granted."""
        if self.stage is Stage.REQUESTED:
            # Only to notice that the host gave up waiting; bytes sent ahead hide that, and wait.
            return not self.early_bytes
        open_both = not self.guest_shutdown & SHUTDOWN_RCV and not self.host_shutdown & SHUTDOWN_SEND
        return self.stage is Stage.ESTABLISHED and open_both and self.credit > 0

    @property
    def closed_by_both(self) -> bool:
        """Whether the host is done with it and only waits for the guest to say so."""
        return self.host_shutdown == SHUTDOWN_BOTH

    def take(self, views: Sequence[memoryview]) -> None:
        """Pass bytes of the guest on, and keep a copy of what the host does not take now. Raises OSError."""
        sent = 0
        if not self.buffer:
            sent = self.stream.write(views)
            self.forwarded = (self.forwarded + sent) & MASK_32
        for view in views:
            if sent < len(view):
                self.buffer += view[sent:]
            sent = max(sent - len(view), 0)

    def flush(self) -> None:
        """Pass on what was kept, as far as the host takes it. Raises OSError."""
        if self.buffer:
            with memoryview(self.buffer) as kept:
                sent = self.stream.write([kept])
            del self.buffer[:sent]
            self.forwarded = (self.forwarded + sent) & MASK_32
