"""A stock kernel's own virtio drivers find disk and entropy device, and write a file system that the host can read."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ostler.images import initrd, kernels
from tests.guest.devices_guest import module_files
from tests.guest.harness import Boot

INIT = b"""#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /mnt
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs devtmpfs /dev
for module in $(cat /modules/order); do insmod /modules/$module || echo "FAILED $module"; done
echo "serial: $(cat /sys/block/vda/serial)"
mount -t ext4 /dev/vda /mnt && cat /mnt/hello
dd if=/dev/zero of=/mnt/zeroes bs=1M count=8 conv=fsync 2>/dev/null
echo "zeroes: $(md5sum </mnt/zeroes)"
echo from the guest >/mnt/answer
umount /mnt
mount -t ext4 /dev/vdc /mnt && echo "third: $(cat /mnt/hello)" && echo from the guest >/mnt/answer && umount /mnt
start=$(cut -d' ' -f1 /proc/uptime)
dd if=/dev/vdd of=/dev/null bs=64k count=64 2>/dev/null
echo "slow: $start $(cut -d' ' -f1 /proc/uptime)"
echo x >/dev/vdb 2>/dev/null || echo "vdb: read-only"
echo "entropy: $(head -c 32 /dev/hwrng | wc -c)"
grep -c 'PCI-MSI.*virtio' /proc/interrupts
poweroff -f
"""


@pytest.mark.skipif(
    not all(map(shutil.which, ("mke2fs", "qemu-img", "qemu-storage-daemon"))),
    reason="needs mke2fs, qemu-img, qemu-storage-daemon",
)
def test_stock_drivers_use_disk_and_entropy_device(boot: Boot, tmp_path: Path) -> None:
    kernel = kernels.fetch("debian-12-cloud")
    loaded = module_files(kernel, "virtio_pci", "virtio_blk", "virtio_rng")
    ramdisk = initrd.build({"init": INIT, "bin/busybox": initrd.busybox_program().read_bytes(), **loaded})
    tree, disk, other = tmp_path / "tree", tmp_path / "disk.img", tmp_path / "other.img"
    tree.mkdir()
    (tree / "hello").write_text("hello from the host\n")
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, disk, "64M"], check=True)
    other.write_bytes(bytes(1 << 20))
    slow = tmp_path / "slow.img"
    slow.write_bytes(bytes(4 << 20))
    third = tmp_path / "third.qcow2"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk, third], check=True)

    run = boot(
        "--kernel", str(kernel.image), "--initrd", str(ramdisk), "--append", "console=ttyS0 loglevel=8",
        "--disk", f"{disk},serial=first", "--disk", f"{other},ro", "--disk", str(third),
        "--disk", f"{slow},ro,rate=4M",
    )  # fmt: skip

    assert run.status == 0, run.log + run.console[-3000:]
    assert run.complaints == []
    for expected in ("serial: first", "hello from the host", "vdb: read-only", "entropy: 32", "third: hello"):
        assert expected in run.console, run.console[-3000:]
    assert "zeroes: 96995b58d4cbf6aaa9041b4f00c7f6ae" in run.console
    assert "FAILED" not in run.console
    # Four MiB at four a second; a tenth of a second's worth passes at once, and what is asked last may pass on debt.
    began, ended = map(float, re.findall(r"slow: ([\d.]+) ([\d.]+)", run.console)[0])
    assert ended - began > 0.6
    assert "Fatal: No config space access function" not in run.console
    answer = subprocess.run(["debugfs", "-R", "cat answer", disk], capture_output=True, check=True)
    assert answer.stdout == b"from the guest\n"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", third, tmp_path / "third.img"], check=True)
    third_answer = subprocess.run(
        ["debugfs", "-R", "cat answer", tmp_path / "third.img"], capture_output=True, check=True
    )
    assert third_answer.stdout == b"from the guest\n"
    assert subprocess.run(["e2fsck", "-fn", disk], capture_output=True, check=False).returncode == 0
