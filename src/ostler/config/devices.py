"""Disks, networks, forwarded ports, shared folders: each as a table in a file, or as one text of the command line.

disk    FILE[,ro][,format=raw|qcow2|auto][,overlay][,serial=TEXT][,rate=SIZE]
net     passt | tap=NAME | bridge=NAME | none   [,mac=…][,mtu=N][,rate=SIZE][,ip=ADDRESS/BITS][,gateway=ADDRESS]
port    [ADDRESS:]HOST:GUEST[/udp]
share   HOST:GUEST[:ro]
"""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator

from ostler.config.sizes import parse_size
from ostler.config.text import one_line, split_options

_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.IGNORECASE | re.ASCII)
_INTERFACE = re.compile(r"[A-Za-z0-9_.-]{1,15}", re.ASCII)
_PORT_TEXT = re.compile(
    r"(?:(?P<address>\[[^\]]+\]|[^:\[\]]+):)?(?P<host>\d{1,5}):(?P<guest>\d{1,5})(?:/(?P<kind>tcp|udp))?"
)
MIN_MTU, MAX_MTU = 68, 65535


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def absolute(value: Path, info: ValidationInfo) -> Path:
    """Relative paths are so to the file they were read from, else to the working directory of whoever asks: the VM
    process has another."""
    folder = (info.context or {}).get("folder", Path())
    return Path(os.path.abspath(folder / value.expanduser()))  # noqa: PTH100 - links stay as they were written


def _size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


def _mac(value: str) -> str:
    if not _MAC.fullmatch(value) or int(value[:2], 16) & 1:
        raise ValueError("expected a unicast MAC address such as 52:54:00:12:34:56")
    return value.lower()


def _interface(value: str) -> str:
    if not _INTERFACE.fullmatch(value):
        raise ValueError("expected the name of a network interface")
    return value


def _network(value: str) -> str:
    try:
        return str(ipaddress.ip_interface(value))
    except ValueError as error:
        raise ValueError("expected an address with its prefix, such as 192.168.0.2/24") from error


def _address(value: str) -> str:
    try:
        return str(ipaddress.ip_address(value.strip("[]")))
    except ValueError as error:
        raise ValueError("expected an IP address") from error


Address = Annotated[str, AfterValidator(_address)]
Rate = Annotated[int, BeforeValidator(_size), Field(gt=0)]


class DiskSpec(_Part):
    """A disk: a raw or qcow2 file, or a block device."""

    path: Annotated[Path, AfterValidator(absolute)]
    format: Literal["auto", "raw", "qcow2"] = "auto"
    read_only: bool = False
    overlay: bool = False
    """What the guest writes is thrown away at its end."""
    serial: Annotated[str, AfterValidator(one_line), Field(max_length=20)] | None = None
    rate: Rate | None = None
    """Bytes a second that it reads and writes together, at most."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str | Path):
            return value
        path, options = split_options(str(value), flags=("ro", "overlay"), keys=("format", "serial", "rate"))
        if not path:
            raise ValueError("expected FILE[,ro][,overlay][,format=raw|qcow2][,serial=TEXT][,rate=SIZE]")
        if "ro" in options:
            options["read_only"] = options.pop("ro")
        return {"path": path, **options}


class NetSpec(_Part):
    """A network interface of the guest."""

    kind: Literal["passt", "tap", "bridge"] = "passt"
    interface: Annotated[str, AfterValidator(_interface)] | None = None
    """The host's TAP device, or its bridge."""
    mac: Annotated[str, AfterValidator(_mac)] | None = None
    mtu: Annotated[int, Field(ge=MIN_MTU, le=MAX_MTU)] | None = None
    rate: Rate | None = None
    """Bytes per second, each way."""
    ip: Annotated[str, AfterValidator(_network)] | None = None
    """A static address with its prefix; without one the guest asks by DHCP."""
    gateway: Address | None = None
    optional: bool = False
    """Go without, and say so, where the host cannot give it."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        first, options = split_options(value, flags=(), keys=("mac", "mtu", "rate", "ip", "gateway"))
        kind, equals, interface = first.partition("=")
        if kind == "passt" and not equals:
            return {"kind": kind, **options}
        if kind in {"tap", "bridge"} and interface:
            return {"kind": kind, "interface": interface, **options}
        raise ValueError("expected passt, tap=NAME, bridge=NAME or none")

    @model_validator(mode="after")
    def _whole(self) -> NetSpec:
        if (self.kind == "passt") != (self.interface is None):
            raise ValueError("expected the name of an interface with tap and bridge, and only with them")
        return self


class PortSpec(_Part):
    """A port of the host that leads to one of the guest."""

    host_address: Address | None = None
    """None: any of the host's addresses."""
    host: Annotated[int, Field(ge=1, le=65535)]
    guest: Annotated[int, Field(ge=1, le=65535)]
    protocol: Literal["tcp", "udp"] = "tcp"

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        found = _PORT_TEXT.fullmatch(value.strip())
        ports = (int(found["host"]), int(found["guest"])) if found else (0, 0)
        if found is None or not all(1 <= port <= 65535 for port in ports):
            raise ValueError("expected [ADDRESS:]HOST:GUEST[/udp], ports from 1 to 65535")
        return {
            "host_address": found["address"], "host": ports[0], "guest": ports[1], "protocol": found["kind"] or "tcp",
        }  # fmt: skip

    def __str__(self) -> str:
        """As the command line has it."""
        address = f"[{self.host_address}]:" if self.host_address and ":" in self.host_address else self.host_address
        prefix = address if address is None or address.endswith(":") else f"{address}:"
        return f"{prefix or ''}{self.host}:{self.guest}{'/udp' if self.protocol == 'udp' else ''}"


class ShareSpec(_Part):
    """A folder of the host that the guest sees too."""

    host: Annotated[Path, AfterValidator(absolute)]
    guest: Annotated[str, AfterValidator(one_line)]
    read_only: bool = False

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        parts = value.split(":")
        if len(parts) not in {2, 3} or not parts[0] or (len(parts) == 3 and parts[2] not in {"ro", "rw"}):
            raise ValueError("expected HOST:GUEST[:ro]")
        return {"host": parts[0], "guest": parts[1], "read_only": parts[2:] == ["ro"]}

    @model_validator(mode="after")
    def _rooted(self) -> ShareSpec:
        if not self.guest.startswith("/"):
            raise ValueError("expected an absolute path in the guest")
        return self
