"""What a vsock device sends: packets of connections in the order they are owed, answers to nobody, data of streams.

Everything waits here until the guest has given buffers for it. What may wait is bounded: one packet of each kind for a
connection, and `MAX_RESETS` answers to packets that belong to none, virtio 1.2 section 5.10.6.1.1.
"""

from __future__ import annotations

from collections import deque

from ostler.devices.virtio.chain import Chain
from ostler.devices.virtio.queue import Virtqueue
from ostler.devices.virtio.vsock_connection import BUFFER_BYTES, Connection
from ostler.devices.virtio.vsock_packet import (
    HEADER_BYTES,
    HOST_CID,
    MASK_32,
    OP_CREDIT_UPDATE,
    OP_RST,
    OP_RW,
    OP_SHUTDOWN,
    TYPE_STREAM,
    Header,
    cut,
    write_header,
)

MAX_RESETS = 256
# With those that the device begins by itself, of all connections at once and some more.
MOST_OWED = 3 * MAX_RESETS
# In one go: as with READ_BYTES of the device, the others want their turns.
READ_CHAINS = 128


class Outbox:
    """The guest's receive queue and what waits for it. Methods that use the queue raise QueueError."""

    def __init__(self, guest_cid: int) -> None:
        self.guest_cid = guest_cid
        self.rx: Virtqueue | None = None
        """None while there is no driver."""
        # Connections that owe the guest a packet, in the order they began to; and answers to nobody.
        self._owing: dict[Connection, None] = {}
        self._resets: deque[tuple[int, int, int]] = deque()
        self.short_buffers = 0
        """Buffers of the guest's that hold not even a header."""

    @property
    def is_empty(self) -> bool:
        """Whether the guest has all that it is owed."""
        return not self._resets and not self._owing

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another answer to a packet of the guest's."""
        return len(self._resets) >= MAX_RESETS

    @property
    def resets(self) -> list[tuple[int, int]]:
        """Guest's and host's port of connections whose end the guest does not know of yet."""
        return [(guest_port, host_port) for guest_port, host_port, kind in self._resets if kind == TYPE_STREAM]

    def owe(self, connection: Connection, op: int) -> None:
        """A packet of a connection, sent by `pay`."""
        connection.pending[op] = None
        self._owing[connection] = None

    def forget(self, connection: Connection) -> None:
        """The connection owes nothing any more."""
        self._owing.pop(connection, None)

    def answer_reset(self, header: Header) -> None:
        """RST to a packet that has no business here; the caller sees to it that the box is not full."""
        self._resets.append((header.src_port, header.dst_port, header.type))

    def reset(self, guest_port: int, host_port: int) -> bool:
        """Tell the guest that a connection is gone; false when it takes no answers."""
        if len(self._resets) >= MOST_OWED:
            return False
        self._resets.append((guest_port, host_port, TYPE_STREAM))
        return True

    def clear(self) -> None:
        """Forget everything."""
        self._owing.clear()
        self._resets.clear()

    def pay(self) -> None:
        """Give the guest every packet it is owed, as far as it has room."""
        rx = self.rx
        if rx is None:
            return
        while not self.is_empty:
            if (chain := self._pop(rx)) is None:
                break
            write_header(chain.writable, self._next_header())
            rx.push(chain, HEADER_BYTES)
        rx.flush()

    def send(self, connection: Connection, wanted: int) -> bool:
        """Read up to `wanted` bytes of the connection's stream straight into the guest's buffers.

        False where these were too few. They are published by the next `pay`. Raises OSError of the stream.
        """
        rx = self.rx
        if rx is None:
            return False
        chains: list[tuple[Chain, int]] = []
        views: list[memoryview] = []
        has_room = True
        while wanted > 0 and len(chains) < READ_CHAINS:
            if (chain := self._pop(rx)) is None:
                has_room = False
                break
            room = min(chain.writable_bytes - HEADER_BYTES, wanted)
            chains.append((chain, room))
            views.extend(cut(chain.writable, HEADER_BYTES, room))
            wanted -= room
        count = 0
        try:
            count = connection.stream.read_into(views) if views else 0
        finally:
            # Every buffer goes back to the guest, whatever happened: the ones left over say what credit there is.
            for chain, room in chains:
                size = min(room, count)
                count -= size
                connection.sent = (connection.sent + size) & MASK_32
                op = OP_RW if size else OP_CREDIT_UPDATE
                write_header(chain.writable, self._header(connection, op, size=size))
                rx.push(chain, HEADER_BYTES + size)
        return has_room

    def _next_header(self) -> tuple[int, ...]:
        """Take the packet that is owed the longest off the list: answers first."""
        if self._resets:
            guest_port, host_port, kind = self._resets.popleft()
            return (HOST_CID, self.guest_cid, host_port, guest_port, 0, kind, OP_RST, 0, 0, 0)
        connection = next(iter(self._owing))
        op = next(iter(connection.pending))
        del connection.pending[op]
        if not connection.pending:
            del self._owing[connection]
        return self._header(connection, op, flags=connection.host_shutdown if op == OP_SHUTDOWN else 0)

    def _header(self, connection: Connection, op: int, *, size: int = 0, flags: int = 0) -> tuple[int, ...]:
        connection.announced = connection.forwarded
        return (
            HOST_CID, self.guest_cid, connection.host_port, connection.guest_port,
            size, TYPE_STREAM, op, flags, BUFFER_BYTES, connection.forwarded,
        )  # fmt: skip

    def _pop(self, rx: Virtqueue) -> Chain | None:
        """The next buffer that holds at least a header; the others go back empty, a ring of them at most."""
        for _ in range(rx.size):
            chain = rx.pop()
            if chain is None or chain.writable_bytes >= HEADER_BYTES:
                return chain
            self.short_buffers += 1
            rx.push(chain, 0)
        return None
