"""`ostler.VM` before and around a guest; with one it is tests/guest's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ostler
from ostler.errors import BadRequest


def test_import_of_ostler_brings_nothing_heavy() -> None:
    script = (
        "import ostler, sys; print([each for each in ('pydantic', 'ostler.client', 'asyncio') if each in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_attributes_that_are_there_are_listed_and_others_are_not() -> None:
    assert {"VM", "AsyncVM", "__version__"} <= set(dir(ostler))
    with pytest.raises(AttributeError, match="no attribute 'vm'"):
        ostler.vm  # noqa: B018


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "image: missing"),
        ({"image": "debian", "memory": "1K"}, "memory '1K'"),
        ({"image": "debian", "colour": "red"}, "colour 'red': not known here"),
        ({"file": "/no/such.toml"}, "No such file"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        ostler.VM(**arguments)


def test_file_and_options_describe_one_guest(tmp_path: Path) -> None:
    path = tmp_path / "guest.toml"
    path.write_text('image = "debian"\nmemory = "1G"\nvolumes = ["data:/data"]')
    request = ostler.VM(file=path, memory="2G").request
    assert (request.image, request.memory, request.volumes[0].host) == ("debian", 2 << 30, tmp_path / "data")


def test_guest_that_was_not_started_says_so() -> None:
    vm = ostler.VM("debian", name="web")
    assert vm.name == "web"
    with pytest.raises(BadRequest, match="guest 'web': is not running"):
        vm.run(["true"])
    vm.stop()
    vm.close()
