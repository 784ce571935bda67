"""The page mapper on a real guest: its page tables against its own pagemap, watching, and guests that merge."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest

import ostler
from ostler.agent.process import Process
from ostler.client import relief

pytestmark = pytest.mark.usefixtures("needs_an_agent")
PAGES, PAGE, PRESENT, PFN = 10_000, 0x1000, 1 << 63, (1 << 55) - 1
MIB = 1 << 20
# Some pages written, some only read (the zero page), some not touched, some in huge pages; then it says what its
# kernel has for each, and stays on the processor in user mode.
PROCESS = f"""
import ctypes, json, mmap, os, struct, sys
size = {PAGES} * {PAGE}
area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
address = ctypes.addressof(ctypes.c_char.from_buffer(area))
area.madvise(mmap.MADV_HUGEPAGE, size // 2 // 4096 * 4096, size // 4 // 4096 * 4096)
for page in range({PAGES}):
    if page % 7 != 3:
        area[page * {PAGE}] = page % 251 + 1
    elif page % 2:
        area[page * {PAGE}]
area[:24] = b"ostler's page mapper was"
with open("/proc/self/pagemap", "rb", buffering=0) as file:
    entries = struct.unpack("{PAGES}Q", os.pread(file.fileno(), {PAGES} * 8, address // {PAGE} * 8))
print(json.dumps({{"address": address, "entries": entries}}), flush=True)
while True: pass
"""


@pytest.fixture(scope="module")
def vm() -> Iterator[ostler.VM]:
    with ostler.VM("debian", memory="384M", accel="soft", nets=["none"]) as vm:
        yield vm


@contextlib.contextmanager
def spinning(vm: ostler.VM, program: str) -> Iterator[Process]:
    """A Python program in the guest that does not end by itself."""
    with vm.popen(["python3", "-c", program]) as process:
        yield process
        process.kill()
        process.wait()


def test_page_table_walk_equals_the_guests_own_pagemap(vm: ostler.VM) -> None:
    with spinning(vm, PROCESS) as process:
        line = b""
        while not line.endswith(b"\n"):
            line += process.stdout.read(1 << 16, timeout_s=60)
        said = json.loads(line)
        root = vm.memory.find_root(said["address"], b"ostler's page mapper was")
        found = vm.memory.pages(said["address"], PAGES, root=root)
        theirs = [(entry & PFN) * PAGE if entry & PRESENT else None for entry in said["entries"]]
        assert found == theirs
        there = [page for page in found if page is not None]
        assert len(there) > PAGES // 2
        walk = vm.memory.translate(said["address"] + 123, root=root)
        assert walk["physical"] == (found[0] or 0) + 123
        assert (walk["user"], walk["writable"], walk["executable"], walk["fault"]) == (True, True, False, "")
        vm.memory.write(said["address"], b"OSTLER", root=root)
        assert vm.memory.read(found[0] or 0, 24, physical=True) == b"OSTLER's page mapper was"


def test_watch_sees_a_guest_that_writes_and_one_that_rests(vm: ostler.VM) -> None:
    with spinning(vm, "a = bytearray(32 << 20)\nwhile True:\n a[::4096] = b'x' * len(a[::4096])"):
        busy = vm.memory.watch(2.0)
    assert busy["dirty_bytes"] >= 32 * MIB
    assert busy["accessed_bytes"] >= 16 * MIB
    found = vm.memory.map()
    assert found["touched_bytes"] >= 32 * MIB
    assert found["swapped_bytes"] == 0


def test_guests_with_equal_content_give_most_of_it_back_and_go_on() -> None:
    """Two guests, 64 MiB each that nobody can compress but that are the same in both."""
    fill = (
        "import hashlib, random; r = random.Random(7); f = open('/dev/shm/same', 'wb')\n"
        "[f.write(r.randbytes(1 << 20)) for _ in range(64)]; f.close()\n"
        "print(hashlib.sha256(open('/dev/shm/same', 'rb').read()).hexdigest())"
    )
    options: dict[str, Any] = {"memory": "384M", "accel": "soft", "nets": ["none"], "cold": True}
    with ostler.VM("debian", **options) as one, ostler.VM("debian", **options) as two:
        sums = {vm.run(["python3", "-c", fill], check=True).text.strip() for vm in (one, two)}
        assert len(sums) == 1
        entries = [vm._running().entry for vm in (one, two)]
        report = relief.relieve(entries, need_bytes=1 << 40, steps=["merge"])
        assert report["refused"] == {}
        assert report["common_bytes"] >= 64 * MIB
        assert report["freed_bytes"] >= 64 * MIB
        for vm in (one, two):
            assert vm.run(["sha256sum", "/dev/shm/same"], check=True).text.split()[0] in sums
            assert vm.memory.map()["merged_bytes"] >= 64 * MIB
            vm.run(["sh", "-c", "echo changed > /dev/shm/same"], check=True)
        # A guest that is saved takes what is common along.
        with one.fork()[0] as child:
            assert child.run(["cat", "/dev/shm/same"], check=True).text == "changed\n"
