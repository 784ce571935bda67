"""Ostler's own calls, guest to host: docs/hypercalls.md. A port and a page, so that they are the same on every
accelerator and for a program in user space as for a kernel.

    0x00 VERSION  read: the version of this interface
    0x04 CALL     write: the number of a guest-physical page that holds a call; read: what became of the last write
    0x08 SHORT    write: number << 16 | argument; read: the result of the last one

A page is stateless: whoever writes its number has filled it in, and reads the answer from it. It is touched only if it
begins with the magic number, so that a page that the guest's kernel has moved meanwhile is left alone.
What calls mean is injected (`serve`); this knows the layout and its bounds.
"""

from __future__ import annotations

import errno
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ostler.devices.state import Saved, blob, load, save, uint
from ostler.errors import StateError
from ostler.memory import GuestMemory, MemoryFault
from ostler.memory.layout import PAGE_SIZE

CALL_PORT, CALL_PORT_SIZE = 0xD00, 0x10
VERSION_OFFSET, CALL_OFFSET, SHORT_OFFSET = 0x0, 0x4, 0x8
VERSION = 1
SIGNATURE, FIRST_LEAF, FACTS_LEAF = b"OstlerCalls\0", 0x4000_0100, 0x4000_0101
HAS_PAGE, HAS_SHORT = 1 << 0, 1 << 1
MAGIC = int.from_bytes(b"OSTLCALL", "little")
# Magic, number, sequence, six arguments, length of the data; then what the host writes: the result, the sequence again.
REQUEST = struct.Struct("<QII6QQ")
ANSWER = struct.Struct("<QqQ")
LENGTH_OFFSET = 0x40
DATA_OFFSET = 0x80
MAX_DATA_BYTES = PAGE_SIZE - DATA_OFFSET
MAX_KEYS, MAX_KEY_BYTES, MAX_STORE_BYTES = 256, 128, 64 << 10

Serve = Callable[[int, tuple[int, ...], bytes], tuple[int, bytes]]
"""A call's number, its six arguments, its data; the result (negative is an errno) and the answer's data."""


@dataclass(slots=True)
class CallState:
    """What a guest and its host have said to each other, as JSON, and whether the guest called itself ready."""

    keys: bytes = blob(4 * MAX_STORE_BYTES)
    is_ready: int = uint(1)


class Calls:
    """The port's device, and the keys that both sides see. Under the board's lock."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self.serve: Serve = _nobody
        self.keys: dict[str, str] = {}
        self.is_ready = False
        self._status = self._result = 0

    def read(self, offset: int, size: int) -> int:
        values = {VERSION_OFFSET: VERSION, CALL_OFFSET: self._status, SHORT_OFFSET: self._result & 0xFFFF_FFFF}
        return values.get(offset, 0) & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        if size != 4:
            return
        if offset == CALL_OFFSET:
            self._status = self._call(value * PAGE_SIZE)
        elif offset == SHORT_OFFSET:
            self._result, _ = self.serve(value >> 16, (value & 0xFFFF, 0, 0, 0, 0, 0), b"")

    def put(self, key: str, value: str) -> int:
        """Set a key; 0 or a negative errno."""
        if not key or len(key.encode()) > MAX_KEY_BYTES:
            return -errno.EINVAL
        held = sum(len(name.encode()) + len(each.encode()) for name, each in self.keys.items() if name != key)
        if held + len(key.encode()) + len(value.encode()) > MAX_STORE_BYTES:
            return -errno.ENOSPC
        if key not in self.keys and len(self.keys) >= MAX_KEYS:
            return -errno.ENOSPC
        self.keys[key] = value
        return 0

    def save(self) -> Saved:
        return save(CallState(json.dumps(self.keys).encode(), int(self.is_ready)))

    def restore(self, data: Mapping[str, object]) -> None:
        """Raises StateError and then changes nothing."""
        state = load(CallState, "calls", data)
        try:
            keys = json.loads(state.keys or b"{}")
        except (ValueError, RecursionError) as error:
            raise StateError(f"calls: saved keys are not JSON: {error}") from error
        if not isinstance(keys, dict) or not all(isinstance(each, str) for pair in keys.items() for each in pair):
            raise StateError("calls: saved keys are not an object of texts")
        before, self.keys = self.keys, {}
        for key, value in keys.items():
            if self.put(key, value):
                self.keys = before
                raise StateError(f"calls: saved key {key[:MAX_KEY_BYTES]!r} is more than there is room for")
        self.is_ready = bool(state.is_ready)

    def _call(self, gpa: int) -> int:
        """Serve the call in a page; 0, or what is wrong with the page."""
        try:
            page = self._memory.view(gpa, PAGE_SIZE)
        except MemoryFault:
            return errno.EFAULT
        with page:
            magic, number, sequence, *arguments, length = REQUEST.unpack_from(page)
            if magic != MAGIC:
                return errno.EFAULT
            if length > MAX_DATA_BYTES:
                result, answer = -errno.EMSGSIZE, b""
            else:
                data = bytes(page[DATA_OFFSET : DATA_OFFSET + length])
                result, answer = self.serve(number, tuple(arguments), data)
            if answer:
                page[DATA_OFFSET : DATA_OFFSET + len(answer)] = answer
            ANSWER.pack_into(page, LENGTH_OFFSET, len(answer), result, sequence)
        self._memory.written(gpa, PAGE_SIZE)
        return 0


def leaves() -> dict[int, tuple[int, int, int, int]]:
    """CPUID leaves by which a guest finds the calls: EAX, EBX, ECX, EDX."""
    ebx, ecx, edx = struct.unpack("<III", SIGNATURE)
    return {FIRST_LEAF: (FACTS_LEAF, ebx, ecx, edx), FACTS_LEAF: (VERSION, CALL_PORT, HAS_PAGE | HAS_SHORT, 0)}


def _nobody(number: int, arguments: tuple[int, ...], data: bytes) -> tuple[int, bytes]:  # noqa: ARG001
    return -errno.ENOSYS, b""
