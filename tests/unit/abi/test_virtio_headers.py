"""Numbers and layouts of `ostler.abi.virtio` against the kernel's own headers: a C program prints what differs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from ostler.abi.virtio import balloon, blk, common, pci, ring

HEADERS = ("virtio_ids", "virtio_config", "virtio_ring", "virtio_pci", "virtio_blk", "virtio_balloon")
# Ours by name, theirs where they spell it otherwise.
RENAMED = {
    "MODERN_DEVICE_BASE": None,
    "VENDOR_REDHAT_QUMRANET": None,
    "COMMON_SIZE": "(int)sizeof(struct virtio_pci_common_cfg)",
    "CAP_VENDOR": None,
    "VIRTIO_PCI_ISR_QUEUE": None,
    "SECTOR_BYTES": None,
    "WRITEBACK_OFFSET": "(int)offsetof(struct virtio_blk_config, wce)",
    "ACTUAL_OFFSET": "(int)offsetof(struct virtio_balloon_config, actual)",
    "POISON_OFFSET": "(int)offsetof(struct virtio_balloon_config, poison_val)",
    "MAX_QUEUE_SIZE": None,
    "VIRTIO_F_NOTIFY_ON_EMPTY": None,
    "VIRTIO_F_ANY_LAYOUT": None,
}
SIZES = [
    (ring.DESCRIPTOR.size, "sizeof(struct vring_desc)"),
    (ring.USED_ELEMENT.size, "sizeof(struct vring_used_elem)"),
    (blk.REQUEST.size, "sizeof(struct virtio_blk_outhdr)"),
    (blk.CONFIG.size, "offsetof(struct virtio_blk_config, unused1) + 3"),
    (balloon.CONFIG.size, "sizeof(struct virtio_balloon_config)"),
    (balloon.STATISTIC.size, "sizeof(struct virtio_balloon_stat)"),
]
STATUS = {"ACKNOWLEDGE": 1, "DRIVER": 2, "DRIVER_OK": 4, "FEATURES_OK": 8, "NEEDS_RESET": 0x40, "FAILED": 0x80}


def theirs(name: str) -> str | None:
    """The C expression for one of our names; None where the headers have none."""
    if name in RENAMED:
        return RENAMED[name]
    if name.startswith("COMMON_"):
        return "VIRTIO_PCI_" + name
    return name


def ours(module: ModuleType) -> dict[str, int]:
    return {name: value for name, value in vars(module).items() if name.isupper() and isinstance(value, int)}


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs a C compiler")
def test_numbers_and_sizes_are_the_kernels(tmp_path: Path) -> None:
    wanted = {
        expression: value
        for module in (ring, pci, blk, balloon, common)
        for name, value in ours(module).items()
        if (expression := theirs(name)) is not None
    }
    wanted |= {f"VIRTIO_ID_{each.name}": each.value for each in common.DeviceId}
    wanted |= {f"VIRTIO_CONFIG_S_{name}": value for name, value in STATUS.items()}
    wanted["VIRTIO_ID_BALLOON"] = 5
    assert len(wanted) > 60
    lines = [f"#include <linux/{name}.h>" for name in HEADERS]
    checks = [f'  if ((long)({each}) != {value}L) puts("{each}");' for each, value in wanted.items()]
    checks += [f'  if ((long)({each}) != {size}L) puts("{each}");' for size, each in SIZES]
    source = ["#include <stddef.h>", "#include <stdint.h>", "#include <stdio.h>", *lines, "int main(void) {"]
    (tmp_path / "check.c").write_text("\n".join([*source, *checks, "}"]))
    built = subprocess.run(
        ["gcc", "-w", "-o", "check", "check.c"], cwd=tmp_path, capture_output=True, check=False, text=True
    )
    if "No such file" in built.stderr:
        pytest.skip("needs the kernel's headers")
    assert built.returncode == 0, built.stderr
    wrong = subprocess.run([tmp_path / "check"], capture_output=True, check=True, text=True).stdout.split()
    assert wrong == []


def test_status_bits_are_the_specifications() -> None:
    assert {each.name: int(each) for each in common.Status} == STATUS
