"""Memory that is filled when it is touched; skipped where the host lets this user have no userfaultfd."""

from __future__ import annotations

import ctypes
import select
import threading

import pytest

from ostler.host.memfd import SharedMapping
from ostler.host.userfault import PAGE_BYTES, Userfault, is_available

pytestmark = pytest.mark.skipif(not is_available(), reason="no userfaultfd for this user")

_libc = ctypes.CDLL(None)


def touched(address: int) -> int:
    """The byte there, read without the interpreter's lock: the answer comes from another thread."""
    found = ctypes.c_ubyte()
    _libc.memcpy(ctypes.byref(found), ctypes.c_void_p(address), ctypes.c_size_t(1))
    return found.value


def test_touch_of_a_missing_page_waits_for_its_content() -> None:
    content = (ctypes.c_char * (2 * PAGE_BYTES))()
    content.raw = b"\x01" * PAGE_BYTES + b"\x02" * PAGE_BYTES
    with SharedMapping("late", 4 * PAGE_BYTES) as memory, Userfault.new() as faults:
        faults.register(memory.address, memory.size_bytes)
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(touched(memory.address + PAGE_BYTES)))
        thread.start()
        assert select.select([faults.fd], [], [], 30)[0]
        assert list(faults.faults()) == [memory.address + PAGE_BYTES]
        faults.copy(memory.address, ctypes.addressof(content), 2 * PAGE_BYTES)
        thread.join()
        assert seen == [2]
        # One that is there stays as it is, whoever brings it again.
        faults.zero(memory.address)
        faults.copy(memory.address, ctypes.addressof(content) + PAGE_BYTES, PAGE_BYTES)
        assert touched(memory.address) == 1
        faults.zero(memory.address + 2 * PAGE_BYTES)
        assert touched(memory.address + 2 * PAGE_BYTES) == 0
        faults.unregister(memory.address, memory.size_bytes)
        assert touched(memory.address + 3 * PAGE_BYTES) == 0
