"""What a guest takes over from an OCI image, and what goes wrong on the way, with tools that are scripts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from ostler.errors import BadRequest, ImageError
from ostler.images import oci, store

pytestmark = pytest.mark.usefixtures("fake_kernel")

CONFIG = {
    "architecture": "amd64",
    "config": {
        "Entrypoint": ["/entry"], "Cmd": ["serve"], "Env": ["A=b=c", "broken"], "User": "www", "WorkingDir": "/srv",
        "ExposedPorts": {"80/tcp": {}, "53/udp": {}, "9": {}, "nonsense": {}},
    },
}  # fmt: skip


def layout(folder: Path, config: Mapping[str, object] = CONFIG) -> Path:
    blobs = folder / "blobs/sha256"
    blobs.mkdir(parents=True)
    (blobs / "aa").write_text(json.dumps(config))
    (blobs / "bb").write_text(json.dumps({"config": {"digest": "sha256:aa"}, "layers": []}))
    (folder / "index.json").write_text(json.dumps({"manifests": [{"digest": "sha256:bb"}]}))
    return folder


def tools(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    programs = folder / "bin"
    programs.mkdir()
    for name, text in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")


def test_pull_takes_the_configuration_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = layout(tmp_path / "source")
    tools(
        tmp_path, monkeypatch,
        skopeo=f'for last; do :; done; target=${{last#oci:}}; cp -r {source} "${{target%:image}}"',
        umoci='for last; do :; done; mkdir -p "$last/rootfs/bin"; echo x > "$last/rootfs/bin/sh"',
    )  # fmt: skip

    image = oci.pull("host.example/name:tag", size_bytes=32 << 20)

    config = image.config
    assert (config.entrypoint, config.command) == (("/entry",), ("serve",))
    assert config.arguments(("other",)) == ("/entry", "other")
    assert (config.env, config.user, config.workdir) == ({"A": "b=c"}, "www", "/srv")
    assert config.ports == ("53/udp", "80/tcp", "9/tcp")
    assert config.origin == {"manifest": "sha256:bb", "config": "sha256:aa"}
    assert store.get("host.example/name:tag").digest == image.digest


def test_image_for_another_processor_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = layout(tmp_path / "source", {**CONFIG, "architecture": "arm64"})
    tools(
        tmp_path, monkeypatch, umoci="exit 1",
        skopeo=f'for last; do :; done; target=${{last#oci:}}; cp -r {source} "${{target%:image}}"',
    )  # fmt: skip

    with pytest.raises(ImageError, match="made for arm64, expected amd64"):
        oci.pull("host.example/name:tag")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ('level=fatal msg="a: dial tcp 127.0.0.1:1: connect: connection refused"', "connection refused"),
        ('level=fatal msg="x: http: server gave HTTP response to HTTPS client"', "no TLS; --insecure allows that"),
        ('level=fatal msg="reading manifest t in h/n: manifest unknown"', "manifest unknown"),
        ('level=fatal msg="Digest did not match, expected sha256:a, got sha256:b"', "Digest did not match"),
        ('level=fatal msg="write /x: no space left on device"', "[Nn]o space left on device"),
    ],
)
def test_pull_that_fails_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, expected: str
) -> None:
    tools(tmp_path, monkeypatch, umoci="exit 1", skopeo=f"echo 'time=\"now\" {said}' >&2; exit 1")

    with pytest.raises(ImageError, match=rf"^image host.example/name:tag: cannot be pulled: .*{expected}"):
        oci.pull("host.example/name:tag")

    assert store.stored() == []
    assert list((store.root() / "tmp").iterdir()) == []


def test_missing_tool_names_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools(tmp_path, monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    with pytest.raises(ImageError, match=r"skopeo: not on this host.*apt-get install skopeo"):
        oci.pull("host.example/name:tag")


@pytest.mark.parametrize("reference", ["", "--option", "UPPER", "a b", "a/b@sha256:12", "a;b"])
def test_what_is_no_reference_is_a_bad_request(reference: str) -> None:
    with pytest.raises(BadRequest, match="neither here nor a reference"):
        oci.pull(reference)


@pytest.mark.parametrize(
    ("value", "owner"),
    [
        (b"", (0, 0)),
        (b"\x08\x21\x10\x2a", (33, 42)),
        (b"\x10\xe8\x07", (0, 1000)),
        (b"\x08\xff\xff\xff\xff\x0f", (0, 0)),
    ],
)
def test_owner_of_rootless_unpacking(value: bytes, owner: tuple[int, int]) -> None:
    assert oci.decode_owner(value) == owner


@pytest.mark.parametrize("value", [b"\x08", b"\x09\x01", b"\x18\x01", b"\x08" + b"\xff" * 20])
def test_owner_that_makes_no_sense_is_refused(value: bytes) -> None:
    with pytest.raises(ValueError, match=r"varint|field"):
        oci.decode_owner(value)
