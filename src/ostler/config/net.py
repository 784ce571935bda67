"""Network interfaces as a user asks for them: `--net KIND[,OPTION=VALUE…]` and `-p [ADDR:]HOST:GUEST[/udp]`.

none                                   no interface
passt                                  user-mode network, no privileges needed; the default
tap=NAME                               a TAP interface of the host
bridge=NAME                            a TAP interface of its own, on a bridge of the host

mac=52:54:00:12:34:56                  of any kind; else made from the guest's name, so that it stays the same
rate=10M  rx=10M  tx=10M               bytes per second that pass: both ways, to the guest, from the guest
loopback=on                            passt: the gateway's address reaches the host's own loopback services
"""

from __future__ import annotations

import hashlib
import re
from ipaddress import ip_address
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ostler.config.sizes import parse_size
from ostler.errors import BadRequest

MAX_INTERFACES = 16
MIN_RATE, MAX_RATE = 1024, 1 << 40
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.ASCII | re.IGNORECASE)
_NAME = re.compile(r"[^\s/:,]{1,15}", re.ASCII)


def _mac(value: str) -> str:
    if not _MAC.fullmatch(value):
        raise ValueError("expected six bytes in hex, such as 52:54:00:12:34:56")
    if int(value[:2], 16) & 1:
        raise ValueError("expected an address of one station, its first byte even")
    return value.lower()


def _address(value: str) -> str:
    return str(ip_address(value)) if value else ""


Port = Annotated[int, Field(ge=1, le=65535)]
Rate = Annotated[int, Field(ge=MIN_RATE, le=MAX_RATE)]


class ForwardSpec(BaseModel):
    """A port of the host that leads to one of the guest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host_port: Port
    guest_port: Port
    protocol: Literal["tcp", "udp"] = "tcp"
    host_address: Annotated[str, AfterValidator(_address)] = ""
    """All of the host's addresses if empty."""


class NetSpec(BaseModel):
    """One interface of a guest, or none at all (`kind` none)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["none", "passt", "tap", "bridge"] = "passt"
    name: str = ""
    """The host's interface, of tap and bridge."""
    mac: Annotated[str, AfterValidator(_mac)] | None = None
    rx_bytes_per_s: Rate | None = None
    tx_bytes_per_s: Rate | None = None
    host_loopback: bool = False
    forwards: tuple[ForwardSpec, ...] = ()

    def mac_bytes(self, guest: str, index: int) -> bytes:
        """The address: as asked for, else the same for the same guest and place among its interfaces."""
        if self.mac:
            return bytes.fromhex(self.mac.replace(":", ""))
        digest = hashlib.sha256(f"ostler mac {guest} {index}".encode()).digest()
        # Locally administered, one station.
        return bytes([digest[0] & 0xFC | 0x02]) + digest[1:6]


def parse_net(text: str) -> NetSpec:
    """The interface described by the value of `--net`. Raises BadRequest of one line."""
    head, *options = text.strip().split(",")
    kind, has_name, name = head.partition("=")
    if kind not in ("none", "passt", "tap", "bridge") or (kind in ("tap", "bridge")) != bool(has_name):
        raise BadRequest(f"net {text!r}: expected passt, tap=NAME, bridge=NAME or none")
    if has_name and not _NAME.fullmatch(name):
        raise BadRequest(f"net {text!r}: expected the name of an interface of the host after {kind}=")
    values: dict[str, object] = {"kind": kind, "name": name}
    for option in options:
        values |= _option(text, kind, option)
    return NetSpec.model_validate(values)


def _option(text: str, kind: str, option: str) -> dict[str, object]:
    key, _, value = option.partition("=")
    if kind == "none":
        raise BadRequest(f"net {text!r}: expected no options after none")
    if key == "mac":
        try:
            return {"mac": _mac(value)}
        except ValueError as error:
            raise BadRequest(f"net {text!r}: mac {value!r}: {error}") from error
    if key in ("rate", "rx", "tx"):
        rate = _rate(text, value)
        return {f"{way}_bytes_per_s": rate for way in ("rx", "tx") if key in (way, "rate")}
    if key == "loopback" and kind == "passt" and value in ("on", "off"):
        return {"host_loopback": value == "on"}
    also = ", loopback=on" if kind == "passt" else ""
    raise BadRequest(f"net {text!r}: option {option!r}: expected mac=…, rate=…, rx=…, tx=…{also}")


def _rate(text: str, value: str) -> int:
    try:
        rate = parse_size(value)
    except ValueError:
        rate = 0
    if not MIN_RATE <= rate <= MAX_RATE:
        raise BadRequest(f"net {text!r}: rate {value!r}: expected bytes per second such as 500K, 10M or 1G")
    return rate


def parse_forward(text: str) -> ForwardSpec:
    """The value of `-p`: `[ADDR:]HOST:GUEST[/udp]`, an IPv6 address in brackets. Raises BadRequest."""
    expected = "expected [ADDRESS:]HOST:GUEST[/tcp|/udp], such as 8080:80 or 127.0.0.1:5353:53/udp"
    body, slash, protocol = text.strip().partition("/")
    if slash and protocol not in ("tcp", "udp"):
        raise BadRequest(f"port {text!r}: {expected}")
    rest, _, guest = body.rpartition(":")
    address, separator, host = rest.rpartition(":")
    if address.startswith("[") and address.endswith("]"):
        address = address[1:-1]
    try:
        if bool(separator) != bool(address):
            raise ValueError(expected)
        ports = [_port(each) for each in (host, guest)]
        return ForwardSpec(
            host_port=ports[0], guest_port=ports[1], host_address=_address(address),
            protocol="udp" if protocol == "udp" else "tcp",
        )  # fmt: skip
    except ValueError as error:
        raise BadRequest(f"port {text!r}: {expected}") from error


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65535):
        raise ValueError("not a port")
    return int(text)


def with_forwards(nets: tuple[NetSpec, ...], forwards: tuple[ForwardSpec, ...]) -> tuple[NetSpec, ...]:
    """The interfaces, the first passt one with these ports. Raises BadRequest when there is none, or twice a port."""
    if not forwards:
        return nets
    wanted = [(each.protocol, each.host_address, each.host_port) for each in forwards]
    twice = next((each for each in wanted if wanted.count(each) > 1), None)
    if twice:
        raise BadRequest(f"port {twice[2]}/{twice[0]}: given twice, expected each port of the host once")
    at = next((at for at, each in enumerate(nets) if each.kind == "passt"), None)
    if at is None:
        raise BadRequest("ports are forwarded by passt alone: expected --net passt beside -p")
    chosen = nets[at].model_copy(update={"forwards": nets[at].forwards + forwards})
    return (*nets[:at], chosen, *nets[at + 1 :])
