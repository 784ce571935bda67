"""TAP interfaces and bridges; those tests that make one need the right to."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import Queue

import pytest

from ostler.backends.tap import HEADER_BYTES, INTERFACES, Tap
from ostler.errors import BadRequest
from tests.unit.backends.conftest import TIMEOUT_S, RunningLoop

ETH_P_ALL, TEST_TYPE = 3, 0x88B5


def _may_make_interfaces() -> bool:
    done = subprocess.run(["ip", "link", "add", "ostlerprobe", "type", "bridge"], capture_output=True, check=False)
    if done.returncode == 0:
        subprocess.run(["ip", "link", "del", "ostlerprobe"], check=True)
    return done.returncode == 0 and Path("/dev/net/tun").exists()


needs_rights = pytest.mark.skipif(not _may_make_interfaces(), reason="may not make network interfaces here")


@pytest.fixture
def bridge() -> Iterator[str]:
    name = f"ostbr{os.getpid() % 100_000}"
    subprocess.run(["ip", "link", "add", name, "mtu", "1400", "type", "bridge"], check=True)
    subprocess.run(["ip", "link", "set", name, "up"], check=True)
    yield name
    subprocess.run(["ip", "link", "del", name], check=True)


@needs_rights
def test_interface_on_a_bridge_carries_frames_both_ways_and_vanishes(running: RunningLoop, bridge: str) -> None:
    frames: Queue[bytes] = Queue()

    def deliver(batch: Sequence[memoryview]) -> int:
        for frame in batch:
            frames.put(bytes(frame))
        return len(batch)

    tap = Tap("ostler%d", running.host, report=lambda _: None, bridge=bridge)
    name, mtu = tap.name, tap.mtu
    running.call(lambda: tap.attach(deliver, lambda: None))
    running.call(lambda: tap.configure(tap.features))
    # Of an experimental type, which nothing else on this host sends.
    outside = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(TEST_TYPE))
    outside.bind((bridge, TEST_TYPE))
    outside.settimeout(TIMEOUT_S)
    broadcast = b"\xff" * 6 + bytes.fromhex("020000000001") + TEST_TYPE.to_bytes(2, "big")
    with outside:
        running.call(lambda: tap.send([[memoryview(bytes(HEADER_BYTES)), memoryview(broadcast + b"to the host")]]))
        to_host = outside.recv(2000)
        outside.send(broadcast + b"to the guest".ljust(46))
        to_guest = b""
        while b"to the guest" not in to_guest:
            to_guest = frames.get(timeout=TIMEOUT_S)
    running.call(tap.close)

    assert to_host.startswith(broadcast + b"to the host")
    assert to_guest[HEADER_BYTES:].startswith(broadcast + b"to the guest")
    assert (name.startswith("ostler"), mtu) == (True, 1400)
    assert not (INTERFACES / name).exists()


@needs_rights
def test_frame_with_an_impossible_header_is_dropped(running: RunningLoop, bridge: str) -> None:
    tap = Tap("ostler%d", running.host, report=lambda _: None, bridge=bridge)
    hostile = b"\1\7" + b"\xff" * 10

    running.call(lambda: tap.send([[memoryview(hostile), memoryview(bytes(60))]]))
    running.call(tap.close)

    assert tap.dropped == 1


@pytest.mark.parametrize("name", ["ostler-no-such", "", "x" * 16, ".."])
def test_interface_that_does_not_exist_is_one_line(running: RunningLoop, name: str) -> None:
    with pytest.raises(BadRequest, match=rf"^tap '{name}': ") as caught:
        Tap(name, running.host, report=lambda _: None)

    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not Path("/dev/net/tun").exists(), reason="no /dev/net/tun")
def test_interface_that_is_no_tap_is_one_line(running: RunningLoop) -> None:
    with pytest.raises(BadRequest, match=r"^tap 'lo': "):
        Tap("lo", running.host, report=lambda _: None)
