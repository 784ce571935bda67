"""A vhost-user front end: a device whose work another program does (qemu-storage-daemon, virtiofsd).

It gives that program guest memory, rings of its own (`vhost_user_ring`), and an eventfd each way for every ring. The
program is started by a `Launcher`, which also says whether it can be started again when it dies: a disk can, because
what it had not answered is simply asked again; a shared folder cannot, because its open files are gone.

Set-up talks to the program and waits for it, a few messages at each start of the guest's driver. Data does not.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable, Sequence
from typing import Protocol, Self

from ostler.abi.virtio import vhost_user as abi
from ostler.abi.virtio.common import VIRTIO_F_VERSION_1, VIRTIO_RING_F_INDIRECT_DESC
from ostler.abi.virtio.vhost_user import Request
from ostler.backends.loop import Host
from ostler.backends.vhost_user_ring import RING_BYTES, RING_SIZE, Part, ShadowRing
from ostler.backends.vhost_user_wire import BackEndLost, Channel
from ostler.errors import HostError
from ostler.host.eventfd import EventFd
from ostler.host.helpers import Helper
from ostler.host.memfd import SharedMapping
from ostler.memory import GuestMemory
from ostler.memory.layout import PHYSICAL_LIMIT

RING_FEATURES = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC
WANTED_PROTOCOL = 1 << abi.PROTOCOL_F_MQ | 1 << abi.PROTOCOL_F_REPLY_ACK | 1 << abi.PROTOCOL_F_CONFIG
# Where the back end sees Ostler's own rings: no guest has memory there.
RINGS_GPA = PHYSICAL_LIMIT
DRAIN_TIMEOUT_S, LAST_WORDS_S = 5.0, 2.0
MAX_RESTARTS, RESTART_WINDOW_S = 5, 60.0

Completed = list[tuple[int, int]]


class Launcher(Protocol):
    """Starts the program behind a device."""

    name: str
    restartable: bool
    """Whether a fresh one can go on where a dead one was."""

    def start(self) -> tuple[Helper, socket.socket]:
        """The program and a socket connected to it. Main thread only; raises HostError."""


class VhostUser:
    """One device's program, its channel and rings; a context manager. Calls under the board's lock."""

    def __init__(
        self, launcher: Launcher, host: Host, *, queue_count: int, config_bytes: int, report: Callable[[str], None]
    ) -> None:
        """Start the program and learn what it can do. Raises HostError.

        `config_bytes` of device configuration are fetched if not 0; `report` is told one line when the program dies.
        """
        self._launcher, self._host, self._report = launcher, host, report
        self._queue_count, self._config_bytes = queue_count, config_bytes
        self._completed: Callable[[int, Completed], None] = _nobody
        self._restarted: Callable[[], None] = _nothing
        self._lost: Callable[[], None] = _nothing
        self.when_died: Callable[[], None] = _nothing
        """Called on the loop's thread each time the program has ended by itself."""
        self._running: tuple[GuestMemory, int, Sequence[int]] | None = None
        self._restarts: list[float] = []
        self.config = b""
        """The device's configuration structure as its program gave it."""
        with contextlib.ExitStack() as stack:
            self._mapping = stack.enter_context(SharedMapping("ostler-vhost-rings", RING_BYTES * queue_count))
            self.rings = [
                ShadowRing(self._mapping, RING_BYTES * n, RINGS_GPA + RING_BYTES * n) for n in range(queue_count)
            ]
            for ring in self.rings:
                stack.callback(ring.close)
            self._kicks = [stack.enter_context(EventFd()) for _ in range(queue_count)]
            self._calls = [stack.enter_context(EventFd()) for _ in range(queue_count)]
            self._connect()
            for index, call in enumerate(self._calls):
                host.loop.add_reader(call.fd, host.locked(self._caller(index, call)))
            self._resources = stack.pop_all()

    # -- what devices use -------------------------------------------------------------------------

    def attach(
        self, completed: Callable[[int, Completed], None], restarted: Callable[[], None], lost: Callable[[], None]
    ) -> None:
        """`completed(queue, slots)` when work is done; `restarted` when all that was under way must be submitted again;
        `lost` when the program died and there will be no other."""
        self._completed, self._restarted, self._lost = completed, restarted, lost

    def start(self, memory: GuestMemory, features: int, queues: Sequence[int]) -> None:
        """Begin to serve these queues for a driver that took `features`. Raises BackEndLost."""
        for ring in self.rings:
            ring.clear()
        self._running = (memory, features, queues)
        self._set_up()

    def stop(self) -> None:
        """Wait for what is under way, and have the program let go of the rings."""
        running, self._running = self._running, None
        if running is None:
            return
        try:
            self._drain(running[2])
            for index in running[2]:
                self._channel.ask(Request.GET_VRING_BASE, abi.VRING_STATE.pack(index, 0))
        except BackEndLost as error:
            # It may still write into memory that is no longer its own: only its end makes sure that it does not.
            self._report(str(error))
            self._helper.stop()
            self._host.loop.call_soon(self._host.locked(self._died))

    def submit(self, queue: int, readable: Sequence[Part], writable: Sequence[Part]) -> int:
        """Hand a chain over; returns its slot. Only while the ring `has_room`; `notify` follows."""
        return self.rings[queue].submit(readable, writable)

    def notify(self, queue: int) -> None:
        """There are new chains."""
        self._kicks[queue].signal()

    def write_config(self, offset: int, data: bytes) -> None:
        """Pass a driver's write on; one that the program refuses changes nothing."""
        with contextlib.suppress(BackEndLost):
            self._channel.send(Request.SET_CONFIG, abi.CONFIG.pack(offset, len(data), 0) + data)
            self.config = self.config[:offset] + data + self.config[offset + len(data) :]

    # -- set-up -------------------------------------------------------------------------------------

    def _connect(self) -> None:
        self._helper, connected = self._launcher.start()
        self._channel = Channel(connected, self._launcher.name)
        try:
            self._negotiate()
        except BackEndLost as error:
            # Its own last words say more than the connection it closed.
            died = self._helper.ended(within_s=LAST_WORDS_S)
            self._hang_up()
            if died:
                raise HostError(self._helper.obituary()) from error
            raise
        except HostError:
            self._hang_up()
            raise
        self._helper.watch(self._host.loop, lambda _helper: self._host.locked(self._died)())

    def _negotiate(self) -> None:
        channel = self._channel
        features = channel.ask_u64(Request.GET_FEATURES)
        if RING_FEATURES & ~features or not features >> abi.F_PROTOCOL_FEATURES & 1:
            raise HostError(f"{self._launcher.name}: offers {features:#x}, expected virtio 1 with indirect descriptors")
        self.features = features
        protocol = channel.ask_u64(Request.GET_PROTOCOL_FEATURES) & WANTED_PROTOCOL
        if self._config_bytes and not protocol >> abi.PROTOCOL_F_CONFIG & 1:
            raise HostError(f"{self._launcher.name}: gives no device configuration")
        channel.send(Request.SET_PROTOCOL_FEATURES, abi.U64.pack(protocol))
        channel.acknowledged = bool(protocol >> abi.PROTOCOL_F_REPLY_ACK & 1)
        channel.send(Request.SET_OWNER)
        if self._config_bytes:
            self.config = self._get_config()

    def _get_config(self) -> bytes:
        head = abi.CONFIG.pack(0, self._config_bytes, 0)
        answer = self._channel.ask(Request.GET_CONFIG, head + bytes(self._config_bytes))
        if len(answer) != abi.CONFIG.size + self._config_bytes:
            raise HostError(f"{self._launcher.name}: configuration of {len(answer) - abi.CONFIG.size} bytes")
        return answer[abi.CONFIG.size :]

    def _set_up(self) -> None:
        assert self._running is not None
        memory, features, queues = self._running
        send = self._channel.send
        send(Request.SET_FEATURES, abi.U64.pack(features | RING_FEATURES | 1 << abi.F_PROTOCOL_FEATURES))
        regions = [
            (each.start, each.size_bytes, memory.host_address(each.start, 1), each.offset, memory.fd)
            for each in memory.regions
        ]
        regions.append((RINGS_GPA, self._mapping.size_bytes, self._mapping.address, 0, self._mapping.fd))
        table = b"".join(abi.MEM_REGION.pack(*region[:4]) for region in regions)
        head = abi.MEM_TABLE.pack(len(regions), 0)
        send(Request.SET_MEM_TABLE, head + table, [region[4] for region in regions])
        for index in queues:
            places = self.rings[index].places
            send(Request.SET_VRING_NUM, abi.VRING_STATE.pack(index, RING_SIZE))
            send(Request.SET_VRING_BASE, abi.VRING_STATE.pack(index, 0))
            address = abi.VRING_ADDR.pack(index, 0, places.descriptors, places.used, places.avail, 0)
            send(Request.SET_VRING_ADDR, address)
            send(Request.SET_VRING_CALL, abi.U64.pack(index), [self._calls[index].fd])
            send(Request.SET_VRING_KICK, abi.U64.pack(index), [self._kicks[index].fd])
            send(Request.SET_VRING_ENABLE, abi.VRING_STATE.pack(index, 1))

    # -- events -----------------------------------------------------------------------------------

    def _caller(self, index: int, call: EventFd) -> Callable[[], None]:
        def called() -> None:
            call.drain()
            if self._running is not None:
                self._completed(index, self.rings[index].completed())

        return called

    def _drain(self, queues: Sequence[int]) -> None:
        """Wait for everything under way. Raises BackEndLost when it takes too long."""
        deadline = time.monotonic() + DRAIN_TIMEOUT_S
        poll = select.poll()
        for index in queues:
            poll.register(self._calls[index], select.POLLIN)
        while any(self.rings[index].busy for index in queues):
            left = deadline - time.monotonic()
            if left <= 0 or not self._helper.alive:
                raise BackEndLost(f"{self._launcher.name}: requests unanswered for {DRAIN_TIMEOUT_S:g} s")
            poll.poll(min(left * 1000, 100))
            for index in queues:
                self._calls[index].drain()
                if done := self.rings[index].completed():
                    self._completed(index, done)

    def kill(self) -> None:
        """End the program, as if the host had."""
        self._helper.kill()

    def _died(self) -> None:
        """The program ended by itself, or was ended: another one takes over, where it can."""
        self._report(self._helper.obituary())
        self.when_died()
        self._hang_up()
        now = time.monotonic()
        self._restarts = [each for each in self._restarts if now - each < RESTART_WINDOW_S]
        if not self._launcher.restartable or len(self._restarts) >= MAX_RESTARTS:
            self._running = None
            self._lost()
            return
        self._restarts.append(now)
        try:
            self._connect()
            if self._running is not None:
                for ring in self.rings:
                    ring.clear()
                self._set_up()
                self._restarted()
        except HostError as error:
            self._report(str(error))
            self._running = None
            self._lost()

    def _hang_up(self) -> None:
        self._channel.close()
        self._helper.stop()

    def close(self) -> None:
        """End the program. Closing twice is harmless."""
        self._running = None
        for call in self._calls:
            self._host.loop.remove_reader(call.fd)
        self._hang_up()
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def _nobody(queue: int, done: Completed) -> None:
    """No device yet."""


def _nothing() -> None:
    """No device yet."""
