"""cloud-init seeds, read back by the reader that wrote no byte of them: the ISO's own structures."""

from __future__ import annotations

import io
from pathlib import Path

import pycdlib
import pytest

from ostler.errors import BadRequest
from ostler.images import seed

USER = b"#cloud-config\npassword: x\n"


def read(path: Path) -> dict[str, bytes]:
    image = pycdlib.PyCdlib()
    image.open(str(path))
    found = {}
    for child in image.list_children(joliet_path="/"):
        name = child.file_identifier().decode("utf-16-be")
        if child.is_file():
            out = io.BytesIO()
            image.get_file_from_iso_fp(out, joliet_path=f"/{name}")
            found[name] = out.getvalue()
    image.close()
    return found


def test_seed_has_cloud_inits_label_and_files(tmp_path: Path) -> None:
    network = {"version": 2}
    path = seed.build(tmp_path / "seed.iso", user_data=USER, meta_data={"instance-id": "i"}, network=network)

    assert path.read_bytes()[0x8028:0x8048].rstrip() == b"cidata"
    assert path.stat().st_size % 512 == 0
    assert {name: data.strip() for name, data in read(path).items()} == {
        "user-data": USER.strip(),
        "meta-data": b'{\n  "instance-id": "i"\n}',
        "network-config": b'{\n  "version": 2\n}',
    }


def test_seed_without_meta_data_is_another_instance_when_its_content_is_another(tmp_path: Path) -> None:
    names = [
        read(seed.build(tmp_path / str(index), user_data=data))["meta-data"]
        for index, data in enumerate((USER, USER + b"#\n", USER))
    ]

    assert names[0] == names[2] != names[1]


def test_seed_from_a_folder_and_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/user-data").write_bytes(USER)
    (tmp_path / "folder/meta-data").write_bytes(b"instance-id: mine\n")
    (tmp_path / "folder/other").write_bytes(b"other")

    assert read(seed.from_path(tmp_path / "folder", tmp_path / "one.iso")).keys() == {"user-data", "meta-data"}
    assert read(seed.from_path(tmp_path / "folder/user-data", tmp_path / "two.iso"))["user-data"] == USER


def test_seed_of_nothing_is_a_bad_request(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadRequest, match="expected a file user-data or meta-data"):
        seed.from_path(tmp_path / "empty", tmp_path / "seed.iso")
    with pytest.raises(BadRequest, match="No such file"):
        seed.from_path(tmp_path / "none", tmp_path / "seed.iso")
    with pytest.raises(BadRequest, match="expected #cloud-config"):
        seed.build(tmp_path / "seed.iso", user_data=b"password: x\n")
    with pytest.raises(BadRequest, match="larger than 16 MiB"):
        seed.build(tmp_path / "seed.iso", user_data=b"#!/bin/sh\n" + bytes(17 << 20))


def test_seed_of_the_same_content_is_made_once_and_nobody_else_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OSTLER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "user-data").write_bytes(USER)

    first = seed.obtain(tmp_path / "user-data")
    assert first == seed.obtain(tmp_path / "user-data")
    (tmp_path / "user-data").write_bytes(USER + b"#\n")

    assert seed.obtain(tmp_path / "user-data") != first
    assert first.stat().st_mode & 0o777 == 0o600
    assert read(first)["user-data"] == USER
