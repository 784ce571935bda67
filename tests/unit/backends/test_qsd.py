"""qemu-storage-daemon as a helper: it serves, says why it does not, dies, comes back, and leaves nothing."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ostler.backends.qsd import PROGRAM, StorageDaemon
from ostler.errors import BadRequest, DiskBusy, HostError
from ostler.host.locks import claim_disk

pytestmark = pytest.mark.skipif(shutil.which(PROGRAM) is None, reason=f"{PROGRAM} is not on this host")


class OneReader:
    """The part of an event loop that `watch` needs."""

    def __init__(self) -> None:
        self.readers: dict[int, Callable[[], None]] = {}

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
        self.readers[fd] = callback

    def remove_reader(self, fd: int) -> None:
        self.readers.pop(fd, None)

    def turn(self) -> None:
        ready, _, _ = select.select(list(self.readers), [], [], 20)
        for fd in ready:
            self.readers[fd]()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "with,comma.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "64M"], check=True)
    return path


def features(address: Path) -> int:
    """Ask for the back end's features by the vhost-user protocol: request 1, version 1, no payload."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(20)
        client.connect(str(address))
        client.sendall((1).to_bytes(4, "little") + (1).to_bytes(4, "little") + bytes(4))
        answer = b""
        while len(answer) < 20:
            piece = client.recv(20 - len(answer))
            assert piece, "the daemon closed the connection"
            answer += piece
    return int.from_bytes(answer[12:], "little")


def test_daemon_serves_vhost_user_and_locks_the_disk(tmp_path: Path, disk: Path) -> None:
    with StorageDaemon(disk, tmp_path / "sock", queue_count=2) as daemon:
        assert features(daemon.address) & 1 << 30  # protocol features: it is a vhost-user back end
        with pytest.raises(DiskBusy, match=rf"in use by process {daemon.pid} \(.*{PROGRAM}"):
            claim_disk(disk, write=False)
        pid = daemon.pid

    assert not (tmp_path / "sock").exists()
    assert not Path(f"/proc/{pid}").exists()


def test_dead_daemon_is_reported_and_serves_the_same_socket_again(tmp_path: Path, disk: Path) -> None:
    loop = OneReader()
    deaths: list[str] = []
    with StorageDaemon(disk, tmp_path / "sock") as daemon:
        daemon.watch(loop, lambda _daemon, obituary: deaths.append(obituary))
        os.kill(daemon.pid, signal.SIGKILL)
        loop.turn()
        assert deaths == [f"{PROGRAM}: killed by SIGKILL"]

        daemon.restart()

        assert features(daemon.address)
        for _ in range(2):
            daemon.restart()
        with pytest.raises(HostError, match="died 4 times and is not started again"):
            daemon.restart()


def test_disk_that_is_no_qcow2_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.qcow2").write_bytes(b"no disk" * 1000)

    with pytest.raises(BadRequest, match=r"x.qcow2: no qcow2 disk"):
        StorageDaemon(tmp_path / "x.qcow2", tmp_path / "sock")

    assert not (tmp_path / "sock").exists()


def test_disk_in_use_is_refused_before_anything_starts(tmp_path: Path, disk: Path) -> None:
    with StorageDaemon(disk, tmp_path / "first") as first:
        with pytest.raises(DiskBusy, match=f"in use by process {first.pid} "):
            StorageDaemon(disk, tmp_path / "second")
        assert not (tmp_path / "second").exists()


def test_missing_daemon_says_what_to_install(tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr("ostler.host.helpers.SYSTEM_FOLDERS", ())

    with pytest.raises(HostError, match=r"qemu-storage-daemon: not found.*qemu-system-common.*ostler disk convert"):
        StorageDaemon(disk, tmp_path / "sock")
