"""Where a guest goes, as users write it: `tcp://HOST:PORT` or `unix:PATH`; and the keys both sides show each other."""

from __future__ import annotations

import ipaddress
import re
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from ostler.errors import BadRequest

_TCP = re.compile(r"tcp://(?:\[([0-9A-Fa-f:.%a-z]+)\]|([^\[\]:/]+)):([0-9]{1,5})/?")
EXPECTED = "expected tcp://HOST:PORT or unix:PATH"


@dataclass(frozen=True, slots=True)
class Address:
    """An address of either kind."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self.host}:{self.port}"

    @property
    def is_private(self) -> bool:
        """Whether nobody on a network can listen: a socket file, or this host's loopback."""
        if self.path or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse_address(text: str) -> Address:
    """Raises BadRequest."""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:").removeprefix("//")
        if not path or "\0" in path:
            raise BadRequest(f"address {text!r}: {EXPECTED}")
        return Address(path=str(Path(path).absolute()))
    match = _TCP.fullmatch(text)
    if match is None or int(match[3]) > 65535:
        raise BadRequest(f"address {text!r}: {EXPECTED}")
    return Address(host=match[1] or match[2], port=int(match[3]))


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: this side's certificate and key, and the authority that signed the other side's."""

    cert: Path
    key: Path
    ca: Path

    def context(self, *, server: bool) -> ssl.SSLContext:
        """Mutual TLS 1.3. Raises BadRequest for files that are none of that."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        for path in (self.cert, self.key, self.ca):
            if not path.is_file():
                raise BadRequest(f"TLS: {path}: no such file")
        try:
            context.load_cert_chain(self.cert, self.key, password=lambda: "")
            context.load_verify_locations(self.ca)
        except (ssl.SSLError, OSError, ValueError) as error:
            what = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            raise BadRequest(f"TLS: {self.cert}, {self.key} and {self.ca}: {what}; expected PEM files") from error
        return context


def tls_files(cert: Path | None, key: Path | None, ca: Path | None) -> TlsFiles | None:
    """All three or none. Raises BadRequest."""
    given = [each for each in (cert, key, ca) if each is not None]
    if not given:
        return None
    if cert is None or key is None or ca is None:
        raise BadRequest("TLS: expected --tls-cert, --tls-key and --tls-ca together")
    return TlsFiles(cert.absolute(), key.absolute(), ca.absolute())


def check_privacy(address: Address, tls: TlsFiles | None, *, insecure: bool) -> None:
    """A guest's memory does not go over a network in the clear by accident. Raises BadRequest."""
    if tls is None and not insecure and not address.is_private:
        raise BadRequest(f"{address}: expected --tls-cert, --tls-key and --tls-ca, or --insecure for a trusted network")


def connect(address: Address, timeout_s: float) -> socket.socket:
    """Raises OSError."""
    if address.path:
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connected.settimeout(timeout_s)
            connected.connect(address.path)
        except OSError:
            connected.close()
            raise
        return connected
    return socket.create_connection((address.host, address.port), timeout=timeout_s)


def listen(address: Address) -> socket.socket:
    """Raises OSError."""
    if address.path:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listener.bind(address.path)
            Path(address.path).chmod(0o600)
            listener.listen(16)
        except OSError:
            listener.close()
            raise
        return listener
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    return socket.create_server((address.host, address.port), family=family, backlog=16)
