"""Addresses, certificates, streams; and a listener that strangers talk to."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ostler.client.receive import Receiver
from ostler.errors import BadRequest, MigrationError
from ostler.migration import wire
from ostler.migration.address import Address, TlsFiles, check_privacy, listen, parse_address, tls_files
from ostler.migration.link import Link, LinkLost, accept_link, open_link, read_preamble
from ostler.migration.wire import Kind

SESSION = bytes(range(16))


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("tcp://host:7777", Address("host", 7777)),
        ("tcp://[::1]:1", Address("::1", 1)),
        ("tcp://192.0.2.1:65535", Address("192.0.2.1", 65535)),
        ("unix:/run/in", Address(path="/run/in")),
    ],
)
def test_address_is_read_and_written_alike(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    "text",
    ["", "host:1", "tcp://host", "tcp://host:65536", "tcp://:1", "unix:", "http://host:1", "tcp://a b:x", "unix:\0"],
)
def test_address_that_is_none_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(BadRequest, match="expected tcp://HOST:PORT or unix:PATH"):
        parse_address(text)


def test_network_without_tls_needs_to_be_asked_for() -> None:
    for private in ("tcp://127.0.0.1:1", "tcp://[::1]:1", "tcp://localhost:1", "unix:/x"):
        check_privacy(parse_address(private), None, insecure=False)
    check_privacy(parse_address("tcp://other:1"), None, insecure=True)
    with pytest.raises(BadRequest, match="--insecure"):
        check_privacy(parse_address("tcp://other:1"), None, insecure=False)


def test_tls_files_are_wanted_all_or_none(tmp_path: Path) -> None:
    assert tls_files(None, None, None) is None
    with pytest.raises(BadRequest, match="together"):
        tls_files(tmp_path, None, None)
    nothing = tmp_path / "nothing"
    with pytest.raises(BadRequest, match="no such file"):
        TlsFiles(nothing, nothing, nothing).context(server=True)
    nothing.write_text("no certificate")
    with pytest.raises(BadRequest, match="expected PEM files"):
        TlsFiles(nothing, nothing, nothing).context(server=False)


def signed(folder: Path, name: str, authority: Path | None, *, address: str = "IP:127.0.0.1") -> tuple[Path, Path]:
    """A certificate and its key; without an authority, one."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    by: list[str | Path] = []
    if authority:
        by += ["-CA", authority, "-CAkey", authority.with_suffix(".key"), "-addext", f"subjectAltName={address}"]
        by += ["-addext", "basicConstraints=critical,CA:FALSE"]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1",
         "-subj", f"/CN={name}", "-keyout", key, "-out", cert, *by],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TlsFiles]:
    folder = tmp_path_factory.mktemp("keys")
    ours, _ = signed(folder, "ca", None)
    other, _ = signed(folder, "other-ca", None)
    return {
        "right": TlsFiles(*signed(folder, "right", ours), ours),
        "stranger": TlsFiles(*signed(folder, "stranger", other), ours),
        "elsewhere": TlsFiles(*signed(folder, "elsewhere", ours, address="IP:192.0.2.1"), ours),
    }


@contextlib.contextmanager
def answering(tls: TlsFiles | None) -> Iterator[tuple[Address, list[Any]]]:
    """One connection is taken; a frame of it is sent back."""
    found: list[Any] = []
    with listen(Address("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connected, _ = listener.accept()
            try:
                found.append(read_preamble(connected))
                with accept_link(connected, tls) as link:
                    frame = link.receive()
                    found.append(bytes(frame.payload))
                    link.send(wire.pack(frame.kind, bytes(frame.payload)))
            except MigrationError as error:
                found.append(error)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield Address("127.0.0.1", listener.getsockname()[1]), found
        finally:
            thread.join()


@pytest.mark.parametrize("name", [None, "right"])
def test_frame_goes_there_and_back(name: str | None, keys: dict[str, TlsFiles]) -> None:
    tls = keys[name] if name else None
    parts: list[bytes | memoryview] = [wire.header(Kind.STATE, 300_000), memoryview(b"a" * 100_000), b"b" * 200_000]
    with answering(tls) as (address, found), open_link(address, tls, SESSION, 3) as link:
        link.send_parts(parts)
        back = link.receive()
        assert bytes(back.payload) == b"a" * 100_000 + b"b" * 200_000
    assert found[0] == wire.Preamble(SESSION, 3, wire.Purpose.MIGRATE)


@pytest.mark.parametrize(("source", "target"), [("stranger", "right"), ("right", "stranger"), ("right", "elsewhere")])
def test_certificate_that_does_not_hold_ends_it(source: str, target: str, keys: dict[str, TlsFiles]) -> None:
    def talk(address: Address) -> None:
        # TLS 1.3 tells the client of its own certificate with the first answer.
        with open_link(address, keys[source], SESSION, 0) as link:
            link.send(wire.pack(Kind.READY))
            link.receive()

    with answering(keys[target]) as (address, found), pytest.raises(MigrationError) as caught:
        talk(address)
    assert "\n" not in str(caught.value)
    assert not any(isinstance(each, bytes) for each in found)


def test_end_of_a_stream_is_a_lost_link() -> None:
    ours, theirs = socket.socketpair()
    with Link(ours) as link, theirs:
        theirs.sendall(wire.pack(Kind.STATE, b"whole") + b"\x08")
        assert bytes(link.receive().payload) == b"whole"
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(LinkLost):
            link.receive()


def test_stream_that_stands_still_is_a_lost_link() -> None:
    ours, theirs = socket.socketpair()
    with Link(ours, timeout_s=0.05) as link, theirs, pytest.raises(LinkLost, match="stood still"):
        link.receive()


def test_listener_outlives_strangers(tmp_path: Path) -> None:
    said: list[tuple[str, dict[str, Any]]] = []
    heard = threading.Event()

    def report(state: str, facts: dict[str, Any]) -> None:
        said.append((state, facts))
        heard.set()

    with Receiver(parse_address(f"unix:{tmp_path}/in"), report) as receiver:
        thread = threading.Thread(target=receiver.serve)
        thread.start()
        for data in (b"GET / HTTP/1.0\r\n" + b" " * 32, wire.pack_preamble(SESSION, 3, wire.Purpose.MIGRATE)):
            heard.clear()
            with socket.socket(socket.AF_UNIX) as stranger:
                stranger.connect(f"{tmp_path}/in")
                stranger.sendall(data)
                assert heard.wait(10)
        receiver.stop()
        thread.join()
    assert [state for state, _ in said] == ["refused", "refused"]
    assert not (tmp_path / "in").exists()
