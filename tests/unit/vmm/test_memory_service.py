"""The control protocol's operations on memory, on a guest of scripted processors."""

from __future__ import annotations

import base64
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ostler.client.relief import DIGEST_BYTES, RUN, TO_ZERO, ZERO, match
from ostler.control.connection import Connection
from ostler.errors import BadRequest, OstlerError
from ostler.memory.paging import CR0_PG, CR4_PAE, EFER_LMA
from ostler.vmm.memory_service import MemoryService
from ostler.vmm.watching import Watch
from tests.unit.vmm.serving import Served, idle

PAGE = 0x1000
Start = Callable[[], Served]


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Served]:
    with Served(tmp_path, idle, extra=MemoryService) as served:
        yield served


def map_pages(guest: Served) -> None:
    """Linear 0x40_0000 leads to 0x20_0000, and the page behind it nowhere; tables from 0x10_0000 on."""
    memory, vcpu = guest.process.machine.memory, guest.process.machine.vcpus[0]
    for table, index, value in ((0x10_0000, 0, 0x10_1007), (0x10_1000, 0, 0x10_2007), (0x10_2000, 2, 0x10_3007),
                                (0x10_3000, 0, 0x20_0007)):  # fmt: skip
        memory.write_int(table + 8 * index, 8, value)
    sregs = vcpu.get_sregs()
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = CR0_PG, 0x10_0000, CR4_PAE, EFER_LMA
    vcpu.set_sregs(sregs)


def test_linear_memory_is_translated_read_and_written(guest: Served) -> None:
    map_pages(guest)
    with guest.connect() as connection:
        found = connection.request("memory-translate", address="0x400123")
        assert found["physical"] == 0x20_0123
        assert [each["name"] for each in found["entries"]] == ["PML4E", "PDPTE", "PDE", "PTE"]
        assert found["host"] == guest.process.machine.memory.host_address(0x20_0123, 1)
        connection.request("memory-write", address=0x40_0123, data=base64.b64encode(b"hello").decode())
        assert guest.process.machine.memory.read(0x20_0123, 5) == b"hello"
        answer = connection.request("memory-read", address=0x20_0123, size=5, space="physical")
        assert base64.b64decode(answer["data"]) == b"hello"
        assert connection.request("memory-pages", address=0x40_0000, count=2)["physical"] == [0x20_0000, None]
        roots = connection.request("memory-roots")["processors"]
        assert roots == [{"vcpu": 0, "cr3": 0x10_0000, "mode": "4-level", "cpl": 0, "rip": 0, "rsp": 0}]
        assert connection.request("status")["state"] == "running"


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("memory-read", {"address": 0x40_0FF0, "size": 0x20}, "linear address 0x401000: is not in"),
        ("memory-read", {"address": 1 << 30, "size": 1, "space": "physical"}, "physical address 0x40000000"),
        ("memory-read", {"address": 0, "size": 1 << 30}, "size 1073741824"),
        ("memory-read", {"address": -1, "size": 1}, "address -1"),
        ("memory-read", {"address": 0, "size": 1, "space": "mars"}, "space 'mars'"),
        ("memory-read", {"address": 0, "size": 1, "vcpu": 7}, "vcpu 7"),
        ("memory-write", {"address": 0, "data": "!"}, "data: expected bytes in base64"),
        ("memory-write", {"address": 0x40_0FFE, "data": "aGVsbG8="}, "linear address 0x401000"),
        ("memory-pages", {"address": 0, "count": 0}, "count 0"),
        ("memory-watch", {"interval_s": "soon"}, "interval_s 'soon'"),
        ("memory-watch", {"interval_s": 1e9}, "interval_s 1000000000.0"),
        ("memory-watch", {"ranges": [[1, 2]]}, "range 0x1"),
        ("memory-watch", {"ranges": [[0, 0x2000], [0x1000, 0x1000]]}, "overlaps"),
        ("memory-digests", {}, "file None"),
        ("memory-merge", {"file": "/no", "runs": "/such"}, "No such file"),
    ],
)
def test_what_makes_no_sense_is_refused(guest: Served, op: str, arguments: dict[str, Any], message: str) -> None:
    map_pages(guest)
    with guest.connect() as connection, pytest.raises(OstlerError, match=message):
        connection.request(op, **arguments)
    assert guest.process.machine.memory.read(0x20_0FFE, 2) == bytes(2)


def test_watch_tells_what_was_written_and_gives_the_log_back(guest: Served) -> None:
    memory = guest.process.machine.memory
    watch = Watch(guest.process.machine, [(0x30_0000, 0x2000)])
    watch.start()
    with guest.connect() as connection, pytest.raises(OstlerError, match="being logged already"):
        connection.request("memory-watch", interval_s=0.01)
    memory.write(0x30_0000, b"x")
    memory.write(0x50_0000, b"y" * 0x2000)
    guest.stopping.set()
    found = watch.finish(guest.stopping, 60)
    assert found["dirty_runs"] == [[0x30_0000, 1], [0x50_0000, 2]]
    assert found["dirty_bytes"] == 0x3000
    assert found["ranges"][0]["dirty_bytes"] == 0x1000
    with guest.connect() as connection:
        assert connection.request("memory-watch", interval_s=0.01)["dirty_bytes"] == 0


def merged(connection: Connection, runs: list[tuple[int, int, int]], common: bytes, *, seal: bool = True) -> Any:
    file, at = os.memfd_create("common", os.MFD_ALLOW_SEALING), os.memfd_create("runs")
    try:
        os.write(file, common)
        os.write(at, b"".join(RUN.pack(*run) for run in runs))
        if seal:
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK)
        here = f"/proc/{os.getpid()}/fd"
        return connection.request("memory-merge", file=f"{here}/{file}", runs=f"{here}/{at}")
    finally:
        os.close(file)
        os.close(at)


def test_merge_replaces_equal_pages_and_leaves_others(guest: Served) -> None:
    memory = guest.process.machine.memory
    memory.write(0x30_0000, b"a" * PAGE + b"b" * PAGE + b"c" * PAGE)
    memory.write(0x40_0000, b"z" * PAGE)
    memory.write(0x40_0000, bytes(PAGE))
    before = memory.touched_bytes
    with guest.connect() as connection:
        done = merged(connection, [(0x300, 0, 3), (0x400, TO_ZERO, 1)], b"a" * PAGE + b"?" * PAGE + b"c" * PAGE)
        assert done == {"merged_bytes": 2 * PAGE, "zero_bytes": PAGE, "changed_bytes": PAGE, "slices": 1}
        assert memory.touched_bytes == before - 3 * PAGE
        assert memory.read(0x30_0000, 3 * PAGE) == b"a" * PAGE + b"b" * PAGE + b"c" * PAGE
        assert connection.request("memory-map")["merged_bytes"] == 2 * PAGE
        memory.write(0x30_0000, b"new")
        memory.discard(0x30_2000, PAGE)
        assert memory.touched_bytes == before - 2 * PAGE
        assert memory.read(0x30_0000, 4) == b"newa"
        assert memory.read(0x30_2000, PAGE) == bytes(PAGE)


@pytest.mark.parametrize(
    ("runs", "seal", "message"),
    [
        ([(0x300, 0, 1)], False, "is not sealed"),
        ([(0x300, 1, 1)], True, "1 pages from 1 on: expected pages of the common"),
        ([(0xFFFF_FFFF, 0, 1)], True, "expected pages of the guest"),
        ([(0x300, 0, 0)], True, "0 pages from 768"),
    ],
)
def test_merge_with_what_could_change_or_is_too_short_is_refused(
    guest: Served, runs: list[tuple[int, int, int]], seal: bool, message: str  # noqa: FBT001
) -> None:  # fmt: skip
    with guest.connect() as connection, pytest.raises(BadRequest, match=message):
        merged(connection, runs, b"a" * PAGE, seal=seal)


def test_digests_of_equal_pages_are_equal_and_match_becomes_a_merge(guest: Served) -> None:
    memory = guest.process.machine.memory
    memory.write(0x30_0000, b"a" * PAGE * 2 + bytes(PAGE))
    file = os.memfd_create("digests")
    with guest.connect() as connection:
        said = connection.request("memory-digests", file=f"/proc/{os.getpid()}/fd/{file}")
        data = os.pread(file, said["pages"] * DIGEST_BYTES, 0)
        found = match({"g": data})
        assert data[0x302 * DIGEST_BYTES : 0x303 * DIGEST_BYTES] == ZERO
        assert (0x300, 0, 1) in found.merge["g"]
        assert (0x301, 0, 1) in found.merge["g"]
    os.close(file)
