"""A guest that counts is moved between processes of this host: no number is missing, and the disk goes with it."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ostler.client import guests, moving
from ostler.client.receive import Receiver
from ostler.control import runtime
from ostler.control.connection import Connection
from ostler.errors import BadRequest, MigrationCancelled, MigrationError, OstlerError
from ostler.host import userfault
from ostler.migration.address import TlsFiles, parse_address
from tests.guest.devices_guest import Guest, running

COUNT = re.compile(r"count (\d+)\s")
SCRIPT = """
n=0
while :; do
    n=$((n + 1))
    printf '%016d' $n | dd of=/dev/vda bs=16 conv=notrunc,fsync 2>/dev/null
    printf '%016d' $n | dd of=/dev/vdb bs=16 conv=notrunc,fsync 2>/dev/null
    [ "$(dd if=/dev/vdb bs=16 count=1 2>/dev/null)" = "$(printf '%016d' $n)" ] || echo wrong
    echo "count $n"
done
"""


def counts(folder: Path) -> list[int]:
    with contextlib.suppress(FileNotFoundError):
        return [int(each) for each in COUNT.findall((folder / "console.log").read_text(errors="replace"))]
    return []


def await_counts(folder: Path, least: int, limit_s: float = 120) -> list[int]:
    deadline = time.monotonic() + limit_s
    while len(found := counts(folder)) < least:
        assert time.monotonic() < deadline, f"{folder.name} stopped counting at {found[-3:]}"
        time.sleep(0.05)
    return found


def moved(name: str, wish: moving.Wish) -> tuple[dict[str, Any], str]:
    """Move a guest; what is known of it, and everything that it said where it was."""
    entry = runtime.find(name)
    # Open before: the folder goes with the process, which says its last words after the guest has gone.
    with entry.console_log.open(errors="replace") as log:
        facts = moving.migrate(entry, wish)
        guests.await_gone(entry)
        return facts, log.read()


def assert_all_counted(*consoles: str) -> None:
    """No number is missing, on whichever side it was said: a line may begin on one and end on the other."""
    found = [int(each) for each in COUNT.findall("".join(consoles))]
    assert found == list(range(1, len(found) + 1))
    assert "wrong" not in "".join(consoles)


@pytest.fixture
def disks(tmp_path: Path) -> tuple[Path, Path]:
    """One that both sides open, and the base of a throw-away one."""
    own, base = tmp_path / "own", tmp_path / "base"
    for path in (own, base):
        path.write_bytes(bytes(1 << 20))
    return own, base


@contextlib.contextmanager
def counting(disks: tuple[Path, Path], **more: Any) -> Iterator[Guest]:
    own, base = disks
    both = [{"path": own, "format": "raw"}, {"path": base, "format": "raw", "overlay": True}]
    with running(SCRIPT, drivers=["virtio_blk"], disks=both, nets=[], memory="128M", **more) as guest:
        await_counts(guest.folder, 3)
        yield guest


@contextlib.contextmanager
def receiving(address: str, tls: TlsFiles | None = None) -> Iterator[tuple[str, list[tuple[str, dict[str, Any]]]]]:
    said: list[tuple[str, dict[str, Any]]] = []
    with Receiver(parse_address(address), lambda *each: said.append(each), tls=tls) as receiver:
        thread = threading.Thread(target=receiver.serve)
        thread.start()
        try:
            yield str(receiver.address), said
        finally:
            receiver.stop()
            thread.join()


@contextlib.contextmanager
def ended_after(name: str) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(OstlerError):
            guests.kill(runtime.find(name))


@pytest.mark.parametrize("how", [{}, {"streams": 3, "compression": "zstd"}], ids=["plain", "streams-zstd"])
def test_guest_moved_there_and_back_counts_on(disks: tuple[Path, Path], tmp_path: Path, how: dict[str, Any]) -> None:
    there, back = f"there-{os.getpid()}", f"back-{os.getpid()}"
    with receiving(f"unix:{tmp_path}/in") as (address, _), counting(disks) as guest, ended_after(there):
        _, first = moved(guest.folder.name, moving.Wish(address=address, name=there, **how))
        other = runtime.find(there).path
        await_counts(other, 3)
        with ended_after(back):
            facts, second = moved(there, moving.Wish(address=address, name=back, **how))
            third = runtime.find(back).path
            last = await_counts(third, 3)
            assert facts["pause_s"] < 5
            assert_all_counted(first, second, (third / "console.log").read_text())
            assert int(disks[0].read_bytes()[:16]) >= last[-1] - 1
            assert disks[1].read_bytes() == bytes(1 << 20)


def test_migration_called_off_leaves_the_guest_counting_here(disks: tuple[Path, Path], tmp_path: Path) -> None:
    there = f"off-{os.getpid()}"
    with receiving(f"unix:{tmp_path}/in") as (address, said), counting(disks) as guest:
        entry = runtime.find(guest.folder.name)
        errors: list[OstlerError] = []

        def move() -> None:
            try:
                # At this rate it would take a minute.
                moving.migrate(entry, moving.Wish(address=address, name=there, bytes_per_s=1e6))
            except OstlerError as error:
                errors.append(error)

        thread = threading.Thread(target=move)
        thread.start()
        while not said and thread.is_alive():
            time.sleep(0.02)
        moving.cancel(entry)
        thread.join()
        assert isinstance(errors[0], MigrationCancelled)
        await_counts(guest.folder, len(counts(guest.folder)) + 3)
        assert there not in [each.name for each in runtime.entries()]
        with pytest.raises(BadRequest, match="is not being moved"):
            moving.cancel(entry)


def test_target_that_cannot_take_the_guest_says_why_and_it_runs_on(disks: tuple[Path, Path], tmp_path: Path) -> None:
    with receiving(f"unix:{tmp_path}/in") as (address, _), counting(disks) as guest:
        entry = runtime.find(guest.folder.name)
        with pytest.raises(MigrationError, match="a guest of that name is running"):
            moving.migrate(entry, moving.Wish(address=address))
        with pytest.raises(MigrationError, match="expected `ostler receive` there"):
            moving.migrate(entry, moving.Wish(address=f"unix:{tmp_path}/nobody"))
        await_counts(guest.folder, len(counts(guest.folder)) + 3)


def test_paused_guest_moves_and_stays_paused_until_it_is_resumed_there(
    disks: tuple[Path, Path], tmp_path: Path
) -> None:
    there = f"paused-{os.getpid()}"
    with receiving(f"unix:{tmp_path}/in") as (address, _), counting(disks) as guest, ended_after(there):
        entry = runtime.find(guest.folder.name)
        guests.request(entry, "pause")
        _, first = moved(guest.folder.name, moving.Wish(address=address, name=there))
        other = runtime.find(there)
        assert guests.request(other, "status")["state"] == "paused"
        assert counts(other.path) == []
        guests.request(other, "resume")
        await_counts(other.path, 5)
        assert_all_counted(first, (other.path / "console.log").read_text())


@pytest.mark.skipif(not userfault.is_available(), reason="no userfaultfd for this user")
def test_guest_on_its_way_goes_over_to_post_copy_and_counts_on(disks: tuple[Path, Path], tmp_path: Path) -> None:
    there = f"switched-{os.getpid()}"
    with receiving(f"unix:{tmp_path}/in") as (address, _), counting(disks) as guest, ended_after(there):
        entry = runtime.find(guest.folder.name)
        # At this rate the first round alone would take a minute.
        wish = moving.Wish(address=address, name=there, post_copy="auto", bytes_per_s=1e6)
        done: list[tuple[dict[str, Any], str]] = []
        thread = threading.Thread(target=lambda: done.append(moved(guest.folder.name, wish)))
        thread.start()
        with Connection.to(entry) as connection:
            for event in connection.events():
                if event["event"] == "migration" and event["phase"] == "memory":
                    break
        guests.request(entry, "migrate-post-copy")
        guests.request(entry, "migrate-limit", bytes_per_s=0)
        thread.join()
        facts, first = done[0]
        other = runtime.find(there).path
        await_counts(other, 5)
        assert_all_counted(first, (other / "console.log").read_text())
        assert facts["round"] == 1
        assert facts["left_bytes"] == 0


@pytest.mark.skipif(not userfault.is_available(), reason="no userfaultfd for this user")
def test_guest_goes_before_its_memory_and_counts_on(disks: tuple[Path, Path], tmp_path: Path) -> None:
    there = f"late-{os.getpid()}"
    with receiving(f"unix:{tmp_path}/in") as (address, _), counting(disks) as guest, ended_after(there):
        facts, first = moved(guest.folder.name, moving.Wish(address=address, name=there, post_copy="now"))
        other = runtime.find(there).path
        await_counts(other, 5)
        assert_all_counted(first, (other / "console.log").read_text())
        assert facts["left_bytes"] == 0
