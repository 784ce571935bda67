"""Persistent disks: made once, self-contained, never mixed up, never removed in use."""

from __future__ import annotations

from pathlib import Path

import pytest

from ostler.backends.disk import open_raw
from ostler.errors import BadRequest, DiskBusy, ImageError
from ostler.host import files
from ostler.images import persist, store
from tests.unit.images.test_store import make

pytestmark = pytest.mark.usefixtures("fake_kernel")


@pytest.fixture(autouse=True)
def _own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSTLER_DATA", str(tmp_path / "data"))


def test_copy_outlives_its_image_and_keeps_what_was_written(tmp_path: Path) -> None:
    image = make(tmp_path)
    original = image.disk.read_bytes()
    copy = persist.obtain("mine", image.name, lambda: image)
    assert copy.disk.read_bytes() == original
    with open_raw(copy.disk) as disk:
        disk.writev(0, [memoryview(b"x" * 512)])
        disk.flush()
    store.remove("one")

    again = persist.obtain("mine", image.name, lambda: image)

    assert again.disk.read_bytes()[:512] == b"x" * 512
    assert again.kernel.read_bytes() == b"kernel" * 1000
    assert (again.modules / "modules.dep").exists()
    assert list(persist.names()) == ["mine"]


def test_copy_of_another_image_is_refused(tmp_path: Path) -> None:
    one, two = make(tmp_path, "one"), make(tmp_path, "two")
    persist.obtain("mine", "one", lambda: one)
    store.tag("other-name-of-one", one.digest)

    with pytest.raises(BadRequest, match=r"'mine': was made from the image one, expected one of two"):
        persist.obtain("mine", "two", lambda: two)
    assert persist.obtain("mine", "other-name-of-one", lambda: two).digest == one.digest


def test_copy_in_use_is_not_removed(tmp_path: Path) -> None:
    copy = persist.obtain("mine", "one", lambda: make(tmp_path))
    with open_raw(copy.disk), pytest.raises(DiskBusy):
        persist.remove("mine")

    persist.remove("mine")

    assert persist.find("mine") is None
    assert list(persist.root().iterdir()) == []


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = make(tmp_path)

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "copy_sparse", full)
    with pytest.raises(ImageError, match=r"'mine' in .*: No space left on device"):
        persist.obtain("mine", image.name, lambda: image)

    assert list(persist.root().iterdir()) == []


@pytest.mark.parametrize("name", ["", ".hidden", "x" * 101])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(BadRequest, match="expected a name"):
        persist.find(name)


def test_name_with_slashes_stays_in_its_folder(tmp_path: Path) -> None:
    copy = persist.obtain("a/../../b", "one", lambda: make(tmp_path))

    assert copy.path.parent == persist.root()
