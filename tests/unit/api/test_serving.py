"""Real listeners: who is at the other end of a UNIX socket, and of TLS with a certificate."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ostler.api import serving
from ostler.api.app import create_app
from ostler.api.client import Client
from ostler.api.service import Service
from ostler.errors import BadRequest, HostError
from ostler.hostd.models import Role
from tests.unit.api.fakes import served


@contextlib.contextmanager
def listening(service: Service, listener: serving.Listener) -> Iterator[None]:
    """Served in a thread of its own."""
    loop, stop = asyncio.new_event_loop(), asyncio.Event()
    app = create_app(service)
    thread = threading.Thread(target=loop.run_until_complete, args=(serving.serve(app, [listener], stop),))
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()
        listener.socket.close()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate that signs itself is its own authority."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("service", "alice", "mallory"):
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days",
             "1", "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", folder / f"{name}.key",
             "-out", folder / f"{name}.pem"], check=True, capture_output=True,
        )  # fmt: skip
    everyone = b"".join((folder / f"{name}.pem").read_bytes() for name in ("alice", "mallory"))
    (folder / "clients.pem").write_bytes(everyone)
    return folder


def test_unix_socket_peer_is_who_the_kernel_says(tmp_path: Path) -> None:
    with served(tmp_path) as service:
        known = replace(service, peers={os.getuid(): Role.OPERATOR})
        path = tmp_path / "s"
        with listening(known, serving.listen_unix(path)), Client(f"unix:{path}") as client:
            assert client.get("/v1/me") == {"name": f"uid {os.getuid()}", "role": "operator", "by": "peer"}
            with pytest.raises(BadRequest, match="is operator, expected admin"):
                client.get("/v1/audit")
        assert path.stat().st_mode & 0o777 == 0o600


def test_listen_unix_socket_in_use_is_left_alone(tmp_path: Path) -> None:
    with serving.listen_unix(tmp_path / "s").socket:
        with pytest.raises(HostError, match="another service listens there"):
            serving.listen_unix(tmp_path / "s")
        assert (tmp_path / "s").exists()
    # Nobody is left behind it: it can be had.
    serving.listen_unix(tmp_path / "s").socket.close()


def test_tls_certificate_has_the_role_it_is_given(tmp_path: Path, keys: Path) -> None:
    tls = serving.Tls(keys / "service.pem", keys / "service.key", keys / "clients.pem")
    with served(tmp_path) as service:
        known = replace(service, certificates={"alice": Role.VIEWER})
        listener = serving.listen_tcp("127.0.0.1:0", tls)
        with listening(known, listener):
            assert listener.shown.startswith("https://127.0.0.1:")

            def client(name: str | None) -> Client:
                pair = (keys / f"{name}.pem", keys / f"{name}.key") if name else None
                return Client(listener.shown, ca=keys / "service.pem", certificate=pair)

            with client("alice") as alice:
                assert alice.get("/v1/me")["name"] == "certificate alice"
            with client("mallory") as mallory, pytest.raises(BadRequest, match="has no role here"):
                mallory.get("/v1/me")
            with client(None) as nobody, pytest.raises(BadRequest, match="credentials: missing"):
                nobody.get("/v1/me")
