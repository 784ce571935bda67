"""A guest with a network by passt: addresses by DHCP, connections out, forwarded ports in, whole data both ways."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import socket
import threading
import urllib.request
from pathlib import Path

import pytest

from ostler.backends.passt_options import has_default_route, host_resolvers
from tests.guest.devices_guest import DHCP, WAIT_S, Guest, running

pytestmark = pytest.mark.skipif(
    shutil.which("passt") is None or not has_default_route(6, "/proc/net/route"),
    reason="passt is not installed, or this host has no IPv4 network",
)


def resolver_answers() -> bool:
    """Whether a resolver that guests can reach answers this host."""
    query = bytes.fromhex("00010100000100000000000009") + b"localhost" + bytes.fromhex("0000010001")
    for address in host_resolvers():
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
            probe.settimeout(2)
            probe.sendto(query, (address, 53))
            return bool(probe.recv(512))
    return False


ANSWERS = resolver_answers()
# `OSTLER_TEST_MIB=100 pytest tests/guest/test_network.py` for the figures of the documentation.
SIZE_BYTES = int(os.environ.get("OSTLER_TEST_MIB", "16")) << 20
REQUESTS = 100

SERVE = (
    DHCP
    + """
echo "hello from the guest" >/www/hello
httpd -p 80 -h /www
nc -ll -p 81 -e cat &
say "leased-$(sed 's/ .*//' /tmp/leased)-$(cat /sys/class/net/eth0/mtu)"
wget -q -O /tmp/blob "http://$report/blob"
say "sum-$(md5sum </tmp/blob | cut -d' ' -f1)"
read -r _ </tmp/end
"""
)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def test_guest_reaches_out_and_is_reached_and_nothing_is_altered() -> None:
    data = random.Random(4).randbytes(SIZE_BYTES)
    web, echo = free_port(), free_port()
    ports = [f"127.0.0.1:{web}:80", f"127.0.0.1:{echo}:81"]
    with running("mkfifo /tmp/end\n" + SERVE, blob=data, ports=ports) as guest:
        assert guest.next() == "leased-10.213.77.2-65520"
        assert guest.next() == f"sum-{hashlib.md5(data, usedforsecurity=False).hexdigest()}"
        for _ in range(REQUESTS):
            with urllib.request.urlopen(f"http://127.0.0.1:{web}/hello", timeout=WAIT_S) as answer:
                assert answer.read() == b"hello from the guest\n"
        assert echoed(echo, data) == hashlib.sha256(data).digest()


@pytest.mark.skipif(not ANSWERS, reason="no resolver of this host answers")
def test_guest_resolves_names_as_the_host_does() -> None:
    ask = "nslookup localhost >/tmp/answer 2>&1; grep -q 'timed out' /tmp/answer && say silent || say answered\n"
    with running(DHCP + ask) as guest:
        assert guest.next() == "answered"


def test_second_interface_has_its_own_network_and_its_rate_alters_nothing() -> None:
    data = random.Random(6).randbytes(1 << 20)
    script = (
        DHCP
        + """
cp /tmp/leased /tmp/first
sed -i '/ip route add default/d' /tmp/lease
ip link set eth1 up
udhcpc -i eth1 -n -q -t 20 -T 1 -s /tmp/lease
set -- $(cat /tmp/leased)
say "second-$1"
ip route add "${report%:*}" via "$2" dev eth1
wget -q -O /tmp/blob "http://$report/blob"
say "sum-$(md5sum </tmp/blob | cut -d' ' -f1)"
test "$(cat /sys/class/net/eth1/statistics/rx_bytes)" -gt 1048576 && say through-the-second
"""
    )
    with running(script, blob=data, nets=["passt", "passt,rate=2M"]) as guest:
        assert guest.next() == "second-10.213.78.2"
        assert guest.next() == f"sum-{hashlib.md5(data, usedforsecurity=False).hexdigest()}"
        assert guest.next() == "through-the-second"


def test_guest_whose_passt_dies_goes_on_with_a_new_one() -> None:
    # Waiting for an answer that died with passt has no end of its own: there is nothing to send that would be refused.
    # So every request has a limit, the first one too: passt is killed while its answer may be on its way.
    script = DHCP + 'while :; do timeout 5 wget -q -O /dev/null "http://$report/more"; done\n'
    with running(script) as guest:
        assert guest.next() == "more"
        kill_passt(guest)
        while "net0: passt: killed by SIGKILL; started again" not in guest.console:
            assert guest.next() == "more"
        assert guest.next() == "more"


def echoed(port: int, data: bytes, *, host: str = "127.0.0.1") -> bytes:
    """Send everything, receive everything at once; the digest of what came back."""
    digest = hashlib.sha256()
    with socket.create_connection((host, port), timeout=WAIT_S) as sock:

        def send() -> None:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        while chunk := sock.recv(1 << 20):
            digest.update(chunk)
        sender.join()
    return digest.digest()


def kill_passt(guest: Guest) -> None:
    """The passt of this guest: the child of its VM process."""
    children = Path(f"/proc/{guest.pid}/task/{guest.pid}/children").read_text().split()
    passts = [int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text().startswith("passt")]
    os.kill(passts[0], signal.SIGKILL)
