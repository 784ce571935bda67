"""Kernels kept unpacked: found again as they were, and never when anything about them changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ostler.boot.kernel import Kernel, Protocol, Segment
from ostler.boot.load import read_kernel
from ostler.boot.unpacked import KEPT, SUFFIX, UnpackedKernels
from ostler.testing import kernels


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "vmlinuz"
    path.write_bytes(b"some kernel")
    return path


def kernel(source: Path) -> Kernel:
    segments = (Segment(0x10_0000, memoryview(b"text"), 4), Segment(0x20_0000, memoryview(b"data"), 0x1000))
    return Kernel(str(source), Protocol.PVH, segments, entry=0x10_0010, cmdline_limit=2047, setup_header=b"\x1f")


def test_kept_kernel_is_found_as_it_was(tmp_path: Path, source: Path) -> None:
    store = UnpackedKernels(tmp_path / "store")
    assert store.find(source) is None

    store.keep(source, kernel(source))

    assert store.find(source) == kernel(source)


def test_changed_file_is_another_kernel(tmp_path: Path, source: Path) -> None:
    store = UnpackedKernels(tmp_path / "store")
    store.keep(source, kernel(source))

    source.write_bytes(b"other kernel")
    os.utime(source, ns=(0, 0))

    assert store.find(source) is None


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"segments": [[0, 99, 1]]}', b'{"segments": [[0, 1, 99]]}', b"\xff"])
def test_damaged_entry_counts_as_none(tmp_path: Path, source: Path, damage: bytes) -> None:
    store = UnpackedKernels(tmp_path)
    store.keep(source, kernel(source))
    (entry,) = tmp_path.glob(f"*{SUFFIX}")
    entry.write_bytes(damage)

    assert store.find(source) is None


def test_folder_that_cannot_be_written_is_not_missed(tmp_path: Path, source: Path) -> None:
    store = UnpackedKernels(source / "below a file")

    store.keep(source, kernel(source))

    assert store.find(source) is None
    assert list(tmp_path.iterdir()) == [source]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    store = UnpackedKernels(tmp_path / "store")
    sources = [tmp_path / f"kernel {number}" for number in range(KEPT + 2)]
    for number, path in enumerate(sources):
        path.write_bytes(b"kernel")
        store.keep(path, kernel(path))
        for entry in (tmp_path / "store").iterdir():
            os.utime(entry, ns=(0, entry.stat().st_mtime_ns - 10**9))
        assert store.find(path) is not None, number

    assert [store.find(path) is not None for path in sources] == [False] * 2 + [True] * KEPT


def test_bzimage_is_read_once_and_found_unpacked_afterwards(tmp_path: Path) -> None:
    store = UnpackedKernels(tmp_path / "store")
    path = tmp_path / "vmlinuz"
    path.write_bytes(kernels.bzimage(kernels.payload(kernels.elf64(note=kernels.xen_note(0x10_0010)), "gzip")))

    first = read_kernel(path, unpacked=store)
    again = read_kernel(path, unpacked=store)

    assert again == first
    assert store.find(path) == first
