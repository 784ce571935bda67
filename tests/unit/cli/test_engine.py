"""`--engine` and `--debug-engine` reach the engine by its environment."""

import os

import pytest

from ostler.cli import engine
from ostler.errors import BadRequest


def test_choose_sets_what_is_given_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSTLER_ENGINE", "before")
    monkeypatch.setenv("OSTLER_DEBUG_ENGINE", "before")

    engine.choose("interp", None)

    assert (os.environ["OSTLER_ENGINE"], os.environ["OSTLER_DEBUG_ENGINE"]) == ("interp", "before")


@pytest.mark.parametrize(
    ("chosen", "shown", "complaint"),
    [
        ("fast", None, "--engine 'fast': expected translate or interp or lockstep"),
        (None, "all", "--debug-engine 'all': expected blocks or stats"),
    ],
)
def test_choose_what_there_is_not_is_refused(
    chosen: str | None, shown: str | None, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OSTLER_ENGINE", raising=False)

    with pytest.raises(BadRequest, match=complaint):
        engine.choose(chosen, shown)

    assert "OSTLER_ENGINE" not in os.environ
