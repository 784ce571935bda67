"""Fixtures of the tests that boot guests."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from ostler.accel.soft import load_engine
from ostler.errors import AccelUnavailable
from tests.guest.harness import OSTLER, Boot, Run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here boots a guest, and a guest needs the software CPU."""
    try:
        load_engine()
        built = True
    except AccelUnavailable:
        built = False
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.guest)
            item.add_marker(pytest.mark.timeout(300))
            if not built:
                item.add_marker(pytest.mark.skip(reason="the software CPU is not built (no new enough cargo)"))


@pytest.fixture
def boot() -> Boot:
    """`boot(arguments...)` runs a guest on the software CPU to its end, without a terminal."""

    def run(*arguments: str, stdin: int = subprocess.DEVNULL) -> Run:
        done = subprocess.run(
            [*OSTLER, "run", "--accel", "soft", *arguments],
            stdin=stdin, capture_output=True, check=False, env={**os.environ, "COLUMNS": "200"},
        )  # fmt: skip
        return Run(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))

    return run
