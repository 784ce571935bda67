"""The store: images are whole or not there, named by their content, never run when damaged, never removed in use."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ostler.backends.disk_overlay import open_overlay
from ostler.errors import BadRequest, ImageError, NoSuchImage
from ostler.images import cache, debian, ensure, making, oci, rootdisk, store, trees

pytestmark = pytest.mark.usefixtures("fake_kernel")
SIZE = 32 << 20


def make_tree(folder: Path, text: str = "hello") -> trees.Tree:
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/sh").write_text(text)
    (folder / "etc").mkdir()
    (folder / "etc/os-release").write_text('ID=test\nVERSION_ID="7"\nPRETTY_NAME="Test 7"\n')
    return trees.Tree(folder)


def make(tmp_path: Path, name: str = "one", *, source: str = "tree") -> store.Image:
    place = tmp_path / f"tree-{len(list(tmp_path.iterdir()))}"
    defaults = making.Defaults(reference=name, source=source, command=("sh",), env={"A": "1"}, ports=("80/tcp",))  # type: ignore[arg-type]
    return making.add_tree(make_tree(place), defaults, names=(name,), size_bytes=SIZE)


def damage(image: store.Image) -> None:
    image.disk.chmod(0o644)
    with image.disk.open("r+b") as file:
        file.seek(5000)
        file.write(b"damage")


def test_image_is_whole_and_found_by_name_and_digest(tmp_path: Path) -> None:
    made = make(tmp_path)

    found = store.get("one")

    assert found == made
    assert store.get(made.digest[:12]).digest == made.digest
    assert found.kernel.read_bytes() == b"kernel" * 1000
    assert (found.modules / "modules.dep").exists()
    assert found.config.os.pretty_name == "Test 7"
    assert found.config.arguments() == ("sh",)
    assert found.config.disk.size_bytes == found.disk.stat().st_size == SIZE
    assert not os.stat(found.disk).st_mode & 0o222  # noqa: PTH116 - the mode as it is on disk
    assert list((store.root() / "tmp").iterdir()) == []
    store.verify(found)


def test_image_that_is_not_there(tmp_path: Path) -> None:
    make(tmp_path)

    assert store.find("two") is None
    with pytest.raises(NoSuchImage, match="'two': not there"):
        store.get("two")


def test_damaged_disk_is_refused_in_one_line_and_can_be_removed(tmp_path: Path) -> None:
    image = make(tmp_path)
    damage(image)

    with pytest.raises(ImageError, match=r"^image one: damaged, disk.raw is not what it was"):
        store.get("one")
    with pytest.raises(ImageError, match=r"ostler image rm one` removes it"):
        ensure.ensure("one")

    assert store.remove("one") == ["one", image.digest]
    assert store.find("one") is None


@pytest.mark.parametrize("file", ["image.json", "files.json"])
def test_damaged_description_is_refused(tmp_path: Path, file: str) -> None:
    image = make(tmp_path)
    text = (image.path / file).read_text()

    (image.path / file).write_text(text.replace("6.0-x", "6.0-y").replace("a", "b"))
    with pytest.raises(ImageError, match=r"image one: damaged, image.json or files.json"):
        store.get("one")
    (image.path / file).write_text("{")
    with pytest.raises(ImageError, match=r"image one: damaged, image.json or files.json cannot be read"):
        store.get("one")


def test_verify_finds_a_damaged_module(tmp_path: Path) -> None:
    image = make(tmp_path)
    module = image.modules / "modules.dep"
    module.unlink()  # it may be linked with the cache's
    module.write_text("other")

    with pytest.raises(ImageError, match="damaged, modules is not"):
        store.verify(store.get("one"))


def test_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rootdisk, "build", full)
    with pytest.raises(ImageError, match=r"^images .*: No space left on device$"):
        make(tmp_path)

    assert store.stored() == []
    assert list((store.root() / "tmp").iterdir()) == []


def test_workspace_of_a_killed_process_is_swept_and_one_in_use_stays() -> None:
    dead = store.root() / "tmp" / "dead" / "locked"
    dead.mkdir(parents=True)
    dead.chmod(0)
    with making.workspace() as living:
        (living / "file").touch()
        with making.workspace():
            assert not dead.parent.exists()
            assert (living / "file").exists()
    assert list((store.root() / "tmp").iterdir()) == []


def test_image_in_use_is_not_removed(tmp_path: Path) -> None:
    image = make(tmp_path)
    with open_overlay(image.disk):
        with pytest.raises(ImageError, match=r"^image one: a guest uses it, this process$"):
            store.remove("one")
        assert store.get("one").digest == image.digest

    store.remove("one")
    assert store.stored() == []


def test_image_stays_until_its_last_name_goes(tmp_path: Path) -> None:
    image = make(tmp_path)
    store.tag("two", image.digest)

    assert store.remove("one") == ["one"]
    assert store.get("two").digest == image.digest
    assert store.remove(image.digest[:16]) == ["two", image.digest]


def test_prune_removes_what_has_no_name(tmp_path: Path) -> None:
    old = make(tmp_path)
    new = make(tmp_path)  # takes the name over

    removed, freed_bytes = store.prune()

    assert removed == [old.digest]
    assert freed_bytes > 0
    assert store.stored() == [new.digest]


def test_names_with_slashes_and_colons(tmp_path: Path) -> None:
    make(tmp_path, "localhost:5000/a/b:1.0")

    assert store.get("localhost:5000/a/b:1.0").name == "localhost:5000/a/b:1.0"
    assert list(store.names()) == ["localhost:5000/a/b:1.0"]


def test_ensure_builds_debian_pulls_the_rest_and_takes_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def build(reference: str, **_more: object) -> store.Image:
        calls.append(f"build {reference}")
        return make(tmp_path, reference, source="debian")

    def pull(reference: str, **_more: object) -> store.Image:
        calls.append(f"pull {reference}")
        return make(tmp_path, reference, source="oci")

    monkeypatch.setattr(debian, "build", build)
    monkeypatch.setattr(oci, "pull", pull)

    for name in ("debian:13", "host/name:tag", "debian:13"):
        assert ensure.ensure(name).name == name
    assert calls == ["build debian:13", "pull host/name:tag"]

    damage(store.get("host/name:tag"))
    assert ensure.ensure("host/name:tag").name == "host/name:tag"
    assert calls.pop() == "pull host/name:tag"
    damage(store.get("debian:13"))
    said: list[str] = []
    assert ensure.ensure("debian:13", lambda step, _fraction=None: said.append(step)).name == "debian:13"
    assert "damaged" in said[0]
    assert calls[2:] == ["build debian:13"]


def test_debian_release_that_is_unknown_says_which_there_are() -> None:
    with pytest.raises(BadRequest, match=r"image debian:sarge: no such release, expected one of 12 \(bookworm\), 13"):
        ensure.ensure("debian:sarge")


def test_same_content_is_the_same_image(tmp_path: Path) -> None:
    image = make(tmp_path)
    files = json.loads((image.path / store.FILES_FILE).read_text())

    later = image.config.model_copy(update={"created": image.config.created.replace(year=2040)})

    assert later.digest(files) == image.digest
    assert cache.root() in image.path.parents
