"""The exception tree: what the command line relies on."""

from __future__ import annotations

import inspect

import pytest

from ostler import errors

PUBLIC = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if cls.__module__ == errors.__name__]


@pytest.mark.parametrize("cls", PUBLIC)
def test_every_error_is_an_ostler_error_with_a_failing_exit_status(cls: type[errors.OstlerError]) -> None:
    assert issubclass(cls, errors.OstlerError)
    # 124 to 127 are what timeout(1) and shells end with for a command of the guest; 125 a lost agent.
    assert cls.exit_status in {1, 2, 3, 124, 125, 126, 127}


def test_guest_crash_keeps_its_report_apart_from_its_one_line() -> None:
    crash = errors.TripleFault("vCPU 0: triple fault at RIP 0x1000", details="RAX 0\nRBX 0")

    assert str(crash) == "vCPU 0: triple fault at RIP 0x1000"
    assert crash.details.splitlines() == ["RAX 0", "RBX 0"]
    assert crash.exit_status == 3
