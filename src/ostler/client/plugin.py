"""Ostler's plugin for pytest: guests as fixtures.

    def test_kernel(guest):
        assert guest.run(["uname", "-s"]).text == "Linux\\n"

`guest` is one guest for a whole session: tests share it and are expected to clean up after themselves. `fresh_guest` is
one for a single test. `guest_factory` makes guests as a test wants them; they end with it. The image and options come
from the command line (`--guest-image`, `--guest-memory`) or from the configuration (`guest_image`, `guest_memory`), or
from a fixture `guest_options` of your own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ostler.client.vm import VM

DEFAULT_IMAGE = "debian"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Say which guest the fixtures start."""
    group = parser.getgroup("ostler", "guests of Ostler")
    for name, text in (("image", "image of the guest fixtures"), ("memory", "memory of the guest fixtures")):
        group.addoption(f"--guest-{name}", default=None, help=text)
        parser.addini(f"guest_{name}", help=text, default="")


@pytest.fixture(scope="session")
def guest_options(pytestconfig: pytest.Config) -> dict[str, Any]:
    """The arguments of `ostler.VM` for `guest` and `fresh_guest`; override it to have others."""
    options: dict[str, Any] = {"image": DEFAULT_IMAGE}
    for name in ("image", "memory"):
        if value := pytestconfig.getoption(f"guest_{name}") or pytestconfig.getini(f"guest_{name}"):
            options[name] = value
    return options


@pytest.fixture(scope="session")
def guest(guest_options: dict[str, Any]) -> Iterator[VM]:
    """One running guest for all tests of the session (of each worker, with pytest-xdist)."""
    import ostler

    with ostler.VM(**guest_options) as vm:
        yield vm


@pytest.fixture
def fresh_guest(guest_options: dict[str, Any]) -> Iterator[VM]:
    """A guest of the test's own."""
    import ostler

    with ostler.VM(**guest_options) as vm:
        yield vm


@pytest.fixture
def guest_factory() -> Iterator[Callable[..., VM]]:
    """`guest_factory("debian", cpus=2, …)` starts a guest that ends with the test."""
    import ostler

    with contextlib.ExitStack() as running:

        def start(image: str = DEFAULT_IMAGE, **options: Any) -> VM:
            return running.enter_context(ostler.VM(image, **options))

        yield start
