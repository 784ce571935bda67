"""virtio-console with several ports: terminals (`/dev/hvc0`) and named byte streams, virtio 1.2 section 5.3.

Port 0 is on queues 0 and 1, the control messages on 2 and 3, port n on 2n+2 and 2n+3. The driver says that it is
ready, is told of every port, says which it is ready for, and is told their names, what they are, and which are open
on the host.

What a guest can cost the host: a control message per kind and port that waits for room in its queue.

Left out on purpose: adding and removing ports while the guest runs; a driver without VIRTIO_CONSOLE_F_MULTIPORT has
port 0 alone; RESIZE messages, of whose fields the specification and Linux's driver have different orders (the size is
in the configuration). Output of which the host has taken a part is sent again from its start after a restore.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ostler.devices.state import Saved, blob, load, save, uint
from ostler.devices.virtio.chain import QueueError
from ostler.devices.virtio.console_port import Port
from ostler.devices.virtio.device import VirtioDevice, read_field
from ostler.devices.virtio.queue import Virtqueue
from ostler.errors import StateError

DEVICE_TYPE = 3
CONTROL_RX, CONTROL_TX = 2, 3
QUEUE_SIZE, CONTROL_QUEUE_SIZE = 128, 64
MAX_PORTS = 16
MAX_NAME_BYTES = 64
BUDGET = 256

F_SIZE, F_MULTIPORT, F_EMERG_WRITE = 1 << 0, 1 << 1, 1 << 2
EMERG_WRITE_OFFSET = 8
CONFIG = struct.Struct("<HHII")
CONTROL = struct.Struct("<IHH")
(
    DEVICE_READY, DEVICE_ADD, DEVICE_REMOVE, PORT_READY, CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME,
) = range(8)  # fmt: skip


@dataclass(slots=True)
class ConsoleState:
    """What outlives the process, besides the queues."""

    columns: int = uint(16)
    rows: int = uint(16)
    driver_ready: int = uint(1)
    ready: int = uint(MAX_PORTS)
    """A bit for every port the driver is ready for."""
    guest_open: bytes = blob(MAX_PORTS)
    """A byte for every port."""


class ConsoleDevice(VirtioDevice):
    """The device. Calls must be serialised by the owner."""

    device_type = DEVICE_TYPE

    def __init__(self, ports: Sequence[Port], *, emergency: Callable[[int], None] | None = None) -> None:
        """`emergency` takes single bytes of a guest that cannot use its queues any more."""
        super().__init__()
        names = [port.name.encode() for port in ports]
        if not 1 <= len(ports) <= MAX_PORTS or any(len(name) > MAX_NAME_BYTES for name in names):
            raise ValueError(f"console: {len(ports)} ports, expected 1 to {MAX_PORTS} with short names")
        self._ports = tuple(ports)
        self._emergency = emergency
        self._state = ConsoleState()
        self.features = F_SIZE | F_MULTIPORT | (F_EMERG_WRITE if emergency else 0)
        pair = (QUEUE_SIZE, QUEUE_SIZE)
        self.queue_sizes = pair + (CONTROL_QUEUE_SIZE, CONTROL_QUEUE_SIZE) + pair * (len(ports) - 1)
        self._queues: Sequence[Virtqueue] = ()
        self._multiport = False
        # Messages owed to the driver, each at most once.
        self._owed: dict[tuple[int, int], None] = {}
        self.malformed = 0
        """Control messages too short, of no port, or of no known kind."""
        for number, port in enumerate(ports):
            port.on_opened = self._opened(number)

    def resize(self, columns: int, rows: int) -> None:
        """The terminal behind port 0 has another size."""
        self._state.columns, self._state.rows = columns & 0xFFFF, rows & 0xFFFF
        self.config_changed()

    # -- VirtioDevice -----------------------------------------------------------------------

    def activate(self, queues: Sequence[Virtqueue], features: int) -> None:
        self._queues = queues
        self._multiport = bool(features & F_MULTIPORT)
        active = self._ports if self._multiport else self._ports[:1]
        for number, port in enumerate(active):
            at = _first_queue(number)
            port.broken = self.broken
            port.activate(queues[at], queues[at + 1])
            port.guest_open = not self._multiport or bool(self._state.guest_open[number : number + 1] == b"\1")
        # What the driver knows of the host's side may be out of date after a restore.
        for number in range(len(active)):
            if self._state.ready >> number & 1:
                self._owed[number, PORT_OPEN] = None

    def kicked(self, index: int) -> None:
        if index == CONTROL_TX:
            self._serve_control()
        elif index == CONTROL_RX:
            self._pay()
        else:
            number = 0 if index < CONTROL_RX else index // 2 - 1
            port = self._ports[number]
            if index % 2:
                port.transmit()
            else:
                port.buffers_given()

    def reset(self) -> None:
        for port in self._ports:
            port.reset()
        self._queues = ()
        self._owed.clear()
        size = (self._state.columns, self._state.rows)
        self._state = ConsoleState(*size)

    def read_config(self, offset: int, size: int) -> int:
        config = CONFIG.pack(self._state.columns, self._state.rows, len(self._ports), 0)
        return read_field(config, offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:  # noqa: ARG002 - a byte in a wider field
        if offset == EMERG_WRITE_OFFSET and self._emergency:
            self._emergency(value & 0xFF)

    def save(self) -> Saved:
        self._state.guest_open = bytes(port.guest_open for port in self._ports)
        return save(self._state)

    def restore(self, data: Mapping[str, object]) -> None:
        """Raises StateError and then changes nothing."""
        state = load(ConsoleState, "console", data)
        if len(state.guest_open) != len(self._ports) or state.ready >> len(self._ports):
            raise StateError(f"console: saved state of other ports than the {len(self._ports)} there are")
        self._state = state

    # -- control ----------------------------------------------------------------------------

    def _opened(self, number: int) -> Callable[[], None]:
        def told() -> None:
            if self._state.ready >> number & 1:
                self._owe(number, PORT_OPEN)

        return told

    def _owe(self, number: int, event: int) -> None:
        self._owed[number, event] = None
        try:
            self._pay()
        except QueueError as error:
            self.broken(error)

    def _serve_control(self) -> None:
        if not self._multiport or not self._queues:
            return
        queue = self._queues[CONTROL_TX]
        for _ in range(BUDGET):
            if (chain := queue.pop()) is None:
                break
            message = chain.read(CONTROL.size)
            if len(message) == CONTROL.size:
                self._message(*CONTROL.unpack(message))
            else:
                self.malformed += 1
            queue.push(chain, 0)
        queue.flush()
        self._pay()

    def _message(self, number: int, event: int, value: int) -> None:
        if event == DEVICE_READY:
            self._state.driver_ready = value & 1
            if value & 1:
                self._owed |= dict.fromkeys((number, DEVICE_ADD) for number in range(len(self._ports)))
        elif number < len(self._ports) and event == PORT_READY:
            self._port_ready(number, is_ready=bool(value & 1))
        elif number < len(self._ports) and event == PORT_OPEN:
            self._ports[number].guest_opened(is_open=bool(value & 1))
        else:
            self.malformed += 1

    def _port_ready(self, number: int, *, is_ready: bool) -> None:
        if not is_ready:
            self._state.ready &= ~(1 << number)
            return
        self._state.ready |= 1 << number
        port = self._ports[number]
        events = [PORT_NAME, PORT_OPEN]
        if port.is_console:
            events = [CONSOLE_PORT, *events]
        self._owed |= dict.fromkeys((number, event) for event in events)

    def _pay(self) -> None:
        """Give the driver every message it is owed, as far as it has room. Raises QueueError."""
        if not self._multiport or not self._queues:
            return
        queue = self._queues[CONTROL_RX]
        while self._owed and (chain := queue.pop()) is not None:
            number, event = next(iter(self._owed))
            del self._owed[number, event]
            queue.push(chain, chain.write(self._content(number, event)))
        queue.flush()

    def _content(self, number: int, event: int) -> bytes:
        port = self._ports[number]
        if event == PORT_OPEN:
            return CONTROL.pack(number, event, int(port.host_open or port.is_console))
        if event == PORT_NAME:
            return CONTROL.pack(number, event, 1) + port.name.encode()
        return CONTROL.pack(number, event, 1)


def _first_queue(number: int) -> int:
    return 0 if number == 0 else 2 * number + 2
