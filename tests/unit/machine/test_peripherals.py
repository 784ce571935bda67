"""What a specification becomes on the PCI bus, and what cannot be opened."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from ostler.backends.loop import Host
from ostler.config import GuestSpec, parse_guest
from ostler.devices.virtio.balloon import Balloon
from ostler.devices.virtio.blk import Block
from ostler.devices.virtio.rng import Entropy
from ostler.errors import BadRequest, DiskBusy
from ostler.machine import peripherals
from ostler.machine.surroundings import Surroundings
from ostler.testing.fakes import FakeClock
from tests.unit.backends.test_vhost_user import TurnedLoop
from tests.unit.machine.test_machine import BoardTimer


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 16))
    return path


def spec(**values: Any) -> GuestSpec:
    return parse_guest(kernel="kernel.img", memory="32M", **values)


def around() -> Surroundings:
    host = Host(TurnedLoop(), threading.Lock())
    return Surroundings(host, None, lambda _device, _text: None, FakeClock(), BoardTimer)


def test_functions_come_in_order_under_their_names(disk: Path, tmp_path: Path, stack: ExitStack) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(bytes(1 << 16))
    wanted = spec(disks=[f"{disk},serial=one", f"{other},ro"], balloon=True, rng=True, cpus=2)
    functions = dict(peripherals.build(wanted, stack, around()))
    assert list(functions) == ["disk0", "disk1", "balloon", "rng"]
    first, second = functions["disk0"], functions["disk1"]
    assert isinstance(first, Block)
    assert isinstance(second, Block)
    assert (first.disk.serial, len(first.queue_sizes), second.disk.read_only) == ("one", 2, True)
    assert isinstance(functions["balloon"], Balloon)
    assert isinstance(functions["rng"], Entropy)


def test_overlay_is_written_and_its_file_is_not(disk: Path, stack: ExitStack) -> None:
    ((_, device),) = peripherals.build(spec(disks=[f"{disk},overlay"], rng=False), stack, around())
    assert isinstance(device, Block)
    device.disk.writev(0, [memoryview(b"x" * 512)])
    assert disk.read_bytes() == bytes(1 << 16)


def test_disk_taken_twice_or_missing_is_refused(disk: Path, tmp_path: Path, stack: ExitStack) -> None:
    with pytest.raises(DiskBusy):
        peripherals.build(spec(disks=[str(disk), str(disk)]), stack, around())
    with pytest.raises(BadRequest, match=r"absent\.img"):
        peripherals.build(spec(disks=[str(tmp_path / "absent.img")]), stack, around())


def test_vsock_without_a_folder_for_its_sockets_is_refused(stack: ExitStack) -> None:
    with pytest.raises(BadRequest, match="runtime folder"):
        peripherals.build(spec(vsock_cid=3), stack, around())
