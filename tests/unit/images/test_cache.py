"""The cache: entries are whole or not there, whatever happens to the process that builds them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from ostler.errors import ImageError
from ostler.images import cache


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSTLER_CACHE", str(tmp_path / "cache"))


def write_one(folder: Path) -> dict[str, Any]:
    (folder / "file").write_text("content")
    return {"version": "1"}


def test_obtain_missing_entry_builds_it_with_its_facts() -> None:
    entry = cache.obtain("things/one", write_one)

    assert (entry.path / "file").read_text() == "content"
    assert entry.facts == {"version": "1"}


def test_obtain_present_entry_does_not_build_again() -> None:
    cache.obtain("one", write_one)

    def never(folder: Path) -> dict[str, Any]:
        raise AssertionError(folder)

    assert cache.obtain("one", never).facts == {"version": "1"}


def test_obtain_damaged_entry_builds_it_again() -> None:
    entry = cache.obtain("one", write_one)
    (entry.path / "file").write_text("half")

    assert cache.find("one") is None
    assert (cache.obtain("one", write_one).path / "file").read_text() == "content"


def test_failing_build_leaves_nothing_behind() -> None:
    def fail(folder: Path) -> dict[str, Any]:
        (folder / "file").write_text("half")
        raise ImageError("no")

    with pytest.raises(ImageError, match="no"):
        cache.obtain("things/one", fail)

    assert list((cache.root() / "things").iterdir()) == []


def test_leftovers_of_a_killed_process_are_removed() -> None:
    leftover = cache.root() / ".one.part-dead"
    leftover.mkdir(parents=True)

    cache.obtain("one", write_one)

    assert not leftover.exists()


def test_two_at_once_build_once_and_both_get_the_entry() -> None:
    built: list[int] = []
    building = threading.Event()
    waiting = threading.Event()

    def slow(folder: Path) -> dict[str, Any]:
        built.append(1)
        building.set()
        assert waiting.wait(10)  # goes on only once the other one stands at the lock
        return write_one(folder)

    def note(step: str, fraction: float | None = None) -> None:
        assert "waiting for another ostler" in step
        assert fraction is None
        waiting.set()

    first = threading.Thread(target=cache.obtain, args=("one", slow))
    first.start()
    assert building.wait(10)
    entry = cache.obtain("one", slow, note)
    first.join()

    assert built == [1]
    assert entry.facts == {"version": "1"}


def test_unwritable_cache_is_one_line_that_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("OSTLER_CACHE", str(tmp_path / "file" / "below"))

    with pytest.raises(ImageError, match=r"cannot be written.*OSTLER_CACHE"):
        cache.obtain("one", write_one)


def test_entry_is_hashed_once_and_again_after_any_write() -> None:
    entry = cache.obtain("one", write_one)
    hashed: list[str] = []

    def digest(path: Path) -> str:
        hashed.append(path.name)
        return cache.sha256(path)

    files = {"file": cache.sha256(entry.path / "file")}
    assert cache.check(entry.path, files, digest) is None
    assert hashed == []  # building it left the stamp

    (entry.path / "file").write_text("CONTENT")
    assert cache.check(entry.path, files, digest) == "file"
    (entry.path / "file").write_text("content")
    assert cache.check(entry.path, files, digest) is None
    assert cache.check(entry.path, files, digest) is None
    assert hashed == ["file", "file"]


def test_entry_that_is_not_accepted_is_built_again() -> None:
    cache.obtain("one", write_one)

    def newer(folder: Path) -> dict[str, Any]:
        return {**write_one(folder), "version": "2"}

    assert cache.obtain("one", newer, accept=lambda entry: entry.facts["version"] == "2").facts["version"] == "2"
