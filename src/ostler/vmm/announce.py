"""Telling a network that a guest has moved: its bridges learn the new way from a frame that comes from there.

A reverse ARP request (RFC 903) with the guest's own hardware address: every switch learns from it, no station has to
answer, and it needs no IP address. passt's networks are this process's own and need none.
"""

from __future__ import annotations

import struct

from ostler.backends.tap import Tap
from ostler.vmm.run import GuestProcess

BROADCAST = b"\xff" * 6
ETHERTYPE_RARP, HARDWARE_ETHERNET, PROTOCOL_IPV4, REQUEST_REVERSE = 0x8035, 1, 0x0800, 3
MIN_FRAME_BYTES = 60


def rarp_frame(mac: bytes) -> bytes:
    """The frame, padded to Ethernet's least length."""
    body = (
        struct.pack("!HHBBH", HARDWARE_ETHERNET, PROTOCOL_IPV4, 6, 4, REQUEST_REVERSE) + mac + bytes(4) + mac + bytes(4)
    )
    return (BROADCAST + mac + struct.pack("!H", ETHERTYPE_RARP) + body).ljust(MIN_FRAME_BYTES, b"\0")


def announce_cards(process: GuestProcess) -> None:
    """Say it on every network that has others on it. Loop thread only."""
    for card in process.networks:
        backend = card.device.backend
        if isinstance(backend, Tap):
            backend.send([[memoryview(bytes(backend.header_bytes)), memoryview(rarp_frame(card.device.mac))]])
