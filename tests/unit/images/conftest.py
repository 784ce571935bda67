"""A cache of the test's own, and a kernel that comes from no archive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ostler.images import kernels
from tests.unit.images.test_kernels import FakeApt, make_package


@pytest.fixture
def fake_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `kernels.fetch` find a tiny package, whichever kernel is asked for."""

    class AnyApt(FakeApt):
        package: Path

        def __init__(self, release: str) -> None:
            del release

        def show(self, package: str, progress: Any) -> dict[str, str]:
            del package, progress
            return {"Depends": "linux-image-6.0-x (= 6.0), other"}

    (tmp_path / "package").mkdir()
    AnyApt.package = make_package(tmp_path / "package")
    monkeypatch.setenv("OSTLER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kernels, "Apt", AnyApt)
