"""Memory caught at one instant: what is written is what was there, whatever the guest does afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ostler.errors import StateError
from ostler.host.copied import PAGE_BYTES
from ostler.memory import GuestMemory
from ostler.snapshot import image

SIZE = 4 << 20


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.of_size(SIZE) as made:
        made.write(0x3000, b"before")
        made.write(0x10_0000, b"x" * 3 * PAGE_BYTES)
        yield made


def a_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)


def caught(memory: GuestMemory, path: Path, *, shared: bool = False, ranges: int | None = None) -> bytes:
    """Catch, change the memory behind it, finish; the image."""
    fd = a_file(path)
    capture = image.capture(memory, fd, shared=shared, ranges=ranges)
    now = bytes(memory.whole)
    memory.write(0x3000, b"behind")
    capture.finish()
    assert os.fstat(fd).st_blocks * 512 < SIZE // 2
    os.close(fd)
    return now


def test_image_is_the_memory_of_the_instant_first_and_later(memory: GuestMemory, tmp_path: Path) -> None:
    for number in range(3):
        memory.write(0x20_0000 + number * PAGE_BYTES, b"more")
        # Zeroes over what was something are holes again.
        memory.write(0x10_0000 + number * PAGE_BYTES, bytes(PAGE_BYTES))
        now = caught(memory, tmp_path / f"{number}")
        assert (tmp_path / f"{number}").read_bytes() == now
        assert memory.read(0x3000, 6) == b"behind"


def test_image_knows_pages_given_back(memory: GuestMemory, tmp_path: Path) -> None:
    caught(memory, tmp_path / "first")
    memory.discard(0x10_0000, 2 * PAGE_BYTES)
    now = caught(memory, tmp_path / "second")
    assert (tmp_path / "second").read_bytes() == now


@pytest.mark.parametrize("kind", ["shared", "private"])
def test_image_of_memory_that_cannot_be_frozen(tmp_path: Path, kind: str) -> None:
    with GuestMemory.of_size(SIZE, shared=kind == "shared") as memory:
        memory.write(0x5000, b"here")
        now = caught(memory, tmp_path / "image", shared=kind == "shared")
        assert (tmp_path / "image").read_bytes() == now


def test_incremental_image_over_its_parent_is_the_memory(memory: GuestMemory, tmp_path: Path) -> None:
    caught(memory, tmp_path / "parent")
    memory.write(0x30_0000, b"new")
    memory.discard(0x10_0000, PAGE_BYTES)
    ranges = a_file(tmp_path / "ranges")
    now = caught(memory, tmp_path / "child", ranges=ranges)
    os.close(ranges)
    found = image.read_ranges(tmp_path / "ranges", SIZE)
    with GuestMemory.of_size(SIZE, shared=False, image=os.open(tmp_path / "parent", os.O_RDONLY)) as restored:
        image.fill(restored, tmp_path / "child", found)
        assert bytes(restored.whole) == now


def changes(memory: GuestMemory, folder: Path) -> bytes:
    """Catch what was written since memory was an image; what it is now."""
    fds = [a_file(folder / name) for name in ("changes", "ranges", "holes")]
    image.capture(memory, fds[0], shared=False, ranges=fds[1], holes=fds[2]).finish()
    for fd in fds:
        os.close(fd)
    return bytes(memory.whole)


def begun(folder: Path, base: int) -> GuestMemory:
    """Memory of an image with the changes over it."""
    found = GuestMemory.of_size(SIZE, shared=False, image=base)
    ranges, holes = (image.read_ranges(folder / name, SIZE) for name in ("ranges", "holes"))
    image.lay_over(found, folder / "changes", ranges=ranges, holes=holes)
    return found


def test_changes_over_their_image_are_the_memory_and_again_in_the_next_generation(
    memory: GuestMemory, tmp_path: Path
) -> None:
    base = image.freeze(memory)
    memory.write(0x30_0000, b"new")
    memory.write(0x30_4000, b"near it")
    memory.discard(0x10_0000, PAGE_BYTES)
    now = changes(memory, tmp_path)
    assert len(image.read_ranges(tmp_path / "ranges", SIZE)) == 1
    with begun(tmp_path, base) as child:
        assert child.touched_bytes == 0
        assert bytes(child.whole) == now
        child.write(0x3000, b"child")
        child.discard(0x30_0000, PAGE_BYTES)
        kept = image.base(child, shared=False)
        assert kept is not None
        (tmp_path / "next").mkdir()
        now = changes(child, tmp_path / "next")
        with begun(tmp_path / "next", os.dup(kept)) as grandchild:
            assert bytes(grandchild.whole) == now


def test_changes_shorter_than_the_memory_are_refused(memory: GuestMemory, tmp_path: Path) -> None:
    base = image.freeze(memory)
    memory.write(0x30_0000, b"new")
    changes(memory, tmp_path)
    os.truncate(tmp_path / "changes", SIZE - PAGE_BYTES)
    with pytest.raises(StateError, match=f"expected {SIZE}"):
        begun(tmp_path, base)


def test_memory_begun_with_an_image_is_caught_whole(memory: GuestMemory, tmp_path: Path) -> None:
    caught(memory, tmp_path / "parent")
    with GuestMemory.of_size(SIZE, shared=False, image=os.open(tmp_path / "parent", os.O_RDONLY)) as restored:
        restored.write(0x3000, b"child")
        now = caught(restored, tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == now


def test_shared_memory_begins_with_a_copy_of_the_image(memory: GuestMemory, tmp_path: Path) -> None:
    now = caught(memory, tmp_path / "parent")
    with GuestMemory.of_size(SIZE, image=os.open(tmp_path / "parent", os.O_RDONLY)) as restored:
        assert bytes(restored.whole) == now
        assert restored.fd >= 0


@pytest.mark.parametrize(
    "ranges", [b"short", image.RANGE.pack(1, 4096), image.RANGE.pack(0, 1), image.RANGE.pack(SIZE, 4096)]
)
def test_ranges_outside_of_memory_are_refused(tmp_path: Path, ranges: bytes) -> None:
    (tmp_path / "ranges").write_bytes(ranges)
    with pytest.raises(StateError):
        image.read_ranges(tmp_path / "ranges", SIZE)
