"""Frames into the buffers of a network card's receive queue: virtio 1.2 section 5.1.6.3 and 5.1.6.4.

A frame goes into one buffer, or with VIRTIO_NET_F_MRG_RXBUF over as many as it needs.
"""

from __future__ import annotations

from ostler.devices.virtio import net_header as net
from ostler.devices.virtio.chain import Chain
from ostler.devices.virtio.net_header import HEADER_BYTES
from ostler.devices.virtio.queue import Virtqueue


class Receiver:
    """What was negotiated for receiving, and the counters of it."""

    def __init__(self, carried_bytes: int) -> None:
        """`carried_bytes`: how much of each frame is the virtio header already."""
        self._carried = carried_bytes
        self.mergeable = False
        self.header = bytes(HEADER_BYTES)
        """Put before frames that carry none."""
        self.frames = self.bytes = 0
        self.dropped = 0
        """Frames that fitted no buffer, or were none."""

    def take(self, rx: Virtqueue, frame: memoryview) -> bool:
        """One frame; false when the guest has no room now. Raises QueueError."""
        carried = self._carried
        if not net.ETHERNET_BYTES <= len(frame) - carried <= net.MAX_FRAME_BYTES:
            self.dropped += 1
            return True
        first = rx.pop()
        if first is None:
            return False
        size = len(frame) - carried + HEADER_BYTES
        chains, room = [first], first.writable_bytes
        while room < size and self.mergeable and len(chains) < rx.size:
            if (more := rx.pop()) is None:
                break
            chains.append(more)
            room += more.writable_bytes
        if room < size:
            return self._undelivered(rx, chains)
        self.frames += 1
        self.bytes += len(frame) - carried
        if len(chains) == 1 and not carried and len(first.writable) == 1:
            # Nearly every small frame: one buffer in one piece.
            view = first.writable[0]
            view[:HEADER_BYTES] = self.header
            view[HEADER_BYTES:size] = frame
            rx.push(first, size)
            return True
        self._scatter(rx, chains, frame)
        return True

    def _undelivered(self, rx: Virtqueue, chains: list[Chain]) -> bool:
        """The frame fits not even all the buffers there are: wait for more, or drop what will never fit."""
        for _ in chains:
            rx.unpop()
        if self.mergeable and len(chains) < rx.size:
            return False
        self.dropped += 1
        return True

    def _scatter(self, rx: Virtqueue, chains: list[Chain], frame: memoryview) -> None:
        """Header and frame over several buffers, in pieces of any size. There is room for all of it."""
        carried = self._carried
        header = bytearray(frame[:carried] if carried else self.header)
        header[net.NUM_BUFFERS_OFFSET :] = len(chains).to_bytes(2, "little")
        parts = [memoryview(header), frame[carried:]]
        filled = []
        for chain in chains:
            written = 0
            for view in chain.writable:
                at = 0
                while at < len(view) and parts:
                    piece = parts[0][: len(view) - at]
                    view[at : at + len(piece)] = piece
                    at += len(piece)
                    rest = parts[0][len(piece) :]
                    parts[:1] = [rest] if rest else []
                written += at
            filled.append((chain, written))
        # Section 5.1.6.4: a driver that polls must not find a part of a frame.
        rx.push_together(filled)
