"""`ostler migrate` and `ostler receive`: what they are asked for, before anything is moved."""

from __future__ import annotations

import pytest

from ostler.cli import main

REFUSED = [
    (["migrate", "nobody", "nowhere"], "expected tcp://HOST:PORT or unix:PATH"),
    (["migrate", "unix:/x"], "--all means every one"),
    (["migrate", "--all", "web", "unix:/x"], "expected no names beside --all"),
    (["migrate", "nobody", "unix:/x"], "not known"),
    (["migrate", "a", "b", "unix:/x", "--name", "c"], "expected one guest beside it"),
    (["migrate", "nobody", "unix:/x", "--streams", "99"], "less than or equal to 16"),
    (["receive", "nowhere"], "expected tcp://HOST:PORT or unix:PATH"),
    (["receive", "tcp://0.0.0.0:0"], "--insecure"),
    (["receive", "tcp://127.0.0.1:0", "--tls-cert", "x"], "together"),
]


@pytest.mark.parametrize(("arguments", "expected"), REFUSED)
def test_bad_requests_are_one_line_and_status_2(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert expected in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("command", ["migrate", "receive"])
def test_help_shows_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"ostler {command} " in capsys.readouterr().out
