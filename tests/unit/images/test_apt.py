"""What Ostler takes over from the host's apt configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from ostler.errors import ImageError
from ostler.images import apt

HOST = """\
'http://mirror.example/debian/dists/bookworm/InRelease' a 0
'http://mirror.example/debian/dists/bookworm-updates/InRelease' a 0
'http://mirror.example/debian/dists/bookworm-backports/InRelease' a 0
'http://security.example/debian-security/dists/bookworm-security/InRelease' a 0
'http://mirror.example/debian/dists/bookworm/main/binary-amd64/Packages.xz' a 0
'https://third.example/apt/dists/nodistro/InRelease' a 0
""".splitlines()


def test_exchange_suite_keeps_the_mirror_and_drops_foreign_archives() -> None:
    assert apt.exchange_suite(HOST, "bookworm", "trixie") == [
        "deb [arch=amd64] http://mirror.example/debian trixie main",
        "deb [arch=amd64] http://mirror.example/debian trixie-updates main",
        "deb [arch=amd64] http://security.example/debian-security trixie-security main",
    ]


def test_exchange_suite_on_a_host_of_another_release_finds_nothing() -> None:
    assert apt.exchange_suite(HOST, "noble", "trixie") == []


def test_host_without_apt_is_one_line_that_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")

    with pytest.raises(ImageError, match=r"apt-get: not on this host.*--kernel"):
        apt.Apt("bookworm")


def test_unknown_package_is_one_line_with_apts_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {
        "apt-get": "echo \"'http://m.example/debian/dists/x/InRelease' a 0\"",
        "apt-config": "true",
        "apt-cache": "echo 'E: No packages found' >&2; exit 100",
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("OSTLER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(apt, "host_release", lambda: "x")

    with pytest.raises(ImageError, match=r"apt-cache show nothing: No packages found"):
        apt.Apt("y").show("nothing")
