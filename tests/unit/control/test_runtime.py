"""The registry of guests: names, held locks, healing."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from ostler.control import runtime
from ostler.errors import BadRequest, GuestNotFound, HostError


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, short_folder: Path) -> Path:
    monkeypatch.setenv("OSTLER_RUNTIME", str(short_folder))
    return short_folder


def test_claimed_guest_runs_as_long_as_its_lock_is_held(folder: Path) -> None:
    with runtime.claim("a", {"remove": False, "image": "debian"}, "{}") as claim:
        assert [entry.name for entry in runtime.entries()] == ["a"]
        assert claim.entry.is_running()
        assert claim.entry.facts["image"] == "debian"
        assert stat.S_IMODE(claim.entry.path.stat().st_mode) == 0o700
    assert not runtime.find("a").is_running()
    assert claim.entry.path == folder / "guests" / "a"


def test_name_of_a_running_guest_is_taken_of_an_ended_one_is_free() -> None:
    with (
        runtime.claim("a", {"remove": False, "n": 1}, "{}"),
        pytest.raises(BadRequest, match="name 'a': a guest of that name is running"),
    ):
        runtime.claim("a", {}, "{}")
    with runtime.claim("a", {"remove": False, "n": 2}, "{}") as again:
        assert again.entry.facts["n"] == 2


def test_entry_that_nobody_wanted_kept_heals_when_its_process_is_gone(folder: Path) -> None:
    runtime.claim("a", {"remove": True}, "{}").close()
    runtime.claim("b", {"remove": False}, "{}").close()
    (folder / "guests" / ".new-killed").mkdir()
    assert [entry.name for entry in runtime.entries()] == ["b"]
    assert sorted(path.name for path in (folder / "guests").iterdir()) == [".lock", "b"]


def test_entry_with_damaged_files_is_treated_as_nobodys(folder: Path) -> None:
    runtime.claim("a", {"remove": False}, "{}").close()
    (folder / "guests" / "a" / "entry.json").write_text("{")
    (folder / "guests" / "a" / "lock").unlink()
    assert runtime.entries() == []


def test_running_guest_is_not_removed_an_ended_one_is() -> None:
    claim = runtime.claim("a", {"remove": False}, "{}")
    with pytest.raises(BadRequest, match="is running"):
        runtime.remove(claim.entry)
    claim.close()
    runtime.remove(claim.entry)
    runtime.remove(claim.entry)
    with pytest.raises(GuestNotFound, match="guest 'a': not known; there are none"):
        runtime.find("a")


@pytest.mark.parametrize("name", ["", ".lock", "../a", "a/b", "-a", "a" * 41, "a\n", "ä"])
def test_odd_names_are_refused(name: str) -> None:
    with pytest.raises(BadRequest, match="name"):
        runtime.claim(name, {}, "{}")


def test_end_is_recorded_whole() -> None:
    claim = runtime.claim("a", {"remove": False}, "{}")
    assert claim.entry.end == {}
    runtime.write_end(claim.entry, {"status": 3})
    claim.close()
    assert runtime.find("a").end == {"status": 3}


def test_folder_that_others_may_enter_is_refused(folder: Path) -> None:
    folder.chmod(0o755)
    with pytest.raises(HostError, match="mode 0700"):
        runtime.entries()


def test_folder_too_deep_for_a_socket_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OSTLER_RUNTIME", str(tmp_path / ("x" * 100)))
    with pytest.raises(HostError, match="too long for sockets"):
        runtime.claim("a", {}, "{}")


def test_new_names_are_good_names() -> None:
    for stem in ("debian:12", "", "x" * 99, "--", "registry/app@sha"):
        assert runtime.check_name(runtime.new_name(stem))


def test_facts_name_the_guest_themselves() -> None:
    with runtime.claim("a", {}, "{}") as claim:
        assert json.loads((claim.entry.path / "entry.json").read_text())["name"] == "a"
