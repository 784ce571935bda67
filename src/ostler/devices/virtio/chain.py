"""A descriptor chain as a device sees it: checked, bounded, views of guest memory. Virtio 1.2 section 2.7."""

from __future__ import annotations

from ostler.abi.virtio.ring import VRING_DESC_F_WRITE


class QueueError(Exception):
    """The driver broke the rules of the ring; the device needs a reset. Never leaves the transport."""


class Chain:
    """One descriptor chain: checked, bounded, as views of guest memory."""

    __slots__ = ("head", "parts", "readable", "readable_bytes", "writable", "writable_bytes")

    def __init__(self, head: int) -> None:
        self.head = head
        self.readable: list[memoryview] = []
        """Driver to device."""
        self.writable: list[memoryview] = []
        """Device to driver."""
        self.readable_bytes = 0
        self.writable_bytes = 0
        self.parts: list[tuple[int, int]] = []
        """Guest-physical address and size of each part, readable ones first."""

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Guest-physical address and size of each writable part."""
        return self.parts[len(self.readable) :]

    def read(self, limit: int | None = None) -> bytes:
        """A copy of the readable part, of its first `limit` bytes if given."""
        if limit is None or limit >= self.readable_bytes:
            return b"".join(self.readable)
        parts, left = [], limit
        for view in self.readable:
            parts.append(view[:left])
            left -= len(parts[-1])
            if not left:
                break
        return b"".join(parts)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Fill the writable part from its start; returns how many bytes had room."""
        view, at = memoryview(data), 0
        for part in self.writable:
            piece = view[at : at + len(part)]
            part[: len(piece)] = piece
            at += len(piece)
            if at == len(view):
                break
        return at


class Ranges:
    """Guest addresses of a chain while its descriptors are read; neighbours are joined."""

    __slots__ = ("head", "readable", "taken", "writable")

    def __init__(self, head: int) -> None:
        self.head = head
        self.readable: list[tuple[int, int]] = []
        self.writable: list[tuple[int, int]] = []
        self.taken = 0

    def take(self, gpa: int, length: int, flags: int) -> None:
        """One descriptor's part. Raises QueueError."""
        self.taken += 1
        if not length:
            raise QueueError(f"chain at {self.head}: a part of no bytes")
        if flags & VRING_DESC_F_WRITE:
            ranges = self.writable
        elif self.writable:
            raise QueueError(f"chain at {self.head}: a readable part behind a writable one")
        else:
            ranges = self.readable
        if ranges:
            start, size = ranges[-1]
            if start + size == gpa:
                ranges[-1] = (start, size + length)
                return
        ranges.append((gpa, length))
