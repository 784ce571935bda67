"""The fixtures for pytest, in a session of their own with a guest that is none."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]

CONFTEST = """
import ostler

class FakeVM:
    made = []

    def __init__(self, image, **options):
        self.image, self.options = image, options

    def __enter__(self):
        FakeVM.made.append(self)
        return self

    def __exit__(self, *_):
        FakeVM.made.remove(self)

ostler.VM = FakeVM
"""
TESTS = """
import ostler

def test_one(guest):
    assert guest.image == "bookworm"
    assert guest.options == {"memory": "1G"}
    assert ostler.VM.made == [guest]

def test_two(guest, fresh_guest, guest_factory):
    assert ostler.VM.made == [guest, fresh_guest]
    third = guest_factory("other", cpus=2)
    assert (third.image, third.options) == ("other", {"cpus": 2})

def test_three(guest):
    assert ostler.VM.made == [guest]
"""


def test_fixtures_give_guests_that_end(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(TESTS)
    pytester.makeini("[pytest]\nguest_image = bookworm\n")
    arguments = ["-p", "no:ostler", "-p", "ostler.client.plugin", "-p", "no:cacheprovider", "--guest-memory", "1G"]
    result = pytester.runpytest_subprocess(*arguments)
    result.assert_outcomes(passed=3)
