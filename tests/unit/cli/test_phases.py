"""Phases of a run and the tap that sees their borders."""

from __future__ import annotations

import os

import pytest

from ostler.cli.phases import SETUP_VARIABLE, Phases, Tap


def drain(fd: int) -> bytes:
    with os.fdopen(fd, "rb") as file:
        return file.read()


def test_tap_passes_everything_and_notes_marks_split_between_writes() -> None:
    read, write = os.pipe()

    with Tap(write) as tap:
        for part in (b"boot\n[ostler] ini", b"t reached, 1 s\n", b"reboot: Power d", b"own\n"):
            os.write(tap.fd, part)
    os.close(write)

    assert drain(read) == b"boot\n[ostler] init reached, 1 s\nreboot: Power down\n"
    assert list(tap.marks) == ["init", "power-off"]


def test_tap_whose_reader_has_gone_lets_the_writer_meet_it() -> None:
    read, write = os.pipe()
    os.close(read)

    def write_on(fd: int) -> None:
        while True:
            os.write(fd, b"x" * 4096)

    with Tap(write) as tap, pytest.raises(BrokenPipeError):
        write_on(tap.fd)
    os.close(write)


def test_phases_of_a_run_follow_each_other_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SETUP_VARIABLE, "2.5")
    phases = Phases()
    begin = phases._last

    phases.end("fetch", begin + 1)
    phases.guest(ended=begin + 20, run_s=17, marks={"init": begin + 10, "power-off": begin + 12})

    assert phases.durations_s == {
        "setup": 2.5, "fetch": 1, "load": 2, "boot": 7, "in the guest": 2, "power-off": 8,
    }  # fmt: skip
    assert phases.table().splitlines()[-1].split() == ["ostler:", "in", "all", "22.50", "s"]


def test_phases_of_a_guest_without_marks_are_load_and_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SETUP_VARIABLE, raising=False)
    phases = Phases()
    begin = phases._last

    phases.guest(ended=begin + 5, run_s=4, marks={})

    assert phases.durations_s == {"load": 1, "run": 4}
