"""Programs behind devices: the real qemu-storage-daemon and virtiofsd, and back ends that answer nonsense."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ostler.abi.virtio import blk as abi
from ostler.abi.virtio import vhost_user as wire
from ostler.abi.virtio.vhost_user import Request
from ostler.backends.loop import Host
from ostler.backends.storage_daemon import PROGRAM, StorageDaemon
from ostler.backends.vhost_user import VhostUser
from ostler.backends.vhost_user_ring import RING_BYTES, RING_SIZE, ShadowRing
from ostler.backends.vhost_user_wire import BackEndLost, Channel
from ostler.backends.virtiofsd import Virtiofsd
from ostler.devices.virtio.external import ExternalBlock, SharedFolder
from ostler.devices.virtio.rate_limit import RateLimit
from ostler.errors import BadRequest, DiskBusy, HostError
from ostler.host.helpers import SYSTEM_FOLDERS
from ostler.host.memfd import SharedMapping
from ostler.testing.fakes import FakeClock, FakeTimer
from ostler.testing.virtio import FakeDriver

MIB = 1 << 20
PATH = os.pathsep.join([os.environ.get("PATH", ""), *SYSTEM_FOLDERS])
needs_daemon = pytest.mark.skipif(not shutil.which(PROGRAM), reason=f"needs {PROGRAM}")
needs_virtiofsd = pytest.mark.skipif(not shutil.which("virtiofsd", path=PATH), reason="needs virtiofsd")
GIVE_UP_S = 20.0


class TurnedLoop:
    """An event loop that the test turns."""

    __test__ = False

    def __init__(self) -> None:
        self.readers: dict[int, Callable[[], None]] = {}
        self.calls: list[Callable[[], None]] = []

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
        self.readers[fd] = callback

    def remove_reader(self, fd: int) -> None:
        self.readers.pop(fd, None)

    def add_writer(self, fd: int, callback: Callable[[], None]) -> None:
        raise NotImplementedError

    def remove_writer(self, fd: int) -> None:
        """Nobody writes here."""

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.calls.append(callback)

    def until(self, condition: Callable[[], bool]) -> None:
        """Serve descriptors until the condition holds."""
        deadline = time.monotonic() + GIVE_UP_S
        while not condition():
            assert time.monotonic() < deadline, "nothing came of it"
            calls, self.calls = self.calls, []
            for callback in calls:
                callback()
            poll = select.poll()
            for fd in self.readers:
                poll.register(fd, select.POLLIN)
            for fd, _ in poll.poll(100):
                if fd in self.readers:
                    self.readers[fd]()


class Rig:
    """A real program, its device, and a driver."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack, self.loop = stack, TurnedLoop()
        self.host = Host(self.loop, threading.Lock())
        self.reports: list[str] = []

    def disk(
        self, path: Path, *, read_only: bool = False, overlay: bool = False, limit: RateLimit | None = None
    ) -> FakeDriver:
        daemon = StorageDaemon(path, "qcow2", read_only=read_only, overlay=overlay, queue_count=1)
        self.stack.callback(daemon.close)
        self.server = self.stack.enter_context(
            VhostUser(daemon, self.host, queue_count=1, config_bytes=60, report=self.reports.append)
        )
        device = ExternalBlock(self.server, serial="mine", queue_sizes=(64,), feature_mask=(1 << 24) - 1, limit=limit)
        return self.stack.enter_context(FakeDriver(device))

    def request(self, driver: FakeDriver, readable: list[bytes], writable: list[int], queue: int = 0) -> bytes:
        sent = driver.queues[queue].add(readable, writable)
        driver.kick(queue)
        done = driver.queues[queue].collect()

        def answered() -> bool:
            done.extend(driver.queues[queue].collect())
            return bool(done)

        self.loop.until(answered)
        assert done == [sent]
        return driver.queues[queue].contents(sent)[: sent.written]

    def write(self, driver: FakeDriver, sector: int, data: bytes) -> None:
        assert self.request(driver, [abi.REQUEST.pack(abi.VIRTIO_BLK_T_OUT, 0, sector), data], [1]) == b"\0"

    def read(self, driver: FakeDriver, sector: int, size: int) -> bytes:
        answer = self.request(driver, [abi.REQUEST.pack(abi.VIRTIO_BLK_T_IN, 0, sector)], [size, 1])
        assert answer[-1] == 0
        return answer[:-1]


@pytest.fixture
def rig() -> Iterator[Rig]:
    with ExitStack() as stack:
        yield Rig(stack)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "4M"], check=True)
    return path


@needs_daemon
def test_qcow2_disk_is_written_read_and_announced(rig: Rig, image: Path) -> None:
    driver = rig.disk(image)
    seen: list[tuple[int, int]] = []
    rig.write(driver, 8, b"ostler" * 512)
    driver.memory.on_write(lambda gpa, size: seen.append((gpa, size)))
    assert rig.read(driver, 8, 3072) == b"ostler" * 512
    assert any(size >= 3072 for _, size in seen)
    assert driver.device.read_config(0, 8) == 4 * MIB // 512
    identity = rig.request(driver, [abi.REQUEST.pack(abi.VIRTIO_BLK_T_GET_ID, 0, 0)], [20, 1])
    assert identity == b"mine".ljust(20, b"\0") + b"\0"
    assert driver.interrupts[0] >= 2


@needs_daemon
def test_qcow2_overlay_leaves_the_image_alone_and_nothing_behind(rig: Rig, image: Path) -> None:
    before = image.read_bytes()
    driver = rig.disk(image, overlay=True)
    rig.write(driver, 0, b"x" * 512)
    assert rig.read(driver, 0, 512) == b"x" * 512
    rig.stack.close()
    assert image.read_bytes() == before
    assert [path.name for path in image.parent.iterdir()] == [image.name]


@needs_daemon
def test_qcow2_read_only_says_so(rig: Rig, image: Path) -> None:
    driver = rig.disk(image, read_only=True)
    assert driver.device.features >> abi.VIRTIO_BLK_F_RO & 1
    answer = rig.request(driver, [abi.REQUEST.pack(abi.VIRTIO_BLK_T_OUT, 0, 0), bytes(512)], [1])
    assert answer[-1] != 0


@needs_daemon
def test_limit_holds_requests_back_and_changes_no_answer(rig: Rig, image: Path) -> None:
    clock, timer = FakeClock(), FakeTimer()
    limit = RateLimit(100_000, clock=clock, timer=timer, burst_bytes=1)
    driver = rig.disk(image, limit=limit)
    driver.device.kick_again = driver.kick
    rig.write(driver, 0, b"o" * 4096)
    sent = driver.queues[0].add([abi.REQUEST.pack(abi.VIRTIO_BLK_T_IN, 0, 0)], [4096, 1])
    driver.kick(0)
    assert timer.deadline_ns is not None
    assert 40_000_000 <= timer.deadline_ns <= 43_000_000
    assert not driver.queues[0].collect()

    clock.now_ns = timer.deadline_ns
    limit.expired()

    rig.loop.until(lambda: driver.queues[0].collect() == [sent])
    assert driver.queues[0].contents(sent) == b"o" * 4096 + b"\0"


@needs_daemon
def test_daemon_killed_is_replaced_and_unanswered_requests_are_asked_again(rig: Rig, image: Path) -> None:
    driver = rig.disk(image)
    rig.write(driver, 0, b"a" * 512)
    assert rig.request(driver, [abi.REQUEST.pack(abi.VIRTIO_BLK_T_FLUSH, 0, 0)], [1]) == b"\0"
    first = rig.server._helper.pid
    os.killpg(first, signal.SIGSTOP)
    pending = driver.queues[0].add([abi.REQUEST.pack(abi.VIRTIO_BLK_T_IN, 0, 0)], [512, 1])
    driver.kick(0)
    os.killpg(first, signal.SIGKILL)
    done = driver.queues[0].collect()

    def answered() -> bool:
        done.extend(driver.queues[0].collect())
        return bool(done)

    rig.loop.until(answered)
    assert done == [pending]
    assert driver.queues[0].contents(pending) == b"a" * 512 + b"\0"
    assert "killed by SIGKILL" in rig.reports[0]
    assert rig.server._helper.pid != first


@needs_daemon
def test_device_reset_and_started_again_works(rig: Rig, image: Path) -> None:
    driver = rig.disk(image)
    rig.write(driver, 0, b"b" * 512)
    driver.device.reset()
    driver.device.activate(driver.virtqueues, driver.features)
    assert rig.read(driver, 0, 512) == b"b" * 512
    driver.device.drain()
    assert rig.read(driver, 0, 512) == b"b" * 512


@needs_daemon
def test_image_that_is_none_is_one_line_by_the_daemon(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "bad.qcow2").write_bytes(b"no image at all" * 100)
    with pytest.raises(HostError, match=r"qemu-storage-daemon for .*not in qcow2 format"):
        rig.disk(tmp_path / "bad.qcow2")


@needs_daemon
def test_image_somebody_else_writes_is_refused(rig: Rig, image: Path, tmp_path: Path) -> None:
    rig.disk(image)
    with pytest.raises(DiskBusy):
        rig.disk(image)
    with pytest.raises(BadRequest, match="No such file"):
        rig.disk(tmp_path / "absent.qcow2")


@needs_virtiofsd
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, or a kernel with user namespaces")
def test_shared_folder_answers_fuse(rig: Rig, tmp_path: Path) -> None:
    server = rig.stack.enter_context(
        VhostUser(Virtiofsd(tmp_path, read_only=False), rig.host, queue_count=2, config_bytes=0, report=print)
    )
    driver = rig.stack.enter_context(FakeDriver(SharedFolder(server, "share0", queue_size=RING_SIZE)))
    init = struct.pack("<IIQQIIIIIIII", 56, 26, 1, 0, 0, 0, 0, 0, 7, 31, 0x2_0000, 0)
    answer = rig.request(driver, [init], [16, 64], queue=1)
    size, error, unique, major = struct.unpack_from("<IiQI", answer)
    assert (size, error, unique, major) == (len(answer), 0, 1, 7)
    assert driver.device.read_config(0, 6) == int.from_bytes(b"share0", "little")
    assert driver.device.read_config(36, 4) == 1


@needs_virtiofsd
def test_shared_folder_whose_program_died_stops_the_device(rig: Rig, tmp_path: Path) -> None:
    server = rig.stack.enter_context(
        VhostUser(Virtiofsd(tmp_path, read_only=False), rig.host, queue_count=2, config_bytes=0,
                  report=rig.reports.append)
    )  # fmt: skip
    driver = rig.stack.enter_context(FakeDriver(SharedFolder(server, "share0", queue_size=RING_SIZE)))
    os.killpg(server._helper.pid, signal.SIGKILL)
    rig.loop.until(lambda: bool(driver.errors))
    assert "server is gone" in str(driver.errors[0])
    assert "killed by SIGKILL" in rig.reports[0]


def test_share_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="expected a folder"):
        Virtiofsd(tmp_path / "absent", read_only=False)


def test_virtiofsd_command_confines_and_mounts_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ostler.backends.virtiofsd.find_program", lambda *_a, **_k: "/usr/lib/qemu/virtiofsd")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    command = Virtiofsd(tmp_path, read_only=True).command(5)
    assert command[0] == "unshare"
    assert "--map-root-user" in command
    assert "--net" in command
    assert "remount,bind,ro" in command[command.index("-c") + 1]
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("ostler.backends.virtiofsd._may_unshare", lambda: False)
    assert Virtiofsd(tmp_path, read_only=False).command(5)[0] == "/usr/lib/qemu/virtiofsd"


# -- a back end that answers nonsense ---------------------------------------------------------------


@pytest.fixture
def ends() -> Iterator[tuple[Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours, "fake"), theirs


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (b"", "closed the connection"),
        (b"\1\0", "closed the connection"),
        (wire.HEADER.pack(2, 5, 8) + bytes(8), "answered by 2"),
        (wire.HEADER.pack(1, 6, 8) + bytes(8), "flags 0x6"),
        (wire.HEADER.pack(1, 1, 8) + bytes(8), "flags 0x1"),
        (wire.HEADER.pack(1, 5, 1 << 30), "bytes"),
        (wire.HEADER.pack(1, 5, 4) + bytes(4), "expected 8"),
    ],
)
def test_answer_that_is_none_loses_the_back_end(
    ends: tuple[Channel, socket.socket], answer: bytes, complaint: str
) -> None:
    channel, theirs = ends
    theirs.sendall(answer)
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(BackEndLost, match=complaint):
        channel.ask_u64(Request.GET_FEATURES)


def test_request_refused_loses_the_back_end(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    channel.acknowledged = True
    theirs.sendall(wire.HEADER.pack(Request.SET_OWNER, 5, 8) + wire.U64.pack(1))
    with pytest.raises(BackEndLost, match="SET_OWNER refused"):
        channel.send(Request.SET_OWNER)


def test_ring_takes_only_slots_it_gave_out() -> None:
    with SharedMapping("test-rings", RING_BYTES) as mapping:
        ring = ShadowRing(mapping, 0, 1 << 39)
        slot = ring.submit([(0x1000, 16)], [(0x2000, 512), (0x3000, 1)])
        view = mapping.view()
        used = ring.places.used - mapping.address
        for number, element in enumerate([(99, 1), (slot, 513), (slot, 513), (0xFFFF_FFFF, 0)]):
            struct.pack_into("<II", view, used + 4 + 8 * number, *element)
        struct.pack_into("<H", view, used + 2, 4)
        assert ring.completed() == [(slot, 513)]
        struct.pack_into("<H", view, used + 2, 3)
        assert ring.completed() == []
        assert (ring.busy, ring.has_room) == (0, True)
        for _ in range(RING_SIZE):
            ring.submit([(0x1000, 16)], [])
        assert ring.has_room is False
        view.release()
        ring.close()
