"""The packet of virtio-vsock: virtio 1.2 section 5.10.6, one header before every payload.

Left out on purpose: SEQPACKET sockets (section 5.10.6.7), whose feature bit the device does not offer.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

HEADER = struct.Struct("<QQIIIHHIII")
HEADER_BYTES = HEADER.size

HOST_CID = 2
TYPE_STREAM = 1

OP_REQUEST, OP_RESPONSE, OP_RST, OP_SHUTDOWN, OP_RW, OP_CREDIT_UPDATE, OP_CREDIT_REQUEST = range(1, 8)

SHUTDOWN_RCV, SHUTDOWN_SEND = 1, 2
SHUTDOWN_BOTH = SHUTDOWN_RCV | SHUTDOWN_SEND

MASK_32 = 0xFFFF_FFFF


class Header(NamedTuple):
    """Field for field what lies in memory."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    len: int
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int


def read_header(views: Sequence[memoryview]) -> Header:
    """The header at the start of a chain of at least HEADER_BYTES; read once, for the guest may change it meanwhile."""
    first = views[0]
    if len(first) >= HEADER_BYTES:
        return Header._make(HEADER.unpack_from(first))
    return Header._make(HEADER.unpack(b"".join(cut(views, 0, HEADER_BYTES))))


def write_header(views: Sequence[memoryview], header: tuple[int, ...]) -> None:
    """Put a header at the start of a chain of at least HEADER_BYTES."""
    first = views[0]
    if len(first) >= HEADER_BYTES:
        HEADER.pack_into(first, 0, *header)
        return
    raw = HEADER.pack(*header)
    at = 0
    for view in cut(views, 0, HEADER_BYTES):
        view[:] = raw[at : at + len(view)]
        at += len(view)


def cut(views: Sequence[memoryview], start: int, size_bytes: int) -> Iterator[memoryview]:
    """The `size_bytes` from `start` on of what the views hold together; fewer where they end. None is empty."""
    for view in views:
        length = len(view)
        if start >= length:
            start -= length
            continue
        if size_bytes <= 0:
            return
        piece = view if not start and size_bytes >= length else view[start : start + size_bytes]
        start = 0
        size_bytes -= len(piece)
        yield piece
