"""The block device: every request, its bounds, and what the disk's errors become."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ostler.abi.virtio import blk as abi
from ostler.devices.virtio.blk import MAX_RANGE_SECTORS, MAX_RANGES, Block
from ostler.devices.virtio.rate_limit import RateLimit
from ostler.errors import HostError, StateError
from ostler.testing.fakes import FakeClock, FakeTimer
from ostler.testing.virtio import FakeDriver

SECTORS = 64
OK, IOERR, UNSUPP = b"\0", b"\1", b"\2"


class MemoryDisk:
    """A disk in memory that counts flushes and fails on demand."""

    def __init__(self, *, read_only: bool = False) -> None:
        self.data = bytearray(range(256)) * (SECTORS * 512 // 256)
        self.size_bytes = len(self.data)
        self.read_only = read_only
        self.serial = "serial-0"
        self.flushes = 0
        self.zeroed: list[tuple[int, int, bool]] = []
        self.fails = False

    def _check(self) -> None:
        if self.fails:
            raise OSError(5, "bad sector")

    def readv(self, offset: int, views: Sequence[memoryview]) -> None:
        self._check()
        for view in views:
            view[:] = self.data[offset : offset + len(view)]
            offset += len(view)

    def writev(self, offset: int, views: Sequence[memoryview]) -> None:
        self._check()
        for view in views:
            self.data[offset : offset + len(view)] = view
            offset += len(view)

    def flush(self) -> None:
        self._check()
        self.flushes += 1

    def discard(self, offset: int, size: int) -> None:
        self._check()
        self.data[offset : offset + size] = bytes(size)

    def write_zeroes(self, offset: int, size: int, *, unmap: bool) -> None:
        self.discard(offset, size)
        self.zeroed.append((offset, size, unmap))


@pytest.fixture
def disk() -> MemoryDisk:
    return MemoryDisk()


@pytest.fixture
def driver(disk: MemoryDisk) -> Iterator[FakeDriver]:
    with FakeDriver(Block(disk)) as driver:
        yield driver


def request(kind: int, sector: int = 0) -> bytes:
    return abi.REQUEST.pack(kind, 0, sector)


def ranges(*items: tuple[int, int, int]) -> bytes:
    return b"".join(abi.RANGE.pack(*item) for item in items)


def test_read_fills_all_parts_and_status(driver: FakeDriver, disk: MemoryDisk) -> None:
    answer = driver.request(0, [request(abi.VIRTIO_BLK_T_IN, 2)], [512, 1024, 1])
    assert answer == disk.data[1024 : 1024 + 1536] + OK
    assert driver.interrupts == [1]


def test_read_header_split_and_status_joined_to_data_is_the_same(driver: FakeDriver, disk: MemoryDisk) -> None:
    header = request(abi.VIRTIO_BLK_T_IN, 1)
    assert driver.request(0, [header[:5], header[5:]], [100, 413]) == disk.data[512:1024] + OK


def test_write_changes_the_disk(driver: FakeDriver, disk: MemoryDisk) -> None:
    assert driver.request(0, [request(abi.VIRTIO_BLK_T_OUT, 3), b"a" * 512, b"b" * 512], [1]) == OK
    assert bytes(disk.data[1536:2560]) == b"a" * 512 + b"b" * 512
    assert driver.request(0, [request(abi.VIRTIO_BLK_T_OUT, 0) + b"c" * 512], [1]) == OK
    assert (bytes(disk.data[:512]), disk.flushes) == (b"c" * 512, 0)


@pytest.mark.parametrize("kind", [abi.VIRTIO_BLK_T_IN, abi.VIRTIO_BLK_T_OUT])
@pytest.mark.parametrize(
    ("sector", "size"), [(SECTORS, 512), (SECTORS - 1, 1024), (0, 100), ((1 << 64) - 1, 512), (1 << 55, 512)]
)
def test_transfer_outside_of_the_disk_or_not_in_sectors_is_an_io_error(
    driver: FakeDriver, disk: MemoryDisk, kind: int, sector: int, size: int
) -> None:
    before = bytes(disk.data)
    if kind == abi.VIRTIO_BLK_T_IN:
        answer = driver.request(0, [request(kind, sector)], [size, 1])
    else:
        answer = driver.request(0, [request(kind, sector), bytes(size)], [1])
    assert (answer[-1:], bytes(disk.data)) == (IOERR, before)


def test_disk_error_is_an_io_error_and_the_device_goes_on(driver: FakeDriver, disk: MemoryDisk) -> None:
    disk.fails = True
    assert driver.request(0, [request(abi.VIRTIO_BLK_T_IN)], [512, 1])[-1:] == IOERR
    assert driver.request(0, [request(abi.VIRTIO_BLK_T_FLUSH)], [1]) == IOERR
    disk.fails = False
    assert driver.request(0, [request(abi.VIRTIO_BLK_T_FLUSH)], [1]) == OK
    assert isinstance(driver.device, Block)
    assert (disk.flushes, driver.device.io_errors) == (1, 2)


def test_request_that_is_kept_is_answered_once_it_can_be_done(driver: FakeDriver, disk: MemoryDisk) -> None:
    device = driver.device
    assert isinstance(device, Block)
    judged: list[str] = []

    def judge(error: OSError) -> bool:
        judged.append(str(error))
        return True

    device.judge = judge
    disk.fails = True
    sent = driver.queues[0].add([request(abi.VIRTIO_BLK_T_OUT, 3), b"a" * 512], [1])
    driver.kick(0)
    assert (len(judged), device.is_waiting, device.io_errors) == (1, True, 0)
    with pytest.raises(HostError, match="could not be done yet"):
        device.drain()
    device.retry()
    assert (len(judged), device.is_waiting) == (2, True)
    disk.fails = False
    device.retry()
    assert not device.is_waiting
    assert bytes(disk.data[1536:2048]) == b"a" * 512
    assert driver.queues[0].collect() == [sent]


def test_injected_error_is_the_disks_own(driver: FakeDriver, disk: MemoryDisk) -> None:
    device = driver.device
    assert isinstance(device, Block)
    kinds: list[str] = []

    def inject(kind: str) -> None:
        kinds.append(kind)
        if kind == "flush":
            raise OSError(5, "injected")

    device.inject = inject
    assert driver.request(0, [request(abi.VIRTIO_BLK_T_FLUSH)], [1]) == IOERR
    assert driver.request(0, [request(abi.VIRTIO_BLK_T_IN)], [512, 1])[-1:] == OK
    assert (kinds, disk.flushes) == (["flush", "read"], 0)


def test_get_id_is_padded_with_zeroes(driver: FakeDriver) -> None:
    assert driver.request(0, [request(abi.VIRTIO_BLK_T_GET_ID)], [20, 1]) == b"serial-0".ljust(20, b"\0") + OK
    assert driver.request(0, [request(abi.VIRTIO_BLK_T_GET_ID)], [10, 1])[-1:] == UNSUPP


def test_discard_and_write_zeroes_take_several_ranges(driver: FakeDriver, disk: MemoryDisk) -> None:
    two = ranges((0, 1, 0), (4, 2, 0))
    assert driver.request(0, [request(abi.VIRTIO_BLK_T_DISCARD), two], [1]) == OK
    assert disk.data[:512] + disk.data[2048:3072] == bytes(1536)
    zeroes = ranges((8, 1, 1), (10, 1, 0))
    assert driver.request(0, [request(abi.VIRTIO_BLK_T_WRITE_ZEROES), zeroes], [1]) == OK
    assert disk.zeroed == [(4096, 512, True), (5120, 512, False)]


@pytest.mark.parametrize(
    ("kind", "payload", "status"),
    [
        (abi.VIRTIO_BLK_T_DISCARD, ranges((0, 1, 1)), UNSUPP),
        (abi.VIRTIO_BLK_T_DISCARD, ranges((0, 1, 2)), UNSUPP),
        (abi.VIRTIO_BLK_T_WRITE_ZEROES, ranges((0, 1, 2)), UNSUPP),
        (abi.VIRTIO_BLK_T_DISCARD, b"", UNSUPP),
        (abi.VIRTIO_BLK_T_DISCARD, ranges((0, 1, 0))[:-1], UNSUPP),
        (abi.VIRTIO_BLK_T_DISCARD, ranges(*[(0, 1, 0)] * (MAX_RANGES + 1)), UNSUPP),
        (abi.VIRTIO_BLK_T_DISCARD, ranges((0, 1, 0), (SECTORS, 1, 0)), IOERR),
        (abi.VIRTIO_BLK_T_WRITE_ZEROES, ranges((0, MAX_RANGE_SECTORS + 1, 0)), IOERR),
        (abi.VIRTIO_BLK_T_WRITE_ZEROES, ranges(((1 << 64) - 1, 1, 0)), IOERR),
        (2, b"", UNSUPP),
        (0xFFFF_FFFF, b"x" * 512, UNSUPP),
    ],
)
def test_request_not_understood_or_out_of_range_changes_nothing(
    driver: FakeDriver, disk: MemoryDisk, kind: int, payload: bytes, status: bytes
) -> None:
    before = bytes(disk.data)
    assert driver.request(0, [request(kind), *([payload] if payload else [])], [1]) == status
    assert disk.data == before


@pytest.mark.parametrize(
    ("readable", "writable"), [([b"short"], [1]), ([request(0)], []), ([], [512, 1]), ([request(1) + bytes(512)], [])]
)
def test_chain_that_is_no_request_stops_the_device(
    driver: FakeDriver, readable: list[bytes], writable: list[int]
) -> None:
    driver.queues[0].add(readable, writable)
    driver.kick(0)
    assert "block request" in str(driver.errors[0])


def test_read_only_disk_says_so_and_refuses_every_change() -> None:
    disk = MemoryDisk(read_only=True)
    before = bytes(disk.data)
    with FakeDriver(Block(disk)) as driver:
        assert driver.device.features >> abi.VIRTIO_BLK_F_RO & 1
        assert not driver.device.features >> abi.VIRTIO_BLK_F_DISCARD & 1
        for kind, data in (
            (abi.VIRTIO_BLK_T_OUT, bytes(512)),
            (abi.VIRTIO_BLK_T_DISCARD, ranges((0, 1, 0))),
            (abi.VIRTIO_BLK_T_WRITE_ZEROES, ranges((0, 1, 0))),
        ):
            assert driver.request(0, [request(kind), data], [1]) == IOERR
        assert driver.request(0, [request(abi.VIRTIO_BLK_T_FLUSH)], [1]) == OK
    assert disk.data == before


def test_write_cache_off_or_no_flush_negotiated_makes_every_write_durable(disk: MemoryDisk) -> None:
    write = [request(abi.VIRTIO_BLK_T_OUT), bytes(512)]
    with FakeDriver(Block(disk)) as driver:
        driver.device.write_config(abi.WRITEBACK_OFFSET, 1, 0)
        assert driver.device.read_config(abi.WRITEBACK_OFFSET, 1) == 0
        driver.request(0, write, [1])
        assert disk.flushes == 1
        driver.device.write_config(abi.WRITEBACK_OFFSET, 1, 1)
        driver.request(0, write, [1])
        assert disk.flushes == 1
    with FakeDriver(Block(disk), features=0) as driver:
        driver.request(0, write, [1])
        assert disk.flushes == 2


def test_configuration_has_capacity_topology_and_queues(disk: MemoryDisk) -> None:
    device = Block(disk, queue_count=3)
    assert device.read_config(0, 8) == SECTORS
    assert (device.read_config(20, 4), device.read_config(24, 1), device.read_config(26, 2)) == (512, 3, 8)
    assert (device.read_config(34, 2), device.read_config(36, 4)) == (3, MAX_RANGE_SECTORS)
    assert (device.read_config(59, 4), device.read_config(0x800, 4)) == (0, 0)


def test_disk_grown_changes_the_configuration(driver: FakeDriver, disk: MemoryDisk) -> None:
    disk.data += bytes(512)
    disk.size_bytes += 512
    assert isinstance(driver.device, Block)
    driver.device.resized()
    assert (driver.device.read_config(0, 8), driver.config_changes) == (SECTORS + 1, 1)


def test_queues_are_served_apart() -> None:
    with FakeDriver(Block(MemoryDisk(), queue_count=2)) as driver:
        driver.request(1, [request(abi.VIRTIO_BLK_T_IN)], [512, 1])
        assert driver.interrupts == [0, 1]


class Later:
    """A worker whose jobs wait until they are wanted."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Callable[[], None], Callable[[OSError | None], None]]] = []

    def submit(self, job: Callable[[], None], done: Callable[[OSError | None], None]) -> None:
        self.jobs.append((job, done))

    def wait(self) -> None:
        while self.jobs:
            job, done = self.jobs.pop(0)
            try:
                job()
            except OSError as error:
                done(error)
            else:
                done(None)


def test_flush_under_way_does_not_hold_up_reads_and_is_answered_when_done(disk: MemoryDisk) -> None:
    worker = Later()
    with FakeDriver(Block(disk, worker=worker)) as driver:
        flush = driver.queues[0].add([request(abi.VIRTIO_BLK_T_FLUSH)], [1])
        driver.kick(0)
        assert driver.request(0, [request(abi.VIRTIO_BLK_T_IN)], [512, 1])[-1:] == OK
        worker.wait()
        assert driver.queues[0].collect() == [flush]
        assert (driver.queues[0].contents(flush), disk.flushes, driver.interrupts) == (OK, 1, [2])


def test_flush_under_way_fails_as_the_disk_says_and_reset_and_saving_wait_for_it(disk: MemoryDisk) -> None:
    worker = Later()
    with FakeDriver(Block(disk, worker=worker)) as driver:
        disk.fails = True
        flush = driver.queues[0].add([request(abi.VIRTIO_BLK_T_FLUSH)], [1])
        driver.kick(0)
        driver.device.drain()
        assert driver.queues[0].contents(flush) == IOERR
        driver.queues[0].add([request(abi.VIRTIO_BLK_T_FLUSH)], [1])
        driver.kick(0)
        driver.device.reset()
        assert (worker.jobs, driver.virtqueues[0].in_flight) == ([], 0)


def test_ring_filled_again_and_again_is_left_for_another_round(driver: FakeDriver) -> None:
    again: list[int] = []
    driver.device.kick_again = again.append
    for _ in range(64):
        driver.queues[0].add([request(abi.VIRTIO_BLK_T_FLUSH)], [1], indirect=True)
    driver.kick(0)
    assert (len(driver.queues[0].collect()), again) == (64, [0])
    driver.kick(0)
    assert again == [0]


def test_saved_write_cache_setting_is_restored(driver: FakeDriver) -> None:
    driver.device.write_config(abi.WRITEBACK_OFFSET, 1, 0)
    other = Block(MemoryDisk())
    other.restore(driver.device.save())
    assert other.read_config(abi.WRITEBACK_OFFSET, 1) == 0
    with pytest.raises(StateError, match="block device"):
        other.restore({"writeback": 2})


PARTS = st.lists(st.binary(min_size=1, max_size=600), max_size=4)


@settings(max_examples=200, deadline=None)
@given(
    kind=st.one_of(st.sampled_from([0, 1, 4, 8, 11, 13]), st.integers(0, 0xFFFF_FFFF)),
    sector=st.one_of(st.integers(0, SECTORS + 1), st.integers(0, (1 << 64) - 1)),
    parts=PARTS,
    spaces=st.lists(st.integers(1, 1100), max_size=4),
    whole=st.booleans(),
)
def test_any_request_is_answered_once_or_stops_the_device(
    kind: int, sector: int, parts: list[bytes], spaces: list[int], *, whole: bool
) -> None:
    disk = MemoryDisk()
    with FakeDriver(Block(disk)) as driver:
        header = [struct.pack("<IIQ", kind, 0, sector)] if whole else []
        if not header + parts and not spaces:
            return
        sent = driver.queues[0].add(header + parts, spaces)
        driver.kick(0)
        done = driver.queues[0].collect()
        assert done == ([] if driver.errors else [sent])
        assert len(disk.data) == disk.size_bytes
        if done:
            assert driver.queues[0].contents(sent)[-1] in (0, 1, 2)


def test_limit_leaves_requests_in_the_ring_until_time_has_passed(disk: MemoryDisk) -> None:
    clock, timer = FakeClock(), FakeTimer()
    limit = RateLimit(100_000, clock=clock, timer=timer, burst_bytes=1000)
    device = Block(disk, queue_count=2, limit=limit)
    with FakeDriver(device) as driver:
        device.kick_again = driver.kick
        for index in (0, 1):
            for sector in range(3):
                driver.queues[index].add([request(abi.VIRTIO_BLK_T_IN, sector)], [512, 1])
            driver.kick(index)
        answered = []
        while True:
            answered.append([len(driver.queues[index].collect()) for index in (0, 1)])
            if timer.deadline_ns is None:
                break
            clock.now_ns, timer.deadline_ns = timer.deadline_ns, None
            limit.expired()

    # Six requests of 529 bytes, 1000 of which pass at once.
    assert 21_000_000 <= clock.now_ns <= 32_000_000
    assert answered[0] == [2, 0]
    assert [sum(each) for each in zip(*answered, strict=True)] == [3, 3]


def test_limit_is_forgotten_by_a_reset(disk: MemoryDisk) -> None:
    timer = FakeTimer()
    limit = RateLimit(1000, clock=FakeClock(), timer=timer, burst_bytes=1)
    device = Block(disk, limit=limit)
    kicked: list[int] = []
    device.kick_again = kicked.append
    with FakeDriver(device) as driver:
        for _ in range(2):
            driver.queues[0].add([request(abi.VIRTIO_BLK_T_IN)], [512, 1])
        driver.kick(0)
        device.reset()
        limit.expired()
    assert (timer.deadline_ns, kicked) == (None, [])
