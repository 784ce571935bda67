"""The block device, virtio 1.2 section 5.2; include/uapi/linux/virtio_blk.h."""

from __future__ import annotations

import struct

# Feature bits by position.
VIRTIO_BLK_F_SEG_MAX = 2
VIRTIO_BLK_F_RO = 5
VIRTIO_BLK_F_BLK_SIZE = 6
VIRTIO_BLK_F_FLUSH = 9
VIRTIO_BLK_F_TOPOLOGY = 10
VIRTIO_BLK_F_CONFIG_WCE = 11
VIRTIO_BLK_F_MQ = 12
VIRTIO_BLK_F_DISCARD = 13
VIRTIO_BLK_F_WRITE_ZEROES = 14

VIRTIO_BLK_T_IN = 0
VIRTIO_BLK_T_OUT = 1
VIRTIO_BLK_T_FLUSH = 4
VIRTIO_BLK_T_GET_ID = 8
VIRTIO_BLK_T_DISCARD = 11
VIRTIO_BLK_T_WRITE_ZEROES = 13

VIRTIO_BLK_S_OK = 0
VIRTIO_BLK_S_IOERR = 1
VIRTIO_BLK_S_UNSUPP = 2

VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP = 1

VIRTIO_BLK_ID_BYTES = 20
SECTOR_BYTES = 512

# struct virtio_blk_outhdr: type, priority, sector.
REQUEST = struct.Struct("<IIQ")
# struct virtio_blk_discard_write_zeroes: sector, number of sectors, flags.
RANGE = struct.Struct("<QII")
# struct virtio_blk_config up to write_zeroes_may_unmap and its padding.
CONFIG = struct.Struct("<QIIHBBIBBHIBxHIIIIIB3x")
WRITEBACK_OFFSET = 32
