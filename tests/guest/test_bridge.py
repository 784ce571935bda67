"""A guest on a bridge of the host: checksums and segmentation are left to the host's kernel, and nothing is altered."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
from collections.abc import Iterator

import pytest

from tests.guest.devices_guest import running
from tests.guest.test_network import SIZE_BYTES, echoed
from tests.unit.backends.test_tap import needs_rights

GUEST, HOST = "198.51.100.2", "198.51.100.1"
SCRIPT = f"""
ip addr add {GUEST}/24 dev eth0
ip link set eth0 up
nc -ll -p 81 -e cat &
ping -c 1 -W 20 {HOST} >/tmp/ping && say pinged
wget -q -O /tmp/blob "http://$report/blob"
say "sum-$(md5sum </tmp/blob | cut -d' ' -f1)"
while :; do sleep 1000; done
"""


@pytest.fixture
def bridge() -> Iterator[str]:
    name = f"ostbg{os.getpid() % 100_000}"
    subprocess.run(["ip", "link", "add", name, "type", "bridge"], check=True)
    try:
        subprocess.run(["ip", "addr", "add", f"{HOST}/24", "dev", name], check=True)
        subprocess.run(["ip", "link", "set", name, "up"], check=True)
        yield name
    finally:
        subprocess.run(["ip", "link", "del", name], check=True)


@needs_rights
def test_guest_on_a_bridge_reaches_the_host_and_is_reached(bridge: str) -> None:
    data = random.Random(5).randbytes(SIZE_BYTES)
    with running(SCRIPT, blob=data, report_to=HOST, nets=[f"bridge={bridge}"]) as guest:
        assert guest.next() == "pinged"
        assert guest.next() == f"sum-{hashlib.md5(data, usedforsecurity=False).hexdigest()}"
        assert echoed(81, data, host=GUEST) == hashlib.sha256(data).digest()
