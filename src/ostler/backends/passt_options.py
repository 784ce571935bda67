"""What passt is asked for, what the guest is to know of it, and what must be true of the host: no processes here."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from ostler.errors import BadRequest, HostError

MTU = 65520
# Of each interface a network of its own, by number; in them the guest is 2, the gateway 1. A guest that asks 3 reaches
# the host's resolver, where that listens on the host's loopback alone.
V4_NETS, V6_NETS = "10.213.{}.", "fd6f:7374:6c65:72{:02x}::"
FIRST_NET, NETS = 77, 128
RESOLVERS = Path("/etc/resolv.conf")


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
