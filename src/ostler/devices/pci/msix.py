"""MSI-X: message table, pending bits and the two masks; PCI Local Bus 3.0 section 6.8.2.

A vector that is masked, or whose function may not master the bus, keeps its event in the pending
bit array and sends it when the last obstacle goes. The pending array is read-only to the guest.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from ostler.errors import StateError
from ostler.registers import Register, bit, field

ENTRY_SIZE = 16
MAX_VECTORS = 2048
CAPABILITY_ID = 0x11
VECTOR_MASKED = 1
# Address low, address high, data, vector control.
ENTRY = struct.Struct("<IIII")
RESET_ENTRY = ENTRY.pack(0, 0, 0, VECTOR_MASKED)


class Control(Register):
    """Message control, section 6.8.2.3."""

    TABLE_SIZE = field(0, 11)
    FUNCTION_MASK = bit(14)
    ENABLE = bit(15)


class Msix:
    """Table and pending array of one function, as one block of memory space: a bus device."""

    def __init__(self, vectors: int, send: Callable[[int, int], None]) -> None:
        """`send(address, data)` delivers a message."""
        if not 0 < vectors <= MAX_VECTORS:
            raise ValueError(f"{vectors} MSI-X vectors: expected 1 to {MAX_VECTORS}")
        self.vectors = vectors
        self.pending_offset = -(-ENTRY_SIZE * vectors // 0x800) * 0x800
        pending_bytes = -(-vectors // 64) * 8
        self.size_bytes = 1 << max(12, (self.pending_offset + pending_bytes - 1).bit_length())
        self.changed: Callable[[int], None] = _nobody
        """Called with a vector whose message or mask changed: whoever routes interrupts past us must follow."""
        self._send = send
        self._table = bytearray(RESET_ENTRY * vectors)
        self._pending = 0
        self.enabled = False
        self._function_masked = False
        self._may_send = False

    def capability(self, bar: int) -> bytes:
        """The capability's body: control, table and pending array both in `bar`."""
        return struct.pack("<HII", self.vectors - 1, bar, self.pending_offset | bar)

    # -- the function's side --------------------------------------------------------------------

    def control(self, value: int, *, may_send: bool) -> None:
        """Message control was written, or bus mastering changed."""
        before = (self.enabled, self._function_masked, self._may_send)
        self.enabled = bool(value & Control.ENABLE)
        self._function_masked = bool(value & Control.FUNCTION_MASK)
        self._may_send = may_send
        if (self.enabled, self._function_masked, self._may_send) == before:
            return
        if not self.enabled:
            self._pending = 0
        for vector in range(self.vectors):
            self.changed(vector)
            if self._pending >> vector & 1:
                self._release(vector)

    def notify(self, vector: int) -> None:
        """An event for `vector`; what nobody configured or enabled is dropped."""
        if vector >= self.vectors or not self.enabled:
            return
        message = self.message(vector)
        if message is None:
            self._pending |= 1 << vector
        else:
            self._send(*message)

    def message(self, vector: int) -> tuple[int, int] | None:
        """Address and data to send, or None while the vector must not."""
        if not self.enabled or self._function_masked or not self._may_send:
            return None
        low, high, data, control = ENTRY.unpack_from(self._table, ENTRY_SIZE * vector)
        if control & VECTOR_MASKED:
            return None
        return high << 32 | low, data

    def reset(self) -> None:
        """As after a reset of the function."""
        self._table[:] = RESET_ENTRY * self.vectors
        self._pending = 0
        self.enabled = self._function_masked = self._may_send = False

    # -- the guest's side -----------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        if offset + size <= len(self._table):
            return int.from_bytes(self._table[offset : offset + size], "little")
        if offset >= self.pending_offset:
            return self._pending >> (offset - self.pending_offset) * 8
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        # Only aligned double and quad words are defined (6.8.2); anything else is ignored.
        if size not in (4, 8) or offset % size or offset + size > len(self._table):
            return
        if offset % ENTRY_SIZE + size == ENTRY_SIZE:
            # Reserved bits of vector control stay zero.
            value &= (VECTOR_MASKED << 32 | 0xFFFF_FFFF) if size == 8 else VECTOR_MASKED
        self._table[offset : offset + size] = value.to_bytes(size, "little")
        vector = offset // ENTRY_SIZE
        self.changed(vector)
        if self._pending >> vector & 1:
            self._release(vector)

    def _release(self, vector: int) -> None:
        message = self.message(vector)
        if message is not None:
            self._pending &= ~(1 << vector)
            self._send(*message)

    # -- state ------------------------------------------------------------------------------------

    def save(self) -> tuple[bytes, bytes]:
        """Table and pending bits."""
        return bytes(self._table), self._pending.to_bytes(-(-self.vectors // 8), "little")

    def restore(self, table: bytes, pending: bytes) -> None:
        """Raises StateError. `control` follows with the restored configuration space."""
        bits = int.from_bytes(pending, "little")
        if len(table) != len(self._table) or bits >> self.vectors:
            raise StateError(f"saved MSI-X table of {len(table)} bytes: expected {self.vectors} vectors")
        self._table[:] = table
        for vector in range(self.vectors):
            self._table[ENTRY_SIZE * vector + 12 : ENTRY_SIZE * (vector + 1)] = (
                table[ENTRY_SIZE * vector + 12] & VECTOR_MASKED
            ).to_bytes(4, "little")
        self._pending = bits


def _nobody(vector: int) -> None:
    """No interrupt goes past the function."""
