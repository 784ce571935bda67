"""How guests end, and what the shell is told about it."""

from __future__ import annotations

import pytest

from tests.guest.harness import Boot


def test_panic_is_status_3_with_its_reason_in_one_line(boot: Boot) -> None:
    run = boot("--append", "console=ttyS0 quiet ostler.panic")

    assert run.status == 3, run.log
    last = run.log.splitlines()[-1]
    assert last.startswith("ostler: ")
    assert "panic" in last
    assert "Traceback" not in run.log


def test_panic_with_debug_shows_registers_and_the_instruction(boot: Boot) -> None:
    run = boot("--debug", "--append", "console=ttyS0 quiet ostler.panic")

    assert run.status == 3, run.log
    assert "RIP" in run.log.upper()
    assert "RAX" in run.log.upper()


@pytest.mark.parametrize("method", ["t", "k"])
def test_reset_with_panic_timeout_is_not_mistaken_for_power_off(boot: Boot, method: str) -> None:
    run = boot("--append", f"console=ttyS0 quiet ostler.panic panic=-1 reboot={method}")

    assert run.status == 3, run.log
