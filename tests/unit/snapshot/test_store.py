"""Snapshots on disk: whole or not there, damage found, nothing left behind."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from ostler.errors import BadRequest, HostError, OstlerError, StateError
from ostler.snapshot import manifest as manifests
from ostler.snapshot import store
from ostler.snapshot.manifest import CHUNK_BYTES, MANIFEST, MEMORY, Manifest

MUTATIONS = 200


@pytest.fixture(autouse=True)
def _data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSTLER_DATA", str(tmp_path))


def put(name: str, **values: Any) -> Manifest:
    with store.workspace(name) as folder:
        with (folder / MEMORY).open("wb") as file:
            file.truncate(4 * CHUNK_BYTES)
            file.seek(CHUNK_BYTES + 5)
            file.write(b"content")
        made = Manifest(
            name=name, id="0" * 16, ostler="1", created=1.0, guest="web", model="ostler-v2.1", spec={},
            memory_bytes=4 * CHUNK_BYTES, image_bytes=4 * CHUNK_BYTES,
            **{"files": {MEMORY: store.describe(folder, MEMORY)}, **values},
        )  # fmt: skip
        manifests.save(made, folder)
    return made


def test_snapshot_written_is_found_verified_and_removed(tmp_path: Path) -> None:
    made = put("one")
    found = store.find("one")
    assert found.manifest == made
    assert [*made.files[MEMORY].chunks] == ["1"]
    store.verify(found, everything=True)
    assert store.names() == ["one"]
    store.remove("one")
    assert store.names() == []
    assert [*(tmp_path / "snapshots").iterdir()] == []


def test_workspace_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fill_the_disk() -> None:
        with store.workspace("one") as folder:
            (folder / MEMORY).write_bytes(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(HostError, match="No space"):
        fill_the_disk()
    assert [*(tmp_path / "snapshots").iterdir()] == []


def test_workspace_of_a_killed_writer_is_removed_by_the_next(tmp_path: Path) -> None:
    put("one")
    (tmp_path / "snapshots" / ".new-dead").mkdir()
    put("two")
    assert sorted(each.name for each in (tmp_path / "snapshots").iterdir()) == ["one", "two"]


def test_name_that_is_taken_is_refused_unless_replaced() -> None:
    put("one")
    with pytest.raises(BadRequest, match="there is one of that name"):
        put("one")
    with store.workspace("one", replace=True) as folder:
        (folder / "other").touch()
    assert [each.name for each in (store.root() / "one").iterdir()] == ["other"]


def test_parent_is_kept_while_it_is_needed() -> None:
    put("parent")
    put("child", parent=f"parent:{'0' * 16}")
    with pytest.raises(BadRequest, match="child go on from it"):
        store.remove("parent")
    parent = store.parent_of(store.find("child"))
    assert parent is not None
    assert parent.name == "parent"


def test_parent_that_is_another_one_is_refused() -> None:
    put("parent")
    put("child", parent=f"parent:{'1' * 16}")
    with pytest.raises(StateError, match="its parent 'parent' is another one now"):
        store.parent_of(store.find("child"))


@pytest.mark.parametrize("at", [0, CHUNK_BYTES + 5, 4 * CHUNK_BYTES - 1])
def test_damaged_memory_is_found_wherever_it_is(at: int) -> None:
    put("one")
    found = store.find("one")
    with (found.folder / MEMORY).open("r+b") as file:
        file.seek(at)
        file.write(b"!")
    with pytest.raises(StateError, match="memory is damaged"):
        store.verify(found)


def test_memory_copied_elsewhere_without_holes_is_still_right() -> None:
    put("one")
    found = store.find("one")
    content = (found.folder / MEMORY).read_bytes()
    (found.folder / MEMORY).unlink()
    (found.folder / MEMORY).write_bytes(content)
    store.verify(found)


def test_file_cut_short_is_refused() -> None:
    put("one")
    found = store.find("one")
    os.truncate(found.folder / MEMORY, 5)
    with pytest.raises(StateError, match="memory: 5 bytes, expected"):
        store.verify(found)


def test_file_outside_of_the_folder_is_refused() -> None:
    for name in ("/etc/passwd", "../other", ".", ".hidden"):
        with pytest.raises(StateError, match="expected one of its own"):
            manifests.place(Path("/somewhere"), name)


def test_unknown_snapshot_says_which_there_are() -> None:
    put("one")
    with pytest.raises(BadRequest, match="snapshot 'two': not known; there are one"):
        store.find("two")


def test_damaged_manifests_are_refused_in_one_line() -> None:
    put("one")
    path, chosen = store.root() / "one" / MANIFEST, random.Random(8)
    whole = path.read_bytes()
    for _ in range(MUTATIONS):
        data = bytearray(whole)
        for _ in range(chosen.randint(1, 4)):
            at = chosen.randrange(len(data))
            data[at : at + chosen.choice((0, 1, 3))] = chosen.choice((b"9", b'"', b"{", b"[]", b"", b"-", b"\xff"))
        path.write_bytes(bytes(data))
        try:
            found = store.find("one")
            store.parent_of(found)
            store.verify(found)
        except OstlerError as error:
            assert "\n" not in str(error)  # noqa: PT017
    path.write_text(json.dumps([]))
    with pytest.raises(StateError, match="manifest"):
        store.find("one")
