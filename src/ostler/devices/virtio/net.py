"""virtio-net: an Ethernet card, virtio 1.2 section 5.1.

Frames go to and come from a `NetBackend` in batches: one system call and one interrupt for many of them. Offloads are
negotiated between driver and back end, the device passes them through:

- a back end whose frames carry the virtio header (TAP) finishes checksums and segments itself;
- one whose frames do not (passt) says what it needs no finishing of, and everything it delivers has been verified.

Receiving: without buffers of the guest's the back end is paused, so that the sender feels it, instead of dropping.

Left out on purpose: several queue pairs (one event loop would serve them all); receive filters, which are best effort
in the specification and of no use on a wire with one guest; VLAN offloads; receive-side scaling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ostler.devices.state import Saved, blob, load, save, uint
from ostler.devices.virtio import net_header as net
from ostler.devices.virtio.chain import Chain, QueueError
from ostler.devices.virtio.device import VirtioDevice, read_field
from ostler.devices.virtio.net_backend import NetBackend
from ostler.devices.virtio.net_header import HEADER, HEADER_BYTES
from ostler.devices.virtio.net_receive import Receiver
from ostler.devices.virtio.queue import Virtqueue
from ostler.devices.virtio.rate_limit import RateLimit
from ostler.errors import StateError

DEVICE_TYPE = 1
RX, TX, CTRL = range(3)
QUEUE_SIZE, CTRL_QUEUE_SIZE = 256, 64
# One batch of the guest's frames: a system call's worth, and what the back end may have to keep a copy of.
BATCH_FRAMES, BATCH_BYTES = 128, 512 << 10
# Batches in one go; then the event loop gets a turn.
BATCHES = 8
CTRL_COMMANDS = 64
CTRL_BYTES = 4096


@dataclass(slots=True)
class NetState:
    """What outlives the process, besides the queues."""

    mac: bytes = blob(net.MAC_BYTES)
    link_up: int = uint(1, 1)
    offloads: int = uint(64)
    """Those of GUEST_OFFLOADS that the driver accepts; features at first, then its commands."""


class NetDevice(VirtioDevice):
    """One card. Calls must be serialised by the owner."""

    device_type = DEVICE_TYPE
    queue_sizes = (QUEUE_SIZE, QUEUE_SIZE, CTRL_QUEUE_SIZE)

    def __init__(
        self,
        backend: NetBackend,
        *,
        mac: bytes,
        tx_limit: RateLimit | None = None,
        rx_limit: RateLimit | None = None,
    ) -> None:
        """`mac` is six bytes. The limits are of what the guest sends and of what it receives."""
        super().__init__()
        if len(mac) != net.MAC_BYTES:
            raise ValueError(f"MAC address of {len(mac)} bytes: expected {net.MAC_BYTES}")
        self._backend = backend
        self._state = NetState(mac)
        self._tx_limit, self._rx_limit = tx_limit, rx_limit
        own = (
            net.F_MAC | net.F_MTU | net.F_STATUS | net.F_MRG_RXBUF | net.F_GUEST_ANNOUNCE
            | net.F_CTRL_VQ | net.F_CTRL_RX | net.F_CTRL_MAC_ADDR
        )  # fmt: skip
        self.features = own | backend.features
        if backend.features & net.GUEST_OFFLOADS:
            self.features |= net.F_CTRL_GUEST_OFFLOADS
        self._rx: Virtqueue | None = None
        self._tx: Virtqueue | None = None
        self._ctrl: Virtqueue | None = None
        self._own_mac = mac
        self._announce = self._restored = False
        self._blocked = self._starved = False
        self._receiver = Receiver(backend.header_bytes)
        self._sent_frames = self._sent_bytes = self._dropped = 0
        backend.attach(self.deliver, self._writable)

    @property
    def backend(self) -> NetBackend:
        """Where frames go and come from."""
        return self._backend

    @property
    def own_mac(self) -> bytes:
        """The address it was made with, whatever the driver or a saved state has it use."""
        return self._own_mac

    @own_mac.setter
    def own_mac(self, mac: bytes) -> None:
        """Be another card to whoever looks at it after the driver's next reset, or is told."""
        self._own_mac = mac

    @property
    def mac(self) -> bytes:
        """The address as the driver has set it last."""
        return self._state.mac

    @property
    def dropped(self) -> int:
        """Frames that fitted no buffer, came without a driver, or were none."""
        return self._dropped + self._receiver.dropped

    def counters(self) -> dict[str, int]:
        """Whole frames and their bytes from the guest (sent) and to it (received), and those lost."""
        return {
            "sent_frames": self._sent_frames,
            "sent_bytes": self._sent_bytes,
            "received_frames": self._receiver.frames,
            "received_bytes": self._receiver.bytes,
            "dropped_frames": self.dropped,
        }

    def set_link(self, *, up: bool) -> None:
        """Plug or unplug the cable; the driver is told."""
        if up != bool(self._state.link_up):
            self._state.link_up = int(up)
            self.config_changed()

    # -- VirtioDevice -----------------------------------------------------------------------

    def activate(self, queues: Sequence[Virtqueue], features: int) -> None:
        self._rx, self._tx, self._ctrl = queues
        self._receiver.mergeable = bool(features & net.F_MRG_RXBUF)
        accepted = features & self._backend.features
        if self._restored:
            # The driver may have turned some off since it negotiated them.
            accepted &= self._state.offloads | ~net.GUEST_OFFLOADS
            self._restored = False
            if features & net.F_GUEST_ANNOUNCE:
                self._announce = True
                self.config_changed()
        self._set_offloads(accepted)
        self._backend.resume()

    def kicked(self, index: int) -> None:
        if index == TX:
            self._serve_tx()
        elif index == RX:
            if self._starved:
                self._starved = False
                self._backend.resume()
        elif index == CTRL:
            self._serve_ctrl()

    def reset(self) -> None:
        self._rx = self._tx = self._ctrl = None
        self._announce = self._restored = self._starved = False
        self._state.mac = self._own_mac
        for limit in (self._tx_limit, self._rx_limit):
            if limit:
                limit.reset()

    def read_config(self, offset: int, size: int) -> int:
        status = (net.STATUS_LINK_UP if self._state.link_up else 0) | (net.STATUS_ANNOUNCE if self._announce else 0)
        pairs = 1
        config = self._state.mac + b"".join(n.to_bytes(2, "little") for n in (status, pairs, self._backend.mtu))
        return read_field(config, offset, size)

    def save(self) -> Saved:
        return save(self._state)

    def restore(self, data: Mapping[str, object]) -> None:
        """Raises StateError. The driver is asked to announce itself: the wire may be another one."""
        state = load(NetState, "network card", data)
        if len(state.mac) != net.MAC_BYTES or state.offloads & ~net.OFFLOADS:
            raise StateError(f"network card: saved address {state.mac.hex()} or offloads {state.offloads:#x} cannot be")
        self._state = state
        self._restored = True

    def _set_offloads(self, offloads: int) -> None:
        self._state.offloads = offloads
        self._backend.configure(offloads)
        # A back end without headers has verified what it delivers: the guest need not.
        verified = offloads & net.F_GUEST_CSUM and not self._backend.header_bytes
        self._receiver.header = HEADER.pack(net.FLAG_DATA_VALID if verified else 0, net.NO_SEGMENTATION, 0, 0, 0, 0, 1)

    # -- from the guest ---------------------------------------------------------------------

    def _serve_tx(self) -> None:
        if (tx := self._tx) is None:
            return
        for _ in range(BATCHES):
            if self._blocked or (self._tx_limit and not self._tx_limit.ready(self._resume_tx)):
                break
            if not self._send_batch(tx):
                break
        else:
            self._backend.call_soon(self._resume_tx)
        tx.flush()

    def _send_batch(self, tx: Virtqueue) -> bool:
        """Whether there may be more."""
        chains: list[Chain] = []
        frames: list[list[memoryview]] = []
        total = 0
        while len(chains) < BATCH_FRAMES and total < BATCH_BYTES and (chain := tx.pop()) is not None:
            chains.append(chain)
            size = chain.readable_bytes - HEADER_BYTES
            if not net.ETHERNET_BYTES <= size <= net.MAX_FRAME_BYTES or not self._state.link_up:
                self._dropped += 1
                continue
            frames.append(self._frame(chain.readable))
            total += size
        if frames:
            self._blocked = not self._backend.send(frames)
            self._sent_frames += len(frames)
            self._sent_bytes += total
            if self._tx_limit:
                self._tx_limit.spend(total)
        for chain in chains:
            tx.push(chain, 0)
        return bool(chains)

    def _frame(self, views: list[memoryview]) -> list[memoryview]:
        """What the back end gets of a chain: with the header, or without."""
        skip = HEADER_BYTES - self._backend.header_bytes
        if not skip:
            return views
        pieces = []
        for view in views:
            if skip >= len(view):
                skip -= len(view)
                continue
            pieces.append(view[skip:] if skip else view)
            skip = 0
        return pieces

    def _resume_tx(self) -> None:
        try:
            self._serve_tx()
        except QueueError as error:
            self.broken(error)

    def _writable(self) -> None:
        self._blocked = False
        self._resume_tx()

    # -- to the guest -----------------------------------------------------------------------

    def deliver(self, frames: Sequence[memoryview]) -> int:
        """Put frames into the guest's buffers; how many were taken. Without a driver or a link all are lost."""
        rx = self._rx
        if rx is None or not rx.enabled or not self._state.link_up:
            self._dropped += len(frames)
            return len(frames)
        taken = 0
        try:
            for frame in frames:
                if self._rx_limit and not self._rx_limit.ready(self._backend.resume):
                    break
                if not self._receiver.take(rx, frame):
                    self._starved = True
                    break
                taken += 1
                if self._rx_limit:
                    self._rx_limit.spend(len(frame))
            rx.flush()
        except QueueError as error:
            self.broken(error)
            return len(frames)
        return taken

    # -- control ----------------------------------------------------------------------------

    def _serve_ctrl(self) -> None:
        if (ctrl := self._ctrl) is None:
            return
        for _ in range(CTRL_COMMANDS):
            if (chain := ctrl.pop()) is None:
                break
            ctrl.push(chain, chain.write(self._command(chain.read(CTRL_BYTES))))
        else:
            self._backend.call_soon(self._resume_ctrl)
        ctrl.flush()

    def _resume_ctrl(self) -> None:
        try:
            self._serve_ctrl()
        except QueueError as error:
            self.broken(error)

    def _command(self, command: bytes) -> bytes:
        """Section 5.1.6.5: class, command, its data; OK or ERR."""
        if len(command) < 2:
            return net.CTRL_ERR
        kind, number, data = command[0], command[1], command[2:]
        if kind == net.CTRL_RX and number in net.CTRL_RX_COMMANDS and len(data) == 1:
            # Everything is delivered anyhow.
            return net.CTRL_OK
        if kind == net.CTRL_MAC and number == net.CTRL_MAC_TABLE_SET:
            return net.CTRL_OK
        if kind == net.CTRL_MAC and number == net.CTRL_MAC_ADDR_SET and len(data) == net.MAC_BYTES:
            self._state.mac = data
            return net.CTRL_OK
        if kind == net.CTRL_ANNOUNCE and number == net.CTRL_ANNOUNCE_ACK and self._announce:
            self._announce = False
            return net.CTRL_OK
        if kind == net.CTRL_GUEST_OFFLOADS and number == net.CTRL_GUEST_OFFLOADS_SET and len(data) == 8:
            return self._change_offloads(int.from_bytes(data, "little"))
        return net.CTRL_ERR

    def _change_offloads(self, wanted: int) -> bytes:
        if wanted & ~(self._backend.features & net.GUEST_OFFLOADS):
            return net.CTRL_ERR
        self._set_offloads(self._state.offloads & ~net.GUEST_OFFLOADS | wanted)
        return net.CTRL_OK
