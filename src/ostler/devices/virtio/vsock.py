"""virtio-vsock: stream sockets between guest and host, virtio 1.2 section 5.10.

A connection is named by the guest's port and the host's. Either side may ask for one; data flows under the credit of
`vsock_connection`. The host's ends are `Stream`s that a back end makes. Life of a connection:

    host asks    REQUESTED --RESPONSE--> ESTABLISHED        any RST, or an error of the host's socket --> GONE
    guest asks   ------------REQUEST---> ESTABLISHED        SHUTDOWN of both directions, or RST --> DRAINING --> GONE

DRAINING connections belong to the host alone: the guest was told that the connection is gone, and what it had sent
before is still passed on. A host that is done with both directions says so by SHUTDOWN and waits for the guest's RST.

What a guest can cost the host: `MAX_CONNECTIONS` streams with `BUFFER_BYTES` each, and what `vsock_outbox` keeps
for it; beyond that the guest's queue waits until it takes answers.

A guest that goes on from saved state is told that each connection it had is gone by an RST in the receive queue and not
by the event of section 5.10.6.9: drivers serve events beside packets, so that one might end a connection that was asked
for after it. For the same reason host ports of such connections are not used again.

Left out on purpose: SEQPACKET sockets; guests talking to each other (only CID 2 is reachable); events.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from ostler.devices.state import Saved, blob, load, save, uint
from ostler.devices.virtio.chain import Chain, QueueError
from ostler.devices.virtio.device import VirtioDevice
from ostler.devices.virtio.queue import Virtqueue
from ostler.devices.virtio.vsock_connection import BUFFER_BYTES, CREDIT_STEP_BYTES, Connection, Stage, Stream
from ostler.devices.virtio.vsock_outbox import MOST_OWED, Outbox
from ostler.devices.virtio.vsock_packet import (
    HEADER_BYTES,
    HOST_CID,
    MASK_32,
    OP_CREDIT_REQUEST,
    OP_CREDIT_UPDATE,
    OP_REQUEST,
    OP_RESPONSE,
    OP_RST,
    OP_RW,
    OP_SHUTDOWN,
    SHUTDOWN_BOTH,
    SHUTDOWN_SEND,
    TYPE_STREAM,
    Header,
    cut,
    read_header,
)
from ostler.errors import StateError

DEVICE_TYPE = 19
RX, TX, EVENT = range(3)
QUEUE_SIZE, EVENT_QUEUE_SIZE = 256, 16
F_STREAM = 1 << 0
DEFAULT_GUEST_CID = 3

MAX_CONNECTIONS = 256
# Host ports given to connections that the host asks for: above those a guest would ask for by number.
FIRST_HOST_PORT, LAST_HOST_PORT = 1 << 30, (1 << 31) - 1
PORTS = struct.Struct("<II")
# Per wake-up of one stream: enough to make the costs of waking small, little enough for the others' turns.
READ_BYTES = 256 << 10
# Packets of the guest served in one go; then the event loop gets a turn.
TX_BUDGET = 1024


class VsockBackend(Protocol):
    """The host side."""

    def connect(self, host_port: int) -> Stream | None:
        """The guest wants this port; None refuses. Must not block."""

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Run on the event loop, under the board's lock."""


@dataclass(slots=True)
class VsockState:
    """What outlives the process. Connections do not, as their other ends are sockets of this host; their names do."""

    guest_cid: int = uint(64, DEFAULT_GUEST_CID)
    next_host_port: int = uint(32, FIRST_HOST_PORT)
    lost: bytes = blob(MOST_OWED * PORTS.size)
    """Connections the guest is to be told the end of: its port and the host's, each."""


class VsockDevice(VirtioDevice):
    """The device. Calls must be serialised by the owner."""

    device_type = DEVICE_TYPE
    queue_sizes = (QUEUE_SIZE, QUEUE_SIZE, EVENT_QUEUE_SIZE)
    features = F_STREAM

    def __init__(self, backend: VsockBackend, *, guest_cid: int = DEFAULT_GUEST_CID) -> None:
        super().__init__()
        self._backend = backend
        self._state = VsockState(guest_cid)
        self._outbox = Outbox(guest_cid)
        self._tx: Virtqueue | None = None
        self._connections: dict[tuple[int, int], Connection] = {}
        self._draining: set[Connection] = set()
        # Streams that have data and found no room in the guest's queue.
        self._starved: dict[Connection, None] = {}
        self._malformed = 0

    @property
    def malformed(self) -> int:
        """Packets without a whole header, with a false length or a foreign address, and buffers too short for one."""
        return self._malformed + self._outbox.short_buffers

    # -- the host's side --------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Whether a driver is there to ask."""
        return self._outbox.rx is not None

    @property
    def connection_count(self) -> int:
        """All of them, those the guest no longer knows included."""
        return len(self._connections) + len(self._draining)

    def open(self, stream: Stream, guest_port: int) -> bool:
        """Ask the guest for a connection; false when no driver is there or there are too many already.

        `stream.established` is called when the guest accepts; the stream is closed when it refuses.
        """
        if not self.active or not self._make_room():
            return False
        connection = Connection(stream, guest_port, self._new_host_port(guest_port), Stage.REQUESTED)
        self._add(connection)
        self._outbox.owe(connection, OP_REQUEST)
        self._guarded(self._outbox.pay)
        return True

    def _add(self, connection: Connection) -> None:
        self._connections[connection.key] = connection
        stream = connection.stream
        stream.bind(
            partial(self._guarded, self._readable, connection), partial(self._guarded, self._writable, connection)
        )
        self._watch(connection)

    def _make_room(self) -> bool:
        """Room for one more; a connection the host is done with is not worth refusing another one."""
        if self.connection_count < MAX_CONNECTIONS:
            return True
        done = next((each for each in self._connections.values() if each.closed_by_both), None)
        if done is None or not self._outbox.reset(done.guest_port, done.host_port):
            return False
        self._remove(done)
        return True

    def _new_host_port(self, guest_port: int) -> int:
        while True:
            port = self._state.next_host_port
            self._state.next_host_port = port + 1 if port < LAST_HOST_PORT else FIRST_HOST_PORT
            if (guest_port, port) not in self._connections:
                return port

    def _guarded(self, action: Callable[..., None], *arguments: Connection) -> None:
        """Serve the host's side; a broken ring found meanwhile is the transport's business."""
        try:
            action(*arguments)
        except QueueError as error:
            self.broken(error)

    # -- VirtioDevice -----------------------------------------------------------------------

    def activate(self, queues: Sequence[Virtqueue], features: int) -> None:  # noqa: ARG002 - one feature, always on
        self._outbox.rx, self._tx, _ = queues

    def kicked(self, index: int) -> None:
        if index == RX:
            self._resume_reading()
        elif index == TX:
            self._serve_tx()

    def reset(self) -> None:
        self._drop_connections()
        self._outbox.rx = self._tx = None

    def read_config(self, offset: int, size: int) -> int:
        return self._state.guest_cid >> (offset * 8) & ((1 << size * 8) - 1)

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Read-only, section 5.10.4."""

    def save(self) -> Saved:
        gone = [*self._connections, *self._outbox.resets]
        self._state.lost = b"".join(PORTS.pack(*each) for each in gone[:MOST_OWED])
        return save(self._state)

    def restore(self, data: Mapping[str, object]) -> None:
        """Raises StateError and then changes nothing. The guest is told that its connections are gone."""
        state = load(VsockState, "vsock", data)
        if len(state.lost) % PORTS.size:
            raise StateError(f"vsock: saved lost has {len(state.lost)} bytes: expected a multiple of {PORTS.size}")
        if not FIRST_HOST_PORT <= state.next_host_port <= LAST_HOST_PORT:
            raise StateError(f"vsock: saved next_host_port = {state.next_host_port:#x}: not one of the host's")
        self._drop_connections()
        self._state = state
        self._outbox.guest_cid = state.guest_cid
        # Sent when the transport has the queues looked at: only then can the guest be interrupted.
        for guest_port, host_port in PORTS.iter_unpack(state.lost):
            self._outbox.reset(guest_port, host_port)

    def _drop_connections(self) -> None:
        for connection in [*self._connections.values(), *self._draining]:
            connection.stage = Stage.GONE
            connection.stream.close()
        for each in (self._connections, self._draining, self._starved, self._outbox):
            each.clear()

    # -- from the guest ---------------------------------------------------------------------

    def _serve_tx(self) -> None:
        tx = self._tx
        if tx is None:
            return
        more = True
        for _ in range(TX_BUDGET):
            # An answer per packet at most: with no room to keep one, the packet stays where it is.
            if self._outbox.is_full:
                break
            if (chain := tx.pop()) is None:
                more = False
                break
            self._receive(chain)
            tx.push(chain, 0)
        tx.flush()
        self._outbox.pay()
        # Without room for answers, the driver's next buffer for them brings us back.
        if more and not self._outbox.is_full:
            self._backend.call_soon(partial(self._guarded, self._serve_tx))

    def _receive(self, chain: Chain) -> None:
        if chain.readable_bytes < HEADER_BYTES:
            self._malformed += 1
            return
        header = read_header(chain.readable)
        if header.src_cid != self._state.guest_cid or header.dst_cid != HOST_CID:
            self._malformed += 1
            return
        connection = self._connections.get((header.src_port, header.dst_port))
        if header.type != TYPE_STREAM or header.len > chain.readable_bytes - HEADER_BYTES:
            self._malformed += 1
            self._refuse(header, connection)
            return
        if connection is None:
            if header.op == OP_REQUEST:
                self._requested(header)
            elif header.op != OP_RST:
                self._refuse(header, None)
            return
        connection.peer_alloc, connection.peer_forwarded = header.buf_alloc, header.fwd_cnt
        try:
            self._dispatch(connection, header, chain)
        except OSError:
            # The host's end broke: whoever was there is gone.
            self._refuse(header, connection)
        else:
            self._watch(connection)

    def _dispatch(self, connection: Connection, header: Header, chain: Chain) -> None:
        """One packet of a known connection. Raises OSError of its stream."""
        op = header.op
        if op == OP_RST:
            self._release(connection)
        elif connection.stage is Stage.REQUESTED:
            if op != OP_RESPONSE:
                self._refuse(header, connection)
                return
            connection.stage = Stage.ESTABLISHED
            connection.stream.established(connection.host_port)
        elif op == OP_RW:
            self._receive_data(connection, header, chain)
        elif op == OP_SHUTDOWN:
            self._receive_shutdown(connection, header.flags)
        elif op == OP_CREDIT_REQUEST:
            self._outbox.owe(connection, OP_CREDIT_UPDATE)
        elif op != OP_CREDIT_UPDATE:
            self._refuse(header, connection)

    def _receive_data(self, connection: Connection, header: Header, chain: Chain) -> None:
        room = BUFFER_BYTES - len(connection.buffer)
        if connection.guest_shutdown & SHUTDOWN_SEND or header.len > room:
            # Against its own word, or beyond its credit.
            self._refuse(header, connection)
            return
        if header.len:
            connection.take([*cut(chain.readable, HEADER_BYTES, header.len)])
            self._passed_on(connection)

    def _receive_shutdown(self, connection: Connection, flags: int) -> None:
        new = flags & SHUTDOWN_BOTH & ~connection.guest_shutdown
        connection.guest_shutdown |= new
        if connection.guest_shutdown == SHUTDOWN_BOTH:
            self._outbox.reset(connection.guest_port, connection.host_port)
            self._release(connection)
        elif new & SHUTDOWN_SEND and not connection.buffer:
            connection.stream.finish_writing()

    def _requested(self, header: Header) -> None:
        stream = self._backend.connect(header.dst_port) if self._make_room() else None
        if stream is None:
            self._refuse(header, None)
            return
        connection = Connection(stream, header.src_port, header.dst_port, Stage.ESTABLISHED)
        connection.peer_alloc, connection.peer_forwarded = header.buf_alloc, header.fwd_cnt
        self._outbox.owe(connection, OP_RESPONSE)
        self._add(connection)

    def _refuse(self, header: Header, connection: Connection | None) -> None:
        """Answer RST, and forget the connection if there was one."""
        if header.op != OP_RST:
            self._outbox.answer_reset(header)
        if connection is not None:
            self._remove(connection)

    def _passed_on(self, connection: Connection) -> None:
        """Bytes went to the host: tell the guest of the room, but not for every packet."""
        if (connection.forwarded - connection.announced) & MASK_32 >= CREDIT_STEP_BYTES:
            self._outbox.owe(connection, OP_CREDIT_UPDATE)

    # -- ends -------------------------------------------------------------------------------

    def _release(self, connection: Connection) -> None:
        """The guest is done; what it sent before is not lost."""
        self._forget(connection)
        if not connection.buffer:
            self._remove(connection)
            return
        connection.stage = Stage.DRAINING
        self._draining.add(connection)
        self._watch(connection)

    def _remove(self, connection: Connection) -> None:
        self._forget(connection)
        self._draining.discard(connection)
        connection.stage = Stage.GONE
        connection.stream.close()

    def _forget(self, connection: Connection) -> None:
        if self._connections.get(connection.key) is connection:
            del self._connections[connection.key]
        self._outbox.forget(connection)
        self._starved.pop(connection, None)

    def _broken(self, connection: Connection) -> None:
        """The stream failed outside of a packet of the guest."""
        if connection.stage is not Stage.DRAINING:
            self._outbox.reset(connection.guest_port, connection.host_port)
        self._remove(connection)

    # -- streams ----------------------------------------------------------------------------

    def _watch(self, connection: Connection) -> None:
        if connection.stage is not Stage.GONE:
            read = connection.wants_to_read and connection not in self._starved
            connection.stream.watch(read=read, write=bool(connection.buffer))

    def _readable(self, connection: Connection) -> None:
        if not self.active or connection.stage is Stage.GONE:
            return
        try:
            self._read(connection)
        except OSError:
            self._broken(connection)
        else:
            self._watch(connection)
        self._outbox.pay()

    def _read(self, connection: Connection) -> None:
        available = connection.stream.available()
        if connection.stage is Stage.REQUESTED:
            connection.early_bytes = bool(available)
            if available is None:
                self._broken(connection)
            return
        if not connection.wants_to_read:
            return
        # What is owed comes first: a RESPONSE before the first byte.
        self._outbox.pay()
        if not self._outbox.is_empty:
            self._starved[connection] = None
            return
        if available is None:
            connection.host_shutdown |= SHUTDOWN_BOTH if connection.stream.hung_up() else SHUTDOWN_SEND
            self._outbox.owe(connection, OP_SHUTDOWN)
        elif available and not self._outbox.send(connection, min(available, connection.credit, READ_BYTES)):
            self._starved[connection] = None

    def _writable(self, connection: Connection) -> None:
        if connection.stage is Stage.GONE:
            return
        try:
            connection.flush()
            if not connection.buffer:
                if connection.stage is Stage.DRAINING:
                    self._remove(connection)
                    return
                if connection.guest_shutdown & SHUTDOWN_SEND:
                    connection.stream.finish_writing()
        except OSError:
            self._broken(connection)
        else:
            self._passed_on(connection)
            self._watch(connection)
        self._outbox.pay()

    def _resume_reading(self) -> None:
        """The guest gave buffers: answers first, then whoever waited for room, then packets that waited for answers."""
        self._outbox.pay()
        waiting, self._starved = self._starved, {}
        for connection in waiting:
            self._watch(connection)
        self._serve_tx()
