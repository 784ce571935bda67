"""Listeners: a UNIX socket whose peers are known by the kernel, and TCP with TLS or tokens; one loop serves them all.

uvicorn does the HTTP. What it does not tell an application is who is at the other end of a socket: the protocol classes
here add the peer's user, or the name in its certificate, to the state that every request of the connection begins with.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
import ssl
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ostler.errors import BadRequest, HostError

_CREDENTIALS = struct.Struct("3i")  # struct ucred: process, user, group
MAX_CONNECTIONS_QUEUED = 256
DRAIN_S = 3


class PeerProtocol(HttpToolsProtocol):
    """HTTP with the peer in the state."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, **peer_of(transport)}


def peer_of(transport: asyncio.BaseTransport) -> dict[str, Any]:
    """Who is at the other end: `peer_uid` of a UNIX socket, `certificate`'s common name with TLS."""
    raw = transport.get_extra_info("socket")
    if raw is not None and raw.family == socket.AF_UNIX:
        packed = raw.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return {"peer_uid": _CREDENTIALS.unpack(packed)[1]}
    tls = transport.get_extra_info("ssl_object")
    certificate = tls.getpeercert() if tls is not None else None
    names = [value for part in (certificate or {}).get("subject", ()) for key, value in part if key == "commonName"]
    return {"certificate": names[0]} if len(names) == 1 else {}


@dataclass(frozen=True, slots=True)
class Tls:
    """Files for TLS; with `ca`, a client's certificate is asked for."""

    cert: Path
    key: Path
    ca: Path | None


@dataclass(frozen=True, slots=True)
class Listener:
    """One bound socket, and how it is served."""

    socket: socket.socket
    tls: Tls | None
    shown: str


def listen_unix(path: Path) -> Listener:
    """Bind in a folder of this user's. Raises HostError."""
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    if _is_served(path):
        bound.close()
        raise HostError(f"socket {path}: another service listens there; expected one of this service's own (--socket)")
    try:
        # Whoever bound it before has gone.
        path.unlink(missing_ok=True)
        bound.bind(str(path))
        path.chmod(0o600)
        bound.listen(MAX_CONNECTIONS_QUEUED)
    except OSError as error:
        bound.close()
        raise HostError(f"socket {path}: {error.strerror or error}") from error
    return Listener(bound, None, f"unix:{path}")


def _is_served(path: Path) -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asked:
        asked.connect(str(path))
        return True
    return False


def listen_tcp(text: str, tls: Tls | None) -> Listener:
    """Bind ADDRESS:PORT. Raises BadRequest for one that others could listen in on, HostError."""
    address, colon, port = text.rpartition(":")
    address = address.strip("[]")
    if not colon or not port.isdigit() or not 0 <= int(port) <= 65535:
        raise BadRequest(f"listen {text!r}: expected ADDRESS:PORT")
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError as error:
        raise BadRequest(f"listen {text!r}: expected an IP address and a port") from error
    if tls is None and not parsed.is_loopback:
        raise BadRequest(
            f"listen {text!r}: tokens would go over the network readable; expected TLS, or a loopback address"
        )
    family = socket.AF_INET6 if parsed.version == 6 else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((address, int(port)))
        bound.listen(MAX_CONNECTIONS_QUEUED)
    except OSError as error:
        bound.close()
        raise HostError(f"listen {text!r}: {error.strerror or error}") from error
    scheme, name = "https" if tls is not None else "http", f"[{address}]" if parsed.version == 6 else address
    return Listener(bound, tls, f"{scheme}://{name}:{bound.getsockname()[1]}")


class _Server(uvicorn.Server):
    """One that leaves signals to whoever runs it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _config(app: ASGIApp, listener: Listener) -> uvicorn.Config:
    options: dict[str, Any] = {}
    if listener.tls is not None:
        ca = listener.tls.ca
        options = {"ssl_certfile": str(listener.tls.cert), "ssl_keyfile": str(listener.tls.key)}
        if ca is not None:
            # Optional, so that a browser with a token can come the same way.
            options |= {"ssl_ca_certs": str(ca), "ssl_cert_reqs": ssl.CERT_OPTIONAL}
    return uvicorn.Config(
        app, http=PeerProtocol, ws="websockets-sansio", lifespan="off", log_config=None, access_log=False,
        server_header=False, timeout_graceful_shutdown=DRAIN_S, ws_max_size=1 << 20,
        **options,
    )  # fmt: skip


async def serve(app: ASGIApp, listeners: list[Listener], stop: asyncio.Event) -> None:
    """Serve until `stop`. Raises HostError for TLS files that are none."""
    servers = []
    for listener in listeners:
        config = _config(app, listener)
        try:
            config.load()
        except (OSError, ssl.SSLError) as error:
            raise HostError(f"TLS: {error}; expected a certificate, its key and who signed clients', PEM") from error
        servers.append(_Server(config))
    tasks = [
        asyncio.create_task(server.serve(sockets=[listener.socket]))
        for server, listener in zip(servers, listeners, strict=True)
    ]
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([stopped, *tasks], return_when=asyncio.FIRST_COMPLETED)
    for server in servers:
        server.should_exit = True
    stopped.cancel()
    await asyncio.gather(*tasks)


def forget_socket(path: Path) -> None:
    """Leave none behind."""
    with contextlib.suppress(OSError):
        os.unlink(path)  # noqa: PTH108 - a socket, whatever it is by now
