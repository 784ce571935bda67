"""One hand-over at a time; and whoever died does not keep the others waiting."""

from __future__ import annotations

import threading
from pathlib import Path

from ostler.migration.turn import Turn


def nothing() -> None:
    """No check."""


def test_second_hand_over_waits_for_the_first(tmp_path: Path) -> None:
    order: list[str] = []
    checked = threading.Event()
    with Turn(tmp_path) as first, Turn(tmp_path) as second:
        assert first.take(nothing) is False

        def follow() -> None:
            assert second.take(checked.set) is True
            order.append("second")

        thread = threading.Thread(target=follow)
        thread.start()
        assert checked.wait(10)
        order.append("first")
        first.release()
        thread.join()
    assert order == ["first", "second"]


def test_who_is_on_its_way_gives_way_and_goes_on_after_it(tmp_path: Path) -> None:
    with Turn(tmp_path) as standing, Turn(tmp_path) as moving:
        moving.give_way()
        standing.take(nothing)
        thread = threading.Thread(target=moving.give_way)
        thread.start()
        standing.release()
        thread.join(10)
        assert not thread.is_alive()


def test_turn_of_one_that_is_gone_is_free(tmp_path: Path) -> None:
    with Turn(tmp_path) as gone:
        gone.take(nothing)
    with Turn(tmp_path) as next_one:
        assert next_one.take(nothing) is False
