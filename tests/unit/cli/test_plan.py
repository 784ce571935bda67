"""`ostler plan`: docs/planning.md's example as documented, and its errors."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from ostler.cli import main

DOCUMENT = (Path(__file__).parents[3] / "docs" / "planning.md").read_text()
EXAMPLE = re.search(r"^```toml\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
STEPS = re.search(r"-->\n```\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
PNG = b"\x89PNG"


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    assert EXAMPLE is not None
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OSTLER_STATE", str(tmp_path / "state"))
    Path("estate.toml").write_text(EXAMPLE[1])
    return "estate.toml"


@pytest.mark.usefixtures("needs_solver")
def test_plan_documented_example_moves_what_the_document_says(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert STEPS is not None
    assert f"ostler plan {example} --picture plan.png" in DOCUMENT

    assert run(example, "--picture", "plan.png", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert run(example) == 0
    shown = " ".join(capsys.readouterr().out.split())

    said = [line.split() for line in STEPS[1].splitlines()]
    assert sorted([each["guest"], each["from"], "→", each["to"]] for each in found["steps"]) == sorted(said)
    assert (found["hosts_before"], found["hosts_after"]) == (3, 2)
    assert found["search"]["goal"]["optimal"]
    assert Path("plan.png").read_bytes().startswith(PNG)
    assert "3 hosts on → 2" in shown
    assert "cedar (off)" in shown
    assert "PUE 1.4; 0.28 EUR/kWh" in shown


@pytest.mark.usefixtures("needs_solver")
def test_plan_svg_of_a_drained_host_is_written(example: str) -> None:
    assert run(example, "--drain", "alder", "--power", "--picture", "plan.svg") == 0

    assert "<svg" in Path("plan.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["none.toml"], "none.toml: No such file"),
        (["estate.toml", "--time-limit", "0"], "--time-limit 0: expected more than 0"),
        (["estate.toml", "--picture", "plan.bmp"], "expected a name that ends in .png"),
        (["estate.toml", "--drain", "oak"], "host 'oak' to drain"),
        ([], "no samples of this host's guests yet"),
        (["--export"], "no samples of this host's guests yet"),
    ],
)
@pytest.mark.usefixtures("example")
def test_plan_bad_request_is_one_line_and_status_2(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2

    said = capsys.readouterr().err
    assert expected in said
    assert said.count("\n") == 1


def test_plan_without_its_libraries_says_what_to_install(
    example: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("ortools", "ortools.sat", "ortools.sat.python"):
        monkeypatch.setitem(sys.modules, name, None)

    assert run(example) == 2

    assert "pip install 'ostler[plan]'" in capsys.readouterr().err


@pytest.fixture
def needs_solver() -> None:
    pytest.importorskip("ortools", reason="plans want OR-tools")
    pytest.importorskip("matplotlib", reason="pictures want matplotlib")
