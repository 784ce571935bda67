"""Unmodified Debian kernels boot, find nothing wrong with the machine, and power off."""

from __future__ import annotations

import pytest

from ostler.images import initrd, kernels
from tests.guest.harness import Boot

REPORT = "console=ttyS0 loglevel=8 ostler.report"


@pytest.mark.parametrize("cpus", [1, 2])
@pytest.mark.parametrize("name", ["debian-12-cloud", "debian-12", "debian-13-cloud"])
def test_stock_kernel_reaches_init_and_powers_off(boot: Boot, name: str, cpus: int) -> None:
    kernel = kernels.fetch(name)
    image = initrd.busybox(kernel)

    run = boot(
        "--kernel", str(kernel.image), "--initrd", str(image), "--append", REPORT,
        "--memory", "512M", "--cpus", str(cpus),
    )  # fmt: skip

    assert run.status == 0, run.log + run.console[-3000:]
    assert f"Linux version {kernel.release} " in run.console
    assert f"cpu: {cpus} x " in run.console
    assert "uptime: " in run.console
    assert run.complaints == []


def test_run_without_arguments_boots_the_default_guest(boot: Boot) -> None:
    run = boot()

    assert run.status == 0, run.log
    assert "Linux version 6.1." in run.console
    assert "x86_64 GNU/Linux" in run.console
    assert "memory: " in run.console
