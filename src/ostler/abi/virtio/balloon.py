"""The traditional memory balloon, virtio 1.2 section 5.5; include/uapi/linux/virtio_balloon.h."""

from __future__ import annotations

import struct
from enum import IntEnum

# Feature bits by position.
VIRTIO_BALLOON_F_MUST_TELL_HOST = 0
VIRTIO_BALLOON_F_STATS_VQ = 1
VIRTIO_BALLOON_F_DEFLATE_ON_OOM = 2
VIRTIO_BALLOON_F_PAGE_POISON = 4
VIRTIO_BALLOON_F_REPORTING = 5

VIRTIO_BALLOON_PFN_SHIFT = 12

# struct virtio_balloon_config: wanted pages, pages it has, free-page-hint command, poison value.
CONFIG = struct.Struct("<IIII")
ACTUAL_OFFSET, POISON_OFFSET = 4, 12

# struct virtio_balloon_stat, packed: tag, value.
STATISTIC = struct.Struct("<HQ")


class Statistic(IntEnum):
    """Tags of statistics, section 5.5.6.4; memory in bytes."""

    SWAP_IN = 0
    SWAP_OUT = 1
    MAJOR_FAULTS = 2
    MINOR_FAULTS = 3
    FREE_MEMORY = 4
    TOTAL_MEMORY = 5
    AVAILABLE_MEMORY = 6
    DISK_CACHES = 7
    HUGETLB_ALLOCATIONS = 8
    HUGETLB_FAILURES = 9
