"""mmdebstrap, with a script in its place: which way is chosen, what is told, what is said when it fails."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import IO

import pytest

from ostler.errors import ImageError
from ostler.images import apt, bootstrap, trees


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on the path, but for what scripts need."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(apt, "host_sources", lambda release: [f"deb mirror {release} main"])
    monkeypatch.setattr(bootstrap, "choose_mode", lambda: "root")
    return folder


def script(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def read_all(stream: IO[bytes]) -> bytes:
    return stream.read()


def test_stream_is_consumed_and_sources_are_given(programs: Path) -> None:
    script(programs, "mmdebstrap", 'echo "I: extracting archives..." >&2; cat; echo "$@"')
    said: list[str] = []

    got = bootstrap.debian("trixie", ["a", "b"], read_all, progress=lambda step, _fraction=None: said.append(step))

    assert got.startswith(b"deb mirror trixie main\n")
    assert b"--mode=root" in got
    assert b"--include=a,b trixie - -" in got
    assert said == ["Debian trixie: preparing", "Debian trixie: extracting archives"]


def test_failure_is_mmdebstraps_own_last_error(programs: Path, tmp_path: Path) -> None:
    script(
        programs, "mmdebstrap", "echo 'E: Unable to locate package nonsense' >&2; echo 'I: cleaning up...' >&2; exit 1"
    )
    (tmp_path / "tree").mkdir()

    with pytest.raises(ImageError, match=r"^mmdebstrap bookworm: Unable to locate package nonsense$"):
        bootstrap.debian("bookworm", [], lambda stream: trees.unpack(stream, tmp_path / "tree"))


def test_host_out_of_space_is_said_so(programs: Path) -> None:
    script(
        programs, "mmdebstrap", "echo 'dpkg: error: cannot copy: No space left on device' >&2; echo 'E: x' >&2; exit 1"
    )

    with pytest.raises(ImageError, match=r"^mmdebstrap bookworm: No space left on device$"):
        bootstrap.debian("bookworm", [], read_all)


def test_consumer_that_fails_ends_mmdebstrap(programs: Path, tmp_path: Path) -> None:
    script(programs, "mmdebstrap", f"trap 'touch {tmp_path}/ended; exit 1' TERM; while :; do echo x; done")

    def full(stream: IO[bytes]) -> None:
        stream.read(1)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        bootstrap.debian("bookworm", [], full)

    assert (tmp_path / "ended").exists()


def test_stream_that_is_no_archive_is_one_line(programs: Path, tmp_path: Path) -> None:
    script(programs, "mmdebstrap", "echo nonsense")

    with pytest.raises(ImageError, match="not a whole tar archive"):
        bootstrap.debian("bookworm", [], lambda stream: trees.unpack(stream, tmp_path))


def test_missing_mmdebstrap_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr("ostler.images.tools.SYSTEM_PATH", "/nonexistent")

    with pytest.raises(ImageError, match="apt-get install mmdebstrap"):
        bootstrap.debian("bookworm", [], read_all)


@pytest.mark.parametrize(
    ("uid", "unshare", "fakechroot", "mode"),
    [(0, False, False, "root"), (1000, True, True, "unshare"), (1000, False, True, "fakechroot")],
)
def test_mode_by_what_the_user_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uid: int, *, unshare: bool, fakechroot: bool, mode: str
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: uid)
    monkeypatch.setattr(bootstrap, "_can_unshare", lambda: unshare)
    monkeypatch.setenv("PATH", str(tmp_path))
    if fakechroot:
        script(tmp_path, "fakechroot", "true")
        script(tmp_path, "fakeroot", "true")

    assert bootstrap.choose_mode() == mode


def test_plain_user_without_any_way_is_told_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr(bootstrap, "_can_unshare", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(ImageError, match=r"/etc/subuid.*apt-get install fakechroot"):
        bootstrap.choose_mode()


def test_archive_may_be_compressed(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:xz") as archive:
        archive.addfile(tarfile.TarInfo("file"))
    stream.seek(0)
    (tmp_path / "tree").mkdir()

    assert trees.unpack(stream, tmp_path / "tree").has("file")
