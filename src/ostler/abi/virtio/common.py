"""Device status, reserved feature bits and device numbers, virtio 1.2 sections 2.1, 6 and 5."""

from __future__ import annotations

from enum import IntEnum, IntFlag


class Status(IntFlag):
    """Device status, section 2.1."""

    ACKNOWLEDGE = 1 << 0
    DRIVER = 1 << 1
    DRIVER_OK = 1 << 2
    FEATURES_OK = 1 << 3
    NEEDS_RESET = 1 << 6
    FAILED = 1 << 7


# Feature bits by position, section 6.
VIRTIO_F_NOTIFY_ON_EMPTY = 24
VIRTIO_F_ANY_LAYOUT = 27
VIRTIO_RING_F_INDIRECT_DESC = 28
VIRTIO_RING_F_EVENT_IDX = 29
VIRTIO_F_VERSION_1 = 32
VIRTIO_F_ACCESS_PLATFORM = 33
VIRTIO_F_RING_PACKED = 34
VIRTIO_F_IN_ORDER = 35
VIRTIO_F_RING_RESET = 40


class DeviceId(IntEnum):
    """Section 5."""

    NET = 1
    BLOCK = 2
    CONSOLE = 3
    RNG = 4
    BALLOON = 5
    VSOCK = 19
    FS = 26
