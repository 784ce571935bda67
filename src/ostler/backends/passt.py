"""User-mode network by passt(1): no privileges, no interface on the host; the guest's connections become sockets.

passt runs as a helper on one end of a socket pair, frames on it have a length of four bytes before them and nothing
else. It takes payloads out of the guest's segments and makes segments of its own, so it neither looks at the guest's
checksums nor minds segments larger than the MTU, and what it delivers has right checksums: hence the offloads offered.
Its MTU is the largest there is: a segment of 64 KiB costs hardly more than one of 1500 bytes.

passt gives up when the socket closes, so it cannot outlive this process. If it dies the device carries on with a new
one, a limited number of times in a minute; connections through the old one are lost.

The guest's addresses are chosen here and not copied from the host, so that it can be configured without DHCP and can
reach the host's own address. The host's loopback services stay out of reach unless `host_loopback` is asked for.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Self

from ostler.backends.loop import Host
from ostler.errors import BadRequest, HostError
from ostler.host.helpers import Helper, find_program

MTU = 65520
# VIRTIO_NET_F_CSUM, GUEST_CSUM, HOST_TSO4, HOST_TSO6.
OFFLOADS = 1 << 0 | 1 << 1 | 1 << 11 | 1 << 12
LENGTH = struct.Struct("!I")
MAX_FRAME_BYTES = 65535 + 14
RECEIVE_BYTES = 1 << 20
SOCKET_BUFFER_BYTES = 4 << 20
IOV_MAX = 1024
MAX_RESTARTS, RESTART_WINDOW_S = 5, 60.0

# Of each interface a network of its own, by number; in them the guest is 2, the gateway 1. A guest that asks 3 reaches
# the host's resolver, where that listens on the host's loopback alone.
V4_NETS, V6_NETS = "10.213.{}.", "fd6f:7374:6c65:72{:02x}::"
FIRST_NET, NETS = 77, 128
RESOLVERS = Path("/etc/resolv.conf")
_NOISE = re.compile(r"(Failed to send \d+ bytes to syslog(; )?)")


@dataclass(frozen=True, slots=True)
class Forward:
    """A port of the host that leads to one of the guest. No address is all of the host's."""

    host_port: int
    guest_port: int
    protocol: str = "tcp"
    host_address: str = ""

    def __str__(self) -> str:
        address = f"{self.host_address}:" if self.host_address else ""
        return f"{address}{self.host_port}:{self.guest_port}/{self.protocol}"


@dataclass(frozen=True, slots=True)
class Address:
    """One address of a guest's interface."""

    address: str
    prefix: int
    gateway: str


@dataclass(frozen=True, slots=True)
class GuestAddresses:
    """How the guest's interface is to be configured; None where the host has no such network itself."""

    mac: bytes
    v4: Address | None
    v6: Address | None
    dns: tuple[str, ...]
    mtu: int = MTU


@dataclass(frozen=True, slots=True)
class PasstOptions:
    """What passt is to do for one interface."""

    mac: bytes
    forwards: tuple[Forward, ...] = ()
    number: int = 0
    """Which of the guest's interfaces it is."""
    host_loopback: bool = False
    """Connections to the gateway's address reach services on the host's loopback interface."""


class Passt:
    """The helper and this side of its socket: a back end of `NetDevice`; a context manager.

    Start it in the main thread before the loop runs.
    """

    features = OFFLOADS
    header_bytes = 0

    def __init__(
        self,
        options: PasstOptions,
        host: Host,
        *,
        report: Callable[[str], None],
        guest: GuestAddresses | None = None,
    ) -> None:
        """`report` is told one line when passt dies; `guest` are addresses other than the usual ones.

        Raises HostError, BadRequest for ports that cannot be had.
        """
        self.addresses = guest or addresses(options)
        self.mtu = self.addresses.mtu
        self.on_down: Callable[[], None] = _nothing
        """Called under the lock when the network is gone for good."""
        self._options = options
        self._host = host
        self._report = report
        self._program = find_program("passt", package="passt", instead="use --net none")
        self._deliver: Callable[[Sequence[memoryview]], int] = len
        self._writable: Callable[[], None] = _nothing
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        # Of the buffer: bytes received, and those of them that whole frames are made of.
        self._filled = self._consumed = 0
        self._waiting: list[memoryview] = []
        self._unsent = bytearray()
        self._restarts: list[float] = []
        self._closed = self._reading = self._lost = False
        for forward in options.forwards:
            check_port(forward)
        self._socket, self._helper = self._start()

    # -- asked by the device ----------------------------------------------------------------

    def attach(self, deliver: Callable[[Sequence[memoryview]], int], writable: Callable[[], None]) -> None:
        self._deliver, self._writable = deliver, writable
        self._watch()

    def configure(self, offloads: int) -> None:
        """Nothing to be told: passt minds neither way."""

    def send(self, frames: Sequence[list[memoryview]]) -> bool:
        pieces: list[memoryview] = []
        for frame in frames:
            size = sum(map(len, frame))
            if size <= MAX_FRAME_BYTES:
                pieces.append(memoryview(LENGTH.pack(size)))
                pieces += frame
        for start in range(0, len(pieces), IOV_MAX):
            batch = pieces[start : start + IOV_MAX]
            sent = 0 if self._unsent else self._write(batch)
            for piece in batch:
                if sent < len(piece):
                    self._unsent += piece[sent:]
                sent = max(sent - len(piece), 0)
        if self._unsent and not self._lost:
            self._host.loop.add_writer(self._socket.fileno(), self._flush)
        return not self._unsent

    def resume(self) -> None:
        self._host.loop.call_soon(self._retry)

    def call_soon(self, callback: Callable[[], None]) -> None:
        self._host.loop.call_soon(self._host.locked(callback))

    def _write(self, pieces: list[memoryview]) -> int:
        try:
            return self._socket.sendmsg(pieces, (), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError:
            # It died; the loop hears of that too. What is lost, TCP sends again.
            return sum(map(len, pieces))

    # -- the loop's events ------------------------------------------------------------------

    def _watch(self) -> None:
        wanted = not self._closed and not self._lost and not self._waiting
        if wanted is not self._reading:
            self._reading = wanted
            fd = self._socket.fileno()
            self._host.loop.add_reader(fd, self._readable) if wanted else self._host.loop.remove_reader(fd)

    def _readable(self) -> None:
        try:
            count = self._socket.recv_into(self._buffer[self._filled :])
        except BlockingIOError:
            return
        except OSError:
            count = 0
        if not count:
            self._gone()
            return
        self._filled += count
        self._hand_over(self._parse())

    def _parse(self) -> list[memoryview]:
        """All whole frames received; what is behind them stays."""
        frames: list[memoryview] = []
        buffer, at = self._buffer, 0
        while self._filled - at >= LENGTH.size:
            (size,) = LENGTH.unpack_from(buffer, at)
            if size > MAX_FRAME_BYTES:
                # Not passt's language: there is no way back into step but a new one.
                self._report(f"passt: a frame of {size} bytes, expected at most {MAX_FRAME_BYTES}")
                self._filled = 0
                self._gone()
                return frames
            if self._filled - at < LENGTH.size + size:
                break
            frames.append(buffer[at + LENGTH.size : at + LENGTH.size + size])
            at += LENGTH.size + size
        self._consumed = at
        return frames

    def _hand_over(self, frames: list[memoryview]) -> None:
        with self._host.lock:
            taken = self._deliver(frames)
        self._waiting = frames[taken:]
        if not self._waiting:
            rest = self._filled - self._consumed
            if rest > 0:
                self._buffer[:rest] = bytes(self._buffer[self._consumed : self._filled])
            self._filled, self._consumed = max(rest, 0), 0
        self._watch()

    def _retry(self) -> None:
        if self._waiting and not self._closed:
            self._hand_over(self._waiting)

    def _flush(self) -> None:
        with self._host.lock:
            if self._unsent:
                with memoryview(self._unsent) as kept:
                    sent = self._write([kept])
                del self._unsent[:sent]
            if not self._unsent:
                self._host.loop.remove_writer(self._socket.fileno())
                self._writable()

    # -- the helper -------------------------------------------------------------------------

    def _start(self) -> tuple[socket.socket, Helper]:
        ours, theirs = socket.socketpair()
        reading, writing = os.pipe()
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, reading)
            with theirs:
                try:
                    for sock in (ours, theirs):
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
                    argv = [self._program, *arguments(self._options, self.addresses, theirs.fileno())]
                    helper = Helper("passt", argv, pass_fds=[theirs.fileno()], stdout=writing)
                except BaseException:
                    ours.close()
                    raise
                finally:
                    os.close(writing)
            try:
                helper.wait_for(reading)
            except HostError as error:
                ours.close()
                helper.stop()
                raise HostError(_NOISE.sub("", str(error))) from error
        ours.setblocking(False)
        helper.watch(self._host.loop, self._died)
        return ours, helper

    def _died(self, helper: Helper) -> None:
        if helper is self._helper:
            self._gone()

    def _gone(self) -> None:
        """Report, and start another one if that is not the rule by now. Loop thread, without the lock."""
        if self._closed or self._lost:
            return
        self._disconnect()
        report = _NOISE.sub("", self._helper.obituary())
        now = time.monotonic()
        self._restarts = [*(at for at in self._restarts if now - at < RESTART_WINDOW_S), now]
        try:
            if len(self._restarts) > MAX_RESTARTS:
                raise HostError(f"{MAX_RESTARTS} times in {RESTART_WINDOW_S:g} s: not started again")
            self._socket, self._helper = self._start()
        except HostError as error:
            self._report(f"{report}; the network is down: {error}")
            with self._host.lock:
                self.on_down()
            return
        self._lost = False
        self._report(f"{report}; started again, open connections are lost")
        self._watch()
        with self._host.lock:
            self._writable()

    def _disconnect(self) -> None:
        self._lost = True
        self._host.loop.remove_writer(self._socket.fileno())
        self._filled = self._consumed = 0
        self._waiting = []
        self._unsent.clear()
        self._watch()
        self._socket.close()
        self._helper.stop()

    def close(self) -> None:
        """Stop passt. Loop thread, or after the loop's end; more calls do nothing."""
        if not self._closed:
            self._closed = True
            if not self._lost:
                self._disconnect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def arguments(options: PasstOptions, guest: GuestAddresses, fd: int) -> list[str]:
    """passt's command line. Its version of 2023-03 understands all of it."""
    # In the foreground as our child; its process number on standard output says that it is ready.
    argv = ["--foreground", "--quiet", "--stderr", "--fd", str(fd), "--pid", "/proc/self/fd/1", "--mtu", str(guest.mtu)]
    if os.geteuid() == 0:
        # As nobody it could not bind low ports, nor, in containers, become nobody at all.
        argv += ["--runas", "0"]
    if guest.v4:
        argv += ["-a", guest.v4.address, "-n", str(guest.v4.prefix), "-g", guest.v4.gateway]
        forward = v4_address(options, 3)
        if forward in guest.dns:
            # Only then: passt would make all answers of the host's resolver come from here, asked there or not.
            argv += ["--dns-forward", forward]
    else:
        argv.append("--ipv6-only")
    if guest.v6:
        argv += ["-a", guest.v6.address, "-g", guest.v6.gateway]
    else:
        argv.append("--ipv4-only")
    if not options.host_loopback:
        argv.append("--no-map-gw")
    for option, protocol in (("-t", "tcp"), ("-u", "udp")):
        specs = [_port_spec(each) for each in options.forwards if each.protocol == protocol]
        # Said when there is none, too: else UDP ports would follow the TCP ones.
        for spec in specs or ["none"]:
            argv += [option, spec]
    return argv


def _port_spec(forward: Forward) -> str:
    address = f"{forward.host_address}/" if forward.host_address else ""
    return f"{address}{forward.host_port}:{forward.guest_port}"


def addresses(options: PasstOptions) -> GuestAddresses:
    """The guest's side of the network. Raises HostError on a host without any."""
    prefix = V6_NETS.format(options.number % NETS)
    v4 = v6 = None
    if has_default_route(6, "/proc/net/route"):
        v4 = Address(v4_address(options, 2), 24, v4_address(options, 1))
    if has_default_route(9, "/proc/net/ipv6_route"):
        v6 = Address(f"{prefix}2", 64, f"{prefix}1")
    if v4 is None and v6 is None:
        raise HostError("passt: this host has no default route, expected one: use --net none")
    resolvers = tuple(each for each in host_resolvers() if (v6 if ":" in each else v4))
    return GuestAddresses(options.mac, v4, v6, resolvers or ((v4_address(options, 3),) if v4 else ()))


def v4_address(options: PasstOptions, host: int) -> str:
    """An address in the interface's own network."""
    return V4_NETS.format(FIRST_NET + options.number % NETS) + str(host)


def has_default_route(kind: int, table: str) -> bool:
    """Whether a routing table of procfs has a usable default route; `kind` is 6 for IPv4's and 9 for IPv6's columns."""
    try:
        lines = Path(table).read_text().splitlines()
    except OSError:
        return False
    if kind == 6:
        rows = (line.split() for line in lines[1:])
        return any(row[1] == row[7] == "00000000" and int(row[3], 16) & 1 for row in rows if len(row) > 7)
    rows = (line.split() for line in lines)
    return any(row[0] == "0" * 32 and row[1] == "00" and row[9] != "lo" for row in rows if len(row) > 9)


def host_resolvers(path: Path = RESOLVERS) -> list[str]:
    """The host's DNS servers that a guest can reach too: none on the host's own loopback, none on a link."""
    try:
        text = path.read_text()
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            with contextlib.suppress(ValueError):
                address = ip_address(words[1])
                if not address.is_loopback and not address.is_link_local and not address.is_unspecified:
                    found.append(str(address))
    return found


def check_port(forward: Forward) -> None:
    """Raises BadRequest that says why a port of the host cannot be had, which passt itself does not."""
    kind = socket.SOCK_DGRAM if forward.protocol == "udp" else socket.SOCK_STREAM
    family = socket.AF_INET6 if ":" in forward.host_address else socket.AF_INET
    with socket.socket(family, kind) as probe:
        if kind == socket.SOCK_STREAM:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((forward.host_address, forward.host_port))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise BadRequest(f"port {forward}: {reason}, expected a free port of this host") from error


def _nothing() -> None:
    """No device is attached yet."""
