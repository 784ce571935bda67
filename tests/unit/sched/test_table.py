"""The table of shares: several processes' views of it, each by a descriptor of its own."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ostler.errors import HostError
from ostler.sched import table as tables
from ostler.sched.table import SLOT_BYTES, SLOTS, Entry, Share, Table

Open = Callable[[], Table]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    made: list[Table] = []

    def make() -> Table:
        made.append(Table(tmp_path / "shares.table"))
        return made[-1]

    yield make
    for each in made:
        each.close()


def say(table: Table, share: Share, *, demand: float = 1.0, used_ns: int = 0, written_ns: int = 1) -> None:
    table.write(share, vcpus=2, demand=demand, used_ns=used_ns, written_ns=written_ns)


def test_what_one_writes_all_read(opened: Open) -> None:
    mine, other = opened(), opened()
    assert mine.claim()
    assert other.claim()
    share = Share(250, 0.25, 0.1, frozenset({0, 3, tables.MAX_HOST_CPU}))
    say(mine, share, demand=1.5, used_ns=2**63, written_ns=7)
    say(other, Share())
    assert mine.slot is not None
    assert next(iter(other.entries())) == Entry(mine.slot, os.getpid(), share, 2, 1.5, 2**63, 7)
    assert [entry.share.is_default for entry in mine.entries()] == [False, True]
    assert math.isinf([*mine.entries()][1].share.cap)


def test_slot_of_a_process_that_is_gone_is_forgotten_and_taken_again(opened: Open, tmp_path: Path) -> None:
    looking = opened()
    if (child := os.fork()) == 0:
        table = Table(tmp_path / "shares.table")
        table.claim()
        say(table, Share(900))
        os._exit(0)  # as a kill: nothing is given back
    os.waitpid(child, 0)
    (left,) = looking.entries()
    assert (left.pid, left.share.weight) == (child, 900)
    assert looking.forget_gone(left)
    assert [*looking.entries()] == []
    assert looking.claim()
    assert looking.slot == left.slot


def test_slot_of_a_living_process_is_not_forgotten(opened: Open) -> None:
    mine, looking = opened(), opened()
    mine.claim()
    say(mine, Share())
    (entry,) = looking.entries()
    assert not looking.forget_gone(entry)
    assert not mine.forget_gone(entry)
    mine.release()
    assert [*looking.entries()] == []


def test_slot_that_is_being_written_is_passed_over(opened: Open, tmp_path: Path) -> None:
    mine, looking = opened(), opened()
    mine.claim()
    say(mine, Share())
    with (tmp_path / "shares.table").open("r+b") as file:
        file.seek(tables.HEADER_BYTES)
        sequence = file.read(1)[0]
        file.seek(tables.HEADER_BYTES)
        file.write(bytes([sequence | 1]))
    assert [*looking.entries()] == []
    say(mine, Share(7))
    assert [entry.share.weight for entry in looking.entries()] == [7]


def test_sequence_that_wraps_is_never_that_of_an_empty_slot(opened: Open, tmp_path: Path) -> None:
    mine = opened()
    mine.claim()
    with (tmp_path / "shares.table").open("r+b") as file:
        file.seek(tables.HEADER_BYTES)
        file.write(b"\xfe\xff\xff\xff")
    say(mine, Share(7))
    assert [entry.share.weight for entry in mine.entries()] == [7]


def test_full_table_has_no_slot(opened: Open) -> None:
    holders = [opened() for _ in range(SLOTS)]
    assert all(each.claim() for each in holders)
    assert not opened().claim()


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shares.table").write_bytes(b"something else" * SLOT_BYTES)
    with pytest.raises(HostError, match="is something else"):
        Table(tmp_path / "shares.table")


def test_announcement_wakes_who_waits_in_another_mapping(opened: Open) -> None:
    waiting, announcing = opened(), opened()
    seen = waiting.generation
    woken = threading.Event()

    def wait() -> None:
        while waiting.generation == seen:
            waiting.wait(seen)
        woken.set()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    announcing.announce()
    assert woken.wait(30)
    thread.join(30)


def test_wait_for_a_generation_that_is_over_returns_at_once(opened: Open) -> None:
    table = opened()
    table.wait(table.generation + 1)
    table.wait(table.generation, timeout_ns=0)
