"""Bounded logs, and reading along."""

from __future__ import annotations

from pathlib import Path

from ostler.control import logfile
from ostler.control.logfile import RotatedLog


def test_log_is_rotated_once_and_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    log = RotatedLog(path, limit_bytes=10)
    for number in range(6):
        log.write(b"%d" % number * 6)
    log.close()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.log", "a.log.1"]
    assert logfile.read(path) == b"222222333333444444555555"
    assert log.tail(3) == b"555"
    assert log.tail(0) == b""


def test_log_goes_on_where_an_earlier_process_stopped(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    for text in (b"one\n", b"two\n"):
        log = RotatedLog(path)
        log.write(text)
        log.close()
    assert path.read_bytes() == b"one\ntwo\n"


def test_log_on_a_full_or_missing_place_loses_output_only(tmp_path: Path) -> None:
    log = RotatedLog(tmp_path / "nowhere" / "a.log")
    log.write(b"lost")
    assert logfile.read(tmp_path / "nowhere" / "a.log") == b""


def test_following_gives_what_is_kept_then_what_comes_through_a_rotation(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    log = RotatedLog(path, limit_bytes=8)
    steps = [b"aaaa", b"bbbb", b"cccc", b"dddd"]
    log.write(b"0000")

    def step() -> bool:
        if steps:
            log.write(steps.pop(0))
        return not steps

    pieces = [*logfile.follow(path, is_over=step)]
    log.close()
    assert b"".join(pieces) == b"0000aaaabbbbccccdddd"
    assert pieces[0] == b"0000aaaa"


def test_following_a_log_that_is_not_there_yet_begins_empty(tmp_path: Path) -> None:
    assert [*logfile.follow(tmp_path / "a.log", is_over=lambda: True)] == [b""]
