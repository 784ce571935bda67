"""The Python examples of the documentation, run as they are; they share one guest, for each starts what is the same."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ostler
from ostler.client import vm as module

pytestmark = pytest.mark.usefixtures("needs_an_agent")

DOCUMENT = Path(__file__).parents[2] / "docs" / "python-api.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def guest() -> Iterator[ostler.VM]:
    """Shadows the plugin's: on the software CPU, without a network."""
    with ostler.VM("debian", memory="384M", accel="soft", nets=["none"]) as vm:
        yield vm


@pytest.fixture
def shared(guest: ostler.VM, monkeypatch: pytest.MonkeyPatch) -> ostler.VM:
    """Let `ostler.VM(…)` judge its arguments and then be the guest that is there."""

    def start(self: ostler.VM) -> ostler.VM:
        self._guest = guest._guest
        return self

    monkeypatch.setattr(module.VM, "start", start)
    monkeypatch.setattr(module.VM, "close", lambda _: None)
    return guest


def test_examples_run_as_documented(shared: ostler.VM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("for the example that copies it\n")
    names: dict[str, Any] = {}
    for example in EXAMPLES:
        exec(compile(example, str(DOCUMENT), "exec"), names)
    found: Callable[[ostler.VM], None] = names["test_kernel"]
    found(shared)
    assert len(EXAMPLES) >= 7
