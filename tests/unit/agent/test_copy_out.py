"""Copies both ways through the real agent, and what a hostile guest's copy must not do to the host."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from ostler.agent import AgentClient
from ostler.agent.copy_out import Limits, Unpacker
from ostler.errors import AgentError, AgentProtocolError, AgentRefused, BadRequest, HostError, OstlerError

FILE = {"path": "", "type": "file", "mode": 0o644, "mtime_ns": 1}
FOLDER = {"path": "", "type": "folder", "mode": 0o755, "mtime_ns": 1}


def below(path: str, kind: str = "file", **more: Any) -> dict[str, Any]:
    return {"path": path, "type": kind, "mode": 0o644, "mtime_ns": 1, **more}


def look(folder: Path) -> dict[str, tuple[int, int, object]]:
    """Everything below a folder: mode, time, content."""
    found: dict[str, tuple[int, int, object]] = {}
    for path in sorted(folder.rglob("*")):
        state = path.lstat()
        content: object = None
        if path.is_symlink():
            content = str(path.readlink())
        elif path.is_file():
            content = path.read_bytes()
        mode = 0 if path.is_symlink() else stat.S_IMODE(state.st_mode)
        found[str(path.relative_to(folder))] = (mode, state.st_mtime_ns, content)
    return found


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "deep" / "er").mkdir(parents=True)
    (root / "file").write_bytes(b"content")
    (root / "big").write_bytes(os.urandom(300_000))
    (root / "empty").touch()
    (root / "tool").write_text("#!/bin/sh\n")
    (root / "tool").chmod(0o755)
    (root / os.fsdecode(b'odd \xe9 "name"\n')).write_text("odd")
    (root / "deep" / "er" / "leaf").write_text("leaf")
    (root / "link").symlink_to("deep/er/leaf")
    (root / "dangling").symlink_to("/nonexistent/target")
    os.mkfifo(root / "pipe")
    for number, path in enumerate(sorted(root.rglob("*"), reverse=True)):
        os.utime(path, ns=(1, 1_600_000_000_000_000_000 + number * 1_000_000_007), follow_symlinks=False)
    (root / "deep").chmod(0o750)
    (root / "deep" / "er").chmod(0o555)
    return root


def test_tree_goes_in_and_comes_out_as_it_was(agent: AgentClient, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "guest").mkdir()

    put = agent.put(tree, str(tmp_path / "guest"))
    got = agent.get(str(tmp_path / "guest" / "tree"), tmp_path / "back")

    before = look(tree)
    del before["pipe"]
    assert look(tmp_path / "guest" / "tree") == before
    assert look(tmp_path / "back") == before
    assert put.entries == got.entries == len(before) + 1
    assert put.bytes == got.bytes == sum(len(what) for _, _, what in before.values() if isinstance(what, bytes))


def test_what_is_no_file_is_counted_as_left_out(agent: AgentClient, tree: Path, tmp_path: Path) -> None:
    assert agent.get(str(tree), tmp_path / "copy").left_out == 1


def test_file_goes_to_a_new_name_and_into_a_folder(agent: AgentClient, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "into").mkdir()
    agent.put(tree / "tool", str(tmp_path / "into"))
    agent.put(tree / "tool", str(tmp_path / "made" / "on the way" / "renamed"))
    agent.get(str(tree / "tool"), tmp_path / "into" / "got")

    for path in (tmp_path / "into" / "tool", tmp_path / "made" / "on the way" / "renamed", tmp_path / "into" / "got"):
        assert path.read_text() == "#!/bin/sh\n"
        assert path.stat().st_mode & 0o777 == 0o755


def test_file_replaces_one_that_is_there_and_a_running_program(agent: AgentClient, tmp_path: Path) -> None:
    (tmp_path / "program").write_bytes(Path("/bin/sleep").read_bytes())
    (tmp_path / "program").chmod(0o755)
    with agent.start([tmp_path / "program", "9882"]):
        agent.put_bytes(b"new", str(tmp_path / "program"), mode=0o600)
    assert (tmp_path / "program").read_bytes() == b"new"
    assert (tmp_path / "program").stat().st_mode & 0o777 == 0o600


def test_bytes_are_written_and_read(agent: AgentClient, tmp_path: Path) -> None:
    content = os.urandom(200_000)
    agent.put_bytes(content, str(tmp_path / "file"))

    assert agent.get_bytes(str(tmp_path / "file")) == content
    with pytest.raises(AgentError, match="more than 1000 bytes"):
        agent.get_bytes(str(tmp_path / "file"), limit_bytes=1000)
    with pytest.raises(BadRequest, match="not a folder"):
        agent.get_bytes(str(tmp_path))


def test_set_user_id_goes_in_but_does_not_come_out(agent: AgentClient, tmp_path: Path) -> None:
    agent.put_bytes(b"x", str(tmp_path / "suid"), mode=0o4755)
    assert stat.S_IMODE((tmp_path / "suid").stat().st_mode) == 0o4755

    agent.get(str(tmp_path / "suid"), tmp_path / "copy")
    assert stat.S_IMODE((tmp_path / "copy").stat().st_mode) == 0o755


def test_copies_that_cannot_be_are_refused_and_leave_nothing(agent: AgentClient, tree: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="nonexistent"):
        agent.put("/nonexistent", str(tmp_path))
    with pytest.raises(AgentRefused) as refusal:
        agent.get("/nonexistent", tmp_path)
    assert refusal.value.code == "not-found"
    with pytest.raises(AgentRefused) as refusal:
        agent.put(tree, str(tree / "file" / "below"))
    assert refusal.value.code == "wrong-type"
    with pytest.raises(HostError, match=r"below: (File exists|Not a directory)"):
        agent.get(str(tree), tree / "file" / "below")
    (tmp_path / "occupied" / "tree").mkdir(parents=True)
    with pytest.raises(AgentRefused, match="directory"):
        agent.put_bytes(b"x" * 200_000, str(tmp_path / "occupied" / "tree"))
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".ostler")]


@pytest.mark.parametrize(
    "entries",
    [
        [below("../x")],
        [FOLDER, below("../x")],
        [FOLDER, below("/etc/x")],
        [FOLDER, below("a/../../x")],
        [FOLDER, below("a//x")],
        [FOLDER, below("./x")],
        [FOLDER, below("a\0b")],
        [FOLDER, below("x" * 300)],
        [FOLDER, below("/".join("a" * 300))],
        [FOLDER, below("x", "device")],
        [FOLDER, below("x", "link", target="")],
        [FOLDER, below("x", "link", target="a\0b")],
        [FOLDER, below("x", "link", target=5)],
        [FOLDER, {"path": "x", "type": "file"}],
        [FOLDER, {"path": "x", "type": "file", "mode": "rwx", "mtime_ns": 1}],
        [FOLDER, {"path": "x", "type": "file", "mode": 1, "mtime_ns": 1 << 80}],
        [FOLDER, {"path": 7, "type": "file", "mode": 1, "mtime_ns": 1}],
        [FOLDER, FOLDER],
        [FILE, below("x")],
        [below("x")],
    ],
)
def test_entries_a_guest_must_not_send_are_refused(tmp_path: Path, entries: list[dict[str, Any]]) -> None:
    *before, last = entries
    with Unpacker(tmp_path / "in" / "place", "name") as unpacker:
        for entry in before:
            unpacker.entry(entry)
        with pytest.raises(AgentProtocolError):
            unpacker.entry(last)
    assert {path.name for path in tmp_path.iterdir()} <= {"in"}


@pytest.mark.parametrize("target", ["/", "..", "/tmp"])
def test_copy_goes_through_no_link_that_the_guest_made(tmp_path: Path, target: str) -> None:
    with Unpacker(tmp_path / "place", "name") as unpacker:
        unpacker.entry(FOLDER)
        unpacker.entry(below("trap", "link", target=target))
        for victim in (below("trap/owned"), below("trap/owned", "folder"), below("trap/owned", "link", target="x")):
            with pytest.raises(OstlerError):
                unpacker.entry(victim)
        unpacker.entry(below("trap"))  # a file in the link's place is fine: it replaces the link
        unpacker.data(b"x")
        unpacker.data(b"")
        unpacker.finish()
    assert (tmp_path / "place" / "trap").read_bytes() == b"x"
    assert not (tmp_path / "owned").exists()


def test_folder_that_the_guest_turns_into_a_link_is_not_followed_for_its_mode(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o700)
    with Unpacker(tmp_path / "place", "name") as unpacker:
        unpacker.entry(FOLDER)
        unpacker.entry(below("a", "folder"))
        with pytest.raises(HostError):  # a link does not replace a folder
            unpacker.entry(below("a", "link", target=str(victim)))
    assert stat.S_IMODE(victim.stat().st_mode) == 0o700


def test_limits_hold(tmp_path: Path) -> None:
    with Unpacker(tmp_path / "a", "name", Limits(entries=2)) as unpacker:
        unpacker.entry(FOLDER)
        unpacker.entry(below("x", "folder"))
        with pytest.raises(AgentError, match="more than 2 entries"):
            unpacker.entry(below("y", "folder"))
    with Unpacker(tmp_path / "b", "name", Limits(bytes=10)) as unpacker:
        unpacker.entry(FILE)
        unpacker.data(b"x" * 10)
        with pytest.raises(AgentError, match="more than 10 bytes"):
            unpacker.data(b"x")
    assert not (tmp_path / "b").exists()


def test_content_out_of_turn_is_refused(tmp_path: Path) -> None:
    with Unpacker(tmp_path / "a", "name") as unpacker:
        with pytest.raises(AgentProtocolError, match="without a file"):
            unpacker.data(b"x")
        with pytest.raises(AgentProtocolError, match="in the middle"):
            unpacker.finish()
        unpacker.entry(FILE)
        with pytest.raises(AgentProtocolError, match="in the middle of a file"):
            unpacker.entry(below("x"))
        with pytest.raises(AgentProtocolError, match="in the middle"):
            unpacker.finish()
    assert list(tmp_path.iterdir()) == []
