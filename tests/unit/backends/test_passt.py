"""The real passt on this side of its socket: what it answers, how it dies, what is left."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import Queue

import pytest

from ostler.backends.passt import Passt
from ostler.backends.passt_options import (
    Address,
    Forward,
    PasstOptions,
    addresses,
    arguments,
    check_port,
    has_default_route,
    host_resolvers,
)
from ostler.errors import BadRequest, HostError
from tests.unit.backends.conftest import TIMEOUT_S, RunningLoop

MAC = bytes.fromhex("525400123456")
OPTIONS = PasstOptions(MAC, host_loopback=True)
ONLINE = has_default_route(6, "/proc/net/route")

needs_passt = pytest.mark.skipif(
    shutil.which("passt") is None or not ONLINE, reason="passt is not installed, or this host has no IPv4 network"
)


class Wire:
    """Stands in for the card: frames into a queue, as many at once as `room` says."""

    def __init__(self, running: RunningLoop, options: PasstOptions = OPTIONS) -> None:
        self.running = running
        self.frames: Queue[bytes] = Queue()
        self.reports: Queue[str] = Queue()
        self.room = 1 << 30
        self.passt = Passt(options, running.host, report=self.reports.put)
        self.writable: Queue[None] = Queue()
        running.call(lambda: self.passt.attach(self.deliver, lambda: self.writable.put(None)))

    def deliver(self, frames: Sequence[memoryview]) -> int:
        taken = min(len(frames), self.room)
        for frame in frames[:taken]:
            self.frames.put(bytes(frame))
        self.room -= taken
        return taken

    def send(self, *frames: bytes) -> bool:
        return self.running.call(lambda: self.passt.send([[memoryview(frame)] for frame in frames]))

    def wait_for(self, wanted: Callable[[bytes], bool]) -> bytes:
        while True:
            frame = self.frames.get(timeout=TIMEOUT_S)
            if wanted(frame):
                return frame


@pytest.fixture
def wire(running: RunningLoop) -> Iterator[Wire]:
    wire = Wire(running)
    yield wire
    running.call(wire.passt.close)


def guest_address(passt: Passt) -> bytes:
    assert passt.addresses.v4
    return socket.inet_aton(passt.addresses.v4.address)


def gateway(passt: Passt) -> bytes:
    assert passt.addresses.v4
    return socket.inet_aton(passt.addresses.v4.gateway)


def arp_request(passt: Passt) -> bytes:
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + MAC + guest_address(passt) + bytes(6) + gateway(passt)
    return b"\xff" * 6 + MAC + b"\x08\x06" + body


def is_arp_reply(frame: bytes) -> bool:
    return frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\2"


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def segment(passt: Passt, router: bytes, port: int, sequence: int, acknowledged: int, flags: int, data: bytes) -> bytes:
    """A TCP segment whose checksum is wrong, as a driver leaves it that was told not to bother."""
    tcp = struct.pack("!HHIIBBHHH", 40000, port, sequence, acknowledged, 5 << 4, flags, 65535, 0xDEAD, 0) + data
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 1, 0, 64, 6, 0) + guest_address(passt) + gateway(passt)
    ip = ip[:10] + checksum(ip).to_bytes(2, "big") + ip[12:]
    return router + MAC + b"\x08\x00" + ip + tcp


@needs_passt
def test_gateway_answers_the_guest(wire: Wire) -> None:
    assert wire.send(arp_request(wire.passt))

    reply = wire.wait_for(is_arp_reply)

    assert reply[28:32] == gateway(wire.passt)


@needs_passt
def test_segments_with_unfinished_checksums_and_beyond_the_announced_size_arrive(wire: Wire) -> None:
    data = bytes(range(256)) * 100
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(TIMEOUT_S)
        port = server.getsockname()[1]
        wire.send(arp_request(wire.passt))
        router = wire.wait_for(is_arp_reply)[22:28]
        wire.send(segment(wire.passt, router, port, 1000, 0, 0x02, b""))
        answer = wire.wait_for(lambda frame: frame[12:14] == b"\x08\0" and frame[23] == 6 and frame[47] == 0x12)
        theirs = struct.unpack_from("!I", answer, 38)[0] + 1
        wire.send(segment(wire.passt, router, port, 1001, theirs, 0x10, b""))
        wire.send(segment(wire.passt, router, port, 1001, theirs, 0x18, data))
        accepted, _ = server.accept()
        with accepted:
            accepted.settimeout(TIMEOUT_S)
            got = b""
            while len(got) < len(data) and (chunk := accepted.recv(65536)):
                got += chunk

    assert got == data


@needs_passt
def test_frames_not_taken_wait_until_there_is_room(wire: Wire) -> None:
    wire.room = 0
    wire.send(*[arp_request(wire.passt)] * 5)
    wire.running.call(wire.passt.resume)
    wire.room = 1 << 30
    wire.running.call(wire.passt.resume)

    replies: list[bytes] = []
    while len(replies) < 5:
        replies.append(wire.wait_for(is_arp_reply))
        wire.running.call(wire.passt.resume)

    assert len(set(replies)) == 1


@needs_passt
def test_passt_that_dies_is_reported_and_started_again(wire: Wire) -> None:
    first = wire.passt._helper.pid
    os.kill(first, signal.SIGKILL)

    report = wire.reports.get(timeout=TIMEOUT_S)
    wire.send(arp_request(wire.passt))

    assert report == "passt: killed by SIGKILL; started again, open connections are lost"
    assert wire.wait_for(is_arp_reply)
    assert wire.passt._helper.pid != first


@needs_passt
def test_passt_that_keeps_dying_is_given_up(wire: Wire) -> None:
    reports = []
    for _ in range(6):
        os.kill(wire.passt._helper.pid, signal.SIGKILL)
        reports.append(wire.reports.get(timeout=TIMEOUT_S))

    assert "the network is down" in reports[-1]
    assert wire.send(arp_request(wire.passt))


@needs_passt
def test_closing_ends_passt(running: RunningLoop) -> None:
    wire = Wire(running)
    pid = wire.passt._helper.pid
    running.call(wire.passt.close)

    assert not Path(f"/proc/{pid}").exists()
    assert wire.reports.empty()


@needs_passt
def test_forwarded_port_leads_to_the_guest(running: RunningLoop) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    wire = Wire(running, PasstOptions(MAC, forwards=(Forward(port, 80, host_address="127.0.0.1"),)))
    try:
        wire.send(arp_request(wire.passt))
        wire.wait_for(is_arp_reply)
        with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S):
            syn = wire.wait_for(lambda frame: frame[12:14] == b"\x08\0" and frame[23] == 6)
    finally:
        running.call(wire.passt.close)

    assert struct.unpack_from("!H", syn, 36)[0] == 80
    assert syn[47] == 0x02


def test_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        forward = Forward(server.getsockname()[1], 80, host_address="127.0.0.1")
        with pytest.raises(BadRequest, match=r"port 127\.0\.0\.1:\d+:80/tcp: address already in use, expected a free"):
            check_port(forward)


def test_missing_passt_is_one_line(running: RunningLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr("ostler.host.helpers.SYSTEM_FOLDERS", ())
    monkeypatch.setattr("ostler.backends.passt_options.has_default_route", lambda *_: True)

    with pytest.raises(HostError, match="passt: not found on this host: install the package passt, or use --net none"):
        Passt(OPTIONS, running.host, report=lambda _: None)


def test_host_without_a_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ostler.backends.passt_options.has_default_route", lambda *_: False)

    with pytest.raises(HostError, match="no default route"):
        addresses(OPTIONS)


def test_command_line_says_none_where_no_port_is_forwarded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ostler.backends.passt_options.has_default_route", lambda kind, _: kind == 6)
    options = PasstOptions(MAC, forwards=(Forward(8080, 80), Forward(81, 81, host_address="::1")))

    argv = arguments(options, addresses(options), 7)

    assert [argv[at + 1] for at, word in enumerate(argv) if word == "-t"] == ["8080:80", "::1/81:81"]
    assert argv[argv.index("-u") + 1] == "none"
    assert {"--ipv4-only", "--no-map-gw"} <= set(argv)


@pytest.mark.parametrize(("resolvers", "forwarded"), [(["192.0.2.9"], False), ([], True)])
def test_resolver_on_the_hosts_loopback_alone_is_forwarded_to(
    monkeypatch: pytest.MonkeyPatch, resolvers: list[str], *, forwarded: bool
) -> None:
    monkeypatch.setattr("ostler.backends.passt_options.has_default_route", lambda kind, _: kind == 6)
    monkeypatch.setattr("ostler.backends.passt_options.host_resolvers", lambda: resolvers)

    guest = addresses(OPTIONS)

    assert guest.dns == (("10.213.77.3",) if forwarded else ("192.0.2.9",))
    assert ("--dns-forward" in arguments(OPTIONS, guest, 7)) is forwarded


def test_interfaces_of_a_guest_have_networks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ostler.backends.passt_options.has_default_route", lambda *_: True)

    first, second = (addresses(PasstOptions(MAC, number=number)) for number in (0, 1))

    assert first.v4 == Address("10.213.77.2", 24, "10.213.77.1")
    assert second.v4 == Address("10.213.78.2", 24, "10.213.78.1")
    assert first.v6 == Address("fd6f:7374:6c65:7200::2", 64, "fd6f:7374:6c65:7200::1")
    assert second.v6 == Address("fd6f:7374:6c65:7201::2", 64, "fd6f:7374:6c65:7201::1")


def test_resolvers_a_guest_cannot_reach_are_left_out(tmp_path: Path) -> None:
    conf = tmp_path / "resolv.conf"
    conf.write_text("nameserver 127.0.0.53\nnameserver 192.0.2.9\nnameserver fe80::1%eth0\nsearch x\nnameserver ?\n")

    assert host_resolvers(conf) == ["192.0.2.9"]
    assert host_resolvers(tmp_path / "none") == []


def test_default_routes_are_found(tmp_path: Path) -> None:
    v4 = tmp_path / "route"
    v4.write_text(
        "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\neth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\n"
    )
    v6 = tmp_path / "ipv6_route"
    v6.write_text(f"{'0' * 32} 00 {'0' * 32} 00 {'0' * 32} ffffffff 00000001 00000000 00200200       lo\n")

    assert has_default_route(6, str(v4))
    assert not has_default_route(9, str(v6))
    assert not has_default_route(6, str(tmp_path / "none"))
