"""Fixtures of the tests that boot guests."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from ostler import accel
from ostler.accel.soft import load_engine
from ostler.errors import AccelUnavailable, BadRequest
from ostler.images import initrd
from tests.guest.harness import OSTLER, Boot, Run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here boots a guest: on the software CPU, but for what is marked `kvm`."""
    missing = {kvm: why_missing(kvm=kvm) for kvm in (False, True)}
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.guest)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(300))
            if reason := missing[item.get_closest_marker("kvm") is not None]:
                item.add_marker(pytest.mark.skip(reason=reason))


def why_missing(*, kvm: bool) -> str | None:
    """Say why there is no such accelerator, or None where there is."""
    try:
        # An engine that is built and does not work is a failure, not a reason to skip.
        accel.open("kvm").close() if kvm else load_engine()
    except AccelUnavailable as error:
        return str(error)
    return None


@pytest.fixture(scope="session")
def needs_an_agent() -> None:
    """Without a Rust compiler there is none, and so no guests of images."""
    try:
        initrd.agent_program()
    except BadRequest as error:
        pytest.skip(str(error))


@pytest.fixture
def boot() -> Boot:
    """`boot(arguments...)` runs a guest to its end, without a terminal; on the software CPU if nothing else is said."""

    def run(*arguments: str, stdin: int = subprocess.DEVNULL) -> Run:
        done = subprocess.run(
            [*OSTLER, "run", "--accel", "soft", *arguments],
            stdin=stdin, capture_output=True, check=False, env={**os.environ, "COLUMNS": "200"},
        )  # fmt: skip
        return Run(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))

    return run
