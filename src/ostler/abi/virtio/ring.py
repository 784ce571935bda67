"""Split virtqueues, virtio 1.2 section 2.7; include/uapi/linux/virtio_ring.h."""

from __future__ import annotations

import struct

VRING_DESC_F_NEXT = 1
VRING_DESC_F_WRITE = 2
VRING_DESC_F_INDIRECT = 4

VRING_AVAIL_F_NO_INTERRUPT = 1
VRING_USED_F_NO_NOTIFY = 1

VRING_DESC_ALIGN_SIZE = 16
VRING_AVAIL_ALIGN_SIZE = 2
VRING_USED_ALIGN_SIZE = 4

# struct vring_desc: address, length, flags, next.
DESCRIPTOR = struct.Struct("<QIHH")
# struct vring_used_elem: head of the chain, bytes written.
USED_ELEMENT = struct.Struct("<II")

MAX_QUEUE_SIZE = 32768


def avail_bytes(size: int) -> int:
    """The driver area with its used_event: flags, index, ring, event."""
    return 6 + 2 * size


def used_bytes(size: int) -> int:
    """The device area with its avail_event."""
    return 6 + USED_ELEMENT.size * size
