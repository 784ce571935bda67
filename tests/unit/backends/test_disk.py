"""Raw disks: what is written is there, what is beyond is refused, and two writers never meet."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ostler.backends import disk
from ostler.backends.disk import open_raw
from ostler.errors import BadRequest, DiskBusy
from ostler.host import files

KIB = 1024


def make(folder: Path, size: int = 64 * KIB, fill: bytes = b"\xaa") -> Path:
    path = folder / "disk.raw"
    path.write_bytes(fill * size)
    return path


def read(backend: disk.DiskBackend, offset: int, size: int) -> bytes:
    buffer = bytearray(size)
    backend.readv(offset, [memoryview(buffer)])
    return bytes(buffer)


def test_readv_writev_scatter_over_views_of_any_size(tmp_path: Path) -> None:
    with open_raw(make(tmp_path)) as raw:
        pieces = [b"a" * 3, b"b" * 4096, b"", b"c" * 505]
        raw.writev(512, [memoryview(piece) for piece in pieces])
        buffers = [bytearray(n) for n in (1000, 0, 3604)]
        raw.readv(512, [memoryview(each) for each in buffers])

        assert b"".join(buffers) == b"".join(pieces)
        assert read(raw, 0, 512) == b"\xaa" * 512


def test_writev_more_views_than_one_system_call_takes(tmp_path: Path) -> None:
    with open_raw(make(tmp_path, 2 << 20)) as raw:
        content = os.urandom(1500 * 512)
        raw.writev(0, [memoryview(content)[at : at + 512] for at in range(0, len(content), 512)])

        assert read(raw, 0, len(content)) == content


def test_transfer_in_pieces_by_the_kernel_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwritev

    def short(fd: int, views: list[memoryview], offset: int) -> int:
        return whole(fd, [views[0].cast("B")[:700]], offset)

    with open_raw(make(tmp_path)) as raw:
        monkeypatch.setattr(os, "pwritev", short)
        content = os.urandom(4096)
        raw.writev(0, [memoryview(content)[:1024], memoryview(content)[1024:]])

        assert read(raw, 0, 4096) == content


def test_write_beyond_the_end_is_refused_and_the_file_does_not_grow(tmp_path: Path) -> None:
    path = make(tmp_path)
    with open_raw(path) as raw, pytest.raises(OSError, match="bytes at") as caught:
        raw.writev(64 * KIB - 512, [memoryview(bytes(1024))])

    assert caught.value.errno == errno.ENOSPC
    assert path.stat().st_size == 64 * KIB


def test_read_of_a_file_cut_short_is_an_io_error(tmp_path: Path) -> None:
    path = make(tmp_path)
    with open_raw(path) as raw:
        os.truncate(path, 4096)
        with pytest.raises(OSError, match="end of the disk") as caught:
            read(raw, 8192, 512)

    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("unmap", [True, False])
@pytest.mark.parametrize("supported", [True, False])
def test_write_zeroes_reads_as_zeroes_on_any_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, unmap: bool, supported: bool
) -> None:
    if not supported:

        def refuse(_fd: int, _mode: int, _offset: int, _size: int) -> None:
            raise OSError(errno.EOPNOTSUPP, "no")

        monkeypatch.setattr(files, "_fallocate", refuse)
    with open_raw(make(tmp_path)) as raw:
        raw.write_zeroes(512, 20 * KIB, unmap=unmap)

        assert read(raw, 0, 64 * KIB) == b"\xaa" * 512 + bytes(20 * KIB) + b"\xaa" * (64 * KIB - 20 * KIB - 512)


def test_discard_gives_space_back(tmp_path: Path) -> None:
    path = make(tmp_path, 1 << 20)
    with open_raw(path) as raw:
        raw.discard(0, 1 << 20)

    assert path.stat().st_size == 1 << 20
    assert path.stat().st_blocks == 0


def test_read_only_disk_refuses_every_change(tmp_path: Path) -> None:
    path = make(tmp_path)
    path.chmod(0o400)
    with open_raw(path, read_only=True) as raw:
        with pytest.raises(OSError, match="Read-only") as write:
            raw.writev(0, [memoryview(bytes(512))])
        with pytest.raises(OSError, match="Read-only"):
            raw.discard(0, 4096)
        with pytest.raises(OSError, match="Read-only"):
            raw.write_zeroes(0, 4096, unmap=True)
        assert write.value.errno == errno.EROFS
        raw.flush()


def test_second_writer_is_told_who_holds_the_disk(tmp_path: Path) -> None:
    path = make(tmp_path)
    program = (
        "import sys; from pathlib import Path; from ostler.backends.disk import open_raw\n"
        "disk = open_raw(Path(sys.argv[1])); print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(DiskBusy, match=rf"disk.raw: in use by process {holder.pid} \("):
            open_raw(path)
        with pytest.raises(DiskBusy, match="for reading"):
            open_raw(path, read_only=True)
    open_raw(path).close()


def test_many_readers_and_no_writer_beside_them(tmp_path: Path) -> None:
    path = make(tmp_path)
    readers = [open_raw(path, read_only=True) for _ in range(2)]
    with pytest.raises(DiskBusy, match="this process"):
        open_raw(path)

    for reader in readers:
        reader.close()
    open_raw(path).close()


@pytest.mark.parametrize("size", [0, 1000])
def test_size_that_is_not_whole_sectors_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(BadRequest, match=f"{size} bytes, expected a positive multiple of 512"):
        open_raw(make(tmp_path, size))


def test_what_is_no_disk_is_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in ("none", ".", "fifo"):
        with pytest.raises(BadRequest, match="expected a file or block device"):
            open_raw(tmp_path / name)


def test_disk_shorter_than_its_partition_table_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path, 1 << 20, fill=b"\0")
    entry = b"\x80\0\0\0\x83\0\0\0" + (2048).to_bytes(4, "little") + (4096).to_bytes(4, "little")
    with path.open("r+b") as file:
        file.seek(446)
        file.write(entry + bytes(48) + b"\x55\xaa")

    with pytest.raises(BadRequest, match=f"1048576 bytes, expected the {6144 * 512} that its partition table says"):
        open_raw(path)

    os.truncate(path, 6144 * 512)
    open_raw(path).close()


def test_refresh_size_follows_growth_only(tmp_path: Path) -> None:
    path = make(tmp_path)
    with open_raw(path) as raw:
        os.truncate(path, 128 * KIB)
        assert raw.refresh_size() == 128 * KIB
        os.truncate(path, 4 * KIB)
        assert raw.refresh_size() == 128 * KIB


def test_default_serial_is_stable_and_short(tmp_path: Path) -> None:
    path = make(tmp_path)

    assert disk.default_serial(path) == disk.default_serial(path.parent / "." / path.name)
    assert len(disk.default_serial(path)) == disk.SERIAL_BYTES
