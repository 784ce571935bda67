"""The vhost-user protocol, docs/interop/vhost-user.rst of QEMU: requests, flags and payloads used by a front end."""

from __future__ import annotations

import struct
from enum import IntEnum

# struct vhost_user_header: request, flags, payload size.
HEADER = struct.Struct("<III")
VERSION, REPLY, NEED_REPLY = 0x1, 0x4, 0x8
MAX_PAYLOAD_BYTES = 4096
MAX_FDS = 8


class Request(IntEnum):
    """Messages of the front end."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    GET_CONFIG = 24
    SET_CONFIG = 25


F_PROTOCOL_FEATURES = 30

PROTOCOL_F_MQ = 0
PROTOCOL_F_REPLY_ACK = 3
PROTOCOL_F_CONFIG = 9

U64 = struct.Struct("<Q")
# struct vhost_vring_state: index, number.
VRING_STATE = struct.Struct("<II")
# struct vhost_vring_addr: index, flags, descriptors, used, available, log.
VRING_ADDR = struct.Struct("<IIQQQQ")
MEM_TABLE = struct.Struct("<II")
# Guest address, size, user address, offset in the file.
MEM_REGION = struct.Struct("<QQQQ")
# Offset, size, flags of a piece of configuration, which follows.
CONFIG = struct.Struct("<III")
